"""Model FLOPs against XLA's own count, and against numbers done by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels import Decoder
from jaxmodels.decoder.config import DecoderConfig, ExpertConfig
from train.runtime import flops


@pytest.mark.parametrize("heads, kv_heads, tied", [(4, 2, True), (4, 4, False)])
def test_formula_agrees_with_xla(heads, kv_heads, tied):
    """Forward pass of an unrolled dense model: XLA also counts what is no product (norms, softmax), under 2 %.

    Attention is computed in full by XLA, hence all T keys for a query here instead of the causal mean.
    """
    cfg = DecoderConfig(512, 256, heads, kv_heads, 64, (1024,) * 2, tied=tied, scan_layers=False)
    B, T = 2, 128
    model = nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)

    def forward(state, tokens):
        from jaxmodels.taps import Taps

        taps = Taps(record=("attention.probability",))  # the plain attention, without loops that XLA counts once
        return nnx.merge(graphdef, state).forward(tokens, taps=taps)[0]

    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    counted = jax.jit(forward).lower(state, tokens).compile().cost_analysis()["flops"]
    causal = flops.forward_flops_per_token(cfg, T) * B * T
    full = causal + B * T * 4 * heads * 64 * cfg.num_layers * (T - flops.mean_keys(cfg, T)[0])
    assert full == pytest.approx(counted, rel=0.02)


def test_numbers_by_hand():
    cfg = DecoderConfig(100, 8, 2, 1, 4, (16, 16))
    # attention 8·8 + 2·8·4 + 8·8 = 192, ffn 3·8·16 = 384, two layers, head 800
    assert flops.active_matmul_parameters(cfg) == 2 * (192 + 384) + 800
    experts = dataclasses.replace(cfg, ffn_widths=(4, 4), experts=ExpertConfig(8, 2))
    assert flops.active_matmul_parameters(experts) == 2 * (192 + 2 * 3 * 8 * 4 + 8 * 8) + 800
    assert flops.mean_keys(cfg, 5) == [3.0, 3.0]
    windowed = dataclasses.replace(cfg, windows=(2, None))
    seen = [np.mean([min(t + 1, w) for t in range(5)]) for w in (2, 5)]
    assert flops.mean_keys(windowed, 5) == pytest.approx(seen)
    assert flops.train_flops_per_token(cfg, 5) == 6 * 1952 + 12 * 2 * 2 * 4 * 3.0


def test_peaks():
    class Device:
        def __init__(self, kind):
            self.device_kind = kind

    kinds = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "TPU v5 lite": 197e12, "TPU v5": 459e12,
             "TPU v5p": 459e12, "TPU v6 lite": 918e12, "TPU v4": 275e12, "NVIDIA A100-SXM4-80GB": 312e12, "cpu": None}
    assert {kind: flops.peak(Device(kind)) for kind in kinds} == kinds
    assert flops.mfu(1e12, 1.0, 1, Device("cpu")) is None and flops.mfu(0.0, 1.0, 1, Device("TPU v5 lite")) is None
    assert flops.mfu(197e12, 2.0, 2, Device("TPU v5 lite")) == pytest.approx(0.25)
