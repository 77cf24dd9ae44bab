"""Between checkpoint files and parameter leaves, one tensor at a time."""

import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.hub.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from jaxmodels.hub.entries import Entry, Source

LeafPath = tuple[str | int, ...]
PLAIN = ("float64", "float32", "float16", "bfloat16")
# Buffers that older exporters stored although the config determines them.
KNOWN_BUFFERS = (
    r"\.rotary_emb\.inv_freq$",
    r"\.attn\.(masked_)?bias$",
    r"position_ids$",
    r"rotary_embeddings\.inv_freq$",
)


def load_arrays(
    checkpoint: Checkpoint,
    entries: Iterable[Entry],
    dtype: Any = None,
    put: Callable[[LeafPath, np.ndarray], Any] | None = None,
    ignore: tuple[str, ...] = (),
) -> dict[LeafPath, Any]:
    """Fill every entry's leaf from the checkpoint: path -> array of `entry.shape`.

    dtype: target type of the leaves that have none of their own; None keeps the type of the entry's first source.
    put(path, host array) -> device array places a leaf (default jax.device_put); with a sharding it may be a closure.
    ignore: regular expressions of tensor names that may be left over without a warning.

    Each leaf is allocated once, filled tensor by tensor, placed and freed: host memory peaks near one leaf above
    the model. Raises UserError for missing, misshapen and non-finite tensors.
    """
    import jax

    put = put or (lambda path, leaf: jax.device_put(leaf))
    entries = list(entries)
    _check(checkpoint, entries, ignore)
    leaves = {}
    for entry in entries:
        wanted = dtype if entry.dtype is None else entry.dtype
        target = np.dtype(_numpy_dtype(wanted) if wanted is not None else checkpoint.dtype(entry.sources[0].name))
        leaf = np.empty(entry.shape, target)
        parts = leaf.reshape(len(entry.sources), *entry.part_shape)
        for index, source in enumerate(entry.sources):
            _fill(parts[index, ...], source, checkpoint)
        leaves[entry.path] = put(entry.path, leaf)
        jax.block_until_ready(leaves[entry.path])  # else the next leaf is allocated while this one is still copied
        del leaf, parts
    return leaves


def save_arrays(
    folder: str | Path,
    entries: Iterable[Entry],
    leaves: Mapping[LeafPath, Any],
    config_dict: dict[str, Any],
    shard_bytes: int = 5_000_000_000,
    extra_files: Mapping[str, str | bytes | Path] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a folder that `transformers` reads: safetensors under Hugging Face names, config.json, extra files.

    leaves: path -> array, as `load_arrays` returns them; types are kept. extra_files: file name -> text, bytes or a
    Path to copy. Everything is written beside the target and renamed at the end, so a reader sees all or nothing.
    """
    folder = Path(os.path.abspath(folder))
    _check_target(folder, overwrite)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.saving-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cannot write into {folder.parent} ({error.strerror}); choose another folder") from None
    try:
        work.chmod(0o777 & ~_umask())
        _write_shards(work, list(entries), leaves, shard_bytes)
        (work / "config.json").write_text(json.dumps(config_dict, indent=2, ensure_ascii=False) + "\n", "utf-8")
        for name, content in (extra_files or {}).items():
            if isinstance(content, Path):
                shutil.copyfile(content, work / name)
            else:
                (work / name).write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        _move_into_place(work, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error.strerror}); free space or choose another folder") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _check(checkpoint: Checkpoint, entries: list[Entry], ignore: tuple[str, ...]) -> None:
    """Names and shapes, before anything is allocated."""
    present = set(checkpoint.names())
    sources = [source for entry in entries for source in entry.sources]
    missing = [source.name for source in sources if source.name not in present]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{checkpoint.path} lacks tensor {missing[0]}{others}; its config.json and weights do not belong together"
        )
    for source in sources:
        shape = tuple(checkpoint.shape(source.name))
        if shape != tuple(source.hf_shape):
            raise UserError(
                f"{checkpoint.path}: tensor {source.name} has shape {shape}, the config asks for "
                f"{tuple(source.hf_shape)}; use the config.json that belongs to these weights"
            )
        dtype = checkpoint.dtype(source.name)
        if dtype.name not in PLAIN:  # integers and float8 mean nothing without their scales
            raise UserError(f"{checkpoint.path}: tensor {source.name} is stored as {dtype.name}; quantised safetensors "
                            f"are not read: fetch the {', '.join(PLAIN)} weights, or a GGUF file")
    patterns = [*KNOWN_BUFFERS, *ignore]
    if checkpoint.config.get("tie_word_embeddings"):
        patterns.append(r"^lm_head\.weight$")
    extra = sorted(present - {source.name for source in sources})
    extra = [name for name in extra if not any(re.search(pattern, name) for pattern in patterns)]
    if extra:
        shown = ", ".join(extra[:3]) + (", ..." if len(extra) > 3 else "")
        warnings.warn(f"{checkpoint.path}: {len(extra)} tensors are not used by this model: {shown}", stacklevel=3)


def _fill(part: np.ndarray, source: Source, checkpoint: Checkpoint) -> None:
    value = checkpoint.read(source.name)
    if not np.isfinite(value).all():
        bad = int(value.size - np.count_nonzero(np.isfinite(value)))
        raise UserError(
            f"{checkpoint.path}: tensor {source.name} holds {bad} NaN or infinite weights of {value.size}; "
            "fetch or train the weights again"
        )
    with np.errstate(over="ignore"):
        part[...] = source.to_ours(value)
    if part.dtype != value.dtype and not np.isfinite(part).all():
        raise UserError(
            f"{checkpoint.path}: tensor {source.name} reaches {float(np.abs(value).max()):.3g}, too large for "
            f"{part.dtype}; load with dtype bfloat16 or float32"
        )


def _numpy_dtype(dtype: Any) -> np.dtype:
    """Accepts "bfloat16" and jax.numpy types, which numpy alone does not know."""
    if isinstance(dtype, str) and hasattr(ml_dtypes, dtype):
        return np.dtype(getattr(ml_dtypes, dtype))
    try:
        return np.dtype(dtype)
    except TypeError:
        raise UserError(f"unknown dtype {dtype!r}; use float32, bfloat16 or float16") from None


def _check_target(folder: Path, overwrite: bool) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise UserError(f"{folder} is not empty; choose another folder or allow overwriting")
        # Run folders have a config.json too.
        if not (folder / "config.json").exists() or not any(folder.glob("*.safetensors")):
            raise UserError(f"{folder} holds something that is not a model (no config.json with safetensors beside "
                            "it); choose another folder")
    elif folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose a folder")


def _write_shards(work: Path, entries: list[Entry], leaves: Mapping[LeafPath, Any], limit: int) -> None:
    """Group tensors into files of at most `limit` bytes (a larger tensor gets its own), then write one at a time."""
    shards: list[list[tuple[Entry, int]]] = [[]]
    filled = total = 0
    for entry in entries:
        leaf = leaves[entry.path]
        if tuple(leaf.shape) != entry.shape:
            raise ValueError(f"leaf {entry.path} has shape {tuple(leaf.shape)}, its entry says {entry.shape}")
        size = int(np.prod(entry.part_shape)) * leaf.dtype.itemsize
        for index in range(len(entry.sources)):
            if shards[-1] and filled + size > limit:
                shards.append([])
                filled = 0
            shards[-1].append((entry, index))
            filled, total = filled + size, total + size
    from jaxmodels.hub.safetensors_file import write_file

    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        host = {entry.path: np.asarray(leaves[entry.path]) for entry, _ in shard}
        tensors = {entry.sources[index].name: _to_hf(entry, index, host[entry.path]) for entry, index in shard}
        write_file(work / name, tensors)
        (work / name).chmod(0o666 & ~_umask())  # the safetensors package writes 0600
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (work / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _to_hf(entry: Entry, index: int, leaf: np.ndarray) -> np.ndarray:
    source = entry.sources[index]
    part = leaf.reshape(len(entry.sources), *entry.part_shape)[index, ...]
    value = np.asarray(source.to_hf(part), order="C")
    if value.shape != tuple(source.hf_shape):
        raise ValueError(f"{source.name}: to_hf gives {value.shape}, hf_shape is {source.hf_shape}")
    return value


def _move_into_place(work: Path, folder: Path) -> None:
    """rename(2) replaces an empty folder in one step; a full one is moved aside first and put back on failure."""
    if not (folder.is_dir() and any(folder.iterdir())):
        os.replace(work, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
    os.replace(folder, old)
    try:
        os.replace(work, folder)
    except OSError:
        os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
