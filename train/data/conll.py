"""CoNLL-style files: a word and its tag a line, an empty line between sentences.

* two columns split by a tab, in any scheme of `jaxmodels.cnn_cnn_lstm.schemes`; ``#`` begins words, never a comment;
* the four columns of CoNLL-2003 (word, part of speech, chunk, tag), split by spaces;
* the CoNLL-2012 files of OntoNotes, whose entities are brackets in the eleventh column.

Which of them a file is, its first line with something on it tells. Sentences come as IOB2; what was amiss but could be
read is counted. Errors name the file and the line.
"""

import dataclasses
import gzip
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

from jaxmodels.cnn_cnn_lstm import schemes
from jaxmodels.cnn_cnn_lstm.schemes import Entity
from jaxmodels.errors import UserError
from train.runtime.files import write_atomic

Repair = Literal["repair", "refuse"]  # what to do with I- after O
_ONTONOTES = "#begin document"
_NE = 10  # column of OntoNotes' entities, from 0
_BRACKET = re.compile(r"\(?[^()*]*\*?\)?")


@dataclasses.dataclass(frozen=True)
class Sentence:
    """words, and their tags in IOB2. text, places: where it was read from running text, and each word's (start, stop)
    in it; else None."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    text: str | None = None
    places: tuple[tuple[int, int], ...] | None = None

    def __len__(self) -> int:
        return len(self.words)


def read_conll(path: str | Path, illformed: Repair = "repair", counts: Counter[str] | None = None) -> list[Sentence]:
    """The sentences of a file, plain or gzip.

    illformed: an I- (or E-) after O, another type or nothing opens an entity (``repair``, counted), or is an error. A
    file whose entities all open with I- is IOB1, and nothing in it is ill-formed.
    counts: gets what was amiss, and ``iob1`` or ``iobes`` for a file in that scheme.
    Raises UserError with file and line for a wrong number of columns and for tags that no scheme knows.
    """
    path, counts = Path(path), Counter() if counts is None else counts
    lines = read_text(path, counts).split("\n")  # not splitlines: U+0085 and U+2028 are within words
    kind = _kind(lines)
    if kind == "ontonotes":
        return _ontonotes(path, lines)
    blocks = _blocks(path, lines, _two if kind == "two" else _four, counts)
    scheme = schemes.detect(tags for _, _, tags in blocks)
    if scheme != "iob2":
        counts[scheme] += 1
    for numbers, _, tags in blocks if scheme != "iob1" else ():
        for i in schemes.illformed(tags):
            if illformed == "refuse":
                before = tags[i - 1] if i else "the beginning of a sentence"
                raise UserError(f"{path}:{numbers[i]}: {tags[i]} after {before} is not {scheme.upper()}; open the "
                                f"entity with B{tags[i][1:]}, or allow repairs")
            counts["repaired"] += 1
    return [Sentence(tuple(words), tuple(schemes.iob2(tags))) for _, words, tags in blocks]


def write_conll(path: str | Path, sentences: Iterable[Sentence]) -> Path:
    """Two columns, IOB2, whole or not at all; gzip for names that end in .gz."""
    path = Path(path)
    parts = []
    for sentence in sentences:
        if bad := next((word for word in sentence.words if not word or re.search(r"[\t\n\r]", word)), None):
            raise UserError(f"word {bad!r} cannot be written to {path}: it is empty or holds a tab or a line's end; "
                            "change it")
        parts.append("".join(f"{word}\t{tag}\n" for word, tag in zip(sentence.words, sentence.tags, strict=True)))
    data = "\n".join(parts).encode()
    return write_atomic(path, lambda file: file.write(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data))


def read_text(path: Path, counts: Counter[str]) -> str:
    """A file's text; a byte order mark is dropped, CRLF becomes LF. Raises UserError for what is not UTF-8."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        told = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({told}); check the path, or fetch the file again") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[:error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: byte {data[error.start]:#x} is not UTF-8; convert the file to UTF-8") from None
    if "\r\n" in text:
        counts["crlf"] += 1
        text = text.replace("\r\n", "\n")
    return text


def _kind(lines: Sequence[str]) -> str:
    first = next((line for line in lines if line.strip()), "")
    if first.startswith(_ONTONOTES) and "\t" not in first:
        return "ontonotes"
    return "four" if "\t" not in first and len(first.split()) == 4 else "two"


Block = tuple[list[int], list[str], list[str]]  # numbers of the lines, words, tags


def _blocks(path: Path, lines: Sequence[str], columns: Callable[[str, str], tuple[str, str] | None],
            counts: Counter[str]) -> list[Block]:
    """The sentences as they stand, none empty."""
    blocks: list[Block] = [([], [], [])]
    for number, line in enumerate(lines, 1):
        if not line.strip():
            if line:
                counts["blank_lines_with_spaces"] += 1
            if blocks[-1][0]:
                blocks.append(([], [], []))
            continue
        found = columns(line, f"{path}:{number}")
        if found is None:
            continue
        try:
            schemes.split_tag(found[1])
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        numbers, words, tags = blocks[-1]
        numbers.append(number)
        words.append(found[0])
        tags.append(found[1])
    return [block for block in blocks if block[0]]


def _two(line: str, where: str) -> tuple[str, str]:
    cells = line.split("\t")
    if len(cells) == 1:
        raise UserError(f"{where}: {line[:40]!r} has no tab; write word, tab, tag, or the four columns of CoNLL-2003 "
                        "from the first line on")
    if len(cells) != 2 or not cells[0].strip():
        what = f"{len(cells)} columns" if len(cells) != 2 else "no word"
        raise UserError(f"{where}: {line[:40]!r} has {what}; write word, tab, tag")
    return cells[0], cells[1].strip()


def _four(line: str, where: str) -> tuple[str, str] | None:
    cells = line.split()
    if len(cells) != 4:
        raise UserError(f"{where}: {line[:40]!r} has {len(cells)} columns, the lines before 4; write word, part of "
                        "speech, chunk, tag, or word, tab, tag from the first line on")
    return None if cells[0] == "-DOCSTART-" else (cells[0], cells[3])


def _ontonotes(path: Path, lines: Sequence[str]) -> list[Sentence]:
    found: list[Sentence] = []
    words: list[str] = []
    entities: list[Entity] = []
    opened: tuple[str, int] | None = None
    for number, line in enumerate([*lines, ""], 1):
        where = f"{path}:{number}"
        if not line.strip() or line.startswith((_ONTONOTES, "#end document")):
            if opened:
                raise UserError(f"{where}: the sentence ends within a {opened[0]} that word {opened[1] + 1} opens; "
                                "close its bracket")
            if words:
                found.append(Sentence(tuple(words), tuple(schemes.tags_of(entities, len(words)))))
            words, entities = [], []
            continue
        cells = line.split()
        if len(cells) <= _NE + 1:
            raise UserError(f"{where}: {len(cells)} columns, a line of CoNLL-2012 has at least {_NE + 2}; check the "
                            "file")
        cell = cells[_NE]
        if not _BRACKET.fullmatch(cell) or (cell[0] == "(" and opened) or (cell[-1] == ")" and cell[0] != "("
                                                                            and not opened):
            raise UserError(f"{where}: {cell!r} in column {_NE + 1} does not fit the brackets before; write (TYPE*, *, "
                            "*) or (TYPE)")
        if cell[0] == "(":
            opened = cell.strip("()*"), len(words)
        words.append(cells[3])
        if cell[-1] == ")" and opened:
            entities.append(Entity(opened[1], len(words), opened[0]))
            opened = None
    return found
