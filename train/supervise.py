"""Starts a run again when it was preempted or killed (training_runtime.md section 6).

    python -m train.supervise [--max-restarts N] [--backoff S] [--run DIR] -- jaxmodels run lm_moe_pretrain --out DIR

A run resumes from its newest checkpoint, so the same command is all that a restart needs. Exit codes 75 (preempted and
saved), 134, 137 and 143 (aborted, killed, terminated) start it again; any other is the end, and is passed on. Imports
nothing heavy: what watches a run must not die of what the run dies of.
"""

import argparse
import contextlib
import glob
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxmodels.errors import UserError

RESTART = (75, 134, 137, 143)
LONGEST = 60.0  # seconds between two starts
IDLE = 2  # starts in a row without anything new (see `committed`), after which the trouble is not the machine's
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FORWARDED = {signal.SIGTERM: signal.SIGTERM, signal.SIGINT: signal.SIGINT, signal.SIGUSR1: signal.SIGUSR1,
             signal.SIGHUP: signal.SIGTERM}  # a closed terminal: the run saves, as for SIGTERM
COMMITTED = "commit_success.txt"  # in a finished checkpoint; checkpoint_folder.py, which says so too, imports jax
RESULTS = "results.json"  # of a run; run_folder.py, likewise


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message} (see python -m train.supervise --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command until it ends for good; returns its exit code, 2 for bad usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    try:
        arguments = _parser().parse_args(argv[:cut])
        command = argv[cut + 1:]
        if not command:
            raise UserError("no command; write it after --, as in: python -m train.supervise -- jaxmodels run NAME")
        return _supervise(command, arguments.max_restarts, arguments.backoff, arguments.run)
    except UserError as error:
        _say(str(error))
        return error.exit_code


def _parser() -> Parser:
    parser = Parser(prog="python -m train.supervise", allow_abbrev=False, usage="%(prog)s [options] -- COMMAND ...",
                    description="Starts COMMAND again when it was preempted or killed.")
    parser.add_argument("--max-restarts", type=int, default=10, metavar="N", help="in all (default 10)")
    parser.add_argument("--backoff", type=float, default=1.0, metavar="S",
                        help=f"seconds to wait, doubled up to {LONGEST:g} while no checkpoint comes (default 1)")
    parser.add_argument("--run", metavar="DIR", help="the run folder, if COMMAND has no --out DIR")
    return parser


def _supervise(command: Sequence[str], max_restarts: int, backoff: float, run: str | None) -> int:
    if max_restarts < 0 or not backoff >= 0:
        raise UserError(f"--max-restarts {max_restarts} and --backoff {backoff:g} must be at least 0")
    folders = _folders(command, run)
    restarts = idle = doublings = 0
    with _Signals() as signals:
        while True:
            before = committed(folders)
            code = _exit_code(_run_once(command, signals))
            if signals.stopped or code not in RESTART:
                return code
            if folders and committed(folders) - before:
                idle = doublings = 0
            elif folders:
                idle += 1
            told = f"the command ended with {_name(code)}"
            if idle >= IDLE:
                _say(f"{told}; {IDLE} starts in a row committed no new step and finished no run in {folders[0]}: "
                     "giving up")
                return code
            if restarts == max_restarts:
                _say(f"{told}; {max_restarts} restarts are used up (--max-restarts)")
                return code
            if not folders and not restarts:
                _say("neither --run DIR nor --out DIR in the command: whether restarts get anywhere is not checked")
            restarts, delay = restarts + 1, min(backoff * 2.0 ** min(doublings, 32), LONGEST)
            doublings += 1
            _say(f"{told}; restart {restarts} of {max_restarts} in {delay:g} s")
            signals.wait(delay)
            if signals.stopped:
                return code


def _run_once(command: Sequence[str], signals: "_Signals") -> int:
    """Runs the command to its end; what signals come in the meantime are passed to it."""
    try:
        # A session of its own: Ctrl-C in a terminal reaches a whole process group, and the command would get it twice,
        # from the terminal and from here; a run takes the second one as "at once, do not save".
        child = subprocess.Popen(command, start_new_session=True)
    except OSError as error:
        raise UserError(f"cannot start {command[0]}: {error.strerror}; check the command after --") from error
    while child.poll() is None:
        for number in signals.wait(None):
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(FORWARDED[number])
    return child.returncode


class _Signals:
    """Signals as a queue: handlers that only fill a socket leave no moment in which one could be missed."""

    def __init__(self) -> None:
        self.stopped = False  # the supervisor itself was asked to stop
        self._read, self._write = socket.socketpair()
        for end in (self._read, self._write):
            end.setblocking(False)

    def __enter__(self) -> "_Signals":
        # What was ignored at the start stays so: nohup means it.
        numbers = [number for number in (*FORWARDED, signal.SIGCHLD) if signal.getsignal(number) != signal.SIG_IGN
                   or number == signal.SIGCHLD]
        self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._read.close()
        self._write.close()

    def wait(self, seconds: float | None) -> Iterator[signal.Signals]:
        """Signals to pass on. Returns when any came, a child's end included; after `seconds` only if asked to stop."""
        end = None if seconds is None else time.monotonic() + seconds
        found: list[signal.Signals] = []
        while True:
            left = None if end is None else max(end - time.monotonic(), 0.0)
            if not select.select([self._read], [], [], left)[0]:
                break
            with contextlib.suppress(BlockingIOError):
                found += map(signal.Signals, self._read.recv(4096))
            self.stopped |= any(number in STOPPING for number in found)
            if end is None or self.stopped:
                break
        return iter([number for number in found if number in FORWARDED])


# Progress


def committed(folders: Sequence[Path]) -> set[tuple[str, int]]:
    """Finished checkpoints, and finished runs: (path, when). However deep: a sweep has trials, a study stages. The time
    of a checkpoint counts: a step may be made anew after a damaged one was set aside.

    A step is committed when its folder is named by its number and holds orbax's marker.
    """
    found = set()
    for folder in folders:
        inside = os.path.join(glob.escape(str(folder)), "**", "")
        for marker in glob.iglob(f"{inside}[0-9]*/{COMMITTED}", recursive=True):
            step = os.path.dirname(marker)
            if re.fullmatch(r"\d+", os.path.basename(step)):
                with contextlib.suppress(OSError):
                    found.add((step, os.stat(marker).st_mtime_ns))
        for results in glob.iglob(f"{inside}{RESULTS}", recursive=True):  # a trial at its end may drop its checkpoints
            with contextlib.suppress(OSError, ValueError, AttributeError):
                if json.loads(Path(results).read_text(encoding="utf-8")).get("status") == "complete":
                    found.add((results, 0))
    return found


def _folders(command: Sequence[str], run: str | None) -> list[Path]:
    """Where the run writes, from --run, or from the command's --out; [] if neither is there."""
    words, local = list(command), []
    for i, word in enumerate(words):
        if word == "--out" and i + 1 < len(words):
            run = run or words[i + 1]
        elif word.startswith("--out="):
            run = run or word.removeprefix("--out=")
        elif word.startswith("loop.local_dir="):  # the second, more frequent tier
            local.append(Path(word.removeprefix("loop.local_dir=")))
    return [Path(run), *local] if run else []


def _exit_code(returncode: int) -> int:
    """As a shell tells it: 128 + n for signal n."""
    return 128 - returncode if returncode < 0 else returncode


def _name(code: int) -> str:
    with contextlib.suppress(ValueError):
        return f"{code} ({signal.Signals(code - 128).name})"
    return f"{code} (preempted and saved)" if code == 75 else str(code)


def _say(line: str) -> None:
    print(f"supervise: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
