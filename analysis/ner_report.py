"""The report of one tagger: entity scores by type, what kind of errors, how far confidences hold, sentences.

Its parts read predictions.jsonl, so that the study of active learning shows the same of every strategy.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from analysis.report import style
from analysis.report.generic import curves, flat_rows, is_number, read_run
from analysis.report.html import Report
from jaxmodels.cnn_cnn_lstm.schemes import Entity, tags_of
from jaxmodels.errors import UserError
from train.entity_metrics import entity_scores, errors
from train.tag_confidence import calibration_error, reliability

# words, truth (start, stop, type), said (the same, a confidence, and a share of votes if they were asked), confidence
Predictions = list[dict[str, Any]]
CONFIDENCE, VOTES = 3, 4  # places in what is said
NOTHING = "nothing"
EXAMPLES, LONGEST = 12, 60  # sentences that are shown, and words of one
PHONE = 3.7  # inches: a wider figure is cut on a phone, and scrolled
TRAINING = ("step", "loss", "dev_f1", "dev_precision", "dev_recall", "gradient_norm", "learning_rate")  # that is drawn
ERRORS = {"type": "type wrong, both ends right", "boundary": "type right, an end wrong", "both": "both wrong, overlaps",
          "missed": "missed", "spurious": "there is none"}
PEERS = {"crf": "feature CRF, no vectors", "spacy": "spaCy's CNN, from scratch"}  # see train/ner_peers.py
# F1 of the feature CRF: what peers=crf has found, and for wnut17 ner_active_learning.md section 9.
KNOWN = {"bc5cdr": 0.795, "ncbi_disease": 0.775, "wnut17": 0.163}
CARDS = (("test.f1", "F1", "entities of the test part: type and both ends right"), ("test.precision", "precision", ""),
         ("test.recall", "recall", ""), ("test.macro_f1", "macro F1", "mean over types"), ("dev_f1", "F1 on dev", ""),
         ("test.surface_f1", "surface F1", "distinct forms"),
         ("test.entity_ece", "calibration error", "of entities; lower is better"),
         ("test.words_per_second", "words a second", "tagging the test part"),
         ("epoch_seconds", "seconds an epoch", ""), ("parameters", "parameters", ""))


def build(run_dir: str | Path) -> Path:
    """Writes report.html of a finished or interrupted run of ner; returns its path."""
    folder = Path(run_dir)
    config, results, lines = read_run(folder)
    report = Report(str(config.get("name") or folder.name), f"Status: {results.get('status', 'nothing yet')}.")
    report.section("Results")
    cards = [(label, results[key], note) for key, label, note in CARDS if is_number(results.get(key))]
    report.number_cards((label, value, _interval(results) if label == "F1" else note) for label, value, note in cards)
    _beside(report, config, results)
    predictions = read_predictions(folder / "predictions.jsonl")
    if predictions:
        types_section(report, {"test": predictions})
        errors_section(report, predictions)
        sure = {"probabilities": events(predictions)}
        if any(len(one) > VOTES for row in predictions for one in row["said"]):
            sure["votes"] = events(predictions, VOTES)
        reliability_section(report, sure, "Probabilities are calibrated on the development part; votes, the share of "
                            "passes with dropout that find the entity too, are told as they are." if len(sure) > 1
                            else "")
        examples_section(report, predictions)
    if lines:
        report.section("Training", "Chosen is the step of the best F1 on the development part.")
        curves(report, {"": [{key: line[key] for key in TRAINING if key in line} for line in lines]})
    report.section("What was run")
    report.table(flat_rows(results), {"key": "number", "value": "value"}, "All results.", "results")
    report.table(flat_rows(config), {"key": "setting", "value": "value"}, "The resolved config.", "config")
    return report.save(folder / "report.html")


def _interval(results: Mapping[str, Any]) -> str:
    low, high = results.get("test.f1_low"), results.get("test.f1_high")
    return f"95 %: {low:.3f} to {high:.3f}" if is_number(low) and is_number(high) else ""


def _beside(report: Report, config: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Other systems on the same files: those that the run has trained, and what was measured once."""
    if is_number(seconds := results.get("epoch_seconds")):
        results = {**results, "test.train_seconds": seconds * results["epochs"]}
    rows = [{"system": name, "measured": "here", **{key: results.get(f"{prefix}.{key}") for key in (
                 "f1", "precision", "recall", "train_seconds", "words_per_second")}}
            for name, prefix in (("this run", "test"), *((PEERS[name], f"test.{name}") for name in PEERS))
            if f"{prefix}.f1" in results]
    beams = [key for key in results if key.startswith("test.beam_") and key.endswith(".f1")]
    rows += [{"system": f"this run, beam of {key.split('.')[1].removeprefix('beam_')}", "measured": "here",
              "f1": results[key]} for key in beams]
    data = (config.get("config") or {}).get("data") or {}
    if data.get("source") in KNOWN and data.get("limit") is None and "test.crf.f1" not in results:
        rows.append({"system": PEERS["crf"], "measured": "earlier, once", "f1": KNOWN[data["source"]]})
    if len(rows) > 1:
        report.table(rows, {"system": "system", "f1": "F1", "precision": "precision", "recall": "recall",
                            "train_seconds": "seconds of training", "words_per_second": "words a second",
                            "measured": "measured"}, "Systems on the same test part, by one scorer.", "systems")


# Parts


def read_predictions(path: Path) -> Predictions:
    """[] if there is no file. Raises UserError for a damaged one."""
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove it and give the command of the run again") from None


def tags(row: Mapping[str, Any], key: str) -> list[str]:
    """IOB2, of ``truth`` or ``said``."""
    return tags_of([Entity(*one[:3]) for one in row[key]], len(row["words"]))


def types_of(predictions: Predictions) -> list[str]:
    return sorted({one[2] for row in predictions for key in ("truth", "said") for one in row[key]})


def error_counts(predictions: Predictions) -> tuple[Counter[str], Counter[tuple[str, str]]]:
    """(errors by kind, entities by (true type, said type)), NOTHING where there is none; boundary errors aside."""
    kinds: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    for row in predictions:
        right = {tuple(one) for one in row["truth"]} & {tuple(one[:3]) for one in row["said"]}
        pairs.update((kind, kind) for _, _, kind in right)
        for kind, true, said in errors(tags(row, "truth"), tags(row, "said")):
            kinds[kind] += 1
            pairs[true.type if true else NOTHING, said.type if said else NOTHING] += 1
    return kinds, pairs


def events(predictions: Predictions, place: int = CONFIDENCE) -> tuple[np.ndarray, np.ndarray]:
    """Confidence (or votes) and rightness of every entity that is said."""
    said = [(one[place], one[:3] in row["truth"]) for row in predictions for one in row["said"]]
    return np.array([p for p, _ in said], float), np.array([right for _, right in said], bool)


def types_section(report: Report, by_label: Mapping[str, Predictions]) -> None:
    """Precision, recall and F1 of each type."""
    rows = []
    for label, predictions in by_label.items():
        scores = entity_scores([tags(row, "truth") for row in predictions], [tags(row, "said") for row in predictions])
        there = Counter(one[2] for row in predictions for one in row["truth"])
        rows += [{"of": label, "type": kind, **{name: scores[f"{kind}.{name}"] for name in
                                                ("precision", "recall", "f1")}, "entities": there[kind]}
                 for kind in sorted(there)]
    report.section("By type")
    columns = {"type": "type", "precision": "precision", "recall": "recall", "f1": "F1", "entities": "entities"}
    report.table(rows, columns if len(by_label) == 1 else {"of": "tagger", **columns}, "Entities of the test part; "
                 "type and both ends have to be right.", "types")


def errors_section(report: Report, predictions: Predictions, of: str = "") -> None:
    """Kinds of errors, and which types stand for which."""
    kinds, pairs = error_counts(predictions)
    total = max(sum(kinds.values()), 1)
    report.section("What kind of errors" + (f": {of}" if of else ""), "Every error is in one of five kinds. An entity "
                   "with a wrong end counts as missed and as wrong in F1, though a reader may be content with it.")
    report.table([{"error": told, "n": kinds[kind], "share": kinds[kind] / total} for kind, told in ERRORS.items()],
                 caption="Errors on the test part.", name="errors")
    names = [*types_of(predictions), NOTHING]
    table = np.array([[pairs[a, b] for b in names] for a in names], float)
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    figure, axes = style.new_figure(min(2.2 + 0.5 * len(names), 7), 1.6 + 0.4 * len(names))
    style.heat_map(axes, share, names, names, "share of the row", vmin=0, vmax=1)
    axes.set(xlabel="said", ylabel="true")
    for i, j in np.ndindex(table.shape):
        if table[i, j]:
            axes.text(j, i, f"{int(table[i, j])}", ha="center", va="center", fontsize=7.5,
                      color="black" if share[i, j] > 0.6 else "white")
    report.figure(figure, "True type against said type, of entities that overlap; numbers are entities. Wrong ends "
                  "with the right type are on the diagonal.", [{"true": a, "said": b, "n": pairs[a, b]} for a in names
                                                          for b in names], "confusion", "Confusion of entity types")


def reliability_section(report: Report, by_label: Mapping[str, tuple[np.ndarray, np.ndarray]], note: str = "") -> None:
    """How often entities of a confidence are right; `events` by label."""
    report.section("How far confidences hold", "Entities of a confidence of 0.8 should be right in 80 % of cases: on "
                   f"the line. {note}".strip())
    figure, axes = style.new_figure(PHONE, 3.4)
    axes.plot([0, 1], [0, 1], color=style.GRID, linewidth=1)
    points, rows = [], []
    for label, (p, right) in by_label.items():
        if not len(p):
            continue
        found = reliability(p, right)
        x, y = [one["confidence"] for one in found], [one["right"] for one in found]
        (line,) = axes.plot(x, y, linewidth=1, label=label)
        axes.scatter(x, y, [4 + 76 * one["n"] / len(p) for one in found], color=line.get_color(), alpha=0.8)
        points += [{"of": label, **one} for one in found]
        rows.append({"of": label, "said entities": len(p), "right": float(right.mean()),
                     "mean confidence": float(p.mean()), "calibration error": calibration_error(p, right)})
    axes.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    if len(rows) > 1:
        figure.legend(loc="outside lower center", ncols=3)
    report.figure(figure, "Entities that are said, in ten bins of confidence; the larger a dot, the more of them.",
                  points, "reliability", "Share of right entities over confidence")
    report.table(rows, caption="Expected calibration error over ten bins of equal size.", name="calibration")


def examples_section(report: Report, predictions: Predictions, of: str = "") -> None:
    """Sentences with errors, then some without: what is said is coloured, what is true underlined."""
    report.section("Sentences" + (f": {of}" if of else ""), "Orange: what the tagger says, the deeper the surer, its "
                   "type behind it. Underlined: the true entity, and where it differs its type too. The first are the "
                   "surest errors, the last are right.")
    right: Predictions = []
    wrong: Predictions = []
    for row in predictions:
        if row["truth"] and len(row["words"]) <= LONGEST:
            same = {tuple(one) for one in row["truth"]} == {tuple(one[:3]) for one in row["said"]}
            (right if same else wrong).append(row)
    wrong = sorted(wrong, key=lambda row: -row["confidence"])[:EXAMPLES * 2 // 3]
    for row in [*wrong, *right[:EXAMPLES - len(wrong)]]:
        pieces, values, marked = highlighted(row)
        report.coloured(pieces, values, f"confidence of the whole: {row['confidence']:.2f}", marked)


def highlighted(row: Mapping[str, Any]) -> tuple[list[str], list[float], set[int]]:
    """(pieces, their values, places that are underlined) as `Report.coloured` takes them."""
    sure = {i: one[3] for one in row["said"] for i in range(one[0], one[1])}
    true = {i for one in row["truth"] for i in range(one[0], one[1])}
    said = {one[1] - 1: one[2] for one in row["said"]}
    right = {tuple(one[:3]) for one in row["said"]}
    missed = {one[1] - 1: one[2] for one in row["truth"] if tuple(one) not in right}
    pieces, values, marked = [], [], set()
    for i, word in enumerate(row["words"]):
        # A space within an entity has its colour, so that the entity is one block; full colour stands for 1.
        inside = i + 1 in sure and i not in said
        for piece, value, under in ((word, sure.get(i, 0.0), i in true),
                                    (f" [{said[i]}]" if i in said else "", 0.0, False),
                                    (f" (true: {missed[i]})" if i in missed else "", 0.0, False),
                                    (" ", sure.get(i, 0.0) if inside else 0.0, False)):
            if piece:
                if under:
                    marked.add(len(pieces))
                pieces.append(piece)
                values.append(value)
    return pieces, values, marked
