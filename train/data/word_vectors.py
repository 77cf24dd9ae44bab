"""Word vectors from files: the text formats of word2vec and GloVe (a word and its numbers a line, spaces between), and
the table of pieces of words that the package wordllama ships."""

import gzip
import importlib.util
import io
import re
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.hub.safetensors_file import SafetensorsFile

# In the wheel of wordllama 0.4 (MIT): float16[32000, 256], and the tokenizer whose pieces are its rows.
TABLE, TENSOR = "weights/l2_supercat_256.safetensors", "embedding.weight"
PIECES = "tokenizers/l2_supercat_tokenizer_config.json"
SPACE = "\u2581"  # begins a word's first piece
EMPTY = re.compile(rf"{SPACE}|<unk>|</?s>|<0x[0-9A-F]{{2}}>")  # pieces that say nothing of a word; the last are bytes


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


def wordllama_vectors(known: Collection[str], width: int, limit: int = 0) -> dict[str, np.ndarray]:
    """Vectors float32[width] of the words in `known`, and of the first `limit` others that are one piece of the table.

    A word's is the mean of those of its pieces, projected on the principal components of the words in `known`. Words
    that are spelled in bytes alone have none. Two files of the package are read, none of its code is.
    """
    from tokenizers import Tokenizer

    folder = _wordllama(width)
    table = np.asarray(SafetensorsFile(folder / TABLE).read(TENSOR), np.float32)
    try:
        tokenizer = Tokenizer.from_file(str(folder / PIECES))
    except Exception as error:  # the package knows no other
        raise UserError(f"{folder / PIECES} is damaged ({error}); install wordllama again") from None
    pieces = {i: piece for piece, i in tokenizer.get_vocab().items()}
    if sorted(pieces) != list(range(len(table))) or not np.isfinite(table).all():
        raise UserError(f"{folder / TABLE} has {len(table)} rows, the tokenizer {len(pieces)} pieces, or values that "
                        "are not finite; install wordllama again")
    others = (word for i in range(len(table)) if (word := pieces[i].removeprefix(SPACE)) != pieces[i]
              and word.isalpha() and word == word.lower() and word not in known)
    words = [*sorted(known), *(word for word, _ in zip(others, range(limit), strict=False))]
    full = np.array([EMPTY.fullmatch(pieces[i]) is None for i in range(len(table))])
    found: dict[str, np.ndarray] = {}
    for word, one in zip(words, tokenizer.encode_batch_fast(words, add_special_tokens=False), strict=True):
        ids = np.array(one.ids, int)
        if full[ids].any():
            found[word] = table[ids[full[ids]]].mean(0)
    values, of = np.stack(list(found.values())), [i for i, word in enumerate(found) if word in known]
    mean = values[of].mean(0)
    _, axes = np.linalg.eigh(np.cov(values[of], rowvar=False, bias=True))  # the largest are the last
    return dict(zip(found, (values - mean) @ axes[:, ::-1][:, :width].astype(np.float32), strict=True))


def write_vectors(path: Path, words: Sequence[str], vectors: np.ndarray) -> Path:
    """word2vec's text format, whole or not at all."""
    from train.runtime.files import write_atomic

    lines = [f"{len(words)} {vectors.shape[1]}", *(f"{word} {' '.join(f'{x:.6g}' for x in row)}"
                                                   for word, row in zip(words, vectors, strict=True))]
    return write_atomic(path, lambda file: file.write(("\n".join(lines) + "\n").encode()))


def _wordllama(width: int) -> Path:
    """The folder of the package. Raises UserError where it is not installed, and for a width that it cannot give."""
    spec = importlib.util.find_spec("wordllama")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("vectors.name=wordllama: the package is not installed; pip install 'jaxmodels[wordllama]', or "
                        "take vectors.name=skipgram")
    folder = Path(spec.submodule_search_locations[0])
    if missing := next((name for name in (TABLE, PIECES) if not (folder / name).is_file()), None):
        raise UserError(f"{folder} has no {missing}; install wordllama 0.4, which ships it")
    info = SafetensorsFile(folder / TABLE).tensors.get(TENSOR)
    if info is None or len(info.shape) != 2 or info.dtype.kind != "f":
        raise UserError(f"{folder / TABLE} has no table {TENSOR}; install wordllama again")
    if width > info.shape[1]:
        raise UserError(f"model.d_word={width}, the vectors of wordllama have {info.shape[1]}; set model.d_word to at "
                        f"most {info.shape[1]}")
    return folder


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
