"""What a kernel does with a gate and an up product before it stores them (moe_split.md 6.7): the layers' activations in
terms that both kernel languages have. Pallas lowers no erfc, which jax.nn.gelu is made of, and on a GPU no custom_jvp,
which jax.nn.relu is.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": lambda x: x * jax.lax.logistic(x),
    "relu": lambda x: jnp.maximum(x, 0.0),
    # 1 + erf loses digits where erfc would not, at x << 0; of what a product rounds to, 1e-7 beside 1, nothing is seen.
    "gelu": lambda x: 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5))),
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))),
}


def gated(activation: str, keep: bool) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    """Of two products in float32, what is stored: act(g) u and, with `keep`, g and u."""
    act = ACTIVATIONS[activation]
    return lambda g, u: (act(g) * u, g, u) if keep else (act(g) * u,)


def unsupported(activation: str) -> str | None:
    """Why no kernel computes this activation, or None."""
    if activation not in ACTIVATIONS:
        return f"the kernels compute {', '.join(ACTIVATIONS)}, not {activation!r}"
    return None
