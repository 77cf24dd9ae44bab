"""Routers: which experts a token needs (moe_split.md section 2). `router.scores(x) -> f32[..., E]`, then `select`.

Every router is a frozen pytree and works under jit. In a split model the chosen experts are summed with weight 1:
the split is exact, so soft-max weights would change the function. Oracle scores need the whole first product: they
are the ceiling of quality, not a way to be fast.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxmodels.errors import UserError
from jaxmodels.experts.layer import apply_experts
from jaxmodels.experts.split import Split
from jaxmodels.kernels.activations import ACTIVATIONS


def _router(*static: str):
    def make(cls):
        cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
        names = [f.name for f in dataclasses.fields(cls)]
        return jax.tree_util.register_dataclass(cls, [n for n in names if n not in static], list(static))

    return make


@_router("activation")
class OracleRouter:
    """What each expert really contributes; see `oracle_scores`."""

    experts: Mapping[str, Array]
    activation: str

    def scores(self, x: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
        _, h = apply_experts(self.experts, x, activation=self.activation, return_hidden=True)
        return oracle_scores(h, self.experts["down"], relu="gate" not in self.experts and self.activation == "relu")


@_router()
class SimilarityRouter:
    """Minus the distance between the unit input and the centre of the expert's unit neuron vectors; untrained."""

    centres: Float[Array, "E D"]

    def scores(self, x: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
        x = _unit(x)
        squares = (x**2).sum(-1, keepdims=True) - 2 * x @ self.centres.T + (self.centres**2).sum(-1)
        return -jnp.sqrt(jnp.maximum(squares, 0.0))


@_router()
class LinearRouter:
    """One product on the unit input; starts from the centres."""

    weight: Float[Array, "D E"]

    @classmethod
    def create(cls, split: Split) -> "LinearRouter":
        return cls(jnp.asarray(split.centres.T))

    def scores(self, x: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
        return _unit(x) @ self.weight


@_router()
class MLPRouter:
    """tanh MLP on the unit input, no biases; starts from the centres and the identity (MoEfication)."""

    first: Float[Array, "D E"]
    second: Float[Array, "E E"]

    @classmethod
    def create(cls, split: Split) -> "MLPRouter":
        return cls(jnp.asarray(split.centres.T), jnp.eye(split.num_experts))

    def scores(self, x: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
        return jnp.tanh(_unit(x) @ self.first) @ self.second


@_router("num_experts")
class RandomRouter:
    """Uniform scores, the floor; the same key gives the same scores."""

    key: Array
    num_experts: int

    def scores(self, x: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
        return jax.random.uniform(self.key, (*x.shape[:-1], self.num_experts))


@_router("activation", "num_shared")
class AnalyticRouter:
    """|h| of one representative neuron for each routed expert (CMoE); shared experts score 0, they always run."""

    gate: Float[Array, "D R"] | None
    up: Float[Array, "D R"]
    gate_bias: Float[Array, "R"] | None
    up_bias: Float[Array, "R"] | None
    activation: str
    num_shared: int

    @classmethod
    def create(cls, ffn: Mapping[str, Any], split: Split, activation: str) -> "AnalyticRouter":
        """From the dense FFN and its `markers` split."""
        if split.representatives is None:
            raise UserError(f"the analytic router needs a split by markers, this one is by {split.method}")
        pick = split.representatives
        # A representative can be a zero neuron of the padding; it then never fires.
        pad = lambda w: jnp.pad(jnp.asarray(w), [(0, 0)] * (w.ndim - 1) + [(0, split.padded)])[..., pick]  # noqa: E731
        names = ("gate", "up", "gate_bias", "up_bias")
        return cls(*(pad(ffn[n]) if n in ffn else None for n in names), activation, split.num_shared)

    def scores(self, x: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
        up = x @ self.up + (0 if self.up_bias is None else self.up_bias)
        act = ACTIVATIONS[self.activation]
        if self.gate is None:
            h = act(up)
        else:
            h = act(x @ self.gate + (0 if self.gate_bias is None else self.gate_bias)) * up
        scores = jnp.abs(h).astype(jnp.float32)
        return jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(self.num_shared, 0)])


def oracle_scores(
    h: Float[Array, "*B E s"], down: Float[Array, "E s D"], *, relu: bool = False
) -> Float[Array, "*B E"]:
    """sum |h_j| ||down_j|| over an expert's neurons; with `relu` (plain ReLU layers, MoEfication) just sum h_j."""
    h = h.astype(jnp.float32)
    if relu:
        return h.sum(-1)
    return jnp.einsum("...es,es->...e", jnp.abs(h), jnp.linalg.norm(down.astype(jnp.float32), axis=-1))


def select(scores: Float[Array, "*B E"], k: int, *, num_shared: int = 0) -> Int[Array, "*B k"]:
    """The k routed experts of highest score for each token, int32; the first `num_shared` experts are not chosen."""
    routed = scores.shape[-1] - num_shared
    if not 1 <= k <= routed:
        raise UserError(f"k = {k} must lie in 1..{routed}, the number of routed experts")
    return (jax.lax.top_k(scores[..., num_shared:], k)[1] + num_shared).astype(jnp.int32)


def select_blocks(
    scores: Float[Array, "*B T E"], k: int, block: int, *, num_shared: int = 0
) -> Int[Array, "*B T k"]:
    """One choice for each `block` of consecutive tokens: the top k of their summed scores."""
    tokens = scores.shape[-2]
    if block < 1:
        raise UserError(f"block = {block} must be at least 1 token")
    blocks = -(-tokens // block)
    padded = jnp.pad(scores, [(0, 0)] * (scores.ndim - 2) + [(0, blocks * block - tokens), (0, 0)])
    summed = padded.reshape(*scores.shape[:-2], blocks, block, -1).sum(-2)
    return jnp.repeat(select(summed, k, num_shared=num_shared), block, axis=-2)[..., :tokens, :]


def train_router(
    router: Any,
    x: Float[Array, "T D"],
    oracle: Float[Array, "T E"],
    *,
    epochs: int = 30,
    batch_size: int = 512,
    learning_rate: float = 0.01,
    validation: float = 0.1,
    seed: int = 0,
) -> tuple[Any, list[float]]:
    """A linear or MLP router fitted to oracle scores, and its validation loss before and after each epoch.

    Binary cross-entropy against scores divided by each token's largest; Adam; the best epoch is kept, the
    untrained one included. x as the model sees it: the reference takes its targets from normalised inputs.
    """
    tokens = x.shape[0]
    held_out = max(1, round(validation * tokens))
    if tokens - held_out < 1:
        raise UserError(f"{tokens} tokens are too few to train a router; give at least 2")
    batch_size = min(batch_size, tokens - held_out)
    targets = jnp.maximum(oracle.astype(jnp.float32), 0.0)
    targets = targets / jnp.maximum(targets.max(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    generator = np.random.default_rng(seed)
    order = generator.permutation(tokens)
    test, train = order[:held_out], order[held_out:]
    optimizer = optax.adam(learning_rate)

    def loss(router, x, targets):
        return optax.sigmoid_binary_cross_entropy(router.scores(x), targets).mean()

    @jax.jit
    def epoch(router, state, batches, x, targets):
        def step(carry, batch):
            router, state = carry
            gradient = jax.grad(loss)(router, x[batch], targets[batch])
            updates, state = optimizer.update(gradient, state, router)
            return (optax.apply_updates(router, updates), state), None

        (router, state), _ = jax.lax.scan(step, (router, state), batches)
        return router, state, loss(router, x[test], targets[test])

    state = optimizer.init(router)
    best, history = router, [float(loss(router, x[test], targets[test]))]
    for _ in range(epochs):
        # The remainder of an epoch, less than a batch, is left out; another shuffle brings it back.
        shuffled = generator.permutation(train)[: len(train) // batch_size * batch_size]
        router, state, value = epoch(router, state, jnp.asarray(shuffled.reshape(-1, batch_size)), x, targets)
        if float(value) < min(history):
            best = router
        history.append(float(value))
    return best, history


def captured_mass(oracle: Float[Array, "*B E"], active: Int[Array, "*B k"]) -> Float[Array, ""]:
    """Mean over tokens of the share of the oracle score that the chosen experts hold."""
    total = oracle.sum(-1)
    share = jnp.take_along_axis(oracle, active, -1).sum(-1) / jnp.where(total > 0, total, 1.0)
    return jnp.where(total > 0, share, 1.0).mean()  # a token without any activity misses nothing


def recall(oracle: Float[Array, "*B E"], active: Int[Array, "*B k"]) -> Float[Array, ""]:
    """Mean share of the oracle's top k that is among the k chosen."""
    best = select(oracle, active.shape[-1])
    return (best[..., :, None] == active[..., None, :]).any(-1).mean(dtype=jnp.float32)


def relative_error(y: Float[Array, "*B D"], dense: Float[Array, "*B D"]) -> Float[Array, ""]:
    """||y - dense|| / ||dense|| over all tokens."""
    y, dense = y.astype(jnp.float32), dense.astype(jnp.float32)
    return jnp.linalg.norm(y - dense) / jnp.linalg.norm(dense)


def _unit(x: Array) -> Array:
    x = x.astype(jnp.float32)
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(norm > 0, norm, 1.0)
