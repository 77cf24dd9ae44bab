"""Text generation: batched left-padded prompts, a key-value cache, one compiled step for each shape."""

import ctypes
import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.decoder.model import Cache, Decoder
from jaxmodels.errors import UserError

BUCKET = 64  # prompts and caches are padded to multiples of this, so that few shapes are ever compiled


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature 0 is greedy; top_k 0 and top_p 1 keep the whole vocabulary."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise UserError(f"temperature {self.temperature} is below 0; 0 is greedy, 1 samples the model as it is")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k} is below 0; 0 keeps the whole vocabulary")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} is outside (0, 1]; 1 keeps the whole vocabulary")

    def draw(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        """float32[B, V] -> int32[B]. Temperature first, then top-k, then the smallest set of mass >= top_p."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / self.temperature
        if self.top_k:
            least = jax.lax.top_k(logits, min(self.top_k, logits.shape[-1]))[0][:, -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.top_p < 1:
            order = jnp.sort(logits, axis=-1, descending=True)
            p = jax.nn.softmax(order, axis=-1)
            inside = jnp.cumsum(p, axis=-1) - p < self.top_p  # the token that crosses the line stays in
            least = jnp.min(jnp.where(inside, order, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def generate(model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, *,
             sampling: Sampling = Sampling(), seed: int = 0, stop_ids: Sequence[int] | None = None) -> list[list[int]]:
    """Continues every prompt by at most ``max_new_tokens`` tokens; a row ends with its stop token, which is kept.

    Load the model with ``scan_layers=False``: unrolled layers decode faster. ``stop_ids`` defaults to the model's
    end-of-text ids. Raises UserError for an empty prompt, an id outside the vocabulary, or more tokens than the model
    has positions.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    for step in stream(model, prompts, max_new_tokens, sampling=sampling, seed=seed, stop_ids=stop_ids):
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows


def stream(model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, sampling: Sampling = Sampling(),
           seed: int = 0, stop_ids: Sequence[int] | None = None) -> Iterator[list[int | None]]:
    """As ``generate``, one list of new tokens (None: that row has ended) after another."""
    cfg = model.cfg
    tokens, mask = _left_pad(prompts, cfg.vocab_size)
    longest = int(mask.sum(1).max())
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens} must be at least 1")
    if not -(2**63) <= seed < 2**63:
        raise UserError(f"seed {seed} does not fit 64 bits; choose a smaller one")
    if longest + max_new_tokens > cfg.max_positions:
        raise UserError(f"prompt of {longest} tokens + {max_new_tokens} new ones exceeds the model's "
                        f"{cfg.max_positions} positions; shorten one of them")
    stop = np.asarray(cfg.eos_ids if stop_ids is None else stop_ids, np.int32)
    B, T = tokens.shape
    graphdef, state = nnx.split(model)
    weights, structure = jax.tree.flatten(state)
    program = _Program((graphdef, structure, sampling))
    cache = Cache.empty(cfg, B, _round_up(T + max_new_tokens))
    key = jax.random.key(seed)
    token, cache, key = _prefill(program, weights, tokens, mask, cache, key)
    done = np.zeros(B, bool)
    for step in range(max_new_tokens):
        # The next step is dispatched before this one's tokens are read: an accelerator never waits for the host.
        following = None
        if step + 1 < max_new_tokens:
            following, cache, key = _decode(program, weights, token, cache, key)
        values = np.asarray(token)
        yield [None if d else int(v) for d, v in zip(done, values, strict=True)]
        done |= np.isin(values, stop)
        if done.all():
            break
        token = following
    del cache
    _return_freed_memory()


class _Program:
    """The static part of a step, hashed once: jit asks for the hash in every call, and a model's takes milliseconds."""

    def __init__(self, parts: tuple):
        self.parts, self._hash = parts, hash(parts)

    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        return self is other or self.parts == other.parts

    def step(self, weights, tokens, cache, key, mask=None):
        graphdef, structure, sampling = self.parts
        model = nnx.merge(graphdef, jax.tree.unflatten(structure, weights))
        logits, _, cache = model.forward(tokens, mask=mask, cache=cache, logits="last")
        key, now = jax.random.split(key)
        return sampling.draw(logits[:, -1], now), cache, key


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _prefill(program, weights, tokens, mask, cache, key):
    return program.step(weights, tokens, cache, key, mask)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _decode(program, weights, token, cache, key):
    return program.step(weights, token[:, None], cache, key)


def _return_freed_memory() -> None:
    """Gives back what the compiler and the cache needed and freed: 200 MB for 30 layers, which glibc would keep."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have no such thing
        if trim is not None:
            trim(0)  # 3 ms


def _left_pad(prompts: Sequence[Sequence[int]], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(int32[B, T], bool[B, T]): prompts end at the right edge, so that every row's next slot is the same."""
    if not len(prompts) or any(len(p) == 0 for p in prompts):
        raise UserError("a prompt has no tokens; give at least one token of text for each")
    worst = max(max(p) for p in prompts), min(min(p) for p in prompts)
    if worst[0] >= vocab_size or worst[1] < 0:
        raise UserError(f"token id {worst[0] if worst[0] >= vocab_size else worst[1]} is outside the vocabulary "
                        f"(0..{vocab_size - 1}); use the model's own tokenizer")
    T = _round_up(max(len(p) for p in prompts))
    tokens, mask = np.zeros((len(prompts), T), np.int32), np.zeros((len(prompts), T), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, T - len(prompt):] = prompt
        mask[row, T - len(prompt):] = True
    return tokens, mask


def _round_up(length: int) -> int:
    return -(-length // BUCKET) * BUCKET


def generate_text(name, prompts: Sequence[str], max_new_tokens: int = 128, temperature: float = 0.0, top_k: int = 0,
                  top_p: float = 1.0, seed: int = 0, *, chat: bool | None = None, dtype: str = "float32",
                  allow_download: bool = False) -> list[str]:
    """Continues texts with the model at ``name`` (all in one batch). What ``jaxmodels generate`` calls.

    chat: put each prompt into the model's chat template; default: when it has one.
    """
    from jaxmodels.hub.models import load
    from jaxmodels.hub.resolve import resolve
    from jaxmodels.hub.tokenizer import load_tokenizer

    sampling = Sampling(temperature, top_k, top_p)
    tokenizer = load_tokenizer(resolve(name, allow_download))
    chat = bool(tokenizer.chat_template) if chat is None else chat
    if chat:
        texts = [tokenizer.apply_chat([{"role": "user", "content": prompt}]) for prompt in prompts]
        ids = [tokenizer.encode(text, special=False) for text in texts]
    else:
        ids = [tokenizer.encode(prompt) for prompt in prompts]
    model = load(name, dtype, scan_layers=False, allow_download=allow_download)
    if not isinstance(model, Decoder):
        raise UserError(f"{name} is an encoder, and only decoders continue a text; give one of those")
    stop = {*model.cfg.eos_ids, *(() if tokenizer.eos_id is None else (tokenizer.eos_id,))}
    rows = generate(model, ids, max_new_tokens, sampling=sampling, seed=seed, stop_ids=tuple(stop))
    return [tokenizer.decode(row, skip_special=True) for row in rows]
