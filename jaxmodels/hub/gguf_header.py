"""The header of a GGUF file: metadata and the table of tensors, each count and size checked against the file first.

The `gguf` package's own reader trusts these numbers (a damaged array length keeps it in a loop of 2^60 steps), so
the header is walked here and the package is used for its constants and its dequantisation.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.hub.checkpoint import is_name

ALIGNMENT = 32  # default of general.alignment
# Value type number -> struct letter; 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """shape: numpy order (the file stores it reversed); start, size: bytes in the file; kind: e.g. "Q4_1"."""

    kind: str
    shape: tuple[int, ...]
    start: int
    size: int


class GgufFile:
    """A mapped GGUF file: `metadata` (key -> int, float, bool, str or list) and `tensors`."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.size = path.stat().st_size
            if self.size < 24:
                raise UserError(f"{path} is {self.size} bytes long, shorter than a GGUF header; download it again")
            with open(path, "rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from None
        self._at = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        self._read_header()

    def bytes_of(self, name: str) -> np.ndarray:
        """uint8 view of a tensor's stored bytes."""
        tensor = self.tensors[name]
        return np.frombuffer(self.map, np.uint8, tensor.size, tensor.start)

    def _read_header(self) -> None:
        if self.map[:4] != b"GGUF":
            raise UserError(f"{self.path} does not begin with GGUF but {self.map[:4]!r}; give a GGUF file")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise UserError(
                f"{self.path} is GGUF version {version} (or big-endian); supported: 2 and 3 little-endian; "
                "convert the model again with a current llama.cpp"
            )
        tensor_count, field_count = self._scalar("Q"), self._scalar("Q")
        self._room(field_count, 12, "metadata fields")
        for _ in range(field_count):
            key = self._name("a metadata key")
            if key in self.metadata:
                raise UserError(f"{self.path}: metadata key {key} occurs twice; convert the model again")
            self.metadata[key] = self._value(self._scalar("I"), key)
        self._room(tensor_count, 24, "tensors")
        table = [self._tensor_row() for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise UserError(f"{self.path}: general.alignment is {alignment!r}, not a power of two; convert it again")
        base = -(-self._at // alignment) * alignment
        for name, shape, kind_number, offset in table:
            if name in self.tensors:
                raise UserError(f"{self.path}: tensor {name} occurs twice; convert the model again")
            if offset % alignment:
                raise UserError(f"{self.path}: tensor {name} has offset {offset}, no multiple of {alignment}")
            self.tensors[name] = self._tensor(name, shape, kind_number, base + offset)

    def _tensor_row(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._name("a tensor name")
        dimensions = self._scalar("I")
        if not 1 <= dimensions <= 4:
            raise UserError(f"{self.path}: tensor {name} has {dimensions} dimensions; GGUF allows 1 to 4")
        shape = tuple(self._scalar("Q") for _ in range(dimensions))[::-1]
        return name, shape, self._scalar("I"), self._scalar("Q")

    def _tensor(self, name: str, shape: tuple[int, ...], kind_number: int, start: int) -> GgufTensor:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            kind = GGMLQuantizationType(kind_number)
        except ValueError:
            raise UserError(
                f"{self.path}: tensor {name} has the unknown quantisation number {kind_number}; "
                "install a newer gguf package or convert the model to Q8_0"
            ) from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if min(shape) < 1 or shape[-1] % block:
            raise UserError(
                f"{self.path}: tensor {name} of shape {shape} does not divide into {kind.name} blocks of {block} values"
            )
        size = math.prod(shape) // block * block_bytes
        if start + size > self.size:
            raise UserError(
                f"{self.path}: tensor {name} ends at byte {start + size}, the file has {self.size}; "
                "it is truncated, download it again"
            )
        return GgufTensor(kind.name, shape, start, size)

    def _value(self, kind: int, key: str) -> Any:
        if kind in SCALARS:
            return self._scalar(SCALARS[kind])
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            raise UserError(f"{self.path}: metadata {key} has the unknown type {kind}; convert the model again")
        item, length = self._scalar("I"), self._scalar("Q")
        if item == STRING:
            self._room(length, 8, f"strings in {key}")
            return [self._string() for _ in range(length)]
        if item not in SCALARS:
            raise UserError(f"{self.path}: metadata {key} is an array of the unsupported type {item}")
        letter = SCALARS[item]
        self._room(length, struct.calcsize("<" + letter), f"values in {key}")
        values = struct.unpack_from(f"<{length}{letter}", self.map, self._at)
        self._at += struct.calcsize(f"<{length}{letter}")
        return list(values)

    def _scalar(self, letter: str) -> Any:
        self._room(1, struct.calcsize("<" + letter), "header fields")
        (value,) = struct.unpack_from("<" + letter, self.map, self._at)
        self._at += struct.calcsize("<" + letter)
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        self._room(length, 1, "bytes of text")
        raw = self.map[self._at : self._at + length]
        self._at += length
        return raw.decode("utf-8", errors="replace")

    def _name(self, what: str) -> str:
        text = self._string()
        if not is_name(text):
            raise UserError(f"{self.path}: {text[:40]!r} is not {what}; the file is damaged, download it again")
        return text

    def _room(self, count: int, each: int, what: str) -> None:
        """count items of at least `each` bytes must fit in what is left of the file."""
        left = self.size - self._at
        if count * each > left:
            raise UserError(
                f"{self.path}: the header announces {count} {what} at byte {self._at}, {left} bytes are left; "
                "the file is truncated or damaged, download it again"
            )
