"""Quantised training by qwix: products in 8 bits, forward and backward, parameters and moments stay float32.

Off by default. It is worth its noise only where the device multiplies 8-bit numbers faster and the model is wide enough
for products to dominate; elsewhere it is slower (training_runtime.md section 1.8). Compare runs at equal quality.
"""

import re
from typing import Literal

import jax.numpy as jnp

from jaxmodels.decoder.model import Decoder
from jaxmodels.errors import UserError

Quantized = Literal["int8", "fp8"]
_TYPES = {"int8": ("int8", "int8"), "fp8": ("float8_e4m3fn", "float8_e5m2")}  # weights and activations; gradients


def quantize(model: Decoder, kind: Quantized) -> Decoder:
    """`model` with the weight products of attention and of dense feed-forward layers quantised by absolute maximum.

    Left as they are: embedding, head, norms, routers, attention itself, and experts, whose grouped kernels have no
    8-bit form. Raises UserError where qwix is not installed.
    """
    try:
        import qwix
    except ImportError:
        raise UserError(f"model.quantize={kind} needs the qwix package: pip install 'jaxmodels[quantize]', or leave "
                        "model.quantize=none") from None
    forward, backward = _TYPES[kind]
    dense = [str(i) for i, (start, _) in enumerate(model.cfg.groups) if not model.cfg.has_experts(start)]
    paths = [r"groups/\d+/attention"] + ([rf"groups/({'|'.join(map(re.escape, dense))})/ffn"] if dense else [])
    rules = [qwix.QtRule(module_path=path, op_names=("dot_general",), weight_qtype=forward, act_qtype=forward,
                         bwd_qtype=backward) for path in paths]
    # Nothing has to be initialised: with absolute maxima there are no statistics, and weights stay as they are.
    tokens = jnp.zeros((1, 2), jnp.int32)
    return qwix.quantize_model(model, qwix.QtProvider(rules), tokens, methods=("forward",), skip_nnx_init=True)
