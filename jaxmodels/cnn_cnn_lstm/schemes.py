"""Tag schemes and entities: IOB1, IOB2, IOBES (BILOU by other letters), and what ill-formed tags mean.

Inside the model tags are IOBES; files and scores are IOB2 (ner_active_learning.md section 2). The repair rule of both
directions: S- and B- open an entity; I- and E- go on with one only if the tag before is B- or I- of the same type, else
they open one. ``iob2`` applies it to any of the schemes, so it reads IOB1 as well.
"""

import functools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxmodels.errors import UserError

SCHEMES = ("iob1", "iob2", "iobes")
OUTSIDE = "O"
_TAG = re.compile(r"O|([BIESLU])-(\S+)")
_LETTER = {"L": "E", "U": "S"}  # of BILOU


class Entity(NamedTuple):
    """Words start..stop-1 of a sentence."""

    start: int
    stop: int
    type: str


@functools.cache
def split_tag(tag: str) -> tuple[str, str]:
    """(``B``, type) or (``O``, ''), BILOU in the letters of IOBES. Raises UserError for what no scheme knows."""
    match = _TAG.fullmatch(tag)
    if match is None:
        raise UserError(f"tag {tag!r} is of no scheme that is known; write O, B-TYPE, I-TYPE (IOB1, IOB2), also E-TYPE "
                        "and S-TYPE (IOBES) or L-TYPE and U-TYPE (BILOU)")
    letter, kind = match.groups()
    return (OUTSIDE, "") if letter is None else (_LETTER.get(letter, letter), kind)


def iob2(tags: Sequence[str]) -> list[str]:
    """The tags of a sentence in any scheme, ill-formed ones repaired, as IOB2."""
    out, before, kind_before = [], OUTSIDE, ""
    for letter, kind in map(split_tag, tags):
        opens = letter in "BS" or before not in "BI" or kind != kind_before
        out.append(OUTSIDE if letter == OUTSIDE else f"{'B' if opens else 'I'}-{kind}")
        before, kind_before = letter, kind
    return out


def iobes(tags: Sequence[str]) -> list[str]:
    """IOB2 -> IOBES."""
    out = []
    for tag, after in zip(tags, [*tags[1:], OUTSIDE], strict=True):
        if tag == OUTSIDE:
            out.append(tag)
            continue
        last = after != f"I-{tag[2:]}"
        out.append(({"B": "S", "I": "E"}[tag[0]] if last else tag[0]) + tag[1:])
    return out


def iob1(tags: Sequence[str]) -> list[str]:
    """IOB2 -> IOB1: B- only where an entity stands right behind another of its type."""
    return [f"I{tag[1:]}" if tag[0] == "B" and before[1:] != tag[1:] else tag
            for before, tag in zip([OUTSIDE, *tags[:-1]], tags, strict=True)]


def illformed(tags: Sequence[str]) -> list[int]:
    """Places where IOB2 or IOBES wants an entity to open and the tag goes on with one: an I- or E- after O, S-, E-,
    another type or at the beginning."""
    split = [split_tag(tag) for tag in tags]
    return [i for i, ((before, kind_before), (letter, kind)) in enumerate(zip([(OUTSIDE, ""), *split[:-1]], split,
                                                                              strict=True))
            if letter in "IE" and (before not in "BI" or kind_before != kind)]


def detect(sentences: Iterable[Sequence[str]]) -> str:
    """The scheme of a file: ``iobes`` where E-, S-, L- or U- occur; ``iob1`` where entities open with I- and B- stands
    only where IOB1 wants it, behind a tag of its type; else ``iob2``."""
    opened_by_i = False
    iob1_so_far = True
    for tags in sentences:
        for before, tag in zip([OUTSIDE, *tags[:-1]], tags, strict=True):
            if tag[0] in "ESLU":
                return "iobes"
            opened_by_i |= tag[0] == "I" and before[2:] != tag[2:]
            iob1_so_far &= tag[0] != "B" or before[2:] == tag[2:]
    return "iob1" if opened_by_i and iob1_so_far else "iob2"


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sentence, tags in any scheme."""
    found: list[Entity] = []
    start = None
    repaired = [*iob2(tags), OUTSIDE]
    for i, tag in enumerate(repaired):
        if start is not None and not tag.startswith("I-"):
            found.append(Entity(start, i, repaired[start][2:]))
            start = None
        if tag[0] == "B":
            start = i
    return found


def tags_of(entities: Iterable[Entity], length: int) -> list[str]:
    """IOB2 tags of a sentence of so many words. Raises UserError for entities that overlap or lie outside."""
    tags = [OUTSIDE] * length
    for entity in entities:
        inside = range(entity.start, entity.stop)
        if not 0 <= entity.start < entity.stop <= length or any(tags[i] != OUTSIDE for i in inside):
            raise UserError(f"entity {tuple(entity)} overlaps another or is not within the {length} words of its "
                            "sentence; entities must lie side by side")
        for i in inside:
            tags[i] = f"{'B' if i == entity.start else 'I'}-{entity.type}"
    return tags
