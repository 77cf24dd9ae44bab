"""The grouped products through `jax.lax.ragged_dot`: compiled on every backend, fast on few.

On CPU and GPU XLA expands it to a dense product over all groups, so its time grows with their number.
"""

import jax
import jax.numpy as jnp
from jax.lax import RaggedDotDimensionNumbers

# transpose_w: contract the last axes of x [M, N] and w [G, K, N]; no transposed copy of w.
_ROWS_TIMES_TRANSPOSED = RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)
_ROWS_TIMES_MATRICES = RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (1,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)
# Contract the ragged row axis itself: one K x N product a group.
_ROWS_TIMES_ROWS = RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def matmul(x, w, group_sizes, *, transpose_w: bool, out_dtype):
    dimensions = _ROWS_TIMES_TRANSPOSED if transpose_w else _ROWS_TIMES_MATRICES
    return _product(dimensions, x, w, group_sizes).astype(out_dtype)


def outer(x, dy, group_sizes, *, out_dtype):
    return _product(_ROWS_TIMES_ROWS, x, dy, group_sizes).astype(out_dtype)


def _product(dimensions: RaggedDotDimensionNumbers, left, right, group_sizes):
    # jax 0.10.2 has no batching rule for ragged_dot over an axis that only some operands carry, hence a loop.
    @jax.custom_batching.sequential_vmap
    def product(left, right, group_sizes):
        return jax.lax.ragged_dot_general(left, right, group_sizes, dimensions, preferred_element_type=jnp.float32)

    return product(left, right, group_sizes)
