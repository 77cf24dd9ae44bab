"""Text2Tree (Yan et al. 2023, arXiv 2311.16650): encoder, head; label states in training only.

    model = Text2Tree(encoder, tree.num_classes, cfg, tree=tree, rngs=nnx.Rngs(0))
    loss, parts = model.loss(batch, key)      # training
    logits, aux = model(tokens, mask)         # inference: the label states are not touched
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.errors import UserError
from jaxmodels.layers.linear import linear
from jaxmodels.layers.param import param
from jaxmodels.taps import NO_TAPS, Taps
from jaxmodels.text2tree import losses
from jaxmodels.text2tree._dropout import dropout
from jaxmodels.text2tree.hiagm import HiagmHead
from jaxmodels.text2tree.hlr import HlrConfig, LabelEmbeddings
from jaxmodels.text2tree.losses import LossConfig
from jaxmodels.text2tree.tree import LabelTree

HEADS = ("linear", "hiagm")

@dataclasses.dataclass(frozen=True)
class Text2TreeConfig:
    """dropout: before the linear head, in training. pooler: a dense layer with tanh below it, as BERT has above [CLS];
    a mean over tokens is better read without (docs/log.md, 2026-11-26). chunks: texts come in pieces, [B, C, T], and
    labels attend to them (`ChunkHead`). attention, start: see `HlrConfig`. head: ``linear``, or ``hiagm``, with an
    output for every node of the tree but the root (`HiagmHead`)."""

    loss: LossConfig = LossConfig()
    dropout: float = 0.1
    pooler: bool = True
    chunks: bool = False
    attention: str = "auto"
    start: str = "random"
    head: str = "linear"

    def __post_init__(self):
        if self.head not in HEADS:
            raise UserError(f"head {self.head!r} is not one of {', '.join(HEADS)}")


class Head(nnx.Module):
    """logits = dropout(u) W + b, with a pooler u = tanh(h W_p + b_p), section 6, else u = h. Its features are h [B, D],
    the encoder's."""

    def __init__(self, d_model: int, classes: int, rate: float, pooler: bool = True, *, rngs: nnx.Rngs):
        self.rate = rate
        if pooler:
            self.pooler = param(rngs, (d_model, d_model), ("embed", None), std=0.02)  # BERT's initial values
            self.pooler_bias = param(rngs, (d_model,), (None,), value=0.0)
        self.out = param(rngs, (d_model, classes), ("embed", "vocab"), std=0.02)
        self.out_bias = param(rngs, (classes,), ("vocab",), value=0.0)

    def features(self, h: jax.Array, there: jax.Array | None = None) -> jax.Array:
        """What is mixed: h itself."""
        return h

    def pool(self, h: jax.Array) -> jax.Array:
        """[..., D] -> u, float32[..., D]."""
        h = h.astype(jnp.float32)
        return jnp.tanh(linear(h, self.pooler[...], self.pooler_bias[...])) if hasattr(self, "pooler") else h

    def __call__(self, features: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """[P, D] -> float32[P, K]."""
        return linear(dropout(self.pool(features), self.rate, key), self.out[...], self.out_bias[...])


class ChunkHead(nnx.Module):
    """Each label looks for itself among the chunks of a text (CAML, Mullenbach et al. 2018, arXiv 1802.05695).

    logits_k = Σ_c α_kc w_k·u_c + b_k, u_c of chunk c as in `Head`, α_k = softmax_c(a_k·u_c). The features of a text are
    the sums above and below that fraction, [B, 2, K]: the mixture of two texts' features is then a text with the
    chunks of both, those of one counting lam, those of the other 1 - lam.
    """

    def __init__(self, d_model: int, classes: int, rate: float, pooler: bool = True, *, rngs: nnx.Rngs):
        self.pooled = Head(d_model, classes, rate, pooler, rngs=rngs)
        self.attention = param(rngs, (d_model, classes), ("embed", "vocab"), std=0.02)

    def features(self, h: jax.Array, there: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """h [B, C, D], there bool[B, C] -> float32[B, 2, K]."""
        head = self.pooled
        u = head.pool(h)
        # Clipped, so that texts need no common maximum: e^30 is far from the ends of float32.
        mass = jnp.exp(jnp.clip(linear(u, self.attention[...]), -30, 30)) * there[..., None]
        return jnp.stack([(mass * linear(dropout(u, head.rate, key), head.out[...])).sum(1), mass.sum(1)], axis=1)

    def __call__(self, features: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """[P, 2, K] -> float32[P, K]; key: dropout is in the features."""
        below = features[:, 1]
        return features[:, 0] / jnp.where(below > 0, below, 1) + self.pooled.out_bias[...]


class Text2Tree(nnx.Module):
    """encoder: see `encoders`. labels: the label states (HLR), None for a model without a tree, or after training."""

    def __init__(self, encoder: nnx.Module, classes: int, cfg: Text2TreeConfig, *, tree: LabelTree | None = None,
                 pooler: tuple[Any, Any] | None = None, label_rows: Any = None, rngs: nnx.Rngs):
        """classes: outputs of the head. pooler: weight [D, D] and bias [D] that it begins with, if there is one (a
        checkpoint's). label_rows: see `hlr.label_rows`."""
        over_nodes = cfg.head == "hiagm"
        if tree is None and (over_nodes or cfg.loss.method != "plain"):
            what = "head hiagm" if over_nodes else f"method {cfg.loss.method}"
            raise UserError(f"{what} needs a label tree; pass tree, or take method='plain'")
        if tree is not None and (outputs := len(tree) - 1 if over_nodes else tree.num_classes) != classes:
            raise UserError(f"the tree has {outputs} {'nodes below its root' if over_nodes else 'classes'}, the head "
                            f"{classes}; restrict the tree to them")
        self.cfg, self.encoder = cfg, encoder
        if over_nodes:
            self.head = HiagmHead(encoder.width, tree, cfg.dropout, rngs=rngs)
        else:
            self.head = (ChunkHead if cfg.chunks else Head)(encoder.width, classes, cfg.dropout, cfg.pooler, rngs=rngs)
        if pooler is not None and (over_nodes or cfg.pooler):
            inner = getattr(self.head, "pooled", self.head)
            inner.pooler[...], inner.pooler_bias[...] = map(jnp.asarray, pooler)
        hlr = HlrConfig(encoder.width, attention=cfg.attention, start=cfg.start)
        self.labels = None if tree is None or cfg.loss.method == "plain" else LabelEmbeddings(
            tree, hlr, start=label_rows, rngs=rngs)

    def __call__(self, tokens: Any, mask: Any = None, taps: Taps = NO_TAPS) -> tuple[jax.Array, dict[str, Any]]:
        """(logits float32[B, K], aux); one compilation for each shape. See `forward`."""
        graphdef, state = nnx.split(self.for_inference())
        return _run(graphdef, state, tokens, mask, taps)

    def forward(self, tokens: Any, mask: Any = None, taps: Taps = NO_TAPS, key: jax.Array | None = None
                ) -> tuple[jax.Array, dict[str, Any]]:
        """The pure forward pass. tokens int32[B, T], [B, C, T] in chunks, or what else the encoder takes.

        mask: bool, False for padding; default: where the token is not 0. taps: of the encoder; chunks are rows of
        their batch, [B·C, T]. key: of dropout, for training.
        """
        key, again = (None, None) if key is None else jax.random.split(key)
        features, _, aux = self.features(tokens, mask, taps, key)
        return self.head(features, again), aux

    def features(self, tokens: Any, mask: Any = None, taps: Taps = NO_TAPS, key: jax.Array | None = None
                 ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        """(what the head reads and mixtures are made of, one vector a text [B, D] for SSL, aux)."""
        tokens = jnp.asarray(tokens)
        if mask is None:
            if not jnp.issubdtype(tokens.dtype, jnp.integer):
                raise UserError("stored states have no padding token; pass mask, bool[B, T]")
            mask = tokens != 0
        mask = jnp.asarray(mask, bool)
        if not self.cfg.chunks:
            h, aux = self.encoder(tokens, mask, taps, key)
            return self.head.features(h), h, aux
        B, C = mask.shape[:2]
        first, second = (None, None) if key is None else jax.random.split(key)
        h, aux = self.encoder(tokens.reshape(B * C, *tokens.shape[2:]), mask.reshape(B * C, -1), taps, first)
        h, there = h.reshape(B, C, -1), mask.any(-1)
        mean = jnp.where(there[..., None], h, 0).sum(1) / jnp.maximum(there.sum(1, keepdims=True), 1)
        return self.head.features(h, there, second), mean, aux

    def loss(self, batch: Mapping[str, jax.Array], key: jax.Array, train: bool = True
             ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(mean loss of a batch, its parts): section 7.

        batch: tokens and mask as in `forward`; labels int32[B] or {0, 1}[B, K]; valid bool[B], optional: the texts that
        are there. train: with dropout.
        """
        keys = jax.random.split(key, 4)
        drop = keys[:3] if train else (None,) * 3
        features, vector, _ = self.features(batch["tokens"], batch.get("mask"), key=drop[0])
        states = None if self.labels is None else self.labels(drop[2])[0]
        return losses.total(self.cfg.loss, features, batch["labels"], lambda x: self.head(x, drop[1]), states, keys[3],
                            batch.get("valid"), vector)

    def for_inference(self) -> "Text2Tree":
        """The same model without the label states: a smaller tree of parameters, the same logits."""
        graphdef, state = nnx.split(self)
        model = nnx.merge(graphdef, state)
        model.labels = None
        return model


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, state, tokens, mask, taps):
    return nnx.merge(graphdef, state).forward(tokens, mask, taps)


def predictions(logits: Any, multi_label: bool) -> np.ndarray:
    """Scores in [0, 1], float32[n, K]: sigmoids or a softmax."""
    logits = jnp.asarray(logits)
    return np.asarray(jax.nn.sigmoid(logits) if multi_label else jax.nn.softmax(logits, axis=-1))
