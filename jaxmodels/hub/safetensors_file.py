"""Safetensors: a header that is checked before it is believed, then tensors read one at a time from a map.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data,
without holes (https://github.com/huggingface/safetensors#format).
"""

import json
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.hub.checkpoint import is_name

HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class TensorInfo:
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file


class SafetensorsFile:
    """One .safetensors file, mapped. Raises UserError unless the whole header agrees with the file's size."""

    def __init__(self, path: Path):
        self.path = path
        self.tensors, self.metadata = read_header(path)
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, name: str) -> np.ndarray:
        """A read-only view of the mapped file; pages are loaded when touched."""
        info = self.tensors[name]
        flat = np.frombuffer(self._map, info.dtype, math.prod(info.shape), info.start)
        return flat.reshape(info.shape)


class SafetensorsCheckpoint:
    """One or many safetensors files as one Checkpoint.

    files: tensor name -> file, or {None: file} for a single file that holds everything.
    """

    def __init__(self, path: Path, config: dict[str, Any], files: dict[str | None, Path]):
        self.path, self.config = path, config
        opened = {file: SafetensorsFile(file) for file in sorted(set(files.values()))}
        if None in files:
            (single,) = opened.values()
            self._of = dict.fromkeys(single.tensors, single)
        else:
            self._of = {name: opened[file] for name, file in files.items()}
            for name, file in self._of.items():
                if name not in file.tensors:
                    raise UserError(f"{file.path} lacks tensor {name}, which the index places there; download it again")
        self.metadata = {key: value for file in opened.values() for key, value in file.metadata.items()}

    def names(self) -> list[str]:
        return list(self._of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._of[name].tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._of[name].tensors[name].dtype

    def read(self, name: str) -> np.ndarray:
        return self._of[name].read(name)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of a file, every number checked against the file's size."""
    remedy = "download or save the file again"
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise UserError(f"{path} is {size} bytes long, shorter than a safetensors header; {remedy}")
            (length,) = struct.unpack("<Q", prefix)
            # A header of 128 bytes begins like a pickle too; as a length, a real pickle's beginning is astronomical.
            if prefix[:4] == b"PK\x03\x04" or (prefix[:1] == b"\x80" and 8 + length > size):
                raise UserError(
                    f"{path} is a pickle named .safetensors, and reading a pickle can run any code; "
                    "convert it with safetensors"
                )
            if length > HEADER_LIMIT:
                raise UserError(f"{path}: header length {length} is over the limit of {HEADER_LIMIT} bytes; {remedy}")
            if 8 + length > size:
                raise UserError(f"{path}: header length {length} does not fit a file of {size} bytes; {remedy}")
            raw = file.read(length)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from None
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the header is not JSON ({error}); {remedy}") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: the header is a JSON {type(header).__name__}, not an object; {remedy}")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise UserError(f"{path}: __metadata__ is not an object; {remedy}")
    tensors, spans = {}, []
    for name, fields in header.items():
        tensors[name], span = _tensor(path, name, fields, 8 + length)
        spans.append((*span, name))
    _check_spans(path, spans, size - 8 - length)
    return tensors, metadata


def _tensor(path: Path, name: str, fields: Any, base: int) -> tuple[TensorInfo, tuple[int, int]]:
    if not is_name(name):
        raise UserError(f"{path}: {name[:40]!r} is not a tensor name; save the file again")
    where = f"{path}: tensor {name}"
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise UserError(f"{where} needs dtype, shape and data_offsets in the header; save the file again")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{where} has dtype {dtype!r:.80}; supported: {', '.join(DTYPES)}")
    if not _naturals(shape):
        raise UserError(f"{where} has shape {shape!r:.80}; a shape is a list of integers of at least 0; save it again")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UserError(f"{where} has data_offsets {offsets!r:.80}; they must be [begin, end]; save the file again")
    needed, span = math.prod(shape) * DTYPES[dtype].itemsize, offsets[1] - offsets[0]
    if needed != span:
        raise UserError(
            f"{where}: {dtype} of shape {shape} takes {needed} bytes, its data_offsets span {span}; save the file again"
        )
    return TensorInfo(DTYPES[dtype], tuple(shape), base + offsets[0]), (offsets[0], offsets[1])


def _check_spans(path: Path, spans: list[tuple[int, int, str]], data_bytes: int) -> None:
    """The tensors must tile the data: no hole, no overlap, nothing beyond the end."""
    end = 0
    for begin, stop, name in sorted(spans):
        if stop > data_bytes:
            raise UserError(
                f"{path}: tensor {name} ends at byte {stop} of {data_bytes} bytes of data; "
                "the file is truncated, download it again"
            )
        if begin != end:
            raise UserError(f"{path}: tensor {name} begins at byte {begin}, expected {end}; save the file again")
        end = stop
    if end != data_bytes:
        raise UserError(f"{path}: {data_bytes} bytes of data, the tensors cover {end}; download the file again")


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def write_file(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write one file with the safetensors package; metadata {"format": "pt"} is what transformers asks for."""
    from safetensors.numpy import save_file

    save_file({name: np.asarray(value, order="C") for name, value in tensors.items()}, path, metadata={"format": "pt"})
