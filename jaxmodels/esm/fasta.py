"""Proteins from FASTA files (plain or gzip), and what is done about characters that are no residues.

Knows nothing of the model, so that training data and the command line read files alike.
"""

import gzip
import io
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jaxmodels.errors import UserError

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"  # the 20 standard amino acids
ODD = "XBUZO"  # unknown, Asx, selenocysteine, Glx, pyrrolysine: tokens of the vocabulary, kept
COUNTED = {  # what `clean` counts -> what it did about it
    "lower_case": "lower-case letters taken as upper case",
    "gaps": "gaps (- and .) left out",
    "stops": "stops (*) left out at the end, X inside",
    "digits": "digits left out",
    "blanks": "blanks left out",
    "unknown": "other characters (J among them) taken as X",
}
_GOOD = re.compile(f"[{RESIDUES}{ODD}]*")


class Record(NamedTuple):
    """One entry of a FASTA file. name: first word of its header line, description: the rest, sequence: as written."""

    name: str
    description: str
    sequence: str


def read_fasta(path: str | os.PathLike) -> list[Record]:
    """Every record of a FASTA file, in order; gzip is told by its first bytes, not by the name.

    Line ends of any system, blank lines, ``;`` comments and a byte-order mark are read over; sequences are joined but
    not cleaned (`clean` does that), so an entry without residues has an empty sequence.
    Raises UserError for a file that is missing, damaged, empty or has text before the first ``>``.
    """
    records, name, description, lines = [], None, "", []
    for number, line in enumerate(_lines(Path(path)), 1):
        line = line.strip()
        if line.startswith(">"):
            if name is not None:
                records.append(Record(name, description, "".join(lines)))
            name, _, description = line[1:].strip().replace("\t", " ").partition(" ")
            description, lines = description.strip(), []
        elif line and not line.startswith(";"):
            if name is None:
                raise UserError(f"{path}: line {number} is {line[:40]!r}, before any header; FASTA entries begin with "
                                "a line '>name'")
            lines.append(line)
    if name is None:
        raise UserError(f"{path} holds no FASTA entry; each begins with a line '>name'")
    records.append(Record(name, description, "".join(lines)))
    return records


def clean(sequence: str) -> tuple[str, dict[str, int]]:
    """(residues in upper case, how many characters were changed by kind); the kinds and what is done: ``COUNTED``.

    The result holds the 20 standard letters and X B U Z O only, and keeps every position that stands for a residue.
    Gaps are left out, though the vocabulary of ESM has them: a row of an alignment is not a protein.
    """
    if _GOOD.fullmatch(sequence):  # nearly all
        return sequence, {}
    counts, out = Counter(), []
    end = len(sequence.rstrip("*-. \t\r\n0123456789"))  # a stop behind it ends the protein
    for i, letter in enumerate(sequence):
        # By table and not by str.upper, which makes two letters of some
        upper = letter.upper() if letter.isascii() else letter
        if upper in RESIDUES or upper in ODD:
            counts["lower_case"] += upper != letter
            out.append(upper)
        elif letter in "-.":
            counts["gaps"] += 1
        elif letter == "*":
            counts["stops"] += 1
            if i < end:
                out.append("X")
        elif letter in "0123456789":
            counts["digits"] += 1
        elif letter.isspace():
            counts["blanks"] += 1
        else:
            counts["unknown"] += 1
            out.append("X")
    return "".join(out), {kind: counts[kind] for kind in COUNTED if counts[kind]}


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            head = file.read(2)
            file.seek(0)
            # Names may be in any encoding, residues are ASCII: nothing is refused for a byte that is not UTF-8.
            with io.TextIOWrapper(gzip.open(file) if head == b"\x1f\x8b" else file, "utf-8-sig", "replace",
                                  newline=None) as text:
                yield from text
    except FileNotFoundError:
        raise UserError(f"no FASTA file at {path}; check the path") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is a damaged gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}); give a FASTA file, plain or gzip") from None
