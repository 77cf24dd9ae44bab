"""What a benchmark prints and writes: one table, and a JSON file with the machine and versions beside the numbers."""

import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks._timing import cores
from jaxmodels.errors import UserError
from train.runtime.environment import describe
from train.runtime.table import print_table


def check_out(out: str | None) -> None:
    """UserError before minutes of measuring when ``out`` cannot be written."""
    if out is None:
        return
    folder = Path(out).absolute().parent
    if Path(out).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--out {out} cannot be written; give a file in an existing folder that you may write to")


def machine(peers: Sequence[str] = ("torch", "transformers")) -> dict[str, Any]:
    """Device, processor, cores, load and versions, the peers' included."""
    about = describe()
    versions = {}
    for name in peers:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return about | {"peers": versions, "processor": processor(), "threads": cores(), "load_before": load,
                    "platform": platform.platform()}


def processor() -> str:
    """Name and model number of the processor, as Linux tells them."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    name = fields.get("model name", platform.machine())
    return f"{name}, family {fields['cpu family']} model {fields['model']}" if "model" in fields else name


def publish(title: str, rows: Sequence[dict[str, Any]], columns: Sequence[str], about: dict[str, Any],
            notes: Sequence[str], out: str | None) -> None:
    """Prints the columns of the rows, and writes everything to ``out``."""
    table = [list(columns), *[[_cell(row.get(column)) for column in columns] for row in rows]]
    print(f"{title}\n{about['processor']}, {about['threads']} threads; jax {about['versions']['jax']} on "
          f"{about['device']['kind']}" + "".join(f", {name} {version}" for name, version in about["peers"].items()))
    print_table(table)
    for note in notes:
        print(note)
    if out is not None:
        content = {"title": title, "about": about, "rows": list(rows), "notes": list(notes)}
        Path(out).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "" if value is None else str(value)
