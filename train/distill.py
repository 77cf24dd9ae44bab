"""A short distillation: a pruned decoder learns to predict what the whole one predicts.

Small enough to need nothing of the training runtime; one device, float32, AdamW. The teacher is run once: its ``top``
most likely tokens at each position and the mass of the rest stand for its distribution, so that every further epoch
costs the student alone.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Bool, Int

from jaxmodels.decoder.model import Decoder
from jaxmodels.errors import UserError


class Targets(NamedTuple):
    """The teacher's distribution at every position: ids int32[R, T, top], log_p float32[R, T, top] of those."""

    ids: np.ndarray
    log_p: np.ndarray


def teacher_targets(teacher: Decoder, tokens: Int[np.ndarray, "R T"], mask: Bool[np.ndarray, "R T"], *, top: int = 64,
                    batch: int = 4) -> Targets:
    """Runs the teacher once. Memory: R·T·top·8 bytes on the host."""
    found = []
    for start in range(0, len(tokens), batch):
        part, live = _fill(tokens[start:start + batch], batch), _fill(mask[start:start + batch], batch)
        logits, _ = teacher(part, mask=live)
        ids, log_p = _top(logits, top)
        found.append((np.asarray(ids), np.asarray(log_p)))
    return Targets(*(np.concatenate(parts)[:len(tokens)] for parts in zip(*found, strict=True)))


def distill(student: Decoder, targets: Targets, tokens: Int[np.ndarray, "R T"], mask: Bool[np.ndarray, "R T"], *,
            steps: int, batch: int = 4, learning_rate: float = 2e-4, weight_decay: float = 0.0, minutes: float = 20.0,
            seed: int = 0, advance: Callable[..., None] = lambda *_: None) -> tuple[Decoder, list[float]]:
    """Minimises KL(teacher ‖ student) over the teacher's top tokens and the mass of all others.

    The learning rate falls along a cosine over ``steps`` after a short warm-up. ``minutes`` is a limit: a slow
    machine ends early, its rate not yet at zero. Returns (student, loss of every step).
    Raises UserError when the loss is not finite.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20, max(steps, 2), learning_rate * 0.05)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=weight_decay))
    graphdef, params = nnx.split(student)
    params = jax.tree.map(jnp.copy, params)  # the steps donate their buffers; the caller's model stays whole
    state = (params, optimizer.init(params))
    step_of = _step(graphdef, optimizer)
    order = np.random.default_rng(seed)
    losses, queue, end = [], np.zeros(0, int), time.monotonic() + 60 * minutes
    for step in range(steps):
        while len(queue) < batch:  # every row once an epoch
            queue = np.concatenate([queue, order.permutation(len(tokens))])
        rows, queue = queue[:batch], queue[batch:]
        state, loss = step_of(state, tokens[rows], mask[rows], targets.ids[rows], targets.log_p[rows])
        losses.append(float(loss))
        if not np.isfinite(losses[-1]):
            raise UserError(f"distillation loss is {losses[-1]} at step {step}; lower the learning rate "
                            f"({learning_rate})")
        advance(1, f"loss {np.mean(losses[-20:]):.3f}")
        if time.monotonic() > end:
            break
    return nnx.merge(graphdef, state[0]), losses


def _step(graphdef: Any, optimizer: optax.GradientTransformation) -> Callable:
    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, tokens, mask, ids, log_p):
        params, moments = state

        def loss_of(params):
            logits, _, _ = nnx.merge(graphdef, params).forward(tokens, mask=mask)
            return _divergence(logits, ids, log_p, mask)

        loss, gradient = jax.value_and_grad(loss_of)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    return step


def _divergence(logits: jax.Array, ids: jax.Array, log_p: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over real tokens of KL over the teacher's top tokens and one bucket for the rest."""
    log_q = jnp.take_along_axis(logits, ids, axis=-1) - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    p = jnp.exp(log_p)
    rest_p = jnp.clip(1 - p.sum(-1), 1e-6, 1.0)
    rest_q = jnp.clip(1 - jnp.exp(log_q).sum(-1), 1e-6, 1.0)
    kl = (p * (log_p - log_q)).sum(-1) + rest_p * (jnp.log(rest_p) - jnp.log(rest_q))
    return jnp.where(mask, kl, 0).sum() / jnp.maximum(mask.sum(), 1)


@functools.partial(jax.jit, static_argnums=1)
def _top(logits, top):
    log_p, ids = jax.lax.top_k(logits, top)
    return ids, log_p - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def _fill(rows: np.ndarray, count: int) -> np.ndarray:
    return np.pad(rows, ((0, count - len(rows)), (0, 0)))
