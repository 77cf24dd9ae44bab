"""How well classes, EC numbers and sets of terms were predicted."""

from collections.abc import Sequence

import numpy as np

Interval = tuple[float, float]


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts int[C, C], rows the truth, of labels int[n] in 0..C-1."""
    flat = np.asarray(truth) * classes + np.asarray(predicted)
    return np.bincount(flat, minlength=classes * classes).reshape(classes, classes)


def class_scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """accuracy, macro_f1 and recall of confusions [..., C, C]; recall is [..., C], nan for a class without members.

    macro_f1 is the mean over all C classes; one that is neither there nor predicted counts 0 (as scikit-learn's
    ``f1_score(average="macro", zero_division=0)`` does, given all labels).
    """
    right = np.diagonal(counts, axis1=-2, axis2=-1)
    there, said = counts.sum(-1), counts.sum(-2)
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = np.where(there + said > 0, 2 * right / (there + said), 0.0)
        recall = np.where(there > 0, right / there, np.nan)
        accuracy = right.sum(-1) / there.sum(-1)
    return {"accuracy": accuracy, "macro_f1": f1.mean(-1), "recall": recall}


def bootstrap(counts: np.ndarray, draws: int = 2000, seed: int = 0) -> dict[str, np.ndarray]:
    """95 % percentile intervals of `class_scores`, over `draws` resamplings of the examples: [2] or [2, C] each.

    Drawing n examples with replacement is drawing the cells of the confusion from a multinomial.
    """
    n = int(counts.sum())
    if n == 0:
        raise ValueError("no example to draw from")
    r = np.random.default_rng(seed)
    drawn = r.multinomial(n, counts.reshape(-1) / n, size=draws).reshape(draws, *counts.shape)
    scores = class_scores(drawn)
    found = {name: np.quantile(scores[name], (0.025, 0.975), axis=0) for name in ("accuracy", "macro_f1")}
    recall, known = scores["recall"], counts.sum(-1) > 0
    found["recall"] = np.full((2, counts.shape[0]), np.nan)
    if known.any():  # a draw may miss a small class: quantiles of those that have it
        found["recall"][:, known] = np.nanquantile(recall[:, known], (0.025, 0.975), axis=0)
    return found


def macro_f1_difference(truth: np.ndarray, first: np.ndarray, second: np.ndarray, classes: int, draws: int = 2000,
                        seed: int = 0) -> tuple[float, float, float]:
    """(macro-F1 of the first answers less that of the second, low, high): 95 %, the same examples drawn for both."""
    flat = (np.asarray(truth, int) * classes + first) * classes + second
    cells = np.bincount(flat, minlength=classes**3)
    drawn = np.random.default_rng(seed).multinomial(len(flat), cells / len(flat), size=draws)
    counts = np.concatenate([cells[None], drawn]).reshape(-1, classes, classes, classes)
    values = class_scores(counts.sum(3))["macro_f1"] - class_scores(counts.sum(2))["macro_f1"]
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return float(values[0]), float(low), float(high)


def ec_accuracy(truth: Sequence[Sequence[str]], predicted: Sequence[str], level: int) -> float:
    """Share of proteins whose predicted EC number agrees with one of theirs in the first `level` fields (1 to 4).

    CARE's k=1 accuracy (Yang et al. 2024). A field that is ``-`` or missing agrees with nothing.
    """
    def head(number: str) -> tuple[str, ...] | None:
        fields = number.split(".")[:level]
        return None if len(fields) < level or "-" in fields else tuple(fields)

    if not 1 <= level <= 4:
        raise ValueError(f"level {level} is not one of 1, 2, 3, 4")
    hits = [head(guess) is not None and head(guess) in {head(number) for number in numbers}
            for numbers, guess in zip(truth, predicted, strict=True)]
    return float(np.mean(hits)) if hits else float("nan")


def fmax(truth: np.ndarray, scores: np.ndarray, thresholds: Sequence[float] | None = None) -> tuple[float, float]:
    """(protein-centric Fmax, its threshold): the largest 2·P·R / (P + R) over thresholds t (default 0.01 ... 1.00).

    truth bool[n, C], scores [n, C]. P is averaged over the proteins that have a score >= t, R over all that have a term
    (Radivojac et al. 2013; DeepFRI). Proteins without a term are left out.
    """
    truth, scores = np.asarray(truth, bool), np.asarray(scores)
    labelled = truth.any(1)
    truth, scores = truth[labelled], scores[labelled]
    best = 0.0, 0.0
    for t in np.arange(1, 101) / 100 if thresholds is None else thresholds:
        said = scores >= t
        some = said.any(1)
        if not some.any():
            continue
        right = (said & truth).sum(1)
        precision = (right[some] / said[some].sum(1)).mean()
        recall = (right / truth.sum(1)).mean()
        if precision + recall:
            best = max(best, (float(2 * precision * recall / (precision + recall)), float(t)), key=lambda one: one[0])
    return best


def macro_aupr(truth: np.ndarray, scores: np.ndarray) -> float:
    """Mean over the terms that a protein has of the average precision: truth bool[n, C], scores [n, C]."""
    from sklearn.metrics import average_precision_score

    truth = np.asarray(truth, bool)
    known = truth.any(0)
    if not known.any():
        return float("nan")
    return float(average_precision_score(truth[:, known], np.asarray(scores)[:, known], average="macro"))
