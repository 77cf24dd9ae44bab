"""The grouped products as Pallas kernels for the TPU: bf16 and float32, accumulated in float32 (moe_split.md 6.3-6.6).

The tile map (tilemap.py) goes ahead of the kernels into scalar memory; the index maps read from it which tile of rows
and whose matrix each step needs, so one program serves every routing, and only visits that exist are run.

Memory tiles are pinned to multiples of `Config.rows`, what is computed is not: in a tile that a group does not fill,
pieces of 128 rows start at the group's first row, rounded down to what a vector load can start at, and only those that
hold rows of the group are multiplied. Tiles of memory that begin at a group's first row as well would overlap their
neighbours in the output: the pipeline writes a block back whole and without order among blocks that overlap, and each
block would need the last rows of the one before. Pinned, neighbours share a block, which stays in VMEM between their
visits and is merged there under a row mask.

Not differentiable by itself; api.py gives the gradients. No speed of it has been measured.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodels.errors import UserError
from jaxmodels.kernels.grouped_matmul import epilogue
from jaxmodels.kernels.grouped_matmul.tilemap import make_visits
from jaxmodels.kernels.varying import varying_axes

_PIECE = 128  # rows of a product that a partly filled tile is computed in: the side of the matrix unit before v6e
_LANES = 128
_VMEM = 32 * 2**20  # for blocks: half of the 64 MiB that v5p and TPU7x have, the least since v5
_SMEM = 2**19  # for the tile map: half of the 1 MiB that every generation since v4 has
# Of each product: its right operands, which have an accumulator each, and its results.
_HELD = {"matmul": (1, 1), "outer": (1, 1), "glu": (2, 1), "glu_kept": (2, 3)}


@dataclass(frozen=True)
class Config:
    """Tile sizes, at most, in the letters of x [M, K] and w [G, K, N]: `rows` of M, `inner` of K, `columns` of N.

    The defaults are the ones to start tuning from (moe_split.md 6.6). `whole`: `matmul` holds all of K in VMEM and
    takes `inner` of it at a time, where that fits. A group's columns of w are then read once for all its visits. In
    blocks of `inner` every visit reads them again, and one of r rows has r operations for each byte of bf16, where a
    v6e's peak over its bandwidth is 560.
    """

    rows: int = 512
    inner: int = 1024
    columns: int = 1024
    whole: bool = True


def unfit(shape: tuple[int, ...], groups: int, dtype: Any) -> str | None:
    """Why the kernels cannot run on x of this shape with this many groups here, or None."""
    if (missing := _missing()) is not None:
        return f"Pallas for the TPU cannot be imported ({missing})"
    if (here := jax.default_backend()) != "tpu":
        return f"only on a TPU, this is {here}"
    return unsupported(shape, groups, dtype)


def unsupported(shape: tuple[int, ...], groups: int, dtype: Any) -> str | None:
    """Why no TPU can run the kernels on x of this shape and dtype, or None; `unfit` without asking what is here."""
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        return f"bfloat16 and float32 only, not {jnp.dtype(dtype)}"
    slots = -(-shape[0] // Config.rows) + groups
    if 16 * slots > _SMEM:  # four int32 a visit
        return f"{groups} groups and {shape[0]} rows make a tile map of {16 * slots} bytes, scalar memory takes {_SMEM}"
    return None


def matmul(
    x: Float[Array, "M K"], w: Float[Array, "G _ _"], group_sizes: Int[Array, "G"], *,
    transpose_w: bool, out_dtype: Any, config: Config | None = None, interpret: Any = False,
) -> Float[Array, "M N"]:  # fmt: skip
    """Rows of group e times w[e] (G K N; G N K with `transpose_w`), fwd and dX of moe_split.md 6.2; tail rows zero."""
    (rows, inner), columns = x.shape, w.shape[1 if transpose_w else 2]
    x, w = _checked(group_sizes, x, w)
    if 0 in (rows, inner, columns, group_sizes.shape[0]):
        return jnp.zeros((rows, columns), out_dtype)
    config = tiles("matmul", (rows, inner, columns), x.dtype, out_dtype, config)
    limit = vmem_limit(vmem_bytes("matmul", inner, x.dtype, out_dtype, config))

    @jax.custom_batching.sequential_vmap
    def product(x, w, group_sizes):
        name = "grouped_matmul_transposed" if transpose_w else "grouped_matmul"
        return _matmul(x, (w,), group_sizes, transpose_w, jnp.dtype(out_dtype), config, limit, interpret, name)[0]

    return product(x, w, group_sizes)


def glu(
    x: Float[Array, "M K"], gate: Float[Array, "G K N"], up: Float[Array, "G K N"], group_sizes: Int[Array, "G"], *,
    activation: str, keep: bool, config: Config | None = None, interpret: Any = False,
) -> Float[Array, "M N"] | tuple[Float[Array, "M N"], Float[Array, "M N"], Float[Array, "M N"]]:  # fmt: skip
    """h = act(x_e gate[e]) * (x_e up[e]) for the rows of each group e (moe_split.md 6.7); with `keep` (h, g, u), the
    two products as well, which the gradient needs. h is rounded once, from float32; tail rows are zero in all.

    `config` is that of `matmul`: `tiles` fits it to two weights.
    """
    if (reason := glu_unsupported(activation)) is not None:
        raise UserError(reason)
    (rows, inner), columns, out_dtype = x.shape, gate.shape[2], x.dtype
    x, gate, up = _checked(group_sizes, x, gate, up)
    product = "glu_kept" if keep else "glu"
    if 0 in (rows, inner, columns, group_sizes.shape[0]):
        nothing = jnp.zeros((rows, columns), out_dtype)
        return (nothing,) * 3 if keep else nothing
    config = tiles(product, (rows, inner, columns), x.dtype, out_dtype, config)
    limit = vmem_limit(vmem_bytes(product, inner, x.dtype, out_dtype, config))

    @jax.custom_batching.sequential_vmap
    def both(x, gate, up, group_sizes):
        return _matmul(x, (gate, up), group_sizes, False, out_dtype, config, limit, interpret,
                       f"grouped_{product}_{activation}", epilogue.gated(activation, keep), 3 if keep else 1)

    results = both(x, gate, up, group_sizes)
    return tuple(results) if keep else results[0]


def glu_unsupported(activation: str) -> str | None:
    """Why the kernel of `glu` does not compute this activation, or None."""
    return epilogue.unsupported(activation)


def outer(
    x: Float[Array, "M K"], dy: Float[Array, "M N"], group_sizes: Int[Array, "G"], *,
    out_dtype: Any, config: Config | None = None, interpret: Any = False,
) -> Float[Array, "G K N"]:  # fmt: skip
    """x_e^T dy_e over the rows of each group, dW of moe_split.md 6.2; exactly zero for an empty group."""
    (rows, inner), columns = x.shape, dy.shape[1]
    x, dy = _checked(group_sizes, x, dy)
    if 0 in (rows, inner, columns, group_sizes.shape[0]):
        return jnp.zeros((group_sizes.shape[0], inner, columns), out_dtype)
    config = tiles("outer", (rows, inner, columns), x.dtype, out_dtype, config)
    limit = vmem_limit(vmem_bytes("outer", inner, x.dtype, out_dtype, config))

    @jax.custom_batching.sequential_vmap
    def product(x, dy, group_sizes):
        return _outer(x, dy, group_sizes, jnp.dtype(out_dtype), config, limit, interpret)

    return product(x, dy, group_sizes)


def tiles(
    product: str, shape: tuple[int, int, int], dtype: Any, out_dtype: Any, config: Config | None = None
) -> Config:
    """The tiles that `product` (of `_HELD`) of shape (M, K, N) runs with: no larger than the arrays, of sides that a
    block may have (a whole axis, or whole registers), an axis cut evenly.

    Two weights take twice the room. Where it is not there, half the columns keep K whole if that is enough: there are
    as many operations for each byte of x then as with one weight, and for each byte of the weights more than in blocks.
    """
    config, align = config or Config(), _sublanes(dtype)
    height = _up(min(config.rows, shape[0]), align)
    height = _up(height, _PIECE if height > _PIECE else align)

    def width(tile: int, axis: int) -> int:
        return axis if tile >= axis else _up(-(-axis // -(-axis // tile)), _LANES)

    def fits(tiles: Config) -> bool:
        return vmem_bytes(product, shape[1], dtype, out_dtype, tiles) <= _VMEM

    chosen = Config(height, width(config.inner, shape[1]), width(config.columns, shape[2]), config.whole)
    if product == "outer":
        return replace(chosen, whole=False)
    widths = [chosen, replace(chosen, columns=width(config.columns // 2, shape[2]))][: _HELD[product][0]]
    tried = [tiles for tiles in widths if config.whole] + [replace(tiles, whole=False) for tiles in widths]
    return next((tiles for tiles in tried if fits(tiles)), tried[-1])


def vmem_bytes(product: str, inner: int, dtype: Any, out_dtype: Any, config: Config) -> int:
    """VMEM that the tiles hold for an axis K of `inner`: two buffers of each block, the float32 accumulators."""
    size, out = jnp.dtype(dtype).itemsize, jnp.dtype(out_dtype).itemsize
    # A block's last axis fills whole registers of 128 lanes.
    rows, columns = config.rows, _up(config.columns, _LANES)
    held = _up(inner if product != "outer" and config.whole else config.inner, _LANES)
    left, right, result = rows * held, held * columns, rows * columns
    if product == "outer":
        left, right, result = left, result, right
    weights, results = _HELD[product]
    return 2 * (size * (left + weights * right) + out * results * result) + 4 * weights * result


def vmem_limit(needed: int) -> int:
    """What to ask the compiler for: the blocks, and room for its own (registers that it spills: up to 2 MiB seen)."""
    if needed > _VMEM:
        raise UserError(
            f"the tiles need {needed / 2**20:.1f} MiB of VMEM, of {_VMEM / 2**20:.0f} that may be used; "
            "give a config of smaller rows, inner or columns"
        )
    return needed + needed // 4 + 4 * 2**20


def _pallas():
    """Imported when a kernel is built: `import jaxmodels` stays light, and works where there is no Pallas."""
    from jax.experimental import pallas
    from jax.experimental.pallas import tpu

    return pallas, tpu


@functools.cache
def _missing() -> str | None:
    try:
        _pallas()
    except ImportError as error:
        return str(error)
    return None


def _matmul(x, weights, group_sizes, transpose_w, out_dtype, config, limit, interpret, name, finish=None, results=1):
    """The rows of each group times its matrix of each of `weights`; then what `finish` makes of these products in
    float32, a tuple of as many `results`. By default the product itself."""
    pl, pltpu = _pallas()
    (rows, inner), columns = x.shape, weights[0].shape[1 if transpose_w else 2]
    visits = make_visits(group_sizes, rows, config.rows, every_tile=True)
    held = inner if config.whole else config.inner  # columns of x in a block
    steps = pl.cdiv(inner, held)
    chunks, tail = held // config.inner, inner % config.inner
    align, piece = _sublanes(x.dtype), min(_PIECE, config.rows)
    contract = (((1,), (1 if transpose_w else 0,)), ((), ()))

    def kernel(group, tile, first, stop, x_ref, *refs):
        w_refs, y_refs, sum_refs = refs[: len(weights)], refs[len(weights) : -len(weights)], refs[-len(weights) :]
        visit, step = pl.program_id(1), pl.program_id(2)
        low, high = first[visit] - tile[visit] * config.rows, stop[visit] - tile[visit] * config.rows
        start, pieces = _pieces(low, high, config.rows, align, piece)
        whole = high - low == config.rows

        def add(at, part):
            # Rows of neighbouring groups are multiplied too, and do not mix with the group's own.
            for w_ref, sum_ref in zip(w_refs, sum_refs, strict=True):
                sum_ref[at, :] += _dot(x_ref[at, part], w_ref[:, part] if transpose_w else w_ref[part, :], contract)

        def accumulate(at, chunks, tail):
            def chunk(i, _):
                add(at, pl.ds(_multiple(i * config.inner, _LANES), config.inner))

            if chunks > 1:
                jax.lax.fori_loop(0, chunks, chunk, None)
            elif chunks == 1:
                add(at, slice(0, config.inner))
            if tail:
                # Only what the arrays hold: what a partial block has beyond, NaN perhaps, is read from neither side.
                add(at, slice(chunks * config.inner, chunks * config.inner + tail))

        def each_piece(function):
            jax.lax.fori_loop(0, pieces, lambda i, _: function(pl.ds(_multiple(start + i * piece, align), piece)), None)

        def multiply(chunks, tail):
            pl.when(whole)(lambda: accumulate(slice(None), chunks, tail))
            pl.when(jnp.logical_not(whole))(lambda: each_piece(lambda at: accumulate(at, chunks, tail)))

        @pl.when((step == 0) & (pieces > 0))
        def _():
            for sum_ref in sum_refs:
                sum_ref[...] = jnp.zeros_like(sum_ref)

        if steps == 1 or tail == 0:
            multiply(chunks, tail)
        else:
            pl.when(step < steps - 1)(lambda: multiply(1, 0))
            pl.when(step == steps - 1)(lambda: multiply(0, tail))

        def finished(at):
            sums = [sum_ref[at, :] for sum_ref in sum_refs]
            return zip(y_refs, finish(*sums) if finish else sums, strict=True)

        def merge(at):
            row = at.start + jax.lax.broadcasted_iota(jnp.int32, (piece, config.columns), 0)
            mine = (row >= low) & (row < high)
            for y_ref, y in finished(at):
                # Through float32: v5e has no vector unit for bf16.
                y_ref[at, :] = jnp.where(mine, y, y_ref[at, :].astype(jnp.float32)).astype(out_dtype)

        @pl.when(step == steps - 1)
        def _():
            @pl.when(whole)
            def _():
                for y_ref, y in finished(slice(None)):
                    y_ref[...] = y.astype(out_dtype)

            @pl.when(jnp.logical_not(whole))
            def _():
                # The first to come clears the tile: rows that no group owns stay zero.
                @pl.when((visit == 0) | (tile[visit] != tile[jnp.maximum(visit - 1, 0)]))
                def _():
                    for y_ref in y_refs:
                        y_ref[...] = jnp.zeros_like(y_ref)

                each_piece(merge)

    # A visit without rows keeps the blocks of the step before it, so that nothing is fetched.
    def x_block(column, visit, step, group, tile, first, stop):
        busy = first[visit] < stop[visit]
        last = jax.lax.div(jnp.maximum(first[visit] - 1, 0), jnp.int32(config.rows))
        return jnp.where(busy, tile[visit], last), jnp.where(busy, step, steps - 1)

    def w_block(column, visit, step, group, tile, first, stop):
        step = jnp.where(first[visit] < stop[visit], step, steps - 1)
        return (group[visit], column, step) if transpose_w else (group[visit], step, column)

    def y_block(column, visit, step, group, tile, first, stop):
        return tile[visit], column

    sides = (config.columns, held) if transpose_w else (held, config.columns)
    x_spec, w_spec = pl.BlockSpec((config.rows, held), x_block), pl.BlockSpec((None, *sides), w_block)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(columns, config.columns), visits.count, steps),
            in_specs=[x_spec] + [w_spec] * len(weights),
            out_specs=[pl.BlockSpec((config.rows, config.columns), y_block)] * results,
            scratch_shapes=[pltpu.VMEM((config.rows, config.columns), jnp.float32)] * len(weights),
        ),
        out_shape=[_struct((rows, columns), out_dtype, x, *weights, group_sizes)] * results,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=limit
        ),
        cost_estimate=_cost(rows, inner, columns, x.dtype, out_dtype, weights, results),
        interpret=interpret,
        name=name,
    )(*visits[1:], x, *weights)


def _outer(x, dy, group_sizes, out_dtype, config, limit, interpret):
    pl, pltpu = _pallas()
    (rows, inner), columns, groups = x.shape, dy.shape[1], group_sizes.shape[0]
    visits = make_visits(group_sizes, rows, config.rows, every_group=True)
    align, piece = _sublanes(x.dtype), min(_PIECE, config.rows)
    # Rows against rows: the transposed left operand is the matrix unit's matter, x is not copied.
    contract = (((0,), (0,)), ((), ()))

    def kernel(group, tile, first, stop, x_ref, dy_ref, dw_ref, sum_ref):
        visit = pl.program_id(2)
        low, high = first[visit] - tile[visit] * config.rows, stop[visit] - tile[visit] * config.rows
        start, pieces = _pieces(low, high, config.rows, align, piece)
        whole = high - low == config.rows

        @pl.when((visit == 0) | (group[visit] != group[jnp.maximum(visit - 1, 0)]))
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        @pl.when(whole)
        def _():
            sum_ref[...] += _dot(x_ref[...], dy_ref[...], contract)

        @pl.when(jnp.logical_not(whole))
        def _():
            def add(i, _):
                begin = _multiple(start + i * piece, align)

                def own(ref):
                    row = begin + jax.lax.broadcasted_iota(jnp.int32, (piece, ref.shape[1]), 0)
                    block = ref[pl.ds(begin, piece), :]
                    mine = (row >= low) & (row < high)
                    return jnp.where(mine, block.astype(jnp.float32), 0).astype(block.dtype)

                # Both are masked: a neighbour's NaN in either would survive the other's zero.
                sum_ref[...] += _dot(own(x_ref), own(dy_ref), contract)

            jax.lax.fori_loop(0, pieces, add, None)

        final = pl.num_programs(2) - 1

        @pl.when((visit == final) | (group[visit] != group[jnp.minimum(visit + 1, final)]))
        def _():
            dw_ref[...] = sum_ref[...].astype(out_dtype)

    def x_block(k, n, visit, group, tile, first, stop):
        return tile[visit], k

    def dy_block(k, n, visit, group, tile, first, stop):
        return tile[visit], n

    def dw_block(k, n, visit, group, tile, first, stop):
        return group[visit], k, n

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(inner, config.inner), pl.cdiv(columns, config.columns), visits.count),
            in_specs=[
                pl.BlockSpec((config.rows, config.inner), x_block),
                pl.BlockSpec((config.rows, config.columns), dy_block),
            ],
            out_specs=pl.BlockSpec((None, config.inner, config.columns), dw_block),
            scratch_shapes=[pltpu.VMEM((config.inner, config.columns), jnp.float32)],
        ),
        out_shape=_struct((groups, inner, columns), out_dtype, x, dy, group_sizes),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=limit
        ),
        cost_estimate=_cost(rows, inner, columns, x.dtype, dy.dtype, [_struct((groups, inner, columns), out_dtype)]),
        interpret=interpret,
        name="grouped_outer",
    )(*visits[1:], x, dy)


def _cost(rows: int, inner: int, columns: int, left: Any, right: Any, matrices: Any, results: int = 1):
    """What XLA is to count for a product: every row once, every operand read and every result written once. It plans
    what runs beside the kernel by it, and `jaxmodels compile` estimates a step. An activation counts as nothing."""
    moved = rows * (inner * jnp.dtype(left).itemsize + results * columns * jnp.dtype(right).itemsize)
    return _pallas()[0].CostEstimate(
        flops=2 * rows * inner * columns * len(matrices), transcendentals=0,
        bytes_accessed=moved + sum(m.size * m.dtype.itemsize for m in matrices),
    )  # fmt: skip


def _pieces(low, high, rows: int, align: int, piece: int):
    """Where the pieces of a tile begin that cover rows low..high-1, and how many: none overlap, none leave the tile."""
    begin = _multiple(jax.lax.div(low, jnp.int32(align)) * align, align)
    count = jnp.where(high > low, jax.lax.div(high - begin + (piece - 1), jnp.int32(piece)), 0)
    return jnp.minimum(begin, rows - count * piece), count


def _dot(left, right, contract):
    # float32 by default means one pass of bf16.
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jax.lax.dot_general(left, right, contract, precision=precision, preferred_element_type=jnp.float32)


def _multiple(value, of: int):
    return _pallas()[0].multiple_of(value, of)


def _sublanes(dtype: Any) -> int:
    """Rows of a vector register's tile: where a load may start without a shift."""
    return 8 * 4 // jnp.dtype(dtype).itemsize


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _struct(shape, dtype, *operands):
    """Inside shard_map, an output that varies along the mesh axes of the operands."""
    axes = varying_axes(*operands)
    return jax.ShapeDtypeStruct(
        shape, dtype, **({"manual_axis_type": jax.sharding.ManualAxisType(varying=axes)} if axes else {})
    )


def _checked(group_sizes: Any, *operands: Any) -> list[Any]:
    """All in the widest dtype of theirs: the matrix unit takes one."""
    if (missing := _missing()) is not None:
        raise UserError(f"Pallas for the TPU cannot be imported ({missing}); name another implementation")
    dtype = jnp.result_type(*(operand.dtype for operand in operands))
    if (reason := unsupported(operands[0].shape, group_sizes.shape[0], dtype)) is not None:
        raise UserError(f"the TPU kernels cannot run: {reason}")
    return [operand.astype(dtype) for operand in operands]
