"""The report of a training run: what was learned, where the time went, what the experts carried, what it writes."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from analysis.report import style
from analysis.report.generic import flat_rows, is_number, read_run
from analysis.report.html import Report
from train.runtime.files import read_json
from train.runtime.goodput import KINDS

Lines = list[dict[str, Any]]
CARDS = (
    ("validation_bits_per_byte", "bits per byte", "held-out packages; lower is better"),
    ("validation_loss", "validation loss", "nats a token"),
    ("validation_perplexity", "perplexity", "held-out families, all questions; lower is better"),
    ("floor.unigram_perplexity", "floor: composition", "perplexity without a network, the same questions"),
    ("floor.neighbours_perplexity", "floor: neighbours", "perplexity from the two residues beside"),
    ("validation_hidden_perplexity", "perplexity, hidden", "of residues behind <mask> alone"),
    ("floor.neighbours_hidden_perplexity", "floor: neighbours, hidden", ""),
    ("tokens", "tokens read", ""),
    ("tokens_per_second", "tokens a second", "median, first steps left out"),
    ("mfu", "MFU", "of the dense bf16 peak"),
    ("goodput", "goodput", "share of wall time in steps that counted"),
    ("parameters", "parameters", ""),
    ("router.entropy", "load entropy", "1: every expert carries the same"),
)


def build(run_dir: str | Path) -> Path:
    """Writes report.html into a training run's folder; returns its path."""
    folder = Path(run_dir)
    config, results, lines = read_run(folder)
    report = Report(str(config.get("name") or folder.name), _status(results))
    report.section("Results")
    report.number_cards((label, results[key], note) for key, label, note in CARDS if is_number(results.get(key)))
    if len(lines) > 1:
        _losses(report, lines, results)
        _experts(report, lines)
    _time(report, lines, read_json(folder / "goodput.json"))
    _samples(report, results)
    report.section("What was run", "All of it is in `config.json` and `results.json`.")
    numbers = {key: value for key, value in results.items() if key != "samples"}
    report.table(flat_rows(numbers), {"key": "number", "value": "value"}, "All results.", "results")
    report.table(flat_rows(config), {"key": "setting", "value": "value"}, "The resolved config.", "config")
    return report.save(folder / "report.html")


def _status(results: dict[str, Any]) -> str:
    status = results.get("status", "nothing written yet")
    if status == "interrupted":
        return "Interrupted: the numbers are those reached so far; the same command goes on from here."
    return f"Failed: {results.get('error', '')}" if status == "failed" else f"Status: {status}."


def _losses(report: Report, lines: Lines, results: dict[str, Any]) -> None:
    floors = {label.removeprefix("floor: "): float(np.log(results[key])) for key, label, _ in CARDS
              if key.startswith("floor.") and "hidden" not in key and is_number(results.get(key))}
    held = "held-out families" if floors else "held-out packages"
    report.section("Learning", f"Loss of every step beside that of the {held}, which no step has seen.")
    tokens = tokens_read(lines)
    report.figure(loss_figure(lines, tokens, held, floors), "Loss against tokens read.", _rows(
        lines, ("loss", "validation_loss", "bits_per_byte", "validation_bits_per_byte"), tokens), "loss",
        "Training and validation loss falling over tokens")
    figure, (left, right) = style.new_figure(7, 2.4, columns=2)
    for axes, key, title in ((left, "learning_rate", "learning rate"), (right, "gradient_norm", "gradient norm")):
        axes.plot(*_curve(lines, key))
        axes.set(xlabel="step", title=title)
    right.set_yscale("log")
    skipped = max((line.get("skipped", 0) for line in lines), default=0)
    told = f" {skipped} steps were skipped because their loss or gradient was not finite." if skipped else ""
    report.figure(figure, f"Learning rate and gradient norm (before clipping).{told}",
                  _rows(lines, ("learning_rate", "gradient_norm", "update_norm"), tokens), "optimizer")


def loss_figure(lines: Lines, tokens: list[float], held_out: str = "held-out packages",
                floors: dict[str, float] | None = None) -> Figure:
    """Training loss, its running mean and the validation loss over tokens; floors: losses without a network, by name.
    """
    figure, axes = style.new_figure(7, 3.4)
    known = [(t, line["loss"]) for t, line in zip(tokens, lines, strict=True) if is_number(line.get("loss"))]
    x, y = np.array(known).T if known else (np.zeros(0), np.zeros(0))
    axes.plot(x, y, alpha=0.3, linewidth=1, label="a step")
    if len(y) >= 20:
        width = max(len(y) // 30, 5)
        axes.plot(x[width - 1:], np.convolve(y, np.ones(width) / width, "valid"), color=style.PALETTE[0],
                  label=f"mean of {width} steps")
    held = [(t, line["validation_loss"]) for t, line in zip(tokens, lines, strict=True) if "validation_loss" in line]
    if held:
        axes.plot(*zip(*held, strict=True), marker="o", color=style.PALETTE[1], label=held_out)
    for i, (name, floor) in enumerate((floors or {}).items()):
        axes.axhline(floor, color=style.PALETTE[2 + i], linestyle="--", linewidth=1, label=f"floor: {name}")
    axes.set(xlabel="tokens", ylabel="nats a token", title="loss")
    axes.legend()
    return figure


def _experts(report: Report, lines: Lines) -> None:
    loads = [(line["step"], np.asarray(line["router.load"])) for line in lines if "router.load" in line]
    if not loads:
        return
    step, load = loads[-1]
    layers, experts = load.shape
    report.section("Load of the experts", "The share of a step's tokens that each expert was given. With equal load it "
                   f"is 1 / {experts} = {1 / experts:.3f}; no token is ever dropped, whatever the load.")
    figure, axes = style.new_figure(7, 1.2 + 0.3 * layers)
    style.heat_map(axes, load, [str(i) for i in range(layers)], [str(i) for i in range(experts)], "share of tokens",
                   vmin=0)
    axes.set(xlabel="expert", ylabel="layer", title=f"load at step {step}")
    rows = [{"step": s, "layer": layer, "expert": e, "share": float(a[layer, e])}
            for s, a in loads for layer in range(layers) for e in range(experts)]
    report.figure(figure, "Load by layer and expert; the download has every evaluated step.", rows, "expert-load")
    figure, (left, right) = style.new_figure(7, 2.4, columns=2)
    left.plot(*_curve(lines, "router.max_ratio"))
    left.axhline(1, color=style.GRID)
    left.set(xlabel="step", title="largest load / mean load")
    right.plot(*_curve(lines, "router.entropy"))
    right.set(xlabel="step", title="entropy of the load (1: equal)")
    report.figure(figure, "How evenly the experts are loaded, mean over layers.",
                  _rows(lines, ("router.max_ratio", "router.entropy", "router.dead", "router.z"), tokens_read(lines)),
                  "balance")


def _time(report: Report, lines: Lines, goodput: dict[str, Any] | None) -> None:
    report.section("Time", "Where the wall time went, over all starts of this run. *Lost* are steps that an earlier "
                   "start had taken and not saved.")
    if goodput:
        kinds = [kind for kind in KINDS if goodput["seconds"].get(kind, 0) > 0]
        figure, axes = style.new_figure(7, 2.0)
        left = 0.0
        for i, kind in enumerate(kinds):
            share = goodput["fractions"][kind]
            colour = style.PALETTE[i % len(style.PALETTE)]
            axes.barh([0], [share], left=left, color=colour, edgecolor="none", label=f"{kind} {share:.1%}")
            left += share
        axes.set(xlim=(0, 1), yticks=[], xlabel="share of wall time")
        figure.legend(ncols=4, loc="outside lower center")
        rows = [{"kind": kind, "seconds": goodput["seconds"][kind], "share": goodput["fractions"][kind]}
                for kind in kinds]
        told = f"{goodput['starts']} start(s), {goodput['total_seconds']:.0f} s in all."
        report.figure(figure, told, rows, "goodput")
        report.table(rows, {"kind": "what", "seconds": "seconds", "share": "share"}, "Wall time.", "wall-time")
    if any("tokens_per_second" in line for line in lines):
        figure, axes = style.new_figure(7, 2.4)
        axes.plot(*_curve(lines, "tokens_per_second"))
        axes.set(xlabel="step", title="tokens a second", ylim=(0, None))
        report.figure(figure, "Throughput of every step.", _rows(
            lines, ("step_seconds", "tokens_per_second", "mfu"), tokens_read(lines)), "throughput")


def _samples(report: Report, results: dict[str, Any]) -> None:
    if not results.get("samples"):
        return
    report.section("What it writes", "The trained model goes on from a few openings (temperature 0.8, top-p 0.95).")
    for text in results["samples"]:
        report.code(text)


def tokens_read(lines: Lines) -> list[float]:
    """Tokens read up to each line; resumed runs have every step once."""
    # Where not every token is asked for (masked residues), `weight` counts the questions and `tokens` what was read.
    return np.cumsum([line.get("tokens", line.get("weight", 0)) for line in lines]).tolist()


def _curve(lines: Lines, key: str) -> tuple[list[float], list[float]]:
    points = [(line["step"], line[key]) for line in lines if is_number(line.get(key))]
    return tuple(map(list, zip(*points, strict=True))) if points else ([], [])


def _rows(lines: Lines, keys: tuple[str, ...], tokens: list[float]) -> list[dict[str, Any]]:
    return [{"step": line["step"], "tokens": total, **{key: line[key] for key in keys if key in line}}
            for line, total in zip(lines, tokens, strict=True)]
