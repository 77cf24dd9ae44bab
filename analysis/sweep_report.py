"""The report of a sweep: the variants side by side, mean and spread over seeds, seed by seed, and their curves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from analysis.report import style
from analysis.report.generic import flat, is_number, read_run
from analysis.report.html import Report
from analysis.training_report import tokens_read
from train.runtime.files import read_json
from train.runtime.run_folder import CONFIG, RESULTS

FIRST = ("validation_bits_per_byte", "test.f1", "validation_loss", "accuracy", "loss")  # what a reader asks for first
CURVES = ("validation_loss", "dev_f1", "loss")
LEFT_OUT = ("seconds", "finished")
Trials = dict[str, dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]]  # variant -> seed -> (results, metrics)


def build(sweep_dir: str | Path) -> Path:
    """Writes report.html into a sweep's folder; returns its path."""
    folder = Path(sweep_dir)
    config, results, _ = read_run(folder)
    trials, unfinished = read_trials(folder)
    report = Report(title(config, results), status(results, trials, unfinished))
    if not trials:
        report.text("No trial is complete yet.")
        return report.save(folder / "report.html")
    numbers = _numbers(trials)
    alone = sum(map(len, trials.values())) == 1
    keys = sorted((key for key in numbers if alone or key in FIRST or _varies(numbers[key])),
                  key=lambda key: FIRST.index(key) if key in FIRST else len(FIRST))
    report.section("Variants", "Mean over seeds; the spread is the standard deviation of one seed (n - 1)."
                   + ("" if alone else " What is the same in all trials is left out."))
    rows = summary(numbers, keys)
    report.number_cards((row["variant"], row["mean"], _note(row)) for row in rows if row["number"] == keys[0])
    report.table(rows, None, "One row a variant and number.", "variants")
    if len(trials) > 1:
        report.section("Seed by seed", "Variants with the same seed saw the same text in the same order.")
        report.table(paired(numbers, keys), None, "Differences from the first variant with the same seed.", "paired")
    _curves(report, trials)
    report.section("Every trial")
    rows = [{"variant": variant, "seed": seed, **{key: numbers[key].get(variant, {}).get(seed) for key in keys}}
            for variant, seeds in trials.items() for seed in seeds]
    report.table(rows, None, "Each has its own report in its folder.", "trials")
    return report.save(folder / "report.html")


def read_trials(folder: Path) -> tuple[Trials, list[str]]:
    """Complete trials, and the names of the others."""
    found: Trials = {}
    unfinished = []
    paths = [path for path in folder.rglob(CONFIG) if path.parent != folder]
    place = {name: i for i, name in enumerate((read_json(folder / RESULTS) or {}).get("order", []))}
    # in the sweep's order, else in that in which they began
    paths.sort(key=lambda path: (place.get(str(path.parent.relative_to(folder)), len(place)), path.stat().st_mtime))
    for path in paths:
        name = path.parent.relative_to(folder)
        if len(name.parts) > 2:
            continue  # a stage of a trial
        _, results, metrics = read_run(path.parent)
        if results.get("status") != "complete":
            unfinished.append(str(name))
            continue
        seed = name.parts[1].removeprefix("seed-") if len(name.parts) > 1 else "-"
        found.setdefault(name.parts[0], {})[seed] = results, metrics
    return found, unfinished


def summary(numbers: Mapping[str, Mapping[str, Mapping[str, float]]], keys: list[str]) -> list[dict[str, Any]]:
    """A row for each number and variant: mean, spread, smallest and largest over seeds."""
    rows = []
    for key in keys:
        for variant, by_seed in numbers[key].items():
            values = np.array(list(by_seed.values()), float)
            spread = float(values.std(ddof=1)) if len(values) > 1 else None
            rows.append({"number": key, "variant": variant, "mean": float(values.mean()), "spread": spread,
                         "smallest": float(values.min()), "largest": float(values.max()), "seeds": len(values)})
    return rows


def paired(numbers: Mapping[str, Mapping[str, Mapping[str, float]]], keys: list[str]) -> list[dict[str, Any]]:
    """Differences from the first variant, for every number that seeds share."""
    rows = []
    for key in keys:
        (base, reference), *others = numbers[key].items()
        for variant, by_seed in others:
            common = [seed for seed in by_seed if seed in reference]
            differences = np.array([by_seed[seed] - reference[seed] for seed in common])
            if not len(differences) or not differences.any():
                continue
            rows.append({"number": key, "variants": f"{variant} − {base}", "mean difference": float(differences.mean()),
                         "smallest": float(differences.min()), "largest": float(differences.max()),
                         "seeds": len(common), "same sign in all": bool((differences > 0).all()
                                                                        or (differences < 0).all())})
    return rows


def _varies(by_variant: Mapping[str, Mapping[str, float]]) -> bool:
    return len({value for by_seed in by_variant.values() for value in by_seed.values()}) > 1


def _note(row: Mapping[str, Any]) -> str:
    spread = "" if row["spread"] is None else f" ± {row['spread']:.2g}"
    return f"{row['number']}{spread}, {row['seeds']} seed{'s' if row['seeds'] > 1 else ''}"


def _numbers(trials: Trials) -> dict[str, dict[str, dict[str, float]]]:
    """number -> variant -> seed -> value."""
    numbers: dict[str, dict[str, dict[str, float]]] = {}
    for variant, seeds in trials.items():
        for seed, (results, _) in seeds.items():
            for key, value in flat(results).items():
                if is_number(value) and key not in LEFT_OUT:
                    numbers.setdefault(key, {}).setdefault(variant, {})[seed] = float(value)
    return numbers


def _curves(report: Report, trials: Trials) -> None:
    lines = [line for seeds in trials.values() for _, metrics in seeds.values() for line in metrics]
    keys = [key for key in CURVES if any(is_number(line.get(key)) for line in lines)]
    if not keys:
        return
    report.section("Curves", "A line a seed, a colour and a kind of line a variant. Time is the number of steps times "
                   "the median step of that trial: what others did on the machine meanwhile shifts no curve but "
                   "stretches it whole.")
    # Without `tokens` there is `weight`: predicted tokens, tagged words, texts or proteins, by the objective.
    amount = "tokens read" if any("tokens" in line for line in lines) else "examples or tokens trained on"
    for key in keys:
        for axis, unit in (("amount", amount), ("minutes", "minutes of training steps")):
            figure, axes = style.new_figure(7, 3.4)
            rows = []
            for i, (variant, seeds) in enumerate(trials.items()):
                for seed, (results, metrics) in seeds.items():
                    points = _points(results, metrics, key, axis)
                    if points:
                        named = any(row["variant"] == variant for row in rows)
                        axes.plot(*zip(*points, strict=True), **style.line(i), linewidth=1.4, alpha=0.8,
                                  marker="o" if len(points) < 30 else None, label=None if named else variant)
                    rows += [{"variant": variant, "seed": seed, unit: x, key: y} for x, y in points]
            if rows:
                axes.set(xlabel=unit, title=f"{key} against {unit}")
                axes.legend()
                report.figure(figure, f"{key} against {unit}.", rows, f"{key}-{axis}")


def _points(results: Mapping[str, Any], metrics: list[dict[str, Any]], key: str, axis: str
            ) -> list[tuple[float, float]]:
    if axis == "amount":
        places = np.array(tokens_read(metrics))
    else:
        places = np.array([line.get("step", 0) for line in metrics]) * results.get("step_seconds_median", 0) / 60
    known = [(float(x), line.get(key)) for x, line in zip(places, metrics, strict=True)]
    return [(x, y) for x, y in known if x > 0 and is_number(y)]


def title(config: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """The experiment, and the grids that were run in this folder; of long ones what they vary."""
    about = config.get("config") or {}
    grids = results.get("grids") or [str(about.get("grid"))]
    told = " and ".join(grids)
    if len(told) > 80:
        told = ", ".join(dict.fromkeys(part.partition("=")[0] for grid in grids for part in grid.split(";")))
    return f"{about.get('experiment')}: {told}"


def status(results: Mapping[str, Any], trials: Trials, unfinished: list[str]) -> str:
    done = sum(map(len, trials.values()))
    told = f"{done} of {results.get('trials', done + len(unfinished))} trials complete"
    failed = results.get("failed_trials", 0)
    return told + (f", {failed} failed" if failed else "") + (f"; not: {', '.join(unfinished)}" if unfinished else "")
