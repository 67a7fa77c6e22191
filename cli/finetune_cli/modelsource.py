"""The base model's shape, for `lint --explain`: from a folder, from the object store, or from a few numbers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from finetune_api.failures import FineTuneError
from finetune_api.modelfiles import Tensor, llama_tensors, model_shape, parse_config, parse_header
from finetune_api.shape import ModelShape
from finetune_api.tuning import Tuning
from finetune_cli.errors import CliError, Exit
from finetune_cli.objectstore import Access, Location, Store

HEADER, SMALL = 100 * 2**20, 64 * 2**20
"""Bytes; the limit that the safetensors library has too, and one for the other files."""
SIZES = ("hidden", "layers", "intermediate", "vocab")


class Source(NamedTuple):
    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def shape(self, tuning: Tuning) -> ModelShape:
        """Raises CliError where the tuning names modules that the model has not."""
        try:
            return model_shape(self.config, self.tensors, tuning, self.name)
        except FineTuneError as error:
            raise CliError(str(error), Exit.USAGE) from error


def of(where: str, access: Access) -> Source:
    """`where`: a folder, s3://…/, or `hidden=4096,layers=32,intermediate=14336,vocab=128256[,keyValue=1024]`."""
    if where.startswith("s3://"):
        return _of_store(where, Store(access))
    if "=" in where and not Path(where).exists():
        return _of_numbers(where)
    return _of_folder(Path(where))


def _of_folder(folder: Path) -> Source:
    if not (folder / "config.json").is_file():
        raise CliError(f"{folder} has no config.json; --model takes a model's folder, its URI or its sizes", Exit.USAGE)

    def part(name: str, start: int, length: int) -> bytes:
        with (folder / name).open("rb") as file:
            file.seek(start)
            return file.read(length)

    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    return _read(str(folder), (folder / "config.json").read_bytes(), sizes, part)


def _of_store(uri: str, store: Store) -> Source:
    prefix = Location.parse(uri.rstrip("/") + "/")
    config = store.read(prefix / "config.json", SMALL)
    if config is None:
        raise CliError(f"{prefix} has no config.json; --model takes a model's folder, its URI or its sizes", Exit.USAGE)
    entries = {entry["Key"].removeprefix(prefix.key): int(entry["Size"]) for entry in store.objects(prefix)}
    sizes = {name: size for name, size in entries.items() if name.endswith(".safetensors") and "/" not in name}
    return _read(str(prefix), config, sizes, lambda name, start, length: store.part(prefix / name, start, length))


def _read(name: str, config: bytes, sizes: Mapping[str, int], part: Callable[[str, int, int], bytes]) -> Source:
    """The config and the headers of the weights, never the weights themselves."""
    if not sizes:
        raise CliError(f"{name} has no .safetensors file", Exit.USAGE)
    tensors: dict[str, Tensor] = {}
    try:
        for file, size in sizes.items():
            length = int.from_bytes(part(file, 0, 8), "little") if size >= 8 else 0
            if not 2 <= length <= min(HEADER, size - 8):
                raise CliError(f"{name}: {file} is not a safetensors file", Exit.USAGE)
            tensors |= parse_header(part(file, 8, length), size, file)
        return Source(name, parse_config(config, f"{name}/config.json"), tensors)
    except FineTuneError as error:
        raise CliError(str(error), Exit.USAGE) from error


def _of_numbers(text: str) -> Source:
    try:
        given = {key: int(value) for key, _, value in (entry.partition("=") for entry in text.split(","))}
    except ValueError:
        given = {}
    if not all(given.get(key, 0) > 0 for key in SIZES) or given.keys() - {*SIZES, "keyValue"}:
        wanted = "hidden=4096,layers=32,intermediate=14336,vocab=128256, and keyValue=1024 where heads share keys"
        raise CliError(f"--model: found {text!r}; write {wanted}", Exit.USAGE)
    key_value = given.get("keyValue", given["hidden"])
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": given["hidden"],
        "intermediate_size": given["intermediate"],
        "num_hidden_layers": given["layers"],
        "vocab_size": given["vocab"],
        "num_attention_heads": given["hidden"],
        "num_key_value_heads": key_value,
        "head_dim": 1,
    }
    tensors = llama_tensors(given["hidden"], given["layers"], given["intermediate"], given["vocab"], key_value)
    return Source(text, config, tensors)
