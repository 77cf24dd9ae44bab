"""Quantised training: which products are in 8 bits, how far the gradient moves, and that nothing of it stays behind."""

import builtins
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels.decoder.config import DecoderConfig, ExpertConfig
from jaxmodels.decoder.model import Decoder
from jaxmodels.errors import UserError
from train.pretrain_config import ModelConfig

TOKENS = np.random.default_rng(0).integers(0, 96, (4, 16)).astype(np.int32)
needs_qwix = pytest.mark.skipif(importlib.util.find_spec("qwix") is None,
                                reason="qwix is not installed; pip install 'jaxmodels[quantize]'")


def gradient_of(model):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        logits = nnx.merge(graphdef, params, rest, copy=True).forward(TOKENS)[0]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), TOKENS[:, 1:, None], -1).mean()

    return jax.jit(jax.value_and_grad(loss)), params


def flat(tree):
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


@pytest.mark.long
@needs_qwix
@pytest.mark.parametrize(("kind", "letters", "limit"), [("int8", "i8", 0.1), ("fp8", "f8E4M3FN", 0.4)])
def test_gradients_are_near_and_products_are_small(kind, letters, limit):
    from train.quantize import quantize

    model = Decoder(DecoderConfig.tiny(vocab_size=96), rngs=nnx.Rngs(0))
    step, params = gradient_of(quantize(model, kind))
    loss, gradient = step(params)
    products = [line for line in step.lower(params).as_text().splitlines() if "dot_general" in line]
    small = [line for line in products if re.search(rf"x{letters}>, tensor<\S+x{letters}>\)", line)]
    assert len(small) >= 7  # q, k, v, out, gate, up, down; scanned layers share them
    exact_step, exact_params = gradient_of(model)
    exact_loss, exact = exact_step(exact_params)
    assert letters + ">" not in exact_step.lower(exact_params).as_text(), "a quantised trace was kept"
    distance = jnp.linalg.norm(flat(gradient) - flat(exact)) / jnp.linalg.norm(flat(exact))
    assert 0 < distance < limit and float(loss) == pytest.approx(float(exact_loss), rel=0.02)


@pytest.mark.long
@needs_qwix
def test_experts_and_routers_stay_exact():
    from train.quantize import quantize

    cfg = DecoderConfig.tiny(vocab_size=96, experts=ExpertConfig(4, 2))
    step, params = gradient_of(quantize(Decoder(cfg, rngs=nnx.Rngs(0)), "int8"))
    assert np.isfinite(step(params)[0])
    wide = [line for line in step.lower(params).as_text().splitlines() if "dot_general" in line and "i8>" in line]
    assert wide and not any(f"x{cfg.ffn_widths[0]}xi8" in line for line in wide)


def test_without_qwix_it_says_what_to_install(monkeypatch):
    from train.quantize import quantize

    real = builtins.__import__

    def refuse(name, *rest, **keywords):
        if name == "qwix":
            raise ImportError(name)
        return real(name, *rest, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match="pip install 'jaxmodels\\[quantize\\]'"):
        quantize(Decoder(DecoderConfig.tiny(vocab_size=96), rngs=nnx.Rngs(0)), "int8")


def test_it_is_off_by_default():
    assert ModelConfig().quantize == "none"
