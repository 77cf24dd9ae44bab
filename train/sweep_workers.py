"""Groups of a sweep's trials in several processes of this machine: ``jaxmodels sweep NAME grid=... workers=N``.

The sweep's own process computes nothing. It hands out groups, one at a time to every worker, and hears how they ended.
A worker stays until none is left, so that it imports and compiles once; what it prints, and its trials, is in
``logs/worker-<n>.log`` of the sweep's folder.

Down a worker's pipe go lines: the number of a group, "save" and "stop" (SIGUSR1 and SIGTERM to a run), "end". Up come
"ready" and, for every group at its end, the trials that failed. A pipe that closes without "end" says that the sweep's
process is dead: the worker saves and ends too.
"""

import collections
import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import IO

from jaxmodels.errors import Interrupted, UserError
from train.runtime.config import load_function
from train.runtime.run_folder import Lent, RunFolder, is_complete
from train.runtime.signals import stop

POLL = 0.2  # seconds between two looks at whether a signal has come
TRIES = 2  # workers that may die of a group: the first may have been killed for what another did
MEMORY = 0.9  # share of a GPU's memory that the workers divide, at most
FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # jax takes either and refuses both
SIGNALS = {"save": signal.SIGUSR1, "stop": signal.SIGTERM}

Failures = Mapping[str, Exception]  # folder of a trial -> what it failed with


# In the sweep's process


class Worker:
    """A process that runs one group after another. group: the number of the one it runs, None for none."""

    def __init__(self, place: int, count: int, asked: Sequence[str], folder: RunFolder):
        """place: from 0, below `count`. asked: see `run_groups`."""
        self.place, self.count, self.asked, self.folder = place, count, asked, folder
        self.name, self.log = f"worker {place + 1}", folder.path("logs", f"worker-{place + 1}.log")
        self.group: int | None = None
        # -P and the path: a worker imports what this process does, and nothing that lies in the current folder instead
        command = [sys.executable, "-P", "-X", "faulthandler", "-m", "train.sweep_workers", str(folder.dir), *asked]
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        # Taken as it is needed: besides what jax takes, every process has half a GiB of CUDA's own on the GPU.
        environment = {} if os.environ.keys() & set(FRACTIONS) else {
            FRACTIONS[1]: f"{MEMORY / count:.4f}", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        with open(self.log, "ab") as log, _on(cores(place, count)):
            # A session of its own: Ctrl-C in a terminal reaches a whole process group, and this process passes it on.
            self.process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths, **environment}, bufsize=0,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                                            start_new_session=True)

    def tell(self, line: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has died, which its other pipe says
            self.process.stdin.write(f"{line}\n".encode())

    def take(self, group: int | None) -> None:
        """The next group; None: there is none, and the process ends."""
        self.group = group
        self.tell("end" if group is None else group)

    def again(self) -> "Worker":
        return Worker(self.place, self.count, self.asked, self.folder)


def run_groups(groups: Mapping[int, Collection[str]], workers: int, asked: Sequence[str], folder: RunFolder,
               ended: Callable[[int, Failures], None]) -> None:
    """Runs groups of a sweep, number -> folders of trials, up to `workers` at once; calls ended(number, failures).

    asked: the arguments of `train.sweep.plan`, which every worker asks again. folder: the sweep's.
    Returns early, when all have saved, if a signal asks this process to stop. Raises UserError on a TPU.
    """
    import jax

    if jax.default_backend() == "tpu":
        raise UserError(f"workers={workers}: a TPU belongs to one process; leave it out, together=N fills a device too")
    count = min(workers, len(groups))
    if count < workers:
        _say(f"workers={workers} is more than there is to run; {count} started")
    _say(f"what the workers print is in {folder.path('logs', 'worker-*.log')}")
    waiting, deaths = collections.deque(groups), collections.Counter[int]()
    running: list[Worker] = []
    stopping, saves = False, stop.saves
    try:
        for place in range(count):
            running.append(Worker(place, count, asked, folder))
        while running:
            if saves != stop.saves:
                saves = stop.saves
                _tell(running, "save")
            if stop.requested and not stopping:
                stopping = True
                waiting.clear()
                _tell(running, "stop")
            for worker, line in _heard(running):
                if line.endswith(b"\n"):
                    if worker.group is not None:
                        ended(worker.group, {name: failure(*told) for name, told in json.loads(line).items()})
                    worker.take(waiting.popleft() if waiting else None)
                    continue
                running.remove(worker)
                code = worker.process.wait()
                if code in (0, Interrupted.exit_code) and (worker.group is None or stopping):
                    continue
                told = f"{worker.name} ended with {_name(code)} (see {worker.log})"
                if worker.group is None:  # it has not come to a first one, and another would not
                    _say(f"{told} before it ran anything")
                    continue
                deaths[worker.group] += 1
                _say(f"{told} in {', '.join(groups[worker.group])}")
                if deaths[worker.group] == TRIES:
                    ended(worker.group, _lost(groups[worker.group], folder, f"{told}, as one before it"))
                elif not stopping:
                    waiting.append(worker.group)
                if waiting:
                    running.append(worker.again())
        for number in waiting:
            ended(number, _lost(groups[number], folder, f"no worker is left to run it; see {folder.path('logs')}"))
    finally:
        for worker in running:  # after an error here: as if this process had died
            worker.process.stdin.close()
            worker.process.wait()


def cores(place: int, count: int) -> Collection[int]:
    """The cores of one of `count` workers, of those that this process may use: parts as equal as they can be."""
    if not hasattr(os, "sched_getaffinity"):
        return ()
    every = sorted(os.sched_getaffinity(0))
    if count > len(every):
        return every[place % len(every)],
    return every[place * len(every) // count:(place + 1) * len(every) // count]


@contextlib.contextmanager
def _on(cores: Collection[int]) -> Iterator[None]:
    """Processes that start inside the block keep to these cores, and XLA and BLAS make as many threads."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _heard(running: Sequence[Worker]) -> list[tuple[Worker, bytes]]:
    """Workers and what each says, b"" for one that has ended; after a moment [], to look for signals."""
    ready = select.select([worker.process.stdout for worker in running], [], [], POLL)[0]
    lines = [(worker, worker.process.stdout.readline()) for worker in running if worker.process.stdout in ready]
    # a pipe does not close while some process that the dead one has left behind holds it
    return lines or [(worker, b"") for worker in running if worker.process.poll() is not None]


def _lost(trials: Collection[str], folder: RunFolder, told: str) -> Failures:
    """Those of a group that are not complete, with why."""
    return {name: RuntimeError(told) for name in trials if not is_complete(folder.dir / name)}


def exit_code_of(error: Exception) -> int | None:
    return error.exit_code if isinstance(error, UserError) else None


def failure(told: str, exit_code: int | None) -> Exception:
    """An error with a UserError's exit code; None: one that no user is to blame for."""
    if exit_code is None:
        return RuntimeError(told)
    error = UserError(told)
    error.exit_code = exit_code
    return error


def _name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _tell(workers: Sequence[Worker], line: str) -> None:
    for worker in workers:
        worker.tell(line)


def _say(line: str) -> None:
    print(f"sweep: {line}", file=sys.stderr, flush=True)


# In a worker


def main(directory: str, name: str, *words: str) -> int:
    """Runs the groups whose numbers come down the pipe, until there are no more. Returns the exit code."""
    from train.sweep import Trial, plan, run_group  # imports this module

    commands, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # into the log
    sys.stdout.reconfigure(line_buffering=True)
    sweep = plan(name, words)
    folder = Lent(directory, sweep.config, sweep.name)
    numbers: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    failures: dict[str, tuple[str, int | None]] = {}

    def failed(trial: Trial, error: Exception) -> None:
        traceback.print_exception(error)
        failures[trial.folder] = str(error), exit_code_of(error)

    with stop.listening(ends=True):
        threading.Thread(target=_listen, args=(commands, numbers), daemon=True).start()
        print("ready", file=replies)
        try:
            while (number := numbers.get()) is not None:
                group = sweep.groups[number]
                print(f"{group[-1].folder}:", flush=True)
                failures.clear()
                run_group(group, folder, lambda stage, function: load_function(function)(stage), failed)
                print(json.dumps(failures), file=replies)
        except Interrupted:
            return Interrupted.exit_code
    return 0


def _listen(commands: IO[str], numbers: "queue.SimpleQueue[int | None]") -> None:
    """Passes on what the sweep's process says."""
    word = ""
    for line in commands:
        word = line.strip()
        if word in SIGNALS:
            _signal(SIGNALS[word])
        if word in ("stop", "end"):
            numbers.put(None)
        elif word.isdecimal():
            numbers.put(int(word))
        if word == "end":
            return
    if word == "stop":  # and then that process was killed: a second Ctrl-C, which means at once
        os._exit(Interrupted.exit_code)
    _signal(signal.SIGTERM)
    numbers.put(None)


def _signal(number: int) -> None:
    signal.pthread_kill(threading.main_thread().ident, number)


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # as jaxmodels.cli does: everything is saved, and threads that read data may hang
