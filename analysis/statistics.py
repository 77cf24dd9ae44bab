"""What a model computes on text, as the arrays that split methods ask for (activations, importance).

``jaxmodels.split`` takes such statistics and never computes them (architecture.md section 4); everything here is read
through taps.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from analysis.atlas.text import Rows, pack
from jaxmodels.decoder.model import Decoder
from jaxmodels.errors import UserError
from jaxmodels.taps import Taps
from train.data.sources import is_source, text_source, where
from train.data.text import known_language
from train.runtime.config import did_you_mean

WINDOW, BATCH = 128, 8
SKIP = 4  # first positions of a window: attention sinks, whose activations are extreme (moe_split.md section 4.2)


def ffn_inputs(model: Decoder, rows: Sequence[Rows], limit: int = 2000) -> list[np.ndarray]:
    """What enters the feed-forward layer of each layer: L arrays float32[tokens, D], at most ``limit`` tokens.

    There is no tap at that place, for it follows from two that there are: the layer's input and what attention adds.
    Tokens are taken evenly from all rows, padding and the first positions left out. Pre- and post-norm models.
    """
    batches = _batches(rows)
    counted = np.concatenate([live for _, _, live in batches])
    places = np.flatnonzero(counted)
    if not places.size:
        raise UserError("the text has no token beyond the first positions of its windows; give more text")
    chosen = np.zeros(counted.size, bool)
    chosen[places[np.linspace(0, places.size - 1, min(limit, places.size)).round().astype(int)]] = True
    parts = np.split(chosen.reshape(counted.shape), np.cumsum([len(live) for _, _, live in batches])[:-1])
    found: list[list[np.ndarray]] = [[] for _ in range(model.cfg.num_layers)]
    for (tokens, mask, _), part in zip(batches, parts, strict=True):
        _, aux = model(tokens, mask=mask, taps=Taps(record=("residual", "attention.output")), logits="none")
        stream, added = (np.asarray(aux[name])[:, part] for name in ("residual", "attention.output"))
        for layer, inputs in enumerate(found):
            inputs.append(np.asarray(_ffn_input(model.block(layer), stream[layer], added[layer]), np.float32))
    return [np.concatenate(inputs) for inputs in found]


def _ffn_input(block: Any, stream: np.ndarray, added: np.ndarray) -> jax.Array:
    if block.placement == "pre":
        return block.ffn_norm(jnp.asarray(stream + added))
    return jnp.asarray(stream) + block.attention_norm(jnp.asarray(added))


def neuron_importance(model: Decoder, clusters: Sequence[Rows]) -> list[np.ndarray]:
    """Mean |h_j · ∂loss/∂h_j| over the tokens of each data cluster (a language): L arrays float64[clusters, F].

    LLaMA-MoE, arXiv 2406.16554; moe_split.md section 1.5. loss: the sum of a row's next-token losses, so that the
    number of rows in a batch does not matter. Raises UserError for models with experts.
    """
    if model.cfg.experts is not None:
        raise UserError("the model has experts already; importance is measured on a dense model")
    graphdef, state = nnx.split(model)
    means = []
    for rows in clusters:
        total, tokens = 0.0, 0
        for ids, mask, live in _batches([rows]):
            total = total + np.asarray(_importance(graphdef, state, ids, mask, live), np.float64)
            tokens += int(live.sum())
        means.append(total / max(tokens, 1))
    layers = np.stack(means, axis=1)  # [L, clusters, F of the widest]
    return [layer[:, :width] for layer, width in zip(layers, model.cfg.ffn_widths, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def _importance(graphdef, state, tokens, mask, live):
    """float32[L, F]: |h · dloss/dh| summed over the live tokens of a batch."""
    model = nnx.merge(graphdef, state)

    def loss(add):
        taps = Taps(record=("ffn.hidden",), add={"ffn.hidden": add})
        logits, aux, _ = model.forward(tokens, mask=mask, taps=taps)
        log_p = jax.nn.log_softmax(logits[:, :-1])
        nll = -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.where(mask[:, 1:], nll, 0).sum(), aux["ffn.hidden"]

    # The gradient with respect to something that adds nothing is the gradient with respect to the hidden layer.
    nothing = jnp.zeros((model.cfg.num_layers, *tokens.shape, max(model.cfg.ffn_widths)))
    slope, hidden = jax.grad(loss, has_aux=True)(nothing)
    return (jnp.abs(hidden * slope) * live[None, :, :, None]).sum((1, 2))


def read_rows(text: str, tokenizer: Any, tokens: int, least: int = 64) -> dict[str, Rows]:
    """Windows of every language that ``SOURCE[:LANGUAGE,LANGUAGE…]`` names, about ``tokens`` in all, shared equally.

    SOURCE is one of train.data.sources; without languages, all that it has. Raises UserError for a source or language
    that is not there, and for one with fewer than ``least`` tokens (for all of a source, those are left out).
    """
    name, wanted = split_name(text)
    texts = {language.code: language.texts for language in text_source(name)}
    for code in wanted:
        if code not in texts:
            raise UserError(f"text source {name!r} has no language {code!r}; {did_you_mean(code, texts)}")
    share = max(least, tokens // len(wanted or texts))
    rows = {code: pack(texts[code], tokenizer, min(WINDOW, share), share) for code in wanted or texts}
    for code in wanted:
        if rows[code].count < least:
            raise UserError(f"language {code!r} of {name!r} has {rows[code].count} tokens, {least} are needed; "
                            "give more text or leave it out")
    rows = {code: row for code, row in rows.items() if row.count >= least}
    if not rows:
        raise UserError(f"no language of {name!r} has {least} tokens; give more text")
    return rows


def split_name(text: str) -> tuple[str, tuple[str, ...]]:
    """("path:texts", ("de", "fr")) of "path:texts:de,fr"; the languages are () where none is named.

    "gettext:fr" is French even beside a folder of that name, which is "gettext:./fr".
    """
    head, _, last = text.rpartition(":")
    codes = tuple(dict.fromkeys(code for code in last.split(",") if code))
    if not codes or not is_source(head) or head in ("path", "tfds"):
        return text, ()
    return (head, codes) if all(map(known_language, codes)) or where(text) is None else (text, ())


def _batches(rows: Sequence[Rows]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(tokens int32[B, T], mask, live) of all rows, one shape; live: real tokens after the first positions."""
    longest = max(r.tokens.shape[1] for r in rows)
    wide = [tuple(np.pad(a, ((0, 0), (0, longest - a.shape[1]))) for a in (r.tokens, r.mask)) for r in rows]
    tokens, mask = (np.concatenate(parts) for parts in zip(*wide, strict=True))
    size = min(BATCH, len(tokens))
    short = -len(tokens) % size
    tokens, mask = np.pad(tokens, ((0, short), (0, 0))), np.pad(mask, ((0, short), (0, 0)))
    live = mask & (np.arange(longest) >= SKIP)
    return [(tokens[i:i + size], mask[i:i + size], live[i:i + size]) for i in range(0, len(tokens), size)]
