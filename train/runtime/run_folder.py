"""The run folder: the same files from every run, so that every tool can read every run (architecture.md section 3).

    config.json      resolved config, versions, git commit, device
    metrics.jsonl    one object a line with `step`, each step once
    results.json     the numbers of a paper's table, flat keys, and `status`: running, complete, interrupted or failed
    report.html      self-contained
    tensorboard/     events
    checkpoints/     training only

The folder's name carries the hash of the config, so the same command finds its own folder again and goes on. A
``flock`` keeps two processes out of one folder; the kernel frees it when a process dies, kill -9 included, so no stale
lock can remain.
"""

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np

from jaxmodels.errors import Interrupted, UserError
from train.runtime import environment, files
from train.runtime.config import config_hash
from train.runtime.progress import Advance, progress
from train.runtime.signals import stop

LOCK, CONFIG, METRICS, RESULTS = ".lock", "config.json", "metrics.jsonl", "results.json"
ALONE = ".alone.lock"  # ends the names of the locks of what runs share
HOUSE_FILES = {LOCK, CONFIG, RESULTS}  # with those locks, all that a run that never started leaves behind
POLL = 0.2  # seconds between two looks at a lock that another process holds


class RunFolder:
    """One run's folder, locked while it is open. Use it as a context manager: the way it ends becomes `status`.

    resumed: whether an earlier start was here; was_complete: whether it came to its end. shared: where what several
    stages can use is kept (the outermost folder). writes: whether this process writes the run's files.
    """

    writes = True

    def __init__(self, directory: str | Path, config: Mapping[str, Any], name: str = "run",
                 operational: Sequence[str] = (), defaults: Mapping[str, Any] = MappingProxyType({})):
        """Makes or reopens `directory` for the run `name` of `config` (plain JSON values).

        operational: dotted keys that say how a run is carried out (on which mesh, how often it saves), not what it is:
        a run may be continued with others. defaults: what a key stands for that a run does not have, because it was
        begun by a version that did not have it either.
        Raises UserError if it cannot be written, is in use, holds another config's run or is not a run folder.
        """
        self.dir = self.shared = Path(directory)
        self.name = name
        self.config, self._operational, self._defaults = files.plain(dict(config)), tuple(operational), dict(defaults)
        self._stages: list[RunFolder] = []
        self._metrics = self._events = None
        self._lock = _lock(self.dir)
        try:
            self.resumed = self._claim()
            self.was_complete = self.resumed and self.results().get("status") == "complete"
            self._last_step = self._repair_metrics()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(
        cls, name: str, config: Mapping[str, Any], out: str | Path | None = None, root: str | Path = "runs",
        follower: bool = False, operational: Sequence[str] = (), defaults: Mapping[str, Any] = MappingProxyType({}),
    ) -> "RunFolder":
        """``root/name-<hash of config>``, or `out`. follower: one of several processes, and not the first."""
        kind = Follower if follower else cls
        digest = _digest(files.plain(dict(config)), operational, defaults)
        return kind(Path(out) if out else Path(root) / f"{name}-{digest}", config, name, operational, defaults)

    # Numbers

    def log(self, step: int, **metrics: Any) -> None:
        """Appends one line to metrics.jsonl and one point a number to TensorBoard; on disk when it returns.

        Raises ValueError for a step that is already there: a resuming run calls `truncate_metrics` first.
        """
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"step {step} is not after the last logged step {self._last_step}; truncate_metrics first")
        values = files.plain(metrics)
        line = json.dumps({"step": int(step), **values}, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            if self._metrics is None:
                self._metrics = open(self.dir / METRICS, "ab", buffering=0)  # noqa: SIM115 (open while the run is)
            whole = line.encode()
            if self._metrics.write(whole) < len(whole):  # one unbuffered write: a kill tears at most the last line
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # else the next would follow a torn one
        except OSError as error:
            raise files.CannotSave(f"cannot write {self.dir / METRICS}: {error.strerror}; free space") from error
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self._writer(step).add_scalar(name, value, step)
        self._last_step = int(step)

    def truncate_metrics(self, step: int) -> None:
        """Drops every line after `step`, the step that was restored."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        self._close_writers()
        _rewrite(self.dir / METRICS, kept)
        self._last_step = kept[-1]["step"] if kept else None

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl so far."""
        return read_metrics(self.dir)

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Merges flat keys into results.json, atomically."""
        files.write_json(self.dir / RESULTS, {**self.results(), **results})

    def results(self) -> dict[str, Any]:
        """What results.json holds now."""
        return files.read_json(self.dir / RESULTS) or {}

    # Files

    def path(self, *parts: str) -> Path:
        """A path inside the folder; its parents are made."""
        path = self.dir.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def save_npz(self, name: str, **arrays: Any) -> Path:
        """Writes ``name.npz`` (`name` may contain slashes) whole or not at all."""
        return files.save_npz(self.dir / f"{name}.npz", arrays)

    def load_npz(self, name: str) -> dict[str, np.ndarray] | None:
        """Arrays of ``name.npz``; None if it is absent or (with a warning) damaged: compute it again."""
        return files.load_npz(self.dir / f"{name}.npz")

    def stage(self, name: str, config: Mapping[str, Any] | None = None, operational: Sequence[str] = (),
              defaults: Mapping[str, Any] = MappingProxyType({})) -> "RunFolder":
        """A run folder inside this one for one stage of a study, closed with it. Use it in a ``with`` block too."""
        config = self.config if config is None else config
        stage = type(self)(self.dir / name, config, f"{self.name}/{name}", operational, defaults)
        stage.shared = self.shared
        self._stages.append(stage)
        return stage

    @contextlib.contextmanager
    def alone(self, path: Path) -> Iterator[None]:
        """Keeps other processes from making `path`, in `shared`, until the block ends; waits for one that does.

        What is there has to be looked at inside. Raises Interrupted if this process is asked to stop while it waits.
        """
        with open(self.shared / f".{path.name}{ALONE}", "wb") as lock:
            while not _is_ours(lock.fileno()):
                self.check_stop()
                time.sleep(POLL)
            yield

    # Time

    def progress(self, total: int, label: str, done: int = 0) -> AbstractContextManager[Advance]:
        """Bar with ETA on stderr; yields ``advance(n=1, note="")``. See `train.runtime.progress`."""
        return progress(total, label, done)

    def check_stop(self) -> None:
        """Raises Interrupted if a signal has asked to stop. Call it between units of work, after saving."""
        stop.check()

    # Life

    def __enter__(self) -> "RunFolder":
        self._started = time.monotonic()
        results = {key: value for key, value in self.results().items() if key != "error"}
        files.write_json(self.dir / RESULTS, {**results, "status": "running"})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, UserError) and not self.resumed and not self._strangers():
                self._remove()  # bad input leaves nothing half-written
                return
            end = {"status": "complete"}
            if not self.was_complete:  # of all starts together, but for those that were killed
                end["seconds"] = round(self.results().get("seconds", 0) + time.monotonic() - self._started, 3)
            if isinstance(error, (Interrupted, KeyboardInterrupt)):
                end["status"] = "interrupted"
            elif error is not None:
                end |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
            with contextlib.suppress(files.CannotSave) if error else contextlib.nullcontext():  # keep the first error
                self.write_results(end)
        finally:
            self.close()

    def close(self) -> None:
        """Frees the lock; `results.json` keeps its status."""
        for stage in self._stages:
            stage.close()
        self._close_writers()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # Inside

    def _claim(self) -> bool:
        """Whether an earlier run of the same config was here; writes config.json if none was."""
        before = files.read_json(self.dir / CONFIG)
        if before is None:
            strangers = [name for name in self._strangers() if not name.startswith(f".{CONFIG}.")]  # killed claiming
            if strangers:
                raise UserError(f"{self.dir} is not a run folder: it holds {strangers[0]!r}; choose a new folder")
            self._describe()
            return False
        recorded = _filled(before.get("config") or {}, self._defaults)
        old, new = (_without(config, self._operational) for config in (recorded, self.config))
        if old != new or before.get("name") != self.name:
            change = _first_difference(old, new) or f"name {before.get('name')!r}"
            raise UserError(f"{self.dir} holds a run of another config ({change}); choose another --out")
        if before["config"] != self.config:
            self._describe()
        return True

    def _describe(self) -> None:
        about = {"name": self.name, "config": self.config}
        about["hash"] = _digest(self.config, self._operational, self._defaults)
        files.write_json(self.dir / CONFIG, about | environment.describe())

    def _repair_metrics(self) -> int | None:
        """Drops a torn last line (kill -9, full disk); returns the last step."""
        path = self.dir / METRICS
        if not path.exists():
            return None
        lines = self.metrics()
        if path.read_bytes().count(b"\n") != len(lines) or not path.read_bytes().endswith(b"\n"):
            _rewrite(path, lines)
        return lines[-1]["step"] if lines else None

    def _writer(self, step: int) -> Any:
        if self._events is None:
            from tensorboardX import SummaryWriter

            # purge_step: TensorBoard forgets points that the truncated run had logged from here on
            self._events = SummaryWriter(str(self.dir / "tensorboard"), purge_step=step)
        return self._events

    def _close_writers(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
        if self._events is not None:
            with contextlib.suppress(OSError):  # a full disk: the error that ended the run is the one to tell
                self._events.close()
        self._metrics = self._events = None

    def _remove(self) -> None:
        """Of a folder without strangers: a link to it, or a current folder, may not go, and is left empty."""
        for path in self.dir.iterdir():
            path.unlink()
        with contextlib.suppress(OSError):
            self.dir.rmdir()

    def _strangers(self) -> list[str]:
        """Names of what is no file of the house."""
        names = sorted(path.name for path in self.dir.iterdir())
        return [name for name in names if name not in HOUSE_FILES and not name.endswith(ALONE)]


class Follower(RunFolder):
    """The run folder as every process but the first sees it: it reads what is there and writes nothing.

    (Checkpoints are written by all processes together; they do not go through here.)
    """

    writes = False

    def __init__(self, directory: str | Path, config: Mapping[str, Any], name: str = "run",
                 operational: Sequence[str] = (), defaults: Mapping[str, Any] = MappingProxyType({})):
        self.dir = self.shared = Path(directory)
        self.name, self.config = name, files.plain(dict(config))
        self.resumed, self._stages = (self.dir / CONFIG).exists(), []
        self.was_complete = self.results().get("status") == "complete"

    def log(self, step: int, **metrics: Any) -> None: ...
    def truncate_metrics(self, step: int) -> None: ...
    def write_results(self, results: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...

    def save_npz(self, name: str, **arrays: Any) -> Path:
        return self.dir / f"{name}.npz"

    def alone(self, path: Path) -> AbstractContextManager[None]:
        return contextlib.nullcontext()  # the first process may hold the lock while it waits for this one

    def progress(self, total: int, label: str, done: int = 0) -> AbstractContextManager[Advance]:
        return contextlib.nullcontext(lambda n=1, note="": None)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *error: object) -> None: ...


class Lent(Follower):
    """The folder of a sweep in a process that only runs its trials: another one holds and writes it."""

    def stage(self, name: str, config: Mapping[str, Any] | None = None, operational: Sequence[str] = (),
              defaults: Mapping[str, Any] = MappingProxyType({})) -> RunFolder:
        config = self.config if config is None else config
        stage = RunFolder(self.dir / name, config, f"{self.name}/{name}", operational, defaults)
        stage.shared = self.shared
        return stage


def is_complete(directory: str | Path) -> bool:
    """Whether a folder holds a run that came to its end; not if nobody can tell."""
    with contextlib.suppress(UserError):
        return (files.read_json(Path(directory) / RESULTS) or {}).get("status") == "complete"
    return False


def read_metrics(directory: str | Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl up to the first that is torn; [] if there is no file."""
    lines = []
    with contextlib.suppress(FileNotFoundError, ValueError):
        for line in (Path(directory) / METRICS).read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            lines.append(json.loads(line))
    return lines


def _rewrite(path: Path, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    files.write_atomic(path, lambda file: file.write(text.encode()))


def _without(config: Mapping[str, Any], keys: Sequence[str], prefix: str = "") -> dict[str, Any]:
    """`config` less some dotted keys (a group's name stands for all of its keys)."""
    return {key: _without(value, keys, f"{prefix}{key}.") if isinstance(value, Mapping) else value
            for key, value in config.items() if f"{prefix}{key}" not in keys}


def _filled(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the keys of `defaults` that it lacks."""
    filled = {**defaults, **config}
    for key in config.keys() & defaults.keys():
        if isinstance(config[key], Mapping) and isinstance(defaults[key], Mapping):
            filled[key] = _filled(config[key], defaults[key])
    return filled


def _digest(config: Mapping[str, Any], operational: Sequence[str], defaults: Mapping[str, Any]) -> str:
    """Hash of what differs from the defaults: a key that a later version adds does not rename older runs."""
    return config_hash(_unlike(_without(config, operational), defaults))


def _unlike(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and isinstance(defaults.get(key), Mapping):
            value = _unlike(value, defaults[key])
            if not value:
                continue
        elif key in defaults and defaults[key] == value:
            continue
        found[key] = value
    return found


def _lock(directory: Path) -> int:
    """File descriptor that holds the folder's lock. Raises UserError if the folder is in use or cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"cannot write run folder {directory}: {error.strerror}; choose a writable --out") from error
    if not _is_ours(descriptor):
        owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise UserError(f"{directory} is in use by process {owner}; wait for it, stop it or choose another --out")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _is_ours(descriptor: int) -> bool:
    """Takes the lock of an open file, unless another process holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _first_difference(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> str:
    """``key: old -> new`` for the first key in which two configs differ; empty if none does."""
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            if inner := _first_difference(old, new, f"{prefix}{key}."):
                return inner
        elif old != new:
            return f"{prefix}{key}: {old!r} -> {new!r}"
    return ""
