"""Taps: the one mechanism for looking into a model and for changing it (architecture.md section 3).

A model names points; a caller says which to record, which to fold while they are recorded, and which to edit.
Recordings are outputs and edits are inputs of a pure function, so taps work under ``jit``, ``grad``, ``vmap``,
``scan`` and sharding, and cost nothing when unused. See ``docs/taps.md``.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.errors import UserError

Edits = Mapping[str, Any]  # arrays of numpy or jax, or numbers
Reduce = Callable[[jax.Array, jax.Array], Any]
KINDS = ("reduce", "edit", "scale", "add", "mask")  # what is told by point, beside `record`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Taps:
    """What to record and what to change, by point name.

    Attributes:
      record: points whose values are returned, each stacked on a leading layer axis: ``aux[point]``: [L, B, T, ...].
      reduce: ``{point: fn}``; ``fn(value, token_mask)`` runs inside the scan over layers, so that only what it returns
        is stacked. ``value`` is [B, T, ...], ``token_mask`` bool[B, T]. Pass arrays that differ by layer through
        ``jax.tree_util.Partial(fn, array)``: leaves carry a leading layer axis and arrive sliced.
      edit: ``{point: fn}``; a value v becomes ``fn(v, token_mask)``. Arrays go through ``Partial`` as with ``reduce``.
      scale, add, mask: ``{point: array}`` that broadcast to [L, B, T, ...]. A value v (after ``edit``)
        becomes ``v * scale + add``, then 0 where ``mask`` is False. The leading axis is L, or 1 for the same edit in
        every layer.
    """

    record: Iterable[str] = dataclasses.field(default=(), metadata={"static": True})
    reduce: Mapping[str, Reduce] = dataclasses.field(default_factory=dict)
    edit: Mapping[str, Reduce] = dataclasses.field(default_factory=dict)
    scale: Edits = dataclasses.field(default_factory=dict)
    add: Edits = dataclasses.field(default_factory=dict)
    mask: Edits = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if isinstance(self.record, str):
            raise UserError(f"Taps(record={self.record!r}) is a string; write record=({self.record!r},)")
        # A plain function would be a leaf of the pytree, which jit refuses: Partial makes it static.
        for kind in ("reduce", "edit"):
            functions = {k: f if isinstance(f, jax.tree_util.Partial) or not callable(f) else jax.tree_util.Partial(f)
                         for k, f in getattr(self, kind).items()}
            object.__setattr__(self, kind, functions)
        object.__setattr__(self, "record", tuple(self.record))  # static under jit, so it must hash

    @property
    def points(self) -> frozenset[str]:
        """Every point that is named anywhere in these taps."""
        return frozenset(self.record).union(*(getattr(self, kind) for kind in KINDS))

    def check(self, points: Iterable[str], num_layers: int) -> None:
        """Raises UserError for a point the model does not have, or an array whose layer axis does not fit."""
        points = tuple(points)
        for name in sorted(self.points - set(points)):
            near = difflib.get_close_matches(name, points, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(points)}"
            raise UserError(f"tap {name!r} is not a point of this model; {hint}")
        for kind in KINDS:
            for name, value in getattr(self, kind).items():
                layers = num_layers + (name == "residual")
                wrong = [jnp.shape(a)[0] for a in jax.tree.leaves(value)
                         if jnp.ndim(a) and jnp.shape(a)[0] not in (1, layers)]
                if wrong and name != "embedding":
                    raise UserError(f"tap {kind}[{name!r}] has {wrong[0]} layers, the model has {layers}; "
                                    f"give a leading axis of {layers}, or of 1 for the same in every layer")

    def layers(self, start: int, stop: int) -> "Taps":
        """The taps of layers start..stop-1, every array with a leading axis of stop - start (ready for a scan)."""
        def cut(x):
            x = jnp.asarray(x)
            x = x[None] if x.ndim == 0 else x
            return jnp.broadcast_to(x, (stop - start, *x.shape[1:])) if x.shape[0] == 1 else x[start:stop]
        return jax.tree.map(cut, self)

    def probe(self, token_mask: jax.Array, width: int = 0, widest: int = 0) -> "Probe":
        """A recorder for one layer; ``self`` holds that layer's slices (no layer axis).

        width: hidden width of this layer's FFN; widest: that of the widest layer, which edits of ``ffn.*`` cover.
        """
        return Probe(self, token_mask, width, widest)


class Probe:
    """Applies one layer's taps while the layer runs: ``value = probe(name, value)``; recordings gather in ``out``."""

    def __init__(self, taps: Taps, token_mask: jax.Array, width: int = 0, widest: int = 0):
        self.taps, self.token_mask, self.width, self.widest, self.out = taps, token_mask, width, widest, {}

    def wants(self, name: str) -> bool:
        return name in self.taps.points

    def __call__(self, name: str, value: jax.Array) -> jax.Array:
        taps = self.taps
        if name in taps.edit:
            value = taps.edit[name](value, self.token_mask).astype(value.dtype)
        if name in taps.scale:
            value = value * self._fit("scale", name, value).astype(value.dtype)
        if name in taps.add:
            value = value + self._fit("add", name, value).astype(value.dtype)
        if name in taps.mask:
            value = jnp.where(self._fit("mask", name, value), value, jnp.zeros((), value.dtype))
        if name in taps.reduce:
            self.out[name] = taps.reduce[name](value, self.token_mask)
        elif name in taps.record:
            self.out[name] = value
        return value

    def _fit(self, kind: str, name: str, value: jax.Array) -> jax.Array:
        edit = jnp.asarray(getattr(self.taps, kind)[name])
        # Layers of unequal width share one edit array, as wide as the widest (architecture.md section 3).
        if name.startswith("ffn.") and value.shape[-1] == self.width < self.widest == (edit.shape or (0,))[-1]:
            edit = edit[..., :self.width]
        try:
            fits = jnp.broadcast_shapes(edit.shape, value.shape) == value.shape
        except ValueError:
            fits = False
        if not fits:
            lead = () if name == "embedding" else ("L",)
            wanted = ", ".join(map(str, (*lead, *value.shape)))
            raise UserError(f"tap {kind}[{name!r}] has shape [{', '.join(map(str, (*lead, *edit.shape)))}]; it must "
                            f"broadcast to [{wanted}]")
        return edit


NO_TAPS = Taps()
