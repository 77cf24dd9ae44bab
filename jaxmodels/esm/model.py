"""The ESM encoders: ESM-2 (Lin et al. 2023), ESM-1b (Rives et al. 2021) and other BERT-like models of proteins.

Reads downwards: block, encoder, forward pass, positions and who sees whom.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.errors import UserError
from jaxmodels.esm.config import EsmConfig
from jaxmodels.esm.heads import Classifier, ContactHead, LMHead, contact_evidence, pool
from jaxmodels.layers import flash, stack
from jaxmodels.layers.attention import Attention, Context
from jaxmodels.layers.axes import constrain
from jaxmodels.layers.mlp import MLP
from jaxmodels.layers.norms import LayerNorm
from jaxmodels.layers.param import param
from jaxmodels.layers.rotary import turns
from jaxmodels.shapes import Array, Bool, Float, Int
from jaxmodels.taps import NO_TAPS, Probe, Taps

POINTS = ("embedding", "residual", "attention.query", "attention.key", "attention.value", "attention.probability",
          "attention.output", "ffn.up", "ffn.hidden", "ffn.output")
OUTPUTS = ("logits", "hidden", "class", "none")
# Share of the residues that a training run of ESM-2 replaces by <mask>, 15 % · 80 % (fair-esm, esm/model/esm2.py).
TRAINED_MASK_RATIO = 0.15 * 0.8


class Block(nnx.Module):
    """One layer: attention, then a feed-forward layer."""

    def __init__(self, cfg: EsmConfig, layer: int, *, rngs: nnx.Rngs):
        self.placement = cfg.norm_placement
        norm = functools.partial(LayerNorm, cfg.d_model, eps=cfg.norm_eps, dtype=cfg.param_dtype, rngs=rngs)
        self.attention_norm, self.ffn_norm = norm(), norm()
        self.attention = Attention(cfg.d_model, cfg.num_heads, cfg.num_heads, cfg.head_dim, qkv_bias=True,
                                   out_bias=True, causal=False, dtype=cfg.param_dtype, rngs=rngs)
        # The exact GELU: the tanh form is measurably wrong here.
        self.ffn = MLP(cfg.d_model, cfg.ffn_widths[layer], activation="gelu", gated=False, bias=True,
                       dtype=cfg.param_dtype, rngs=rngs)

    def __call__(self, x: jax.Array, context: Context, probe: Probe, window=None, cache=None):
        """x [B, T, D] -> (x, None); window and cache are what layers of a decoder take."""
        x = probe("residual", constrain(x, "batch", None, None))
        if self.placement == "pre":
            x = x + self.attention(self.attention_norm(x), context, probe)[0]
            return x + self.ffn(self.ffn_norm(x), probe), None
        x = self.attention_norm(x + self.attention(x, context, probe)[0])
        return self.ffn_norm(x + self.ffn(x, probe)), None


class Esm(nnx.Module):
    """``logits, aux = model(tokens)``: int32[B, T] -> float32[B, T, V] and what the taps recorded."""

    def __init__(self, cfg: EsmConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        dtype, D = cfg.param_dtype, cfg.d_model
        norm = functools.partial(LayerNorm, D, eps=cfg.norm_eps, dtype=dtype, rngs=rngs)
        self.embed = param(rngs, (cfg.vocab_size, D), ("vocab", "embed"), std=0.02, dtype=dtype)
        self.positions = None if cfg.position == "rotary" else param(
            rngs, (cfg.max_positions, D), (None, "embed"), std=0.02, dtype=dtype)
        self.embed_norm = norm() if cfg.embed_norm else None
        self.groups = nnx.List([
            stack.stack(lambda rngs, i=start: Block(cfg, i, rngs=rngs), stop - start, rngs)
            for start, stop in cfg.groups])
        self.norm = norm() if cfg.norm_placement == "pre" else None
        self.lm_head = LMHead(D, cfg.vocab_size, eps=cfg.norm_eps, dtype=dtype, rngs=rngs) if cfg.lm_head else None
        self.contact_head = ContactHead(cfg.num_layers * cfg.num_heads, dtype=dtype, rngs=rngs) \
            if cfg.contact_head else None
        self.classifier = Classifier(D, cfg.classes, dtype=dtype, rngs=rngs) if cfg.classes else None

    def __call__(self, tokens: Int[Any, "B T"] | None = None, mask: Bool[Any, "B T"] | None = None,
                 segments: Int[Any, "B T"] | None = None, positions: Int[Any, "B T"] | None = None,
                 soft: Float[Any, "B T V"] | None = None, taps: Taps = NO_TAPS, output: str = "logits",
                 num_segments: int | None = None) -> tuple[Float[Array, "..."] | None, dict[str, Any]]:
        """Runs the model; one compilation for each shape and set of taps.

        Args:
          tokens: int32[B, T], ``<cls> residues <eos>`` and padding.
          mask: bool[B, T], False for padding, which is never looked at and never counted. Default: where the token is
            not ``<pad>``. (transformers takes pads for tokens where no mask is passed.)
          segments: int32[B, T], several proteins packed into a row: 0 is padding, and tokens of one protein share an
            id and stand together. Proteins do not see each other; positions and the compensation for masked tokens
            are each protein's own.
          positions: int32[B, T], counted from 0 at ``<cls>``; default: from the start of the row or segment.
          soft: float[B, T, V], distributions over the vocabulary in place of ids. With ``tokens`` beside them, those
            say where padding, ``<cls>`` and ``<eos>`` are; else the likeliest token does.
          taps: what to record and what to change.
          output: ``logits`` of the masked-LM head, float32[B, T, V]; ``hidden``, after the final norm, [B, T, D];
            ``class``, float32[B, C]; ``none`` (no head; returns None).
          num_segments: with ``segments`` and ``class``: how many proteins to classify in each row, the segments
            1..num_segments: float32[B, S, C], of no meaning for a segment that a row does not have.

        Returns:
          (output, aux), aux: a dict of recordings by point, with a leading layer axis.

        Raises UserError for inputs of another type or shape, for an output whose head the model lacks, for a protein
        longer than a learned table of positions, and for taps at points the model lacks or that do not fit.
        """
        _check_ids(tokens, self.cfg)
        graphdef, state = nnx.split(self)
        return _run(graphdef, state, tokens, mask, segments, positions, soft, taps, output, num_segments)

    def forward(self, tokens=None, mask=None, segments=None, positions=None, soft=None, taps: Taps = NO_TAPS,
                output="logits", num_segments: int | None = None, start: tuple[jax.Array, jax.Array] | None = None):
        """The pure forward pass, for use inside other transforms. Returns (output, aux).

        start: (layer, what enters it [B, T, D]), see ``stack.run_from``: layers before it are left out.
        """
        cfg = self.cfg
        taps.check(POINTS, cfg.num_layers)
        self._check_output(output, segments, num_segments)
        tokens, soft = _check_inputs(tokens, soft, cfg)
        if mask is None:
            mask = tokens != cfg.pad_id
        mask = jnp.asarray(mask, bool)
        if segments is not None:
            mask &= jnp.asarray(segments) > 0
        positions, context = make_context(cfg, mask, tokens, segments, positions)
        probe = stack.embedding_probe(taps, mask)
        x = probe("embedding", self.embed_tokens(tokens, mask, segments, positions, soft).astype(cfg.dtype))
        if start is None:
            x, aux, _ = stack.run(self.groups, cfg, x, context, taps, mask)
            aux.update(probe.out)
        else:
            x, aux = stack.run_from(self.groups, cfg, *start, context, taps, mask), {}
        if output == "none":
            return None, aux
        x = constrain(x, "batch", None, None)
        x = x if self.norm is None else self.norm(x)
        if output == "class":
            residues = mask & (tokens != cfg.cls_id) & (tokens != cfg.eos_id)
            return self.classifier(pool(x, cfg.pool, mask, residues, segments, num_segments)), aux
        return (x if output == "hidden" else self.unembed(x)), aux

    def contacts(self, tokens: Int[Any, "B T"], mask: Bool[Any, "B T"] | None = None) -> Float[Array, "B T-2 T-2"]:
        """Probability that two residues touch: float32[B, T-2, T-2], for ``tokens`` with <cls> and <eos>.

        Of a row shorter than the batch, the residues come first and the rest means nothing. The attention maps of one
        layer at a time are in memory. Raises UserError for a model without a contact head and for rows without room
        for a residue.
        """
        if self.contact_head is None:
            raise UserError("this model has no contact head; load it with contact_head=True for a fresh one")
        _check_ids(tokens, self.cfg)
        graphdef, state = nnx.split(self)
        return _contacts(graphdef, state, tokens, mask)

    def embed_tokens(self, tokens, mask, segments, positions, soft=None) -> jax.Array:
        """What enters the first layer: float32[B, T, D]."""
        cfg = self.cfg
        embed = self.embed[...].astype(jnp.float32)
        if cfg.token_dropout:
            embed = embed.at[cfg.mask_id].set(0)
        if soft is None:
            x = embed.at[tokens].get(mode="fill")  # NaN, and not the nearest row, for an id beyond the vocabulary
            masked = (tokens == cfg.mask_id).astype(jnp.float32)
        else:
            x = jnp.einsum("btv,vd->btd", soft, embed, precision=jax.lax.Precision.HIGHEST)
            masked = soft[..., cfg.mask_id]
        if cfg.token_dropout:
            x = x * _compensation(masked * mask, mask, segments)[..., None]
        if self.positions is not None:
            # Padding has the row pad_id, as in RoBERTa; NaN beyond the table.
            rows = jnp.where(mask & (tokens != cfg.pad_id), positions + cfg.pad_id + 1, cfg.pad_id)
            x = x + self.positions[...].at[rows].get(mode="fill").astype(jnp.float32)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        return jnp.where(mask[..., None], x, 0)

    def unembed(self, x: jax.Array) -> jax.Array:
        """The masked-LM head: final hidden states [..., D] -> float32[..., V]."""
        return self.lm_head(x, self.embed[...])

    def block(self, layer: int) -> Block:
        """One layer as a module of its own, for callers that walk through the depth."""
        return stack.layer_of(self.groups, self.cfg, layer)

    def _check_output(self, output, segments, num_segments):
        if output not in OUTPUTS:
            raise UserError(f"output {output!r} is not one of {', '.join(OUTPUTS)}")
        if output == "logits" and self.lm_head is None:
            raise UserError("this model has no masked-LM head; take output='hidden', or load it with lm_head=True for "
                            "a fresh one to be trained")
        if output == "class" and self.classifier is None:
            raise UserError("this model has no classifier; load it with classes=N for a fresh one to be trained")
        if output == "class" and (segments is None) != (num_segments is None):
            raise UserError(f"segments {'are' if segments is not None else 'are not'} given, num_segments is "
                            f"{num_segments}; packed rows need both to be classified, single proteins neither")


@functools.partial(jax.jit, static_argnums=(0, 8, 9))
def _run(graphdef, state, tokens, mask, segments, positions, soft, taps, output, num_segments):
    model = nnx.merge(graphdef, state)
    return model.forward(tokens, mask, segments, positions, soft, taps, output, num_segments)


@functools.partial(jax.jit, static_argnums=0)
def _contacts(graphdef, state, tokens, mask):
    model = nnx.merge(graphdef, state)
    tokens, _ = _check_inputs(tokens, None, model.cfg)
    if tokens.shape[1] < 3:
        raise UserError(f"rows of {tokens.shape[1]} tokens have no residue; <cls>, residues and <eos> are needed")
    mask = tokens != model.cfg.pad_id if mask is None else jnp.asarray(mask, bool)
    weight = model.contact_head.weight[...].reshape(model.cfg.num_layers, -1)  # layer by layer, head by head
    evidence = jax.tree_util.Partial(contact_evidence, weight, (mask & (tokens != model.cfg.eos_id))[None])
    _, aux = model.forward(tokens, mask, taps=Taps(reduce={"attention.probability": evidence}), output="none")
    bias = model.contact_head.bias[...].astype(jnp.float32)
    return jax.nn.sigmoid(aux["attention.probability"].sum(0) + bias)


def make_context(cfg: EsmConfig, mask, tokens, segments=None, positions=None):
    """(positions int32[B, T], Context): where each token stands and whom it may look at."""
    B, T = mask.shape
    room = cfg.max_positions - cfg.pad_id - 1
    if cfg.position == "learned" and positions is None and segments is None and room < T:
        raise UserError(f"rows of {T} tokens are longer than the {room} that this model's table of positions holds; "
                        "cut the proteins")
    if positions is None:
        # A learned table counts real tokens only, whatever the mask says (transformers does so too); rotation sees
        # differences only, so there a row may begin anywhere.
        if cfg.position == "rotary":
            positions = jnp.broadcast_to(jnp.arange(T), (B, T))
        else:
            real = (tokens != cfg.pad_id).astype(jnp.int32)
            positions = jnp.cumsum(real, axis=1) - real
        if segments is not None:
            starts = jnp.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
            first = jax.lax.cummax(jnp.where(starts, jnp.arange(T), 0), axis=1)
            positions -= jnp.take_along_axis(positions, first, axis=1)
    positions = jnp.broadcast_to(positions, mask.shape).astype(jnp.int32)
    allowed = mask[:, None, :]
    if segments is not None:
        allowed &= segments[:, :, None] == segments[:, None, :]
    rotation = turns(positions, cfg.frequencies) if cfg.position == "rotary" else None
    groups = None
    if cfg.attention != "xla":  # whose mask says it all
        groups = flash.groups(jnp.where(mask, 1 if segments is None else segments, 0),
                              with_runs=cfg.attention == "cudnn_packed")
    return positions, Context(rotation, allowed, groups=groups, implementation=cfg.attention)


def _compensation(masked, mask, segments):
    """What token dropout multiplies the embeddings of a protein by: float32[B, T] or [B, 1]."""
    mask = mask.astype(jnp.float32)
    if segments is None:
        n, m = mask.sum(1, keepdims=True), masked.sum(1, keepdims=True)
    else:
        same = (segments[:, :, None] == segments[:, None, :]).astype(jnp.float32)
        n, m = (jnp.einsum("bts,bs->bt", same, counted, precision=jax.lax.Precision.HIGHEST)
                for counted in (mask, masked))
    # (1 - trained) / (1 - m / n); where all is masked the embeddings are 0 anyhow, and stay so.
    return jnp.where(n > m, (1 - TRAINED_MASK_RATIO) * n / jnp.where(n > m, n - m, 1), 1)


def _check_inputs(tokens, soft, cfg: EsmConfig):
    """(tokens int[B, T], soft float32[B, T, V] or None); the likeliest tokens where only distributions are given."""
    if soft is not None:
        soft = jnp.asarray(soft)
        if soft.ndim != 3 or soft.shape[-1] != cfg.vocab_size or not jnp.issubdtype(soft.dtype, jnp.floating):
            raise UserError(f"soft tokens are {soft.dtype}{list(soft.shape)}; distributions over the vocabulary are "
                            f"needed: float[B, T, {cfg.vocab_size}]")
        soft = soft.astype(jnp.float32)
        tokens = soft.argmax(-1) if tokens is None else tokens
    if tokens is None:
        raise UserError("neither tokens nor soft tokens are given; pass tokens int32[B, T] or soft float[B, T, V]")
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or not tokens.size or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise UserError(f"tokens are {tokens.dtype}{list(tokens.shape)}; a batch of rows is needed: int32[B, T]")
    return tokens, soft


def _check_ids(tokens, cfg: EsmConfig) -> None:
    """Ids that lie in the host's memory; those on a device give NaN rather than wait for it."""
    if isinstance(tokens, np.ndarray) and tokens.size and np.issubdtype(tokens.dtype, np.integer):
        wrong = tokens.max() if tokens.max() >= cfg.vocab_size else tokens.min()
        if not 0 <= wrong < cfg.vocab_size:
            raise UserError(f"token id {wrong} is not in the vocabulary; ids are 0 to {cfg.vocab_size - 1}")
