"""Time configurations of an implementation on this device; minutes, and only when called."""

import dataclasses
import functools
import importlib
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.kernels.grouped_matmul.tuning.tables import PRODUCTS

CLOSE = 1.3  # times the fastest in the first rounds: what is slower is not measured further
_FIRST = 3  # rounds before that
_TURN = 5e-3  # seconds that a turn lasts at least: a dispatch to an accelerator costs tens of microseconds
# Relative Frobenius norm: twice what two orders of summation differ by (moe_split.md 7).
_LIMIT = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The fastest configuration for one call; ms and default_ms: median milliseconds for each kind of group sizes.

    config None: the default. tried: milliseconds by configuration, slower ones of few rounds. discarded: why others
    were not timed.
    """

    implementation: str
    product: str
    rows: int
    inner: int
    columns: int
    groups: int
    dtype: str
    config: Any
    ms: Mapping[str, float]
    default_ms: Mapping[str, float]
    tried: Mapping[str, Mapping[str, float]]
    discarded: Mapping[str, str]


def even_sizes(rows: int, groups: int) -> np.ndarray:
    """int32[groups] of sum `rows`, as equal as they can be."""
    return apportion(rows, np.ones(groups))


def zipf_sizes(rows: int, groups: int, seed: int = 0) -> np.ndarray:
    """int32[groups] of sum `rows`, the i-th largest in proportion to 1 / i, in random order."""
    return np.random.default_rng(seed).permutation(apportion(rows, 1 / np.arange(1, groups + 1)))


def apportion(rows: int, weights: np.ndarray) -> np.ndarray:
    """int32 of sum `rows` in proportion to the weights: rounded down, the rest to the largest remainders."""
    shares = rows * weights / weights.sum()
    sizes = np.floor(shares).astype(np.int64)
    sizes[np.argsort(sizes - shares, kind="stable")[: rows - sizes.sum()]] += 1
    return sizes.astype(np.int32)


def tune(
    product: str,
    rows: int,
    inner: int,
    columns: int,
    groups: int,
    dtype: Any,
    implementation: str,
    candidates: Iterable[Any] | None = None,
    *,
    repeats: int = 15,
) -> Tuned:
    """The fastest of the candidates (default: the module's own) for even and Zipf sizes, and the default config.

    Sides as in the package's docstring. A candidate that does not compile, or whose result is not the default's, is
    discarded with the reason. The candidates take turns; those far behind after three rounds get no more. What counts
    is the geometric mean over both kinds of sizes. Raises UserError if the implementation cannot run here.
    """
    dtype = jnp.dtype(dtype)
    _check(implementation, product, rows, inner, groups, dtype)
    if candidates is None:
        candidates = candidates_of(implementation, product, rows, inner, columns, groups, dtype)
    configs = [None, *dict.fromkeys(config for config in candidates if config is not None)]
    operands = draw(product, rows, inner, columns, groups, dtype)
    sizes = {"even": jnp.asarray(even_sizes(rows, groups)), "zipf": jnp.asarray(zipf_sizes(rows, groups))}
    runs: dict[Any, Callable[[str], Any]] = {}
    wanted: dict[str, np.ndarray] = {}
    discarded: dict[str, str] = {}
    for config in configs:
        run = _runner(implementation, product, config, operands, sizes)
        try:
            results = {kind: _sample(run(kind)) for kind in sizes}
        except Exception as error:  # compilers of kernels raise many kinds; what fails is not the fastest
            if config is None:
                raise
            discarded[repr(config)] = f"failed: {' '.join(str(error).split())[:200]}"
            continue
        wanted = wanted or results
        wrong = max(_difference(results[kind], wanted[kind]) for kind in sizes)
        if wrong <= _LIMIT.get(dtype.name, 1e-2):
            runs[config] = run
        else:
            discarded[repr(config)] = f"wrong: differs from the default by {wrong:.1e} (relative Frobenius norm)"
    seconds = measure(runs, tuple(sizes), min(_FIRST, repeats))
    best = min(map(_score, seconds.values()))
    leading = {config: run for config, run in runs.items() if config is None or _score(seconds[config]) <= CLOSE * best}
    more = measure(leading, tuple(sizes), repeats - _FIRST) if repeats > _FIRST else {}
    for config, times in more.items():
        for kind, found in times.items():
            seconds[config][kind] = [*seconds[config][kind], *found]
    winner = min(leading, key=lambda config: _score(seconds[config]))
    tried = {config: {kind: 1e3 * float(np.median(found)) for kind, found in times.items()}
             for config, times in seconds.items()}  # fmt: skip
    return Tuned(implementation, product, rows, inner, columns, groups, dtype.name, winner, tried[winner], tried[None],
                 {repr(config): times for config, times in tried.items()}, discarded)  # fmt: skip


def candidates_of(
    implementation: str, product: str, rows: int, inner: int, columns: int, groups: int, dtype: Any
) -> Sequence[Any]:
    """Configurations worth timing: the module's own `candidates` of these arguments, or those listed here."""
    module = importlib.import_module(f"jaxmodels.kernels.grouped_matmul.{implementation}")
    find = getattr(module, "candidates", None) or _CANDIDATES.get(implementation)
    if find is None:
        raise UserError(f"implementation {implementation!r} has no configurations to tune")
    return find(*([module] if find in _CANDIDATES.values() else []), product, rows, inner, columns, groups, dtype)


def _cpu_candidates(cpu, product, rows, inner, columns, groups, dtype) -> list[Any]:
    mean = -(-rows // groups)
    rooms = {0, cpu.batch_room(rows, groups), *(-(-mean * share // 32) * 8 for share in (3, 4, 5, 6, 8))}
    blocks = [block for block in (16, 32, 64, 128, 256) if block <= max(rows, 16)]
    # Places for every row of a common group, no more: 512 of them a group are large matrices already.
    return [cpu.Config(room, block) for room in sorted(rooms) if room <= 1024 for block in blocks]


def _tpu_candidates(tpu, product, rows, inner, columns, groups, dtype) -> list[Any]:
    """Tiles that fit VMEM, and whose tile map fits scalar memory, one configuration for each that would run.

    For float32 results and twice the rows: a table also answers calls with those, and must not make them fail.
    """
    kernel, found = "outer" if product == "dW" else "matmul", {}
    for sides in itertools.product((128, 256, 512, 1024), (512, 1024, 2048), (512, 1024, 2048), (True, False)):
        config = tpu.Config(*sides)
        tiles = tpu.tiles(kernel, (rows, inner, columns), dtype, jnp.float32, config)
        try:
            tpu.vmem_limit(tpu.vmem_bytes(kernel, inner, dtype, jnp.float32, tiles))
        except UserError:
            continue
        if 16 * (2 * rows // config.rows + groups) <= tpu._SMEM:
            found.setdefault(tiles, config)
    return list(found.values())


def _hopper_candidates(hopper, product, rows, inner, columns, groups, dtype) -> list[Any]:
    """Tiles that fit shared memory, with as many stages as there is room for and one fewer."""
    blocks, found = hopper.default_config(columns).blocks, []
    for width in (64, 128, 192, 256):
        if width > max(64, -(-columns // 64) * 64):
            continue
        fitting = []
        for stages in range(2, 7):
            try:
                fitting.append(hopper.Config(width, stages, 1, blocks).stages)
            except UserError:
                break
        found += [hopper.Config(width, stages, band, blocks) for stages in fitting[-2:] for band in (1, 4, 8, 16)]
    return found


_CANDIDATES: dict[str, Callable[..., list[Any]]] = {
    "cpu": _cpu_candidates, "tpu": _tpu_candidates, "hopper": _hopper_candidates}  # fmt: skip


def draw(product: str, rows: int, inner: int, columns: int, groups: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Standard-normal operands of the product; constants would run faster than real numbers do."""
    right = {"fwd": (groups, inner, columns), "dX": (groups, columns, inner), "dW": (rows, columns)}[product]
    keys = jax.random.split(jax.random.key(0, impl="rbg"))
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, ((rows, inner), right), strict=True))


def _runner(implementation, product, config, operands, sizes) -> Callable[[str], Any]:
    """Calls the implementation itself: through `grouped_matmul`, the default would be looked up in a table."""
    from jaxmodels.kernels.grouped_matmul import api

    chosen = api._IMPLEMENTATIONS[implementation]
    if product == "dW":
        function = functools.partial(chosen.outer, out_dtype=jnp.float32, config=config)
    else:
        out_dtype = operands[0].dtype
        function = functools.partial(chosen.matmul, transpose_w=product == "dX", out_dtype=out_dtype, config=config)
    compiled = jax.jit(function)
    return lambda kind: compiled(*operands, sizes[kind])


def _check(implementation: str, product: str, rows: int, inner: int, groups: int, dtype: Any) -> None:
    from jaxmodels.kernels.grouped_matmul import api

    if product not in PRODUCTS:
        raise UserError(f"product {product!r} is unknown; choose from {', '.join(PRODUCTS)}")
    takers = [name for name, one in api._IMPLEMENTATIONS.items() if one.takes_config]
    if implementation not in takers:
        raise UserError(f"implementation {implementation!r} takes no config; tune one of {', '.join(takers)}")
    if (reason := api._IMPLEMENTATIONS[implementation].unfit((rows, inner), groups, dtype)) is not None:
        raise UserError(f"{implementation!r} cannot run here: {reason}")


def _sample(result: Any) -> np.ndarray:
    """Some rows of [M, N], or of each matrix of [G, K, N]: at an odd distance, so that every place in a tile occurs."""
    axis, most = (0, 4096) if result.ndim == 2 else (1, 128)
    step = max(result.shape[axis] // most, 1) | 1
    return np.asarray(result[::step] if axis == 0 else result[:, ::step], np.float32)


def measure(
    runs: Mapping[Any, Callable[[str], Any]], kinds: Sequence[str], rounds: int
) -> dict[Any, dict[str, list[float]]]:
    """Seconds a call by configuration and kind of sizes: one turn a round each, every round begun by another."""
    calls = {config: max(1, int(_TURN / max(_turn(run, kinds[0], 1), 1e-6))) for config, run in runs.items()}
    seconds: dict[Any, dict[str, list[float]]] = {config: {kind: [] for kind in kinds} for config in runs}
    turns = list(runs)
    for number in range(rounds):
        first = number % len(turns)
        for config in turns[first:] + turns[:first]:
            for kind in kinds:
                seconds[config][kind].append(_turn(runs[config], kind, calls[config]))
    return seconds


def _turn(run: Callable[[str], Any], kind: str, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls - 1):
        run(kind)
    jax.block_until_ready(run(kind))  # a device works in order
    return (time.perf_counter() - start) / calls


def _score(times: Mapping[str, Sequence[float]]) -> float:
    return float(np.exp(np.mean([np.log(np.median(found)) for found in times.values()])))


def _difference(found: np.ndarray, wanted: np.ndarray) -> float:
    error = float(np.linalg.norm((found - wanted).ravel()) / max(float(np.linalg.norm(wanted.ravel())), 1e-30))
    return error if np.isfinite(error) else float("inf")
