"""Benchmarks on a GPU that is there for a short while: steps as processes, each with its own time, all with one.

    python3 -m benchmarks.on_gpu --out FILE.json [--seconds 100] [--stages kernels,...] [--folder DIR]

The steps of a stage run side by side: their compilers share the cores, and those that measure wait for each other
(_alone.py). A step that fails, hangs or is killed for its time costs itself alone. After --seconds all that still runs
is killed and no stage begins; what did not run is named. FILE.json is written whenever a step ends, and holds what each
step wrote to its own file until then, its exit status and the end of what it printed.

A step that should run at another occasion is one more line of STEPS.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._alone import VARIABLE
from jaxmodels.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
LINES, WIDTH, SHOWN = 60, 240, 12  # of what a step printed that are kept, and shown of one that failed
KEYS = ("key", "point", "model", "product", "side", "step", "result", "ms", "TFLOP/s", "of peak", "of dense",
        "tokens/s", "MFU", "of matmul", "row error", "note")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Step:
    """argv: after ``python``; {out} in it is a file of the step's own, which it writes as JSON. memory: share of the
    GPU's that jax may take. seconds: its own limit, from the start of its stage."""

    stage: str
    name: str
    argv: tuple[str, ...]
    seconds: float
    memory: float = 0.9
    environment: tuple[tuple[str, str], ...] = ()


def _kernel(product: str) -> Step:
    return Step("kernels", f"hopper {product}", ("-m", "benchmarks.hopper_run", "--products", product,
                                                 "--seconds", "75", "--out", "{out}"), 90, 0.14)  # fmt: skip


def _train(size: str, name: str) -> Step:
    # Batch 4: both plan 25 GiB, and run side by side. O1 and no Triton products: nothing but time to compile is less.
    argv = ("-m", "benchmarks.train_step", "--sizes", size, "--batch", "4", "--repeats", "5", "--steps", "5",
            "--no-peers", "--out", "{out}")  # fmt: skip
    quick = (("JAX_OPTIMIZATION_LEVEL", "O1"), ("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false"))
    return Step("train", f"train {name}", argv, 150, 0.45, quick)


STEPS = (
    *(_kernel(product) for product in ("forward", "dx", "dw", "glu", "glu_kept")),
    Step("kernels", "torch grouped_mm", ("-m", "benchmarks._grouped_peers", "--points", "Qwen3-30B-A3B", "Mixtral-8x7B",
                                         "--distributions", "random", "--seconds", "0.2", "--out", "{out}"), 60),
    _train("dense 124M", "dense 124M"),
    _train("8 experts top-2, 124M active", "experts 124M"),
)  # fmt: skip


def main(out: str | None, seconds: float = 100.0, stages: Sequence[str] = (), folder: str | None = None,
         steps: Sequence[Step] = STEPS) -> bool:  # fmt: skip
    """Runs the steps of `stages` (all), and says whether all went well. folder: of the steps' own files."""
    if out is None:
        raise UserError("--out is needed: the file that keeps what each step wrote")
    known = list(dict.fromkeys(step.stage for step in steps))
    for name in stages:
        if name not in known:
            raise UserError(f"stage {name!r} is unknown; choose from {', '.join(known)}")
    with contextlib.ExitStack() as stack:
        place = Path(folder or stack.enter_context(tempfile.TemporaryDirectory()))
        place.mkdir(parents=True, exist_ok=True)
        record = Record(Path(out), [step for step in steps if not stages or step.stage in stages], seconds)
        for stage in (name for name in known if not stages or name in stages):
            _stage([step for step in record.steps if step.stage == stage], record, place)
    print(record.table(), flush=True)
    return all(one["state"] == "done" for one in record.told.values())


class Record:
    """What became of each step, on the disk whenever it changes."""

    def __init__(self, out: Path, steps: Sequence[Step], seconds: float):
        self.out, self.steps, self.start = out, steps, time.monotonic()
        self.end = self.start + seconds
        self.told: dict[str, dict[str, Any]] = {
            step.name: {"stage": step.stage, "state": "skipped", "argv": step.argv} for step in steps}
        self.write()

    def add(self, step: Step, **found: Any) -> None:
        self.told[step.name] |= found
        self.write()

    def write(self) -> None:
        part = Path(f"{self.out}.part")
        content = {"seconds": time.monotonic() - self.start, "steps": self.told}
        part.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        os.replace(part, self.out)

    def table(self) -> str:
        return "\n".join(f"{one['state']:>10}  {one.get('seconds', 0):6.1f} s  {name}"
                         for name, one in self.told.items())  # fmt: skip


@dataclasses.dataclass
class Running:
    step: Step
    process: subprocess.Popen
    printed: Path
    file: Path
    start: float

    def over(self, now: float, end: float) -> bool:
        return self.process.poll() is not None or now > min(self.start + self.step.seconds, end)


def _stage(steps: Iterable[Step], record: Record, folder: Path) -> None:
    """Starts them together; returns when the last has ended."""
    lock = folder / "lock"
    lock.touch()
    running: list[Running] = []
    try:
        for step in steps:
            if time.monotonic() >= record.end:
                print(f"-- skipped: {step.name}: no time left", flush=True)
                continue
            record.add(step, state="running")
            try:
                running.append(_begin(step, folder, {VARIABLE: str(lock)}))
            except OSError as error:
                record.add(step, state="failed", printed=[str(error)])
        while running:
            for one in [one for one in running if one.over(time.monotonic(), record.end)]:
                running.remove(one)
                _end(one, record)
            time.sleep(0.05)
    finally:  # interrupted: nothing stays on the device
        for one in running:
            _kill(one.process)


def _begin(step: Step, folder: Path, environment: Mapping[str, str]) -> Running:
    stem = "".join(c if c.isalnum() else "-" for c in step.name)
    file, printed = folder / f"{stem}.json", folder / f"{stem}.log"
    file.unlink(missing_ok=True)
    argv = [sys.executable, *(str(file) if word == "{out}" else word for word in step.argv)]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    tools = [os.environ.get("PATH", os.defpath), *toolkit()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1",
                                "PATH": os.pathsep.join(tools),
                                "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_CLIENT_MEM_FRACTION": str(step.memory),
                                } | environment | dict(step.environment)  # fmt: skip
    with printed.open("w") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT,
                                   env=environment, start_new_session=True)  # fmt: skip
    return Running(step, process, printed, file, time.monotonic())


def toolkit(roots: Sequence[str] = ("/usr/local", "/opt")) -> list[str]:
    """Folders of ptxas that $PATH does not name. XLA looks for it, and for nvlink, on $PATH and in /usr/local/cuda; its
    plug-in brings neither where nvidia-cuda-nvcc is not installed, and then no kernel compiles."""
    if shutil.which("ptxas") and shutil.which("nvlink"):
        return []
    compiler = shutil.which("nvcc")
    beside = [Path(compiler).resolve().parent] if compiler else []
    found = [path.parent for root in roots for path in sorted(Path(root).glob("cuda*/bin/ptxas"), reverse=True)]
    return [str(folder) for folder in (*beside, *found) if (folder / "ptxas").exists()]


def _end(one: Running, record: Record) -> None:
    status = one.process.poll()
    _kill(one.process)  # also whatever it left behind
    state = {None: "killed", 0: "done"}.get(status, "failed")
    lines = one.printed.read_text("utf-8", "replace").splitlines()[-LINES:]
    lines = [line[:WIDTH] for line in lines]
    seconds = time.monotonic() - one.start
    try:
        result = json.loads(one.file.read_text("utf-8"))
    except (OSError, ValueError):
        result = None
    record.add(one.step, state=state, status=status, seconds=seconds, result=result, printed=lines)
    shown = lines[-SHOWN:] if state != "done" else []
    print(f"-- {state}: {one.step.name}, {seconds:.1f} s", *brief(result), *shown, sep="\n", flush=True)


def brief(result: Any) -> list[str]:
    """A line for each row of what a step wrote; those that say no more than that all is well are counted."""
    rows = result.get("rows", []) if isinstance(result, dict) else []
    quiet = [row for row in rows if row.get("result") in ("right", "compiled") and not row.get("note")]
    counts = {word: sum(row["result"] == word for row in quiet) for word in ("compiled", "right")}
    lines = [", ".join(f"{count} {word}" for word, count in counts.items())] if quiet else []
    for row in rows:
        if row not in quiet:
            told = ((key, row[key]) for key in KEYS if row.get(key) not in (None, ""))
            lines.append("; ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{value}"
                                   for key, value in told)[:WIDTH])  # fmt: skip
    return lines


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="a JSON file, written whenever a step ends")
    parser.add_argument("--seconds", type=float, default=100.0, help="of all steps together (default 100)")
    parser.add_argument("--stages", type=lambda words: words.split(","), default=(), help="some only, comma-separated")
    parser.add_argument("--folder", help="keep the steps' own files and logs here")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an interruption: the steps are killed
    try:
        sys.exit(0 if main(**vars(parser.parse_args())) else 1)
    except UserError as error:
        sys.exit(str(error))
