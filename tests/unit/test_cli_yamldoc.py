"""YAML with positions: values as Kubernetes clients read them, and where each stands."""

from typing import Any

import pytest

from finetune_cli import yamldoc
from finetune_cli.yamldoc import Position, YamlError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("2.0e-4", 2e-4),
        ("3.0", 3),
        ("-7", -7),
        ("0x10", 16),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("yes", True),
        ("off", False),
        ("~", None),
        ('"2"', "2"),
        ("!!str 2", "2"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
        ("{1: a, true: b}", {"1": "a", "true": "b"}),
    ],
)
def test_scalars_mean_what_they_mean_on_the_server(text: str, value: Any) -> None:
    (document,) = yamldoc.load(f"x: {text}\n")
    assert document.data == {"x": value}
    assert type(document.data["x"]) is type(value)


def test_documents_are_read_apart_and_empty_ones_left_out() -> None:
    documents = yamldoc.load("a: 1\n---\n---\n# nothing\n---\nb: 2\n")
    assert [(d.data, d.start.line) for d in documents] == [({"a": 1}, 1), ({"b": 2}, 6)]


TEXT = """\
kind: X
spec:
  list:
    - name: one
    - {name: two, size: -1}
  text: >
    long
"""


@pytest.mark.parametrize(
    ("path", "key", "line", "column"),
    [
        ((), False, 1, 1),
        (("kind",), False, 1, 7),
        (("kind",), True, 1, 1),
        (("spec", "list", 1, "size"), False, 5, 25),
        (("spec", "list", 1, "size"), True, 5, 19),
        (("spec", "list", 0), False, 4, 7),
        (("spec", "list", 0, "absent"), False, 4, 7),
        (("spec", "absent", "deeper"), False, 2, 1),
        (("absent",), False, 1, 1),
    ],
)
def test_paths_are_found_and_absent_ones_point_to_their_parent(
    path: tuple[str | int, ...], key: bool, line: int, column: int
) -> None:
    (document,) = yamldoc.load(TEXT)
    assert document.locate(path, key=key) == Position(line, column)


def test_duplicate_keys_are_found_at_every_depth() -> None:
    (document,) = yamldoc.load("a: 1\nb:\n  c: 1\n  c: 2\na: 2\n")
    assert [(d.path, d.position.line, d.first.line) for d in document.duplicates] == [
        (("b", "c"), 4, 3),
        (("a",), 5, 1),
    ]


def test_anchors_and_merge_keys_are_expanded_and_own_keys_win() -> None:
    (document,) = yamldoc.load("base: &b {x: 1, y: 2}\nmore: &m {y: 3}\nall:\n  <<: [*b, *m]\n  x: 9\n")
    assert document.data["all"] == {"x": 9, "y": 2}
    assert document.duplicates == ()


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("a: [1\nb: 2", "is not valid YAML", 2),
        ("a: 1\n\tb: 2", "is not valid YAML", 2),
        ("a: 1\nb: \x00", "is not valid YAML", 2),
        ("a: 1\nb: !!python/object:os.system x", "has the tag", 2),
        ("a: !!int x", "has the tag", 1),
        ("a: .inf", "numbers must be finite", 1),
        ("? [1, 2]\n: x", "has a key that is not a plain word", 1),
        ("a: &a\n  - *a", "nests too deeply", 1),
        (LAUGHS, "is too large", 1),
        ("a: {<<: 1}", "names no mapping", 1),
    ],
)
def test_what_is_no_manifest_is_refused_with_the_line(text: str, message: str, line: int) -> None:
    with pytest.raises(YamlError, match=message) as caught:
        yamldoc.load(text)
    assert caught.value.position.line == line
