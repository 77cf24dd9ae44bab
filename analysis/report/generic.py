"""The report of any run folder, from nothing but the files that every run writes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis.report import style
from analysis.report.html import Report
from jaxmodels.errors import UserError
from train.runtime.files import read_json
from train.runtime.run_folder import CONFIG, RESULTS, read_metrics

PLOTS, CARDS = 12, 8  # as many as a reader looks at; the tables hold the rest
FIRST = ("loss", "validation_loss", "accuracy")


def build(run_dir: str | Path) -> Path:
    """Write report.html into a run folder from its config.json, metrics.jsonl and results.json; returns its path."""
    folder = Path(run_dir)
    config, results, metrics = read_run(folder)
    report = Report(str(config.get("name") or folder.name), _status(results))
    numbers = {key: value for key, value in results.items() if is_number(value)}
    if results:
        report.section("Results")
        report.number_cards((key, value) for key, value in list(numbers.items())[:CARDS])
        report.table(flat_rows(results), {"key": "number", "value": "value"}, "All results.", "results")
    if metrics:
        report.section("Curves", f"{len(metrics)} lines of `metrics.jsonl`.")
        curves(report, {"": metrics})
    report.section("What was run")
    report.table(flat_rows(config), {"key": "setting", "value": "value"}, "The resolved config.", "config")
    return report.save(folder / "report.html")


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """(config, results, metrics) of a run folder. Raises UserError if it is none."""
    config = read_json(folder / CONFIG)
    if config is None:
        raise UserError(f"{folder} is not a run folder: it has no {CONFIG}; give the folder that a run has written")
    return config, read_json(folder / RESULTS) or {}, read_metrics(folder)


def curves(report: Report, runs: Mapping[str, list[dict[str, Any]]]) -> None:
    """One small plot for every number over `step`; runs: label -> lines of metrics.jsonl."""
    keys = dict.fromkeys(
        key for lines in runs.values() for line in lines for key, value in line.items() if is_number(value)
    )
    keys = [key for key in FIRST if key in keys] + [key for key in keys if key not in (*FIRST, "step")]
    for key in keys[:PLOTS]:
        figure, axes = style.new_figure(7, 2.6)
        rows = []
        for i, (label, lines) in enumerate(runs.items()):
            points = [(line["step"], line[key]) for line in lines if is_number(line.get(key)) and "step" in line]
            axes.plot(
                *zip(*points, strict=True) if points else ([], []),
                marker="o" if len(points) < 30 else None,
                label=label,
                **style.line(i),
            )
            rows += [
                {"run": label, "step": step, key: value} if label else {"step": step, key: value}
                for step, value in points
            ]
        axes.set(xlabel="step", title=key)
        if len(runs) > 1:
            axes.legend()
        report.figure(figure, f"{key} over steps.", rows, name=key, alt=f"Line plot of {key} over steps")
    if len(keys) > PLOTS:
        report.text(f"{len(keys) - PLOTS} more are in `metrics.jsonl`: {', '.join(keys[PLOTS:])}.")


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists as JSON text."""
    result: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            result |= flat(item, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = (
                json.dumps(item, ensure_ascii=False) if isinstance(item, (list, Mapping)) else item
            )
    return result


def flat_rows(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": item} for key, item in flat(value).items()]


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _status(results: Mapping[str, Any]) -> str:
    status = results.get("status")
    if not results:
        return "This run has written no results yet."
    if status == "interrupted":
        return "Interrupted: the numbers are those reached so far; the same command goes on from here."
    if status == "failed":
        return f"Failed: {results.get('error', 'no reason recorded')}"
    return f"Status: {status}." if status else ""
