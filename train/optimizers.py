"""Optimizers and learning-rate schedules, all from optax, by name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from train.settings import OptimizerConfig


def make_schedule(cfg: OptimizerConfig, steps: int) -> Callable[[Any], Any]:
    """Step -> learning rate over a run of `steps`."""
    top, end = cfg.learning_rate, cfg.learning_rate * cfg.floor
    warmup = max(round(cfg.warmup * steps), 1)
    up = optax.linear_schedule(top / warmup, top, max(warmup - 1, 1))  # the first step moves already
    if cfg.schedule == "constant":
        return optax.join_schedules([up, optax.constant_schedule(top)], [warmup])
    if cfg.schedule == "cosine":
        return optax.join_schedules(
            [up, optax.cosine_decay_schedule(top, max(steps - warmup, 1), cfg.floor)], [warmup])
    falling = max(round(cfg.decay * steps), 1)
    stable_until = max(steps - falling, warmup)
    return optax.join_schedules(
        [up, optax.constant_schedule(top), optax.linear_schedule(top, end, falling)], [warmup, stable_until])


def make_optimizer(cfg: OptimizerConfig, steps: int, *, stacked: str = "groups", spared: str | None = None
                   ) -> optax.GradientTransformation:
    """The optimizer of a run of `steps`. Parameters below a key named `stacked` carry a leading layer axis; those below
    one named `spared` have no weight decay.

    Muon (Jordan et al. 2024, optax.contrib.muon) orthogonalises every matrix of a stack, and of an expert stack, on its
    own; embeddings, heads, norms and biases go to AdamW, then with Nesterov's momentum.
    """
    schedule = make_schedule(cfg, steps)

    def is_decayed(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, p: _rank(path, p, stacked) >= 2 and spared not in _names(path), params)

    if cfg.name == "sgd":
        core = optax.sgd(schedule)
    elif cfg.name == "adamw":
        core = optax.adamw(schedule, cfg.beta1, cfg.beta2, weight_decay=cfg.weight_decay, mask=is_decayed)
    else:
        directions = optax.contrib.muon(
            1.0, adam_b1=cfg.beta1, adam_b2=cfg.beta2,
            consistent_rms=0.2,  # steps as large as AdamW's (Liu et al. 2025, eq. 4), so that one rate serves both
            muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(
                lambda path, p: _dimensions(path, p, stacked), params))
        # Its own weight decay knows no mask for what it gives to AdamW. Directions point downhill already.
        core = optax.chain(directions, optax.add_decayed_weights(-cfg.weight_decay, is_decayed),
                           optax.scale_by_schedule(schedule))
    return optax.chain(optax.clip_by_global_norm(cfg.clip), core) if cfg.clip else core


def scaled(optimizer: optax.GradientTransformation, scales: Callable[[Any], Any]) -> optax.GradientTransformation:
    """`optimizer` with every update times ``scales(params)``, a tree of numbers or of arrays that broadcast.

    Weight decay is scaled with the rest, as a lower learning rate scales it.
    """
    scale = optax.stateless(lambda updates, params: jax.tree.map(jnp.multiply, updates, scales(params)))
    return optax.chain(optimizer, scale)


def layerwise(params: Any, layers: int, trunk: float, decay: float, heads: tuple[str, ...] = ("classifier",),
              stacked: str = "groups") -> Any:
    """Scales for `scaled`: 1 for heads, `trunk` for what follows the last layer, times `decay` for each layer below.

    Howard and Ruder 2018 (discriminative fine-tuning); ELECTRA and BEiT use it in this form. params: a tree whose
    layers lie below `stacked`, in order, each array of a group with a leading layer axis.
    """
    first, groups = 0, {}
    for name in sorted(params[stacked], key=int):
        groups[name] = first
        first += jax.tree.leaves(params[stacked][name])[0].shape[0]

    def scale(path: Any, p: Any) -> Any:
        names = _names(path)
        if names[0] in heads:
            return jnp.float32(1)
        if names[0] == stacked:
            depth = groups[path[1].key] + jnp.arange(p.shape[0])
            return (trunk * decay ** (layers - 1.0 - depth)).reshape(-1, *[1] * (p.ndim - 1))
        return jnp.float32(trunk * decay**layers if names[0] in ("embed", "positions", "embed_norm") else trunk)

    return jax.tree_util.tree_map_with_path(scale, params)


def _names(path: Any) -> list[str]:
    return [str(getattr(key, "key", getattr(key, "name", key))) for key in path]


def _rank(path: Any, p: Any, stacked: str) -> int:
    return p.ndim - (stacked in _names(path))


def _dimensions(path: Any, p: Any, stacked: str) -> Any:
    """Which axes of a parameter form the matrix that Muon orthogonalises; None: AdamW."""
    names = _names(path)
    rank = _rank(path, p, stacked)
    if stacked not in names or rank < 2 or "router" in names or p.ndim - 1 < 2 or names[-1].endswith("bias"):
        return None
    numbers = optax.contrib.MuonDimensionNumbers
    if "attention" in names:  # [L, D, N, H] projects D to N·H; [L, N, H, D] back
        return numbers((1, 2), (3,)) if names[-1] == "out" else numbers((1,), (2, 3))
    return numbers((p.ndim - 2,), (p.ndim - 1,))  # [L, D, F], experts [L, E, D, s]
