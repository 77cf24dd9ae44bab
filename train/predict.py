"""What ``jaxmodels predict RUN`` does for every experiment: which run, which texts, where the answers go.

An experiment whose runs predict names a function in its config, ``predict = "module:function"``, called as
``function(config, folder, texts, top)`` and giving `Predictions`. config: what config.json records under that name. The
function is that of the installed experiment: a folder from elsewhere must not choose what is called.
"""

import argparse
import collections
import csv
import dataclasses
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from jaxmodels.errors import UserError
from train.data.coded_texts import csv_rows
from train.runtime.config import experiment_names, experiment_of, find, load_function
from train.runtime.files import read_json, write_atomic
from train.runtime.run_folder import CONFIG, RESULTS

SHOWN = 5  # lines that an error names


@dataclasses.dataclass(frozen=True)
class Predictions:
    """rows: (number of the text from 0, a value for each of the columns), texts in order; made while they are read.
    silence: what it means that a text has no row, and what helps."""

    columns: tuple[str, ...]
    rows: Iterable[tuple[int, tuple[Any, ...]]]
    silence: str


def predict(run: str | Path, texts: Sequence[str], top: int | None = None) -> Predictions:
    """What a finished run says about texts. top: so many answers a text, however sure; default: as the run decides.

    Raises UserError for a folder that is no finished run of an experiment that predicts, for empty texts and top < 1.
    """
    function, config = finished(Path(run))
    if top is not None and top < 1:
        raise UserError(f"--top {top}: it must be at least 1")
    if not texts:
        raise UserError("no text is given; give at least one")
    if empty := [i + 1 for i, text in enumerate(texts) if not text.strip()]:
        raise UserError(f"{_some(empty)} of {len(texts)} texts {'are' if len(empty) > 1 else 'is'} empty; fill or drop "
                        f"{'them' if len(empty) > 1 else 'it'}")
    if odd := [i + 1 for i, text in enumerate(texts) if text.encode("utf-8", "ignore").decode() != text]:
        raise UserError(f"text {_some(odd)} holds bytes that are not UTF-8, as the terminal has passed them on; "
                        "give it in UTF-8, or with --csv")
    return load_function(function)(config, Path(run), texts, top)


def finished(run: Path) -> tuple[str, Mapping[str, Any]]:
    """(what predicts, the config) of a run at its end whose experiment predicts; UserError for others."""
    about = read_json(run / CONFIG) if run.is_dir() else None
    if about is None:
        raise UserError(f"{run} is not a run folder: it has no {CONFIG}; give the folder that a run has written")
    name = experiment_of(str(about.get("name")))
    function = getattr(find(name).get_config(), "predict", None) if name in experiment_names() else None
    if not function:
        raise UserError(f"{run} is a run of {about.get('name')}, which predicts nothing; give a run of text2tree or "
                        "ner, or of another experiment that does")
    status = (read_json(run / RESULTS) or {}).get("status", "not begun")
    if status != "complete":
        raise UserError(f"{run} is not finished (status: {status}); run it to its end first, with the same command")
    return function, about.get("config") or {}


def read_column(path: str | Path, column: str) -> tuple[list[str], dict[str, int]]:
    """(the texts of a CSV's column, counts of what was amiss but can be used). Raises UserError for what cannot."""
    counts: collections.Counter[str] = collections.Counter()
    path = Path(path).expanduser()
    rows = [(line, row[column]) for line, row in csv_rows(path, [column], counts, "--column")]
    if not rows:
        raise UserError(f"{path} has no row below its header; give at least one text")
    if empty := [line for line, text in rows if not text.strip()]:
        raise UserError(f"{path}: {len(empty)} of {len(rows)} texts in {column!r} are empty, line {_some(empty)}; fill "
                        "or drop these rows")
    return [text for _, text in rows], {name: count for name, count in counts.items() if count}


def command(arguments: argparse.Namespace, print_table: Callable[[list[tuple[str, ...]]], None]) -> None:
    """``jaxmodels predict``: run; text (a list) or csv and column; top; out."""
    if (arguments.csv is None) != (arguments.column is None):
        raise UserError("--csv FILE and --column NAME belong together; give both, or --text alone")
    finished(Path(arguments.run))  # told of before a large file is read
    texts, amiss = (arguments.text, {}) if arguments.text else read_column(arguments.csv, arguments.column)
    found = predict(arguments.run, texts, arguments.top)
    answered: set[int] = set()

    def table() -> Iterator[tuple[str, ...]]:
        yield ("text", *found.columns)
        for text, values in found.rows:
            answered.add(text)
            yield (str(text + 1), *(f"{value:.6f}" if isinstance(value, float) else str(value) for value in values))

    if arguments.out:
        write_csv(Path(arguments.out), table())
        print(arguments.out)
    else:
        print_table(list(table()))
    for name, count in amiss.items():
        print(f"jaxmodels: {arguments.csv}: {name}: {count}", file=sys.stderr)
    if silent := len(texts) - len(answered):
        print(f"jaxmodels: {silent} of {len(texts)} texts have {found.silence}", file=sys.stderr)


def write_csv(path: Path, rows: Iterable[Sequence[str]]) -> None:
    """Whole or not at all."""

    def write(file: IO[bytes]) -> None:
        wrapped = io.TextIOWrapper(file, encoding="utf-8", newline="")
        csv.writer(wrapped).writerows(rows)
        wrapped.detach()  # flushed, and left open for whoever opened it

    write_atomic(path, write)


def _some(lines: Sequence[int]) -> str:
    return ", ".join(map(str, lines[:SHOWN])) + (" ..." if len(lines) > SHOWN else "")
