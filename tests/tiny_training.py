"""Small things to train, for the tests of the runtime."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxmodels.decoder.config import DecoderConfig
from jaxmodels.decoder.model import Decoder
from train.runtime.mesh import MeshConfig, make_mesh
from train.runtime.state import blueprint
from train.runtime.step import TrainStep


class Perceptron(nnx.Module):
    """Two layers with dropout: a model whose random stream is part of the state."""

    def __init__(self, key, rate=0.1):
        rngs = nnx.Rngs(params=key, dropout=jax.random.fold_in(key, 7))
        self.first, self.second = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(jax.nn.tanh(self.first(x))))


@dataclasses.dataclass(frozen=True)
class Regression:
    """Sum of squares over the rows that a mask counts."""

    def loss(self, model, batch, key):
        error = ((model(batch["x"]) - batch["y"]) ** 2).sum(-1)
        return jnp.where(batch["mask"], error, 0).sum(), {"weight": batch["mask"].sum()}

    def metrics(self, loss, sums):
        return {"loss": loss / jnp.maximum(sums["weight"], 1)}

    def update(self, rest, sums):
        return rest


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Cross-entropy of a decoder, without what a mixture of experts needs."""

    def loss(self, model, batch, key):
        logits = model.forward(batch["tokens"], mask=batch["mask"])[0][:, :-1]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])
        return jnp.where(batch["mask"][:, 1:], nll, 0).sum(), {"weight": batch["mask"][:, 1:].sum()}

    metrics, update = Regression.metrics, Regression.update


def decoder(**overrides):
    return DecoderConfig.tiny(vocab_size=96, **overrides)


def perceptron_batch(rows=16, seed=0):
    r = np.random.default_rng(seed)
    return {"x": r.normal(size=(rows, 8)).astype(np.float32), "y": r.normal(size=(rows, 4)).astype(np.float32),
            "mask": r.random(rows) < 0.8}


def token_batch(rows=16, length=12, seed=0):
    """Rows of uneven length, so that a mean of means differs from the mean."""
    r = np.random.default_rng(seed)
    lengths = r.integers(2, length + 1, rows)
    return {"tokens": r.integers(0, 96, (rows, length)).astype(np.int32),
            "mask": np.arange(length) < lengths[:, None]}


def plan_of(build, optimizer, mesh=None, seed=0):
    mesh = mesh or make_mesh(MeshConfig(data=1), jax.devices()[:1])
    return blueprint(build, optimizer, mesh, seed=seed), mesh


def decoder_step(optimizer, mesh, accumulate=1, **overrides):
    """(blueprint, TrainStep) of the tiny decoder."""
    plan, _ = plan_of(lambda key: Decoder(decoder(**overrides), rngs=nnx.Rngs(params=key)), optimizer, mesh)
    return plan, TrainStep(plan.graphdef, NextToken(), optimizer, accumulate)
