"""How well codes of texts were predicted (text2tree.md section 11).

truth bool[n, K] and scores float[n, K] in [0, 1], or int[n] classes, which `one_hot` turns into the former.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy import sparse

THRESHOLDS = tuple(np.arange(1, 20) / 20)  # 0.05 ... 0.95
BINS = ((1, 10), (11, 50), (51, 100), (101, 500), (501, None))  # training texts of a class


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """int[n] -> bool[n, K]."""
    return np.asarray(labels)[:, None] == np.arange(classes)


# Sets of labels


def counts(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Right, said and there, int[3, K]."""
    truth, predicted = np.asarray(truth, bool), np.asarray(predicted, bool)
    return np.stack([(truth & predicted).sum(0), predicted.sum(0), truth.sum(0)])


def f1(counted: np.ndarray) -> dict[str, np.ndarray]:
    """micro_f1, macro_f1 (over the classes that are there), macro_f1_all, from counts [..., 3, K]: [...] each.

    F1_c is 0 where it is undefined. (Not the harmonic mean of macro precision and macro recall, as CAML's script has.)
    """
    each, there = class_f1(counted), counted[..., 2, :] > 0
    right, said, gold = np.moveaxis(counted.sum(-1), -1, 0)
    with np.errstate(invalid="ignore"):
        micro = np.where(said + gold > 0, 2 * right / np.maximum(said + gold, 1), 0.0)
        macro = np.where(there, each, 0).sum(-1) / np.maximum(there.sum(-1), 1)
    return {"micro_f1": micro, "macro_f1": macro, "macro_f1_all": each.mean(-1)}


def class_f1(counted: np.ndarray) -> np.ndarray:
    """F1 of each class, [..., K], from counts [..., 3, K]."""
    right, both = counted[..., 0, :], counted[..., 1, :] + counted[..., 2, :]
    return np.where(both > 0, 2 * right / np.maximum(both, 1), 0.0)


def worst(counted: np.ndarray, most: int = 20) -> list[int]:
    """The classes of the lowest F1, of those that are there."""
    order = np.argsort(class_f1(counted), kind="stable")
    return [int(c) for c in order if counted[2, c]][:most]


def tuned_threshold(truth: np.ndarray, scores: np.ndarray, thresholds: Sequence[float] = THRESHOLDS) -> float:
    """The threshold of the best macro-F1, to be found on the development part; the lowest of equal ones."""
    scores = np.asarray(scores)
    found = [float(f1(counts(truth, scores >= t))["macro_f1"]) for t in thresholds]
    return float(thresholds[int(np.argmax(found))])


# Rankings


def ranking(truth: np.ndarray, scores: np.ndarray, ks: Sequence[int] = (5, 8)) -> dict[str, float]:
    """p_at_K, r_precision and map (mean average precision), over the texts that have a label.

    p_at_K divides by K, whatever the number of labels. Equal scores count in the order of the classes.
    """
    truth = np.asarray(truth, bool)
    labelled = truth.any(1)
    if not labelled.any():
        return {**{f"p_at_{k}": float("nan") for k in ks}, "r_precision": float("nan"), "map": float("nan")}
    truth = truth[labelled]
    order = np.argsort(-np.asarray(scores)[labelled], axis=1, kind="stable")
    hits = np.take_along_axis(truth, order, axis=1)
    gold, ranks = truth.sum(1), np.arange(1, truth.shape[1] + 1)
    precision = hits.cumsum(1) / ranks
    found = {f"p_at_{k}": float(hits[:, :k].sum(1).mean() / k) for k in ks}
    found["r_precision"] = float(precision[np.arange(len(gold)), gold - 1].mean())
    return found | {"map": float(((precision * hits).sum(1) / gold).mean())}


# Buckets of classes


def buckets(train_counts: np.ndarray) -> dict[str, np.ndarray]:
    """Masks bool[K]: tail, middle and head thirds by training count, and bins of it, ``1_10`` ... ``501_up``."""
    train_counts = np.asarray(train_counts)
    K = len(train_counts)
    rank = np.empty(K, int)
    rank[np.argsort(train_counts, kind="stable")] = np.arange(K)
    found = {name: rank * 3 // max(K, 1) == i for i, name in enumerate(("tail", "middle", "head"))}
    for low, high in BINS:
        found[f"{low}_{high or 'up'}"] = (train_counts >= low) & (train_counts <= (high or np.inf))
    return found


def bucket_f1(counted: np.ndarray, masks: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Macro-F1 of the classes of each bucket that are there; buckets without one are left out."""
    each, there = class_f1(counted), counted[2] > 0
    members = {name: mask & there for name, mask in masks.items()}
    return {f"macro_f1_{name}": float(each[some].mean()) for name, some in members.items() if some.any()}


# The tree


def hierarchical(truth: np.ndarray, predicted: np.ndarray, ancestors: sparse.csr_array) -> dict[str, float]:
    """Micro precision, recall and F1 after all ancestors of what is true and of what is said are added, the root left
    out (Kiritchenko et al. 2006). ancestors bool[K, N]: `LabelTree.ancestors`; all of ICD-10-CM would be 7 GB dense."""
    closure = ancestors[:, 1:].astype(np.int32)
    gold, said = (sparse.csr_array(np.asarray(labels, np.int32)) @ closure > 0 for labels in (truth, predicted))
    right = gold.multiply(said).nnz
    return {"hierarchical_precision": right / max(said.nnz, 1), "hierarchical_recall": right / max(gold.nnz, 1),
            "hierarchical_f1": 2 * right / max(said.nnz + gold.nnz, 1)}


def level_accuracy(truth: np.ndarray, predicted: np.ndarray, paths: np.ndarray) -> dict[str, float]:
    """Share of texts whose predicted class has the right ancestor at each level, of those whose class is that deep.

    truth, predicted int[n]; paths int[K, D + 1]: `LabelTree.paths`.
    """
    gold, said = paths[np.asarray(truth)], paths[np.asarray(predicted)]
    deep = gold >= 0
    return {f"accuracy_level_{level}": float((gold == said)[deep[:, level], level].mean())
            for level in range(1, paths.shape[1]) if deep[:, level].any()}


# Tables


def multi_label(truth: np.ndarray, scores: np.ndarray, threshold: float, train_counts: np.ndarray,
                ancestors: sparse.csr_array | None = None) -> dict[str, float]:
    """Everything of one method on one test set: at 0.5, and at the threshold tuned on dev (``tuned_...``)."""
    scores = np.asarray(scores)
    found: dict[str, float] = {"threshold": threshold, **ranking(truth, scores)}
    for prefix, at in (("", 0.5), ("tuned_", threshold)):
        counted = counts(truth, scores >= at)
        here = {name: float(value) for name, value in f1(counted).items()} | bucket_f1(counted, buckets(train_counts))
        if ancestors is not None:
            here |= hierarchical(truth, scores >= at, ancestors)
        found |= {prefix + name: value for name, value in here.items()}
    return found


def multi_class(truth: np.ndarray, predicted: np.ndarray, train_counts: np.ndarray, paths: np.ndarray | None = None,
                ancestors: sparse.csr_array | None = None) -> dict[str, float]:
    """Everything of one method on one test set of int[n] classes; micro_f1 is the accuracy."""
    K = len(train_counts)
    gold, said = one_hot(truth, K), one_hot(predicted, K)
    counted = counts(gold, said)
    found = {name: float(value) for name, value in f1(counted).items()} | bucket_f1(counted, buckets(train_counts))
    found["accuracy"] = float(np.mean(np.asarray(truth) == np.asarray(predicted)))
    if paths is not None:
        found |= level_accuracy(truth, predicted, paths)
    return found | (hierarchical(gold, said, ancestors) if ancestors is not None else {})


# Doubt


def bootstrap_f1(truth: np.ndarray, said: np.ndarray, masks: Mapping[str, np.ndarray], *, draws: int = 2000,
                 seed: int = 0) -> dict[str, tuple[float, float]]:
    """95 % intervals of what `resampled_f1` draws; nan for a bucket none of whose classes is ever drawn."""
    return {name: interval(values) for name, values in resampled_f1(truth, said, masks, draws=draws, seed=seed).items()}


def interval(drawn: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of float[draws], nan left out."""
    return (float("nan"), float("nan")) if np.isnan(drawn).all() else tuple(
        map(float, np.nanquantile(drawn, (0.025, 0.975))))


def resampled_f1(truth: np.ndarray, said: np.ndarray, masks: Mapping[str, np.ndarray], *, draws: int = 2000,
                 seed: int = 0) -> dict[str, np.ndarray]:
    """micro_f1, macro_f1 and the macro_f1_BUCKET of each mask bool[K] of texts drawn with replacement, float[draws].

    truth, said bool[n, K]. Equal seeds draw equal texts. A bucket none of whose classes is drawn has nan.
    """
    found: dict[str, list[np.ndarray]] = {}
    for counted in _resampled(truth, said, draws, seed):
        each, there, whole = class_f1(counted), counted[..., 2, :] > 0, f1(counted)
        values = {name: whole[name] for name in ("micro_f1", "macro_f1")}
        for name, mask in masks.items():
            members = (there & mask).sum(-1)
            with np.errstate(invalid="ignore"):
                values[f"macro_f1_{name}"] = np.where(there & mask, each, 0).sum(-1) / np.where(members, members,
                                                                                                np.nan)
        for name, some in values.items():
            found.setdefault(name, []).append(some)
    return {name: np.concatenate(values) for name, values in found.items()}


def paired_bootstrap(difference: float, first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Whether the first of two methods is better: both on the same resampled texts, Koehn 2004.

    difference: that was measured, first - second. first, second float[draws]: `resampled_f1` of both, on equal texts.
    Returns ``difference``, its 95 % interval ``low``, ``high``, and ``p``, the share of draws in which the first is not
    better.
    """
    drawn = first - second
    low, high = interval(drawn)
    return {"difference": float(difference), "low": low, "high": high,
            "p": float((drawn[~np.isnan(drawn)] <= 0).mean())}


def _resampled(truth: np.ndarray, said: np.ndarray, draws: int, seed: int) -> Iterator[np.ndarray]:
    """`counts` of texts drawn with replacement, float[draws of a piece, 3, K]; equal seeds draw equal texts."""
    from scipy.sparse import csr_matrix, hstack  # most labels are neither true nor said

    truth, said = np.asarray(truth, bool), np.asarray(said, bool)
    n, rng = len(truth), np.random.default_rng(seed)
    events = hstack([csr_matrix(each) for each in (truth & said, said, truth)], "csr").astype(np.float32)
    for size in [100] * (draws // 100) + [draws % 100] * (draws % 100 > 0):
        times = rng.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float32)
        yield np.rint(times @ events).reshape(size, 3, truth.shape[1])


def calibration(true: np.ndarray, scores: np.ndarray, bins: int = 10) -> dict[str, np.ndarray | float]:
    """Whether a score says how often it is right (Guo et al. 2017, arXiv 1706.04599, section 2).

    true bool[...], scores float[...] of as many decisions. Bins of equal width: ``score`` and ``share`` (of what is
    true), means of each that is not empty, ``count``; and ``ece``, the mean of |score - share| over all decisions.
    """
    true, scores = np.asarray(true, bool).ravel(), np.asarray(scores, float).ravel()
    place = np.minimum((scores * bins).astype(int), bins - 1)
    count, score, share = (np.bincount(place, weights, bins) for weights in (None, scores, true))
    full = count > 0
    score, share, count = score[full] / count[full], share[full] / count[full], count[full]
    return {"score": score, "share": share, "count": count,
            "ece": float((count * np.abs(score - share)).sum() / max(count.sum(), 1))}
