"""The grouped products on NVIDIA Hopper (compute capability 9), in Pallas Mosaic GPU: bulk copies, wgmma, fp32 sums.

Rows meet their matrices in tiles of 128 rows that begin at the first row of a group (moe_split.md 6.3), as two halves
of 64 rows that are placed on their own: the last of a group slides back to end with the group. Rows in both halves are
computed twice, to the same bits, and nothing has to be masked. Of a group under 64 rows the halves store a power of two
of rows each, the first and the last ones. Rows past the last group are a group of their own whose products have no
terms.

The gradient of the matrices sums over rows, so there a foreign row must not count, NaN or not, and bulk copies of the
right operand must begin at a multiple of 8 rows. What whole 64s of rows from the first such multiple on leave over, at
most 70 rows a group, is copied to the side with zeros below, both operands, and the kernel reads it from there.

Neither operand is ever transposed in memory. K and N that are no multiples of 64 are padded, which copies the operands,
and so are rows to a multiple of 8 for the gradient of the matrices. Over several GPUs, call it inside `jax.shard_map`:
XLA cannot divide a kernel.

One H100 has run it at full size, right in all 90 checks (benchmarks/results/hopper_h100.json); what can be seen without
a GPU, tests/test_grouped_matmul_hopper.py checks under interpreters and compilers.
"""

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxmodels.errors import UserError
from jaxmodels.kernels.grouped_matmul import epilogue
from jaxmodels.kernels.varying import vary, varying_axes

SHARED_BYTES = 232_448  # 227 KiB: what a thread block may have on compute capability 9.0 (CUDA programming guide)
MULTIPROCESSORS = 132  # of an H100 SXM; used where no GPU is there to ask
_HALF = 64
_TILE = 2 * _HALF
_SIDE = 72  # rows to the side: up to 7 before the first multiple of 8 and up to 63 after the last whole 64
_DTYPES = ("bfloat16", "float16")  # wgmma reads only 16-bit types transposed


@dataclass(frozen=True)
class Config:
    """How the kernel cuts the work. The output tile is 128 rows x `columns`, the contraction goes 64 at a time.

    `band`: tiles that run at the same time cover this many tiles downwards, and share their columns of the weights.
    `blocks`: persistent thread blocks, one a multiprocessor.
    """

    columns: int = 256
    stages: int = 4
    band: int = 8
    blocks: int = MULTIPROCESSORS

    def __post_init__(self):
        if self.columns % 64 or not 64 <= self.columns <= 256:
            raise UserError(f"columns={self.columns}; a wgmma takes 64, 128, 192 or 256")
        if self.stages < 2 or self.band < 1 or self.blocks < 1:
            raise UserError(f"{self}: at least 2 stages, a band and a block of 1 are needed")
        if self.shared_bytes() > SHARED_BYTES:
            raise UserError(f"{self} needs {self.shared_bytes()} bytes of shared memory, {SHARED_BYTES} are there; "
                            f"choose fewer stages or columns")  # fmt: skip

    def shared_bytes(self, weights: int = 1) -> int:
        """Operands of all stages, two 8 KiB buffers for the stores of each consumer, and 1 KiB for barriers."""
        return self.stages * _stage_bytes(weights * self.columns) + 4 * _HALF * 128 + 1024


def _stage_bytes(columns: int) -> int:
    return 2 * 64 * (_TILE + columns)


def default_config(columns: int, *, blocks: int | None = None, weights: int = 1, widest: int = 256) -> Config:
    """The width of tile that wastes least at the right edge, wider ones preferred, and as many stages as fit, up to 6.

    A product reads 128 + c numbers a step for 128 c multiplications: the narrower, the more shared-memory traffic.
    Of two weights, tiles are at most 128 wide: their accumulators are the registers of one of 256.
    """
    widths = [c for c in (256, 192, 128, 64) if c <= max(columns, 64) and c * weights <= 256 and c <= widest]
    # 3, 10 and 30 %: guesses at what narrow tiles cost, not measured; they decide only between similar wastes.
    penalty = {256: 1.0, 192: 1.03, 128: 1.1, 64: 1.3}
    best = min(widths, key=lambda c: -(-columns // c) * c * penalty[c])
    free = SHARED_BYTES - 4 * _HALF * 128 - 1024
    return Config(best, min(6, free // _stage_bytes(weights * best)), blocks=blocks or _multiprocessors())


def glu_config(columns: int, config: Config | None = None) -> Config:
    """What `glu` runs with, given the configuration of `matmul`: as wide and deep as two weights have room for."""
    if config is None:
        return default_config(columns, weights=2)
    fits = default_config(columns, blocks=config.blocks, weights=2, widest=config.columns)
    return Config(fits.columns, min(fits.stages, config.stages), config.band, config.blocks)


def unfit(shape, groups, dtype) -> str | None:
    """Why this cannot run here, or None: a GPU of compute capability 9.x and a 16-bit float type are needed."""
    if jnp.dtype(dtype).name not in _DTYPES:
        return f"takes {' and '.join(_DTYPES)}, not {jnp.dtype(dtype).name}"
    if jax.default_backend() != "gpu":
        return f"only on a CUDA GPU of compute capability 9.x, this is {jax.default_backend()}"
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", "unknown"))
    if not capability.startswith("9."):
        return f"only on compute capability 9.x, {device.device_kind} has {capability}"
    try:
        importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    except ImportError as error:  # jax 0.10 imports absl there without naming absl-py among what it needs
        return f"Pallas Mosaic GPU does not import: {error}; for absl, pip install absl-py"
    return None


def matmul(
    x: Float[Array, "M K"], w: Float[Array, "G _ _"], group_sizes: Int[Array, "G"], *, transpose_w: bool, out_dtype,
    config: Config | None = None, interpret: Any = None,
) -> Float[Array, "M N"]:  # fmt: skip
    """Rows of each group times its matrix [K, N], or [N, K] with `transpose_w`; zero past the last group."""
    _check(x, w, out_dtype)
    rows, width = x.shape
    columns = w.shape[1 if transpose_w else 2]
    if rows == 0 or columns == 0 or width == 0 or w.shape[0] == 0:
        return vary(jnp.zeros((rows, columns), out_dtype), varying_axes(x, w, group_sizes))
    config = config or default_config(columns)

    @jax.custom_batching.sequential_vmap
    def product(x, w, group_sizes):
        x, w = _pad(x, 1, 64), _pad(w, 64, 64)
        name = "grouped_matmul_transposed" if transpose_w else "grouped_matmul"
        y, = _matmul(x, [w], group_sizes, transpose_w, jnp.dtype(out_dtype), config, interpret, name)  # fmt: skip
        return y[:rows, :columns]

    return vary(product(x, w, group_sizes), varying_axes(x, w, group_sizes))


def glu(
    x: Float[Array, "M K"], gate: Float[Array, "G K N"], up: Float[Array, "G K N"], group_sizes: Int[Array, "G"], *,
    activation: str, keep: bool, config: Config | None = None, interpret: Any = None,
) -> Float[Array, "M N"] | tuple[Float[Array, "M N"], Float[Array, "M N"], Float[Array, "M N"]]:  # fmt: skip
    """h = act(x_e gate[e]) * (x_e up[e]) for the rows of each group e (moe_split.md 6.7); with `keep` (h, g, u), the
    two products as well, which the gradient needs. h is rounded once, from float32; zero past the last group in all.

    `config` is that of `matmul`; `glu_config` fits it to two weights.
    """
    if (reason := glu_unsupported(activation)) is not None:
        raise UserError(reason)
    for w in (gate, up):
        _check(x, w, x.dtype)
    (rows, width), columns, results = x.shape, gate.shape[2], 3 if keep else 1
    axes = varying_axes(x, gate, up, group_sizes)
    if 0 in (rows, columns, width, gate.shape[0]):
        nothing = vary(jnp.zeros((rows, columns), x.dtype), axes)
        return (nothing,) * 3 if keep else nothing
    config = glu_config(columns, config)

    @jax.custom_batching.sequential_vmap
    def both(x, gate, up, group_sizes):
        padded = _pad(x, 1, 64), [_pad(w, 64, 64) for w in (gate, up)]
        found = _matmul(*padded, group_sizes, False, x.dtype, config, interpret,
                        f"grouped_glu_{activation}", results, epilogue.gated(activation, keep))  # fmt: skip
        return tuple(y[:rows, :columns] for y in found)

    found = tuple(vary(y, axes) for y in both(x, gate, up, group_sizes))
    return found if keep else found[0]


def glu_unsupported(activation: str) -> str | None:
    """Why the kernel of `glu` does not compute this activation, or None."""
    return epilogue.unsupported(activation)


def outer(
    x: Float[Array, "M K"], dy: Float[Array, "M N"], group_sizes: Int[Array, "G"], *, out_dtype,
    config: Config | None = None, interpret: Any = None,
) -> Float[Array, "G K N"]:  # fmt: skip
    """x_e^T dy_e for each group e; exactly zero for an empty one."""
    _check(x, dy, out_dtype)
    (rows, width), columns, groups = x.shape, dy.shape[1], group_sizes.shape[0]
    if 0 in (rows, width, columns, groups):
        return vary(jnp.zeros((groups, width, columns), out_dtype), varying_axes(x, dy, group_sizes))
    config = config or default_config(columns)

    @jax.custom_batching.sequential_vmap
    def product(x, dy, group_sizes):
        x, dy = _pad(x, 8, 64), _pad(dy, 8, 64)
        return _outer(x, dy, group_sizes, jnp.dtype(out_dtype), config, interpret)[:, :width, :columns]

    return vary(product(x, dy, group_sizes), varying_axes(x, dy, group_sizes))


def _matmul(
    x, weights, group_sizes, transpose_w: bool, out_dtype, config: Config, interpret, name: str, results: int = 1,
    finish=lambda y: (y,),
):  # fmt: skip
    """The rows of each group times its matrix of each of `weights`, and the `results` that `finish` makes of these."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from jaxmodels.kernels.grouped_matmul import _hopper_kernel

    (rows, width), groups = x.shape, weights[0].shape[0]
    columns = weights[0].shape[1 if transpose_w else 2]
    config = _narrow(config, columns)
    across = -(-columns // config.columns)
    terms = -(-width // 64)
    count, table = halves(group_sizes, rows)

    def plan(refs):
        used = refs[0][0]
        return used * across, functools.partial(visit, refs[1], used)

    def visit(table, used, tile):
        # Down a band of row tiles, then to the next columns: what runs at once shares rows and weights through L2.
        area = jnp.int32(config.band * across)
        first = lax.div(tile, area) * config.band
        height = jnp.minimum(used - first, config.band)
        within = lax.rem(tile, area)
        row_tile, column = first + lax.rem(within, height), lax.div(within, height)
        start, slid, code = (table[i, row_tile] for i in range(3))
        group, second, log = code >> 4, (code >> 3) & 1, code & 7
        steps = jnp.where(group < groups, terms, 0)
        column *= config.columns
        return _hopper_kernel.Visit(steps, second == 1, columns - column, (group, start, slid, log, column))

    def load(refs, where, step, left, right, barrier):
        group, start, slid, _, column = where
        along, over = pl.ds(step * 64, 64), pl.ds(column, config.columns)
        for half, first in enumerate((start, slid)):
            plgpu.copy_gmem_to_smem(refs[2].at[pl.ds(first, _HALF), along], left.at[half], barrier)
        for i in range(len(weights)):
            matrix = refs[3 + i].at[group]
            source = matrix.at[over, along] if transpose_w else matrix.at[along, over]
            plgpu.copy_gmem_to_smem(source, right.at[i], barrier)

    def store(out, where, half, offset, block):
        _, start, slid, log, column = where
        first = jnp.where(half == 0, start, slid)
        for i in range(7):  # the shape of a bulk copy is static: one for each power of two

            @pl.when(log == i)
            def _(size=2**i):
                target = out.at[pl.ds(first, size), pl.ds(column + offset, block.shape[1])]
                plgpu.copy_smem_to_gmem(block.at[pl.ds(0, size)], target)

    kernel = _hopper_kernel.build(
        config=config, dtype=x.dtype, out_type=jax.ShapeDtypeStruct((rows, columns), out_dtype),
        right_block=(config.columns, 64) if transpose_w else (64, config.columns),
        flip_left=False, flip_right=transpose_w, plan=plan, load=load, store=store, arrivals=2 + len(weights),
        rows_anywhere=True, name=name, interpret=interpret, weights=len(weights), results=results, finish=finish,
    )  # fmt: skip
    return kernel(count, table, x, *weights)


def halves(group_sizes: Int[Array, "G"], rows: int) -> tuple[Int[Array, "1"], Int[Array, "3 V"]]:
    """The number of row tiles and, for each, first rows of the two halves and 16 group + 8 second + log2(stored rows).

    `second`: the other half has rows of its own. Group G stands for the rows past the last group.
    """
    sizes = jnp.concatenate([group_sizes.astype(jnp.int32), (rows - jnp.sum(group_sizes, dtype=jnp.int32))[None]])
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    tiles = -(-sizes // _TILE)
    last = jnp.cumsum(tiles, dtype=jnp.int32)  # tiles up to and with each group
    slot = jnp.arange(-(-rows // _TILE) + len(sizes), dtype=jnp.int32)
    # One comparison with all: a binary search is a loop of small kernels on a GPU.
    group = jnp.sum(slot[:, None] >= last[:-1], axis=1, dtype=jnp.int32)
    size, end = sizes[group], ends[group]
    start = end - size + _TILE * (slot - (last - tiles)[group])
    log = jnp.sum(size[:, None] >= 2 ** np.arange(1, 7), axis=1, dtype=jnp.int32)
    stored = 1 << log
    second = jnp.where(size < _HALF, size > stored, end - start > _HALF)
    first = jnp.maximum(jnp.minimum(jnp.stack([start, start + _HALF]), end - stored), 0)  # 0: slots not in use
    return last[-1:], jnp.concatenate([first, (16 * group + 8 * second + log)[None]])


def _outer(x, dy, group_sizes, out_dtype, config: Config, interpret):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from jaxmodels.kernels.grouped_matmul import _hopper_kernel

    (rows, width), columns, groups = x.shape, dy.shape[1], group_sizes.shape[0]
    config = _narrow(config, columns)
    down, across = -(-width // _TILE), -(-columns // config.columns)
    band = min(config.band, down)
    table, row, exists = leftovers(group_sizes, rows)

    def plan(refs):
        return jnp.int32(groups * down * across), functools.partial(visit, refs[0])

    def visit(table, tile):
        group, within = lax.div(tile, jnp.int32(down * across)), lax.rem(tile, jnp.int32(down * across))
        area = jnp.int32(band * across)
        first = lax.div(within, area) * band
        height = jnp.minimum(down - first, band)
        inside = lax.rem(within, area)
        row, column = (first + lax.rem(inside, height)) * _TILE, lax.div(inside, height) * config.columns
        start, whole, steps = (table[i, group] for i in range(3))
        return _hopper_kernel.Visit(steps, row + _HALF < width, columns - column, (group, start, whole, row, column))

    def load(refs, where, step, left, right, barrier):
        group, start, whole, row, column = where

        def copy(rows_of_x, rows_of_dy):
            for half in range(2):
                plgpu.copy_gmem_to_smem(rows_of_x.at[:, pl.ds(row + half * _HALF, _HALF)], left.at[half], barrier)
            plgpu.copy_gmem_to_smem(rows_of_dy.at[:, pl.ds(column, config.columns)], right.at[0], barrier)

        taken, beside = pl.ds(pl.multiple_of(start + step * 64, 8), 64), pl.ds((step - whole) * 64, 64)
        lax.cond(
            step < whole,
            lambda: copy(refs[1].at[taken], refs[2].at[taken]),
            lambda: copy(refs[3].at[group, beside], refs[4].at[group, beside]),
        )

    def store(out, where, half, offset, block):
        group, _, _, row, column = where
        target = out.at[group, pl.ds(row + half * _HALF, _HALF), pl.ds(column + offset, block.shape[1])]
        plgpu.copy_smem_to_gmem(block, target)

    kernel = _hopper_kernel.build(
        config=config, dtype=x.dtype, out_type=jax.ShapeDtypeStruct((groups, width, columns), out_dtype),
        right_block=(64, config.columns), flip_left=True, flip_right=False,
        plan=plan, load=load, store=store, arrivals=3, rows_anywhere=False, name="grouped_outer", interpret=interpret,
    )  # fmt: skip
    return kernel(table, x, dy, _gather(x, row, exists), _gather(dy, row, exists))[0]


def leftovers(
    group_sizes: Int[Array, "G"], rows: int
) -> tuple[Int[Array, "3 G"], Int[Array, "G 72"], Bool[Array, "G 72"]]:
    """First aligned row, whole 64s from there on and steps of each group; its other rows, and which of these exist."""
    size = group_sizes.astype(jnp.int32)
    end = jnp.cumsum(size, dtype=jnp.int32)
    start = end - size
    aligned = (start + 7) // 8 * 8
    head = jnp.minimum(aligned, end) - start
    whole = jnp.maximum(end - aligned, 0) // 64
    others = size - 64 * whole
    place = jnp.arange(_SIDE, dtype=jnp.int32)
    row = start[:, None] + place + jnp.where(place < head[:, None], 0, 64 * whole[:, None])
    plan = jnp.stack([aligned, whole, whole + (others + 63) // 64])
    return plan, jnp.minimum(row, rows - 1), place < others[:, None]


def _gather(a, row, exists):
    # Selected, not multiplied: the rows below may hold NaN. A zero in one operand would not stop it in the other.
    return jnp.where(exists[:, :, None], a[row], jnp.zeros((), a.dtype))


def _narrow(config: Config, columns: int) -> Config:
    """The same with tiles not wider than the output: a bulk copy may end past the edge, not be larger than all."""
    return Config(min(config.columns, columns // 64 * 64), config.stages, config.band, config.blocks)


def _pad(a, rows: int, columns: int):
    """Zeros to multiples of these in the last two axes, and to 64 at least, the height of a bulk copy."""
    down, across = (max(-(-size // m) * m, 64) - size for size, m in zip(a.shape[-2:], (rows, columns), strict=True))
    return jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, down), (0, across)]) if down or across else a


def _check(x, other, out_dtype) -> None:
    if x.dtype != other.dtype or x.dtype.name not in _DTYPES:
        raise UserError(f"the Hopper kernel takes {' or '.join(_DTYPES)} for both, not {x.dtype} and {other.dtype}")
    if jnp.dtype(out_dtype).name not in (*_DTYPES, "float32"):
        raise UserError(f"the Hopper kernel writes {', '.join(_DTYPES)} and float32, not {jnp.dtype(out_dtype).name}")


@functools.cache
def _multiprocessors() -> int:
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else MULTIPROCESSORS
