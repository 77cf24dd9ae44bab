"""How sure a tagger may say it is: calibration of entity and sentence confidences on the development part."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxmodels.cnn_cnn_lstm.schemes import entities
from jaxmodels.cnn_cnn_lstm.tagger import Calibration, Tagged, confidence, entity_log_prob

BINS = 10


class Events(NamedTuple):
    """What was said with which log-probability, float64[n], and whether it was right, bool[n]."""

    log_prob: np.ndarray
    right: np.ndarray


def events(truth: Sequence[Sequence[str]], found: Sequence[Tagged]) -> dict[str, Events]:
    """entity: the entities that were said; sentence: whole sentences, right if every tag is."""
    said = [(entity_log_prob(one, entity), entity in gold) for tags, one in zip(truth, found, strict=True)
            for gold in [set(entities(tags))] for entity in entities(one.tags)]
    whole = [(one.total, list(tags) == list(one.tags)) for tags, one in zip(truth, found, strict=True)]
    return {name: Events(np.array([p for p, _ in pairs], float), np.array([r for _, r in pairs], bool))
            for name, pairs in (("entity", said), ("sentence", whole))}


def fit(found: Events, steps: int = 50) -> tuple[float, float]:
    """(scale, shift) of the largest likelihood, by Newton's method; (1, 0) where all is right, or all wrong, or little.

    A small pull towards (1, 0) keeps separable events finite.
    """
    if len(found.right) < 10 or found.right.all() or not found.right.any():
        return 1.0, 0.0
    p = np.clip(confidence(found.log_prob), 1e-9, 1 - 1e-9)
    x = np.stack([np.log(p / (1 - p)), np.ones(len(p))], axis=1)
    prior, pull = np.array([1.0, 0.0]), 1.0
    w = prior.copy()
    for _ in range(steps):
        q = 1 / (1 + np.exp(-np.clip(x @ w, -30, 30)))
        gradient = x.T @ (q - found.right) + pull * (w - prior)
        step = np.linalg.solve((x * (q * (1 - q))[:, None]).T @ x + pull * np.eye(2), gradient)
        w = w - step * min(1.0, 2.0 / np.abs(step).max(initial=1e-9))
    return float(w[0]), float(w[1])


def fitted(truth: Sequence[Sequence[str]], found: Sequence[Tagged]) -> Calibration:
    return Calibration(**{name: fit(one) for name, one in events(truth, found).items()})


def calibration_error(p: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: mean of |share that is right - mean confidence| over equally filled bins.

    Equal confidences, of which votes have many, are in one bin: between two the order in the corpus would decide.
    """
    if not len(p):
        return float("nan")
    order = np.argsort(p, kind="stable")
    p, right = np.asarray(p, float)[order], np.asarray(right)[order]
    starts = [part[0] for part in np.array_split(np.arange(len(p)), min(bins, len(p)))]
    place = np.searchsorted(starts, np.searchsorted(p, p), side="right")
    return float(np.abs(np.bincount(place, right - p)).sum() / len(p))


def reliability(p: np.ndarray, right: np.ndarray, bins: int = BINS) -> list[dict[str, float]]:
    """For a diagram: confidence, share that is right, n, of each bin of equal width that is not empty."""
    place = np.minimum((np.asarray(p) * bins).astype(int), bins - 1)
    return [{"confidence": float(p[place == b].mean()), "right": float(right[place == b].mean()),
             "n": int((place == b).sum())} for b in range(bins) if (place == b).any()]


def numbers(truth: Sequence[Sequence[str]], found: Sequence[Tagged], calibration: Calibration,
            votes: Sequence[Sequence[float]] | None = None) -> dict[str, float]:
    """entity_ece, sentence_ece, and the same before calibration (``_raw``). votes: see `entity_votes`; with them
    entity_ece_votes, of these shares as they are."""
    out, seen = {}, events(truth, found)
    if votes is not None:
        out["entity_ece_votes"] = calibration_error(np.array([p for one in votes for p in one]), seen["entity"].right)
    for name, one in seen.items():
        out[f"{name}_ece"] = calibration_error(confidence(one.log_prob, getattr(calibration, name)), one.right)
        out[f"{name}_ece_raw"] = calibration_error(confidence(one.log_prob), one.right)
    return out
