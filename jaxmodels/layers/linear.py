"""The product with a weight matrix that the layers share."""

import math

import jax
import jax.numpy as jnp

_FEW, _PIECE = 8, 32  # measured on CPU: 20 % faster up to 8 rows, several times slower from 16 on


def linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """x [..., D] · weight [D, F] + bias [F] -> [..., F], computed in the type of x."""
    weight = weight.astype(x.dtype)
    rows, D = math.prod(x.shape[:-1]), x.shape[-1]
    if 1 < rows <= _FEW and D % _PIECE == 0:
        y = jax.lax.platform_dependent(x, weight, cpu=_in_pieces, default=jnp.matmul)
    else:
        # Flat: XLA's gradient in the weight of a product with three axes takes up to twice as long on CPU.
        # lax.dot_general and not @, whose trace jax keeps: quantised training (train/quantize.py) replaces the former,
        # and a kept trace would stay quantised for the next model of this shape.
        y = jax.lax.dot_general(x.reshape(-1, D), weight, (((1,), (0,)), ((), ()))).reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias.astype(x.dtype)


def _in_pieces(x, weight):
    """The sum of products over pieces of D. For the few rows of a decoding step the time goes into reading the weights,
    and XLA's matrix product on CPU reads them in narrow columns; a piece is read from end to end."""
    pieces = x.shape[-1] // _PIECE
    x_pieces = x.reshape(-1, pieces, _PIECE)
    weight = weight.reshape(pieces, _PIECE, -1)
    y = jnp.einsum("mpd,pdf->pmf", x_pieces, weight, preferred_element_type=jnp.float32).sum(0)
    return y.astype(x.dtype).reshape(*x.shape[:-1], -1)
