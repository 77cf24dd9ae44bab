"""Files of named sources: texts and tables, plain or gzip. What is wrong with one is a UserError that says so."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxmodels.errors import UserError


def one(path: Path, file: str, name: str) -> Path:
    """`file` in the folder `path`, or the file `path` itself. name: of the source, for the error."""
    found = path / file if path.is_dir() else path
    if not found.is_file():
        raise UserError(f"{name}: {found} is missing; put {file} there")
    return found


def text_of(path: Path) -> str:
    """The whole file; gzip is told by its first bytes, and a byte order mark is dropped."""
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())[:100]}); fetch it again") from error


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The object of every line."""
    for number, line in enumerate(text_of(path).splitlines(), 1):
        try:
            yield json.loads(line)
        except ValueError:
            raise UserError(f"{path}: line {number} is not JSON; fetch the file again") from None


def table(path: Path, columns: tuple[str, ...], separator: str = "\t") -> Iterator[dict[str, str]]:
    """Rows of a table with a header; it may have more columns than these, which it must have."""
    csv.field_size_limit(2**31 - 1)  # titin alone has 35,000 residues
    # in the tables with tabs a quotation mark is a letter of a name
    quoting = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
    rows = csv.DictReader(io.StringIO(text_of(path)), delimiter=separator, quoting=quoting)
    if missing := [column for column in columns if column not in (rows.fieldnames or ())]:
        raise UserError(f"{path} has no column {missing[0]!r}; it has {', '.join(rows.fieldnames or ('none',))}")
    for row in rows:
        if any(row[column] is None for column in columns):
            raise UserError(f"{path}: line {rows.line_num} is cut short; fetch it again")
        yield row
