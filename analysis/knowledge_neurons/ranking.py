"""What was found about neurons, as rankings: one number a neuron, higher is better."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from analysis.knowledge_neurons import scores
from analysis.knowledge_neurons.neurons import Layout
from train.enzyme import CLASSES

GROUPS = 2 * CLASSES  # half · CLASSES + class


class Found(NamedTuple):
    """What was scored: moments of activations; sums of contributions by the name of their path."""

    moments: scores.Moments
    paths: dict[str, scores.Attributed]


def groups_of(labels: Sequence[int]) -> np.ndarray:
    """half · CLASSES + class: the members of every class go to the halves in turn."""
    seen, groups = [0] * CLASSES, []
    for label in np.asarray(labels).tolist():
        groups.append(seen[label] % 2 * CLASSES + label)
        seen[label] += 1
    return np.array(groups, int)


def rankings(found: Found, layout: Layout, halves: Sequence[int] = (0, 1)) -> dict[str, np.ndarray]:
    """Scores float64[n] by name: those of `selection.SCORED` that there are, and further ones for the tables."""
    active = scores.activation_scores(found.moments, CLASSES, halves)
    raw = active["raw"]
    out = {"activation": raw, "activation_quantile": layout.quantiles(raw), "activation_contrast": active["contrast"],
           "activation_rms": active["rms"], "activation_scaled": layout.scaled(raw)}
    for name, sums in found.paths.items():
        by_class = sums.of_classes(CLASSES, halves)
        short = name if name == "grad_x_act" else f"ig_{name.removesuffix('-zero').replace('-', '_')}"
        out[short] = scores.task_score(by_class)
        if name == "gate-zero":
            out["ig_abs"] = scores.task_score(sums.of_classes(CLASSES, halves, signed=False))
            out["ig_gate_pairs"] = scores.task_score(layout.pair_summed(by_class))
            out["ig_gate_scaled"] = layout.scaled(out[short])
    return out
