"""Word vectors in the text formats of word2vec and GloVe: a word and its numbers a line, spaces between."""

import gzip
import io
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from jaxmodels.errors import UserError


def read_vectors(path: str | Path, known: Collection[str], limit: int = 0) -> dict[str, np.ndarray]:
    """Vectors float32[D] of the words in `known`, and of the first `limit` others; words are lower-cased, the first of
    equal ones stays. A first line of two numbers (word2vec's header) is passed over.

    Raises UserError with file and line for a line of another width, numbers that are none, and a file without vectors.
    """
    path, found, others = Path(path).expanduser(), {}, 0
    width = None
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as raw:
            for number, line in enumerate(io.TextIOWrapper(raw, "utf-8", errors="replace", newline="\n"), 1):
                word, _, rest = line.rstrip("\r\n ").partition(" ")
                cells = rest.split(" ")
                if number == 1 and len(cells) == 1 and word.isdecimal():
                    continue
                word = word.lower()
                wanted = word in known
                if word in found or not (wanted or others < limit):
                    continue
                width = width or len(cells)
                found[word] = _numbers(cells, width, f"{path}:{number}")
                others += not wanted
    except (OSError, EOFError, zlib.error) as error:
        told = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({told}); check vectors.path") from None
    if not found:
        raise UserError(f"{path} has no vector of a word in the data; give word2vec's or GloVe's text format")
    return found


def write_vectors(path: Path, words: Sequence[str], vectors: np.ndarray) -> Path:
    """word2vec's text format, whole or not at all."""
    from train.runtime.files import write_atomic

    lines = [f"{len(words)} {vectors.shape[1]}", *(f"{word} {' '.join(f'{x:.6g}' for x in row)}"
                                                   for word, row in zip(words, vectors, strict=True))]
    return write_atomic(path, lambda file: file.write(("\n".join(lines) + "\n").encode()))


def _numbers(cells: list[str], width: int, where: str) -> np.ndarray:
    if len(cells) != width:
        raise UserError(f"{where}: {len(cells)} numbers, the lines before {width}; remove the line")
    try:
        values = np.array(cells, np.float32)
    except ValueError:
        raise UserError(f"{where}: not all of the {width} values are numbers; give a text file, not a binary one"
                        ) from None
    if not np.isfinite(values).all():
        raise UserError(f"{where}: a value is not finite; remove the line")
    return values
