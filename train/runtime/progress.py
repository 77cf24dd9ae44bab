"""A progress bar with ETA on stderr; plain, occasional lines where stderr is not a terminal."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

PLAIN_SECONDS = 10.0  # between two lines in a log file

Advance = Callable[..., None]


@contextlib.contextmanager
def progress(total: int, label: str, done: int = 0) -> Iterator[Advance]:
    """Yields ``advance(n=1, note="")``.

    Args:
      total: units of work in all.
      label: what is counted, a word or three.
      done: units that an earlier run has finished; they do not enter the ETA.
    """
    stream = sys.stderr
    with _bar(total, label, done) if stream.isatty() else _lines(total, label, done) as advance:
        yield advance


@contextlib.contextmanager
def _bar(total: int, label: str, done: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, completed=done, note="")
        yield lambda n=1, note="": bar.update(task, advance=n, note=note)


@contextlib.contextmanager
def _lines(total: int, label: str, done: int) -> Iterator[Advance]:
    start = last = time.monotonic()
    finished, printed = done, done

    def show(note: str = "") -> None:
        nonlocal last, printed
        last, printed = time.monotonic(), finished
        rate = (finished - done) / max(last - start, 1e-9)
        eta = f", ETA {clock((total - finished) / rate)}" if rate and finished < total else ""
        print(f"{label}: {finished}/{total} in {clock(last - start)}{eta} {note}".rstrip(), file=sys.stderr, flush=True)

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal finished
        finished += n
        if time.monotonic() - last >= PLAIN_SECONDS:
            show(note)

    yield advance
    if finished != printed:
        show()


def clock(seconds: float) -> str:
    """``1:02:03``, ``4:05`` or ``6.7 s``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
