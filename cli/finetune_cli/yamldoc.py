"""YAML with positions: what the file says, and the line and column where it says it.

Scalars are read as the Kubernetes clients read them (`2e-4` is a number, a date is a string, `3.0` is the integer 3):
a manifest means the same here and on the server. Duplicate keys are found, not silently dropped.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from finetune_api.model import Path

MAX_NODES = 100_000
"""Aliases are expanded; a manifest that grows beyond this is an attack or an accident."""


class Position(NamedTuple):
    """1-based, as editors count."""

    line: int
    column: int


class YamlError(Exception):
    """The text is not YAML that a Kubernetes client would take: one sentence, and where."""

    def __init__(self, message: str, position: Position) -> None:
        super().__init__(message)
        self.position = position


class Duplicate(NamedTuple):
    path: Path
    position: Position
    first: Position


@dataclass(frozen=True)
class Document:
    """One document of a file. `keys` and `values` map paths to where the key and its value start."""

    data: Any
    start: Position
    keys: Mapping[Path, Position] = field(default_factory=dict)
    values: Mapping[Path, Position] = field(default_factory=dict)
    duplicates: tuple[Duplicate, ...] = ()

    def locate(self, path: Path, *, key: bool = False) -> Position:
        """Where `path` stands (its key with `key`), else its nearest ancestor that is in the file."""
        while path:
            at, value = self.keys.get(path), self.values.get(path)
            # A block that begins below its key is better found at the key.
            if at and (key or not value or value.line > at.line):
                return at
            if value:
                return value
            path, key = path[:-1], True
        return self.start


def load(text: str) -> list[Document]:
    """The documents of a file; empty ones are left out. Raises YamlError."""
    documents = []
    try:
        loader = _Loader(text)
        while loader.check_node():
            node = loader.get_node()
            if node is None:
                continue
            reader = _Reader(loader)
            data = reader.read(node, ())
            if data is not None:
                documents.append(Document(data, _position(node), reader.keys, reader.values, tuple(reader.duplicates)))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = Position(mark.line + 1, mark.column + 1) if mark else Position(1, 1)
        raise YamlError(f"is not valid YAML: {error.problem or error.context}", where) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(f"is not valid YAML: {error.reason}", Position(line, 1)) from error
    return documents


class _Loader(yaml.SafeLoader):
    """SafeLoader with the implicit types of the Kubernetes clients' parser."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


_IMPLICIT = (
    ("bool", r"^(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$", "yYnNtTfFoO"),
    ("int", r"^[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$", "-+0123456789"),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    ("merge", r"^<<$", "<"),
)
for _name, _pattern, _first in _IMPLICIT:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(_pattern), ["" if c == "\0" else c for c in _first]
    )
_SCALARS = {f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "null", "str")}
_MERGE = "tag:yaml.org,2002:merge"


class _Reader:
    """Turns the nodes of one document into plain values and remembers where each stood."""

    def __init__(self, loader: _Loader) -> None:
        self._loader = loader
        self._nodes = 0
        self.keys: dict[Path, Position] = {}
        self.values: dict[Path, Position] = {}
        self.duplicates: list[Duplicate] = []

    def read(self, node: yaml.Node, path: Path) -> Any:
        self._nodes += 1
        if self._nodes > MAX_NODES or len(path) > 100:
            raise YamlError("is too large or nests too deeply once its aliases are expanded", _position(node))
        self.values[path] = _position(node)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._item(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._scalar(node)

    def _item(self, node: yaml.Node, path: Path) -> Any:
        self.keys[path] = _position(node)
        return self.read(node, path)

    def _scalar(self, node: yaml.Node) -> Any:
        if node.tag not in _SCALARS:
            raise YamlError(f"has the tag {node.tag!r}, which a manifest cannot carry", _position(node))
        try:
            value = self._loader.construct_object(node)
        except ValueError as error:
            raise YamlError(f"has the tag {node.tag!r} on {node.value!r}", _position(node)) from error
        if isinstance(value, float):
            if not math.isfinite(value):
                raise YamlError(f"found {node.value}; numbers must be finite", _position(node))
            return int(value) if value.is_integer() else value
        return value

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        own: dict[str, Position] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                for merged in _merged(value_node):
                    result = self._mapping(merged, path) | result
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise YamlError("has a key that is not a plain word", _position(key_node))
            key, position = str(key_node.value), _position(key_node)
            if key in own:
                self.duplicates.append(Duplicate((*path, key), position, own[key]))
            own.setdefault(key, position)
            self.keys[*path, key] = position
            result[key] = self.read(value_node, (*path, key))
        return result


def _merged(node: yaml.Node) -> Iterator[yaml.MappingNode]:
    """The mappings that `<<` names, the strongest first."""
    for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        if not isinstance(item, yaml.MappingNode):
            raise YamlError("has a << that names no mapping", _position(item))
        yield item


def _position(node: yaml.Node) -> Position:
    return Position(node.start_mark.line + 1, node.start_mark.column + 1)
