"""One view of every weight file: named tensors in Hugging Face names and orientation, beside a config dict."""

import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxmodels.errors import UserError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
NAME_LIMIT = 1000  # characters


@runtime_checkable
class Checkpoint(Protocol):
    """Weights on disk. Nothing but headers is read until `read`, and `read` touches one tensor."""

    path: Path
    config: dict[str, Any]  # the Hugging Face config.json; synthesised from the metadata of a GGUF file
    metadata: dict[str, Any]

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype:
        """What `read` returns: float32 for a quantised tensor, else the stored type (ml_dtypes for bfloat16)."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The tensor in Hugging Face orientation; may be a read-only view of the mapped file."""
        ...


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model folder, a .safetensors file beside its config.json, or a .gguf file.

    Headers are validated here, against the size of the file, before anything is allocated.
    Raises UserError (one line, with the remedy) for everything that is missing, damaged or a pickle.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise UserError(f"no model at {path}; give a folder with config.json and safetensors, or a .gguf file")
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        from jaxmodels.hub.gguf_file import GgufCheckpoint

        return GgufCheckpoint(path)
    if suffix == ".safetensors":
        return _safetensors(path, read_config(path.parent), {None: path})
    if path.name.endswith(".safetensors.index.json"):
        return _safetensors(path, read_config(path.parent), _shards(path))
    if suffix in PICKLE_SUFFIXES:
        raise _pickle_error(path)
    raise UserError(f"{path}: unknown kind of weight file {suffix or path.name!r}; supported: .safetensors, .gguf")


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json as a dict."""
    file = folder / "config.json"
    if not file.exists():
        raise UserError(f"{folder} has no config.json; put the model's config.json beside its weights")
    return read_json(file)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError when it is unreadable, damaged or not an object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not readable JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} holds a JSON {type(value).__name__}, not an object; fetch the file again")
    return value


def is_name(text: object) -> bool:
    """Whether a file's own name for a tensor or key can stand in a one-line message."""
    return isinstance(text, str) and 0 < len(text) <= NAME_LIMIT and text.isprintable()


def _open_folder(folder: Path) -> Checkpoint:
    if (folder / INDEX_NAME).exists():
        return _safetensors(folder, read_config(folder), _shards(folder / INDEX_NAME))
    if (folder / SINGLE_NAME).exists():
        return _safetensors(folder, read_config(folder), {None: folder / SINGLE_NAME})
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return open_checkpoint(ggufs[0])
    if ggufs:
        raise UserError(f"{folder} holds {len(ggufs)} GGUF files; name one, for example {ggufs[0]}")
    pickles = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICKLE_SUFFIXES)
    if pickles:
        raise _pickle_error(pickles[0])
    raise UserError(f"{folder} holds no weights; it needs {SINGLE_NAME}, {INDEX_NAME} with its shards, or a .gguf file")


def _safetensors(path: Path, config: dict, files: dict) -> Checkpoint:
    from jaxmodels.hub.safetensors_file import SafetensorsCheckpoint

    return SafetensorsCheckpoint(path, config, files)


def _shards(index: Path) -> dict[str, Path]:
    """Tensor name -> shard file, from a model.safetensors.index.json."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map; fetch the file again")
    for tensor, shard in weight_map.items():
        if not is_name(tensor):
            raise UserError(f"{index}: {tensor[:40]!r} is not a tensor name; fetch the file again")
        if not isinstance(shard, str) or shard != Path(shard).name or shard in ("", ".", ".."):
            raise UserError(
                f"{index}: tensor {tensor} points to {str(shard)[:80]!r}; a shard must be a file in the same folder"
            )
    for shard in sorted(set(weight_map.values())):
        if Path(shard).suffix.lower() != ".safetensors":
            raise UserError(f"{index} names the shard {shard}; only .safetensors shards are read")
        if not (index.parent / shard).is_file():
            raise UserError(f"{index} names the shard {shard}, which is missing; download it into {index.parent}")
    return {tensor: index.parent / shard for tensor, shard in weight_map.items()}


def _pickle_error(path: Path) -> UserError:
    return UserError(
        f"{path} is a pickle, and reading a pickle can run any code it carries; convert it where you trust it, "
        "with transformers: model.save_pretrained(folder, safe_serialization=True), and load that folder"
    )
