"""The part that all grouped products on Hopper share: one producer that loads, two consumers that multiply and store.

Persistent blocks walk a list of output tiles. In each block one warp group issues bulk copies (TMA) into a ring of
stages, and two warp groups multiply (wgmma), 64 rows of the tile each. The ring does not end with a tile: while the
consumers store one, the producer already fills stages for the next. Only imported where a kernel is built.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

HALF = 64  # rows of the output tile for each of the two consumers: the height of a wgmma
SWIZZLE = 128  # bytes of a row of a shared-memory tile; with it, loads and stores have no bank conflicts
PRODUCER = 2  # index of the warp group that loads; 0 and 1 multiply
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232  # 128 * (40 + 2 * 232) of the 65536 on a multiprocessor
# As jax 0.12 calls it, ptxas ignores these ("setmaxnreg ignored", C7504) and gives each 168: enough for a product; some
# activations of two then spill up to 13 registers (benchmarks/hopper_compile.py). In jax 0.10 it heeds them.


class Visit(NamedTuple):
    """One output tile: how many steps of the contraction, and what of it there is to store."""

    steps: jax.Array
    second: jax.Array  # whether the second consumer has rows of its own
    width: jax.Array  # columns from the first one of the tile to the edge
    where: Any  # what `load` and `store` need to find it


def build(
    *,
    config: Any,
    dtype: Any,
    out_type: jax.ShapeDtypeStruct,
    right_block: tuple[int, int],
    flip_left: bool,
    flip_right: bool,
    plan: Callable[[Sequence[Any]], tuple[jax.Array, Callable[[jax.Array], Visit]]],
    load: Callable[..., None],
    store: Callable[..., None],
    arrivals: int,
    rows_anywhere: bool,
    name: str,
    interpret: Any = None,
    weights: int = 1,
    results: int = 1,
    finish: Callable[..., tuple[jax.Array, ...]] = lambda y: (y,),
) -> Callable[..., list[jax.Array]]:
    """A function of the operands that runs the kernel and gives `results` arrays of `out_type`.

    `plan(refs)` gives the number of output tiles and what describes one.
    `load(refs, where, step, left, right, barrier)` issues `arrivals` copies into left [2, 64, 64] and the `weights`
    blocks of right. Each has an accumulator; `finish` makes what is stored of these, in float32, a few columns at once.
    `store(out, where, half, column, block)` issues one copy of `block` [64, 128 bytes] to that column of the tile.
    `rows_anywhere`: the copies to `left` begin at any row, else at multiples of eight, as all to `right` do.
    `flip_left`, `flip_right`: the operand lies transposed in shared memory; wgmma reads it so, no copy is made.
    """
    stages, columns, out_dtype = config.stages, config.columns, out_type.dtype
    chunk = SWIZZLE // out_dtype.itemsize
    swizzled = lambda itemsize, rows: (  # noqa: E731
        plgpu.TilingTransform((rows, SWIZZLE // itemsize)), plgpu.SwizzleTransform(SWIZZLE)
    )  # fmt: skip

    def body(*refs, left, right, staged, full, empty):
        operands, outs = refs[:-results], refs[-results:]
        arriving, left = left if rows_anywhere and not interpret else (left, left)
        block, blocks, me = lax.axis_index("block"), lax.axis_size("block"), lax.axis_index("thread")
        tiles, visit = plan(operands)
        mine = lax.div(tiles - block + (blocks - 1), jnp.int32(blocks))  # tiles block, block + blocks, ...
        slot_of = lambda count: lax.rem(count, jnp.int32(stages))  # noqa: E731

        def produce():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def tile(i, count):
                steps, _, _, where = visit(block + i * blocks)

                def step(k, count):
                    slot = slot_of(count)
                    plgpu.barrier_wait(empty.at[slot])
                    load(operands, where, k, arriving.at[slot], right.at[slot], full.at[slot])
                    return count + 1

                return lax.fori_loop(0, steps, step, count)

            lax.fori_loop(0, mine, tile, jnp.int32(0))
            for slot in range(stages):  # nobody may arrive at a barrier of a block that has ended
                plgpu.barrier_wait(empty.at[slot])

        def consume():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            for slot in range(stages):  # all stages are free: the producer waits on the first round as on the others
                plgpu.barrier_arrive(empty.at[slot])

            def tile(i, count):
                steps, second, width, where = visit(block + i * blocks)
                busy = (me == 0) | second
                products = jnp.where(busy, steps, 0)

                def accumulate(*accs):
                    def step(k, count):
                        slot = slot_of(count)
                        plgpu.barrier_wait(full.at[slot])
                        a = left.at[slot, me]
                        a = a.transpose((1, 0)) if flip_left else a
                        for i, acc in enumerate(accs):
                            b = right.at[slot, i]
                            plgpu.wgmma(acc, a, b.transpose((1, 0)) if flip_right else b)
                        plgpu.wgmma_wait(weights)  # all but those just issued are done, so the stage before is free

                        @pl.when(k > 0)
                        def _():
                            plgpu.barrier_arrive(empty.at[slot_of(count + (stages - 1))])

                        return count + 1

                    lax.fori_loop(0, products, step, count)
                    return [acc[...] for acc in accs]

                sums = pl.run_scoped(accumulate, *[plgpu.ACC((HALF, columns))] * weights)

                @pl.when(products > 0)
                def _():
                    plgpu.barrier_arrive(empty.at[slot_of(count + products - 1)])

                def skip(k, count):
                    plgpu.barrier_wait(full.at[slot_of(count)])
                    plgpu.barrier_arrive(empty.at[slot_of(count)])
                    return count + 1

                lax.fori_loop(0, steps - products, skip, count)

                for c in range(columns // chunk):

                    @pl.when(busy & (c * chunk < width))
                    def _(c=c):
                        values = finish(*(y[:, c * chunk : (c + 1) * chunk] for y in sums))
                        for turn, (out, value) in enumerate(zip(outs, values, strict=True), c * results):
                            # Of two buffers in turn: all is read of what the tile before stored, then all but the last.
                            plgpu.wait_smem_to_gmem(min(turn, 1), wait_read_only=True)
                            buffer = staged.at[me, turn % 2]
                            buffer[...] = value.astype(out_dtype)
                            plgpu.commit_smem()
                            store(out, where, me, c * chunk, buffer)

                return count + steps

            lax.fori_loop(0, mine, tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        lax.cond(me == PRODUCER, produce, consume)

    itemsize = jnp.dtype(dtype).itemsize
    # A copy to shared memory splits the coordinates of its source into tiles too: with wgmma's tiles of eight rows it
    # must begin at a multiple of eight, and silently copies something else if it does not. As these blocks are as wide
    # as a tile, tiles of one row are the same bytes in the same order. The interpreter knows neither tiles nor unions.
    lefts = plgpu.RefUnion(*(
        plgpu.SMEM((stages, 2, HALF, 64), dtype, transforms=swizzled(itemsize, rows)) for rows in (1, 8)
    ))  # fmt: skip
    return plgpu.kernel(
        body,
        out_type=[out_type] * results,
        grid=(config.blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="thread",
        scratch_types={
            "left": lefts if rows_anywhere and not interpret else lefts.refs[1],
            "right": plgpu.SMEM((stages, weights, *right_block), dtype, transforms=swizzled(itemsize, 8)),
            # One row a tile, and 128 bytes wide: so any number of rows can be stored, and at any row.
            "staged": plgpu.SMEM((2, 2, HALF, chunk), out_dtype, transforms=swizzled(out_dtype.itemsize, 1)),
            "full": plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
            "empty": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        },
        # jax 0.12 made the other one the default. This one wants no proof that rows begin at multiples of a tile.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name=name,
        interpret=interpret,
    )
