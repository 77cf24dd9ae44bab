"""Texts with entities by their characters: JSON lines and brat folders, cut into sentences of words.

Entities end where words do: one that begins or ends within a word is widened to all of it, of two that overlap the
longer stays, and what is in several pieces is left out; each is counted.
"""

import bisect
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxmodels.cnn_cnn_lstm import tokens
from jaxmodels.cnn_cnn_lstm.schemes import Entity, tags_of
from jaxmodels.errors import UserError
from train.data.conll import Sentence, read_text

LISTS = ("entities", "spans", "label", "labels")  # where a line of JSON keeps its entities
STARTS, STOPS, TYPES = ("start", "start_offset"), ("end", "end_offset", "stop"), ("label", "type")


class Span(NamedTuple):
    """text[start:stop] is a `type`."""

    start: int
    stop: int
    type: str


def read_jsonl(path: str | Path, counts: Counter[str] | None = None) -> list[Sentence]:
    """A JSON object a line: ``text`` and a list of entities, each ``[start, end, type]`` or an object with those.

    So doccano exports them (``label``), and many others. Raises UserError with file and line for what does not fit.
    """
    path, counts = Path(path), Counter() if counts is None else counts
    found: list[Sentence] = []
    for number, line in enumerate(read_text(path, counts).split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            found += sentences(*parse_line(line, where)[1:], where, counts)
    return found


def read_brat(folder: str | Path, counts: Counter[str] | None = None) -> list[Sentence]:
    """Every NAME.txt of a folder with its NAME.ann, in the order of their names. Lines other than T are passed over."""
    folder, counts = Path(folder), Counter() if counts is None else counts
    files = sorted(folder.glob("*.ann"))
    if not files:
        raise UserError(f"{folder} has no .ann file; give a brat folder of NAME.txt and NAME.ann")
    found: list[Sentence] = []
    for file in files:
        texts = Counter()  # brat counts characters of the file as it is, so CRLF must stay
        source = file.with_suffix(".txt")
        try:
            text = source.read_bytes().decode("utf-8")
        except OSError as error:
            raise UserError(f"{source} cannot be read ({error.strerror}); {file.name} needs it beside") from None
        except UnicodeDecodeError:
            raise UserError(f"{source} is not UTF-8; convert it") from None
        spans = [span for number, line in enumerate(read_text(file, texts).split("\n"), 1) if line.startswith("T")
                 and (span := _brat(line, text, f"{file}:{number}", counts)) is not None]
        found += sentences(text, spans, str(file), counts)
    return found


def sentences(text: str, spans: Iterable[Span], where: str, counts: Counter[str],
              pattern: re.Pattern[str] | None = None) -> list[Sentence]:
    """The sentences of a text with the tags of its entities. where: what an error begins with. pattern: of words."""
    cut = tokens.sentences_of(text, pattern or tokens.pattern_of())
    words = [word for sentence in cut for word in sentence]
    taken = entities_of(spans, [(word.start, word.stop) for word in words], text, where, counts)
    # An entity does not end with a sentence that was cut within it: join those sentences again.
    bounds = [0]
    for sentence in cut:
        bounds.append(bounds[-1] + len(sentence))
    inside = {i for entity in taken for i in range(entity.start + 1, entity.stop)}
    bounds = [bound for bound in bounds if bound not in inside]
    tags = tags_of(taken, len(words))
    return [Sentence(tuple(word.text for word in words[a:b]), tuple(tags[a:b]), text,
                     tuple((word.start, word.stop) for word in words[a:b]))
            for a, b in zip(bounds, bounds[1:], strict=False)]


def entities_of(spans: Iterable[Span], places: Sequence[tuple[int, int]], text: str, where: str, counts: Counter[str]
                ) -> list[Entity]:
    """The entities of a text by its words, which are at `places` (start, stop), in order."""
    starts, ends = [start for start, _ in places], [stop for _, stop in places]
    taken: list[Entity] = []
    inside = bytearray(len(places))  # whether an entity has a word: to ask all of them takes minutes in a long text
    for span in sorted(set(spans), key=lambda span: (span.start - span.stop, span)):
        if not 0 <= span.start < span.stop <= len(text):
            raise UserError(f"{where}: entity {span.start}..{span.stop} is not within the {len(text)} characters of "
                            "its text; places count characters (code points) from 0, the end not included")
        first = bisect.bisect_right(ends, span.start)  # the first word that ends behind it
        last = first
        while last < len(places) and starts[last] < span.stop:
            last += 1
        if first == last:
            counts["without_words"] += 1
            continue
        if starts[first] != span.start or ends[last - 1] != span.stop:
            counts["widened"] += 1
        if any(inside[first:last]):
            counts["overlapping"] += 1
            continue
        inside[first:last] = bytes([1]) * (last - first)
        taken.append(Entity(first, last, span.type))
    return taken


def parse_text(line: str, where: str) -> tuple[Mapping[str, Any], str]:
    """(the whole object, its text) of a line of JSON."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); write an object with text a line") from None
    if not isinstance(row, Mapping) or not isinstance(row.get("text"), str):
        raise UserError(f"{where}: no text; write an object with text a line")
    # JSON can write half of a pair of UTF-16, which no file in UTF-8 can: it would fail only when a batch is written.
    if half := re.search("[\ud800-\udfff]", row["text"]):
        raise UserError(f"{where}: character {half.start()} of the text is half a character ({half[0]!r}); write its "
                        "text again, whole")
    return row, row["text"]


def parse_line(line: str, where: str) -> tuple[Mapping[str, Any], str, list[Span]]:
    """(the whole object, its text, its entities) of a line of JSON."""
    row, text = parse_text(line, where)
    key = next((key for key in LISTS if key in row), None)
    values = [] if key is None else row[key]
    if not isinstance(values, list):
        raise UserError(f"{where}: {key} is not a list; write [[start, end, type], ...]")
    return row, text, [_span(value, f"{where}: {key}[{i}]") for i, value in enumerate(values)]


def _span(value: Any, where: str) -> Span:
    if isinstance(value, Mapping):
        parts = [next((value[key] for key in keys if key in value), None) for keys in (STARTS, STOPS, TYPES)]
    else:
        parts = list(value) if isinstance(value, list) else []
    if len(parts) != 3 or not all(isinstance(n, int) for n in parts[:2]) or not isinstance(parts[2], str):
        raise UserError(f"{where} is {str(value)[:60]!r}; write [start, end, type], or an object with start, end and "
                        "label")
    return Span(parts[0], parts[1], word_type(parts[2], where))


def _brat(line: str, text: str, where: str, counts: Counter[str]) -> Span | None:
    cells = line.split("\t")
    match = re.fullmatch(r"(\S+) (\d+) (\d+)((?:;\d+ \d+)*)", cells[1]) if len(cells) == 3 else None
    if match is None:
        raise UserError(f"{where}: {line[:60]!r} is not T<n>, tab, TYPE START END, tab, text; check the file")
    kind, start, stop, more = match.groups()
    if more:
        counts["in_pieces"] += 1
        return None
    start, stop = int(start), int(stop)
    # brat shows line ends within an entity as spaces
    if re.sub(r"\s", " ", text[start:stop]) != re.sub(r"\s", " ", cells[2]):
        raise UserError(f"{where}: characters {start}..{stop} of the text are {text[start:stop]!r}, the line says "
                        f"{cells[2]!r}; text and annotations do not belong together")
    return Span(start, stop, word_type(kind, where))


def word_type(kind: str, where: str) -> str:
    """A type as tags can hold it. Raises UserError for another."""
    if not kind or re.search(r"\s", kind):
        raise UserError(f"{where}: type {kind!r} is empty or has spaces; write one word")
    return kind
