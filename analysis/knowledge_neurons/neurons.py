"""Neurons as one vector: a neuron is one coordinate of one site in one layer, shared by all tokens.

Sites are those of `analysis.attribution.SITES`, in forward order: q, k, v, o (D each), fc1 (4D), fc2 (D); 9D a layer
(esm_knowledge_neurons.md section 4). Scores and masks are vectors over all n neurons, ordered by site, layer, place.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from analysis.attribution import SITES
from jaxmodels.errors import UserError
from jaxmodels.esm.config import EsmConfig

POINTS = tuple(SITES.values())
ROTATED = ("q", "k")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where every neuron of a vector is. layers: L; shapes: of each site in one layer, in the order of SITES."""

    layers: int
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, cfg: EsmConfig) -> "Layout":
        """Raises UserError for layers of unequal width, of which enrichment by layer would compare unlike things."""
        if len(set(cfg.ffn_widths)) > 1:
            raise UserError(f"the layers have unequal widths {sorted(set(cfg.ffn_widths))}; give a model that was not "
                            "pruned")
        head, width = (cfg.num_heads, cfg.head_dim), (cfg.d_model,)
        return cls(cfg.num_layers, (head, head, head, width, (cfg.ffn_widths[0],), width))

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons of each site in one layer."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        return self.layers * sum(self.widths)

    @property
    def sizes(self) -> Int[np.ndarray, "S L"]:
        """Neurons of every cell, a site in a layer."""
        return np.repeat(np.array(self.widths)[:, None], self.layers, 1)

    @functools.cached_property
    def cell(self) -> Int[np.ndarray, "n"]:
        """site · L + layer of every neuron."""
        return np.repeat(np.arange(self.sizes.size), self.sizes.reshape(-1))

    def flat(self, arrays: Mapping[str, Any], lead: int = 0) -> np.ndarray:
        """{tap point: [L, *lead, *site]} -> [*lead, n]."""
        parts = []
        for point in POINTS:
            a = np.moveaxis(np.asarray(arrays[point]), 0, lead)
            parts.append(a.reshape(*a.shape[:lead], -1))
        return np.concatenate(parts, -1)

    def arrays(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """[n] -> {tap point: [L, 1, 1, *site]}, which broadcasts over examples and tokens."""
        if vector.shape != (self.size,):
            raise UserError(f"a vector of shape {vector.shape} is not one number for each of {self.size} neurons")
        ends = np.cumsum([0, *(self.layers * width for width in self.widths)])
        return {point: vector[start:end].reshape(self.layers, 1, 1, *shape) for point, shape, start, end
                in zip(POINTS, self.shapes, ends, ends[1:], strict=False)}

    def counts(self, kept: Bool[np.ndarray, "n"]) -> Int[np.ndarray, "S L"]:
        """Kept neurons of every cell."""
        return np.bincount(self.cell[kept], minlength=self.sizes.size).reshape(self.sizes.shape)

    def quantiles(self, scores: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        """Of each score among those of its site and layer, in (0, 1); equal scores share the middle of their places.

        Every cell then has the same quantiles: a global ranking by them keeps the same share of every site and layer.
        """
        from scipy.stats import rankdata

        out = np.empty(self.size)
        for cell in range(self.sizes.size):
            inside = self.cell == cell
            out[inside] = (rankdata(scores[inside]) - 0.5) / inside.sum()
        return out

    def scaled(self, scores: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        """Scores (>= 0) over the mean of their site and layer: how they spread is left, how large they are is not."""
        total = np.bincount(self.cell, weights=scores, minlength=self.sizes.size)
        mean = (total / self.sizes.reshape(-1))[self.cell]
        return np.divide(scores, mean, out=np.zeros(self.size), where=mean > 0)

    def pair_summed(self, scores: Float[np.ndarray, "*C n"]) -> Float[np.ndarray, "*C n"]:
        """Scores that no rotation of a pair of q or k changes: each of the two has half of the pair's signed sum.

        Rotary positions turn the coordinates j and j + H/2 of a head into each other, so that how a sum falls on the
        two means nothing by itself (esm_knowledge_neurons.md section 4). Other sites stay.
        """
        out, ends = np.array(scores, float), np.cumsum([0, *(self.layers * width for width in self.widths)])
        for number, name in enumerate(SITES):
            if name in ROTATED:
                here = out[..., ends[number]:ends[number + 1]]
                heads = here.reshape(*here.shape[:-1], -1, 2, self.shapes[number][-1] // 2)
                here[...] = np.broadcast_to(heads.mean(-2, keepdims=True), heads.shape).reshape(here.shape)
        return out


def chosen(labels: Sequence[int], limit: int | None) -> Int[np.ndarray, "m"]:
    """Which of labelled examples are used: all, or the first `limit` of every class; in their order."""
    labels, seen, kept = np.asarray(labels), {}, []
    for i, label in enumerate(labels.tolist()):
        seen[label] = seen.get(label, 0) + 1
        if limit is None or seen[label] <= limit:
            kept.append(i)
    return np.array(kept, int)
