"""``jaxmodels.split`` and ``jaxmodels.prune``: whole decoders into experts, and into smaller decoders."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jaxmodels.decoder.config import ROUTERS, ExpertConfig
from jaxmodels.decoder.model import Decoder
from jaxmodels.errors import UserError
from jaxmodels.experts import routers
from jaxmodels.experts.prune import prune_experts
from jaxmodels.experts.split import Split, expert_shape, split_many
from jaxmodels.hub.models import build, leaves


@dataclasses.dataclass(frozen=True)
class ModelSplit:
    """The split of every layer. labels, perm: int32[L, F]; centres: float32[L, E, D]."""

    layers: tuple[Split, ...]

    @property
    def labels(self) -> np.ndarray:
        return np.stack([s.labels for s in self.layers])

    @property
    def perm(self) -> np.ndarray:
        return np.stack([s.perm for s in self.layers])

    @property
    def centres(self) -> np.ndarray:
        return np.stack([s.centres for s in self.layers])


def ffn_layers(model: Decoder) -> list[dict[str, jax.Array]]:
    """The feed-forward weights of every layer as plain dicts (dense or expert layout; routers left out)."""
    flat = leaves(model)
    out: list[dict[str, jax.Array]] = []
    for g, (start, stop) in enumerate(model.cfg.groups):
        names = {path[3]: leaf for path, leaf in flat.items() if path[:3] == ("groups", g, "ffn") and len(path) == 4}
        out += [{name: leaf[i] for name, leaf in names.items()} for i in range(stop - start)]
    return out


def with_ffn(model: Decoder, layers: Sequence[dict[str, Any]], router: Sequence[dict[str, Any]] | None = None,
             **config: Any) -> Decoder:
    """The model with other feed-forward weights, everything else shared. ``config`` are changes of DecoderConfig."""
    cfg = dataclasses.replace(model.cfg, **config)
    old = model.cfg.groups
    arrays = {path: leaf for path, leaf in leaves(model).items() if path[0] != "groups"}
    by_layer: dict[tuple, list] = {}
    for path, leaf in leaves(model).items():
        if path[0] == "groups" and path[2] != "ffn":
            start, stop = old[path[1]]
            if (start, stop) in cfg.groups:  # the usual case: nothing is copied
                arrays[("groups", cfg.groups.index((start, stop)), *path[2:])] = leaf
            else:
                by_layer.setdefault(path[2:], [None] * cfg.num_layers)[start:stop] = [leaf[i] for i in
                                                                                        range(stop - start)]
    for g, (start, stop) in enumerate(cfg.groups):
        for path, values in by_layer.items():
            if values[start] is not None:
                arrays[("groups", g, *path)] = jnp.stack(values[start:stop])
        for name in layers[start]:
            arrays[("groups", g, "ffn", name)] = _stacked([layers[i][name] for i in range(start, stop)],
                                                          cfg.param_dtype)
        for name in (router[start] if router else {}):
            dtype = "float32" if name == "bias" else cfg.param_dtype  # RouterBias, whatever the parameters are
            arrays[("groups", g, "ffn", "router", name)] = _stacked([router[i][name] for i in range(start, stop)],
                                                                    dtype)
    return build(cfg, arrays)


def _stacked(parts: list, dtype: str) -> jax.Array:
    return jnp.stack([jnp.asarray(part, dtype) for part in parts])


def unroll(model: Decoder) -> Decoder:
    """The same model with every layer alone: decodes faster than stacked layers on every backend."""
    return model if not model.cfg.scan_layers else with_ffn(
        model, ffn_layers(model), _router_layers(model), scan_layers=False)


def stack(model: Decoder) -> Decoder:
    """The same model with equal neighbouring layers stacked and scanned: compiles faster, as training wants it."""
    return model if model.cfg.scan_layers else with_ffn(
        model, ffn_layers(model), _router_layers(model), scan_layers=True)


def split(model: Decoder, *, num_experts: int | None = None, expert_size: int | None = None, method: str = "kmeans",
          seed: int = 0, router: str = "all", top_k: int | None = None, block: int = 1,
          activations: Iterable[Any] | None = None, importance: Iterable[Any] | None = None, num_shared: int = 0,
          pad: bool = False, processes: int | None = 1, progress: Callable[[int, int], None] | None = None,
          **options: Any) -> tuple[Decoder, ModelSplit]:
    """Splits every feed-forward layer of a dense decoder into experts (moe_split.md section 1).

    With ``router="all"`` (default) every expert runs and the model computes what it computed before, to float
    round-off. Any other router keeps ``top_k`` experts for each token, or for each ``block`` of tokens.

    Args:
      num_experts, expert_size: one of the two. They must divide the width, or ``pad=True`` appends zero neurons.
      method: kmeans, coactivation, random, markers or importance. coactivation and markers need ``activations``: the
        input of each layer's FFN, [tokens, D] a layer; importance needs ``importance``: [clusters, F] a layer.
      router: all, oracle, similarity, linear, mlp, markers or random.
      num_shared: always-on experts (markers, importance).
      processes: parallel searches; None for one a processor. More than 1 spawns, so the calling script needs the usual
        ``if __name__ == "__main__"`` guard.
      progress: called as progress(done, layers).

    Returns:
      (expert model, ModelSplit).

    Raises:
      UserError: sizes that do not divide, a method without its statistics, a model that has experts already.
    """
    if model.cfg.experts is not None:
        raise UserError("the model has experts already; split a dense model")
    if router not in ROUTERS[1:]:  # a trained router cannot be made by splitting
        raise UserError(f"router {router!r} is not one of {', '.join(ROUTERS[1:])}")
    if router == "markers" and method != "markers":
        raise UserError(f"router markers needs method markers, not {method}")
    sizes = {expert_shape(w, num_experts, expert_size, pad) for w in set(model.cfg.ffn_widths)}
    if len({experts for experts, _ in sizes}) > 1:
        raise UserError("layers of unequal width need num_experts, not expert_size: every layer must get as many")
    experts = next(iter(sizes))[0]
    # Before the search, which may take long.
    config = ExpertConfig(experts, experts - num_shared if top_k is None else top_k, router=router, renormalise=False,
                          shared=num_shared, block=block)
    dense = ffn_layers(model)
    activations, importance = (x if x is None else list(x) for x in (activations, importance))
    done = split_many(dense, num_experts=num_experts, expert_size=expert_size, method=method, seed=seed,
                      activations=activations, importance=importance, num_shared=num_shared, pad=pad,
                      processes=processes, progress=progress, activation=model.cfg.activation, **options)
    splits = tuple(s for _, s in done)
    expert_model = with_ffn(
        model, [weights for weights, _ in done],
        [_router_parameters(router, ffn, s, model.cfg.activation) for ffn, s in zip(dense, splits, strict=True)],
        experts=config, ffn_widths=tuple(s.expert_size for s in splits))
    return expert_model, ModelSplit(splits)


def prune(model: Decoder, keep: Any) -> Decoder:
    """Keeps some experts (of a split model: bool[L, E]) or neurons (of a dense one: bool[L, F]) of every layer.

    The rest leaves the weights: the result is a dense decoder with a width of its own in each layer, unrolled.
    Raises UserError when a layer would keep nothing or ``keep`` has another shape.
    """
    cfg = model.cfg
    if cfg.experts is not None and cfg.experts.router == "softmax":
        raise UserError("the experts of a trained router cannot be merged into a dense layer; prune a split model")
    keep = np.asarray(keep)
    width = cfg.experts.num_experts if cfg.experts else max(cfg.ffn_widths)
    if keep.dtype != bool or keep.shape != (cfg.num_layers, width):
        raise UserError(f"keep is {keep.dtype}{list(keep.shape)}; bool[{cfg.num_layers}, {width}] is needed")
    layers = [prune_experts(ffn, k) if cfg.experts else prune_neurons(ffn, k[:f])
              for ffn, k, f in zip(ffn_layers(model), keep, cfg.ffn_widths, strict=True)]
    return with_ffn(model, layers, experts=None, expert_layers=None, scan_layers=False,
                    ffn_widths=tuple(layer["down"].shape[0] for layer in layers))


def prune_neurons(ffn: dict[str, Any], keep: Bool[Any, "F"]) -> dict[str, Any]:
    """A dense FFN of the neurons that are kept."""
    index = np.flatnonzero(keep)
    if not index.size:
        raise UserError("keep selects no neuron; a layer needs at least one")
    return {name: w if name == "down_bias" else w[:, index] if name in ("gate", "up") else w[index]
            for name, w in ffn.items()}


def with_down(model: Decoder, down: Float[Any, "L F D"], bias: Float[Any, "L D"]) -> Decoder:
    """A dense decoder with other down projections and an output bias: what recovery returns (experts/recover.py)."""
    layers = [ffn | {"down": d[:ffn["down"].shape[0]], "down_bias": b}
              for ffn, d, b in zip(ffn_layers(model), down, bias, strict=True)]
    return with_ffn(model, layers, down_bias=True)


def _router_layers(model: Decoder) -> list[dict[str, jax.Array]] | None:
    out: list[dict[str, jax.Array]] = [{} for _ in range(model.cfg.num_layers)]
    for path, leaf in leaves(model).items():
        if path[0] == "groups" and path[2:4] == ("ffn", "router"):
            start, stop = model.cfg.groups[path[1]]
            for i in range(start, stop):
                out[i][path[4]] = leaf[i - start]
    return out if any(out) else None


def _router_parameters(kind: str, ffn: dict[str, Any], layer: Split, activation: str) -> dict[str, Any]:
    if kind == "similarity":
        return {"centres": layer.centres}
    if kind == "linear":
        return {"weight": layer.centres.T}
    if kind == "mlp":
        return {"first": layer.centres.T, "second": np.eye(layer.num_experts, dtype=np.float32)}
    if kind == "markers":
        router = routers.AnalyticRouter.create(ffn, layer, activation)
        fields = {name: getattr(router, name) for name in ("gate", "up", "gate_bias", "up_bias")}
        return {name: w for name, w in fields.items() if w is not None}
    return {}
