"""Several runs in one report: their results side by side, what differed in their configs, their curves together."""

from collections.abc import Sequence
from pathlib import Path

from analysis.report.generic import CARDS, curves, flat, read_run
from analysis.report.html import Report
from jaxmodels.errors import UserError


def build(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Write one page comparing at least two run folders to `out`; returns its path."""
    folders = [Path(run_dir) for run_dir in run_dirs]
    if len(folders) < 2:
        raise UserError(f"{len(folders)} run to compare; give at least 2 run folders")
    labels = _labels(folders)
    runs = {label: read_run(folder) for label, folder in zip(labels, folders, strict=True)}
    configs = {label: flat(config.get("config") or config) for label, (config, _, _) in runs.items()}
    results = {label: flat(results) for label, (_, results, _) in runs.items()}
    differing = [key for key, values in side_by_side(configs).items() if len({repr(v) for v in values.values()}) > 1]

    report = Report(f"{len(folders)} runs compared", ", ".join(labels))
    report.section("Results", "One row a run; a click on a heading sorts.")
    keys = list(side_by_side(results))
    report.table(
        [{"run": label} | {k: configs[label].get(k) for k in differing[:CARDS]} | results[label] for label in labels],
        ["run", *differing[:CARDS], *(key for key in keys if key not in differing[:CARDS])],
        "Settings that differ, then results.",
        "comparison",
    )
    metrics = {label: lines for label, (_, _, lines) in runs.items() if lines}
    if metrics:
        report.section("Curves")
        curves(report, metrics)
    report.section("What differed")
    if differing:
        rows = [{"setting": key} | {label: configs[label].get(key) for label in labels} for key in differing]
        report.table(rows, ["setting", *labels], "Settings that are not equal in all runs.", "settings")
    else:
        report.text("Nothing: all runs have the same config.")
    return report.save(out)


def side_by_side(tables: dict[str, dict]) -> dict[str, dict]:
    """key -> label -> value, keys in order of first appearance, absent values None."""
    keys = dict.fromkeys(key for table in tables.values() for key in table)
    return {key: {label: table.get(key) for label, table in tables.items()} for key in keys}


def _labels(folders: list[Path]) -> list[str]:
    """Folder names, with as much of the parents as makes them different."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise UserError("a run folder is given twice; give each once")
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]
