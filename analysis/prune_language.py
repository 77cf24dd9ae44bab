"""A smaller model that keeps what one language uses: choosing, cutting and repairing in one call.

The atlas studies every rule with its controls (analysis/atlas/pruning.py); this is the one that it recommends.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

import jaxmodels
from analysis.activations import down_norms
from analysis.atlas.collect import activity
from analysis.atlas.config import AtlasConfig
from analysis.atlas.pruning import Scores, mask_of
from analysis.atlas.repair import Calibration, rank_neurons, sequential_refit
from analysis.atlas.text import Rows
from jaxmodels.decoder.model import Decoder
from jaxmodels.errors import UserError
from jaxmodels.experts.models import ffn_layers, with_down, with_ffn
from jaxmodels.experts.prune import prune_experts
from jaxmodels.experts.recover import keep_last


def by_contribution(model: Decoder, rows: Rows, share: float) -> np.ndarray:
    """bool[L, F] of a dense model, bool[L, E] of a split one: what contributes most on a text, mean |h_j| · ‖down_j‖.

    The same share is kept in every layer. ``rows``: windows of one language.
    """
    dense, experts = as_dense(model)
    layers, width = dense.cfg.num_layers, dense.cfg.ffn_widths[0]
    order = np.tile(np.arange(width, dtype=np.int32), (layers, 1))  # as_dense leaves neurons in expert order
    cfg = AtlasConfig()
    cfg = dataclasses.replace(cfg, profile=dataclasses.replace(cfg.profile, shares=(cfg.profile.main_share,)))
    counts = activity(dense, rows, order, down_norms(dense), cfg, experts or 1)
    k = next(int(name.rpartition("_")[2]) for name in counts if name.startswith("expert_top_"))
    scores = Scores.of(counts, order, experts or 1, k)
    keep = mask_of("contribution uniform" if experts else "neuron contribution uniform", scores, share, order)
    return keep.reshape(layers, experts, -1)[..., 0] if experts else keep


def cut(model: Decoder, *, keep: np.ndarray | None = None, share: float | None = None, rows: Rows | None = None,
        repair: bool = False, advance: Callable[[], None] | None = None) -> Decoder:
    """The model without the parts that are not kept: a dense decoder, smaller in every layer.

    Args:
      keep: bool[L, E] of a split model or bool[L, F] of a dense one; else ``share`` and ``rows`` choose.
      repair: refit what is left to the whole model's activations on ``rows`` (analysis/atlas/repair.py). Of a dense
        model without ``keep`` it also chooses the neurons: those that the others can replace least stay, ``share`` of
        the whole model (``recover.keep_last``: the first layer of a deep model stays whole).

    Raises UserError for shapes that do not fit, layers of unequal width, and repair of post-norm models.
    """
    if keep is None and not (repair and model.cfg.experts is None):
        keep = by_contribution(model, rows, share)
    if not repair:
        return jaxmodels.prune(model, keep)
    dense, experts = as_dense(model)
    layers, width = dense.cfg.num_layers, dense.cfg.ffn_widths[0]
    advance = advance or (lambda: None)
    text = Calibration(dense, rows.tokens, rows.mask)
    if keep is None:
        keep = keep_last(rank_neurons(text, share, advance=advance), share)
    else:
        if keep.shape != (layers, experts or width):
            raise UserError(f"keep is {keep.dtype}{list(keep.shape)}; bool[{layers}, {experts or width}] is needed")
        if not keep.any(1).all():
            raise UserError("keep selects nothing in a layer; each needs at least one")
        keep = np.repeat(keep, width // keep.shape[1], axis=1)
    done = sequential_refit(text, keep, advance=advance)
    return jaxmodels.prune(with_down(dense, done.down, done.bias), keep)


def as_dense(model: Decoder) -> tuple[Decoder, int]:
    """(the dense model that a split one computes with all experts on, E); a dense model as it is, and 0.

    Neurons are in the order of the experts. Raises UserError for trained experts and for layers of unequal width.
    """
    cfg = model.cfg
    if len(set(cfg.ffn_widths)) > 1:
        raise UserError("the model's layers have unequal widths (it was pruned before); prune the whole model anew")
    if cfg.experts is None:
        return model, 0
    if cfg.experts.router == "softmax":
        raise UserError("the experts of a trained router cannot be merged into a dense layer; prune a split model")
    everything = np.ones(cfg.experts.num_experts, bool)
    layers: list[dict[str, Any]] = [prune_experts(ffn, everything) for ffn in ffn_layers(model)]
    return with_ffn(model, layers, experts=None, expert_layers=None,
                    ffn_widths=(layers[0]["down"].shape[0],) * len(layers)), cfg.experts.num_experts
