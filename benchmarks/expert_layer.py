"""A whole sparse expert layer, router and top-k included, beside the dense layer that it replaces, in the same run.

    jaxmodels bench expert_layer [--out FILE]      # also writes FILE with .html: speed-up against dense by active share

Sides: `dense`, all E s neurons; `static`, a dense layer of the k s neurons that would stay (what pruning gives, and the
bound of every routed layer); `token`, `expert_ffn` with experts chosen for every token; `block`, chosen for 64
neighbouring tokens by the sum of their scores; the same on `lax.ragged_dot`; and PyTorch's loop over experts where it
is installed. "of bound" is the time divided by (the dense layer's time x active share): 1 would be sparsity for free.
Speed-up is against dense. Useful FLOPs: 6 a token, expert, d_model and neuron forward, 18 with the backward pass
(moe_split.md 6.7).
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._report import check_out, machine, publish
from benchmarks._timing import cores, take_turns
from jaxmodels.experts.layer import dense_ffn
from jaxmodels.kernels import expert_ffn

BLOCK = 64  # tokens that share their experts in the `block` side
COLUMNS = ("point", "routing", "pass", "side", "ms", "p10", "p90", "TFLOP/s", "speed-up", "of bound", "temporary MiB",
           "note")
PASSES = {"forward": 6, "forward+backward": 18}  # useful FLOPs of a token, active expert, d_model and neuron


@dataclasses.dataclass(frozen=True)
class Point:
    """A layer: T tokens of width D, E experts of s neurons, k of them active."""

    name: str
    T: int
    D: int
    s: int
    E: int
    k: int
    routings: tuple[str, ...] = ("even", "random", "zipf")
    peers: bool = True  # beside our own implementations also those that take long

    @property
    def share(self) -> float:
        return self.k / self.E


def _shares(name: str, T: int, D: int, s: int, E: int) -> tuple[Point, ...]:
    """The same layer at active shares of 10 to 100 %."""
    counts = sorted({max(round(E * share), 1) for share in (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)})
    return tuple(Point(f"{name}, {k / E:.0%}", T, D, s, E, k, ("random",), peers=False) for k in counts)


CPU = (
    Point("E=64 top-4", 512, 576, 128, 64, 4),
    Point("E=12 top-3", 512, 576, 128, 12, 3),
    *_shares("SmolLM2, s=128", 512, 576, 128, 12),
    *_shares("SmolLM2, s=32", 512, 576, 32, 48),
)
ACCELERATOR = (
    Point("OLMoE-1B-7B", 16_384, 2048, 1024, 64, 8),
    Point("Qwen3-30B-A3B", 16_384, 2048, 768, 128, 8),
    Point("Qwen3-235B-A22B", 16_384, 4096, 1536, 128, 8, ("even", "zipf")),
    Point("gpt-oss-20b", 16_384, 2880, 2880, 32, 4, ("even", "zipf")),
    Point("SonicMoE point", 262_144, 4096, 768, 128, 8, ("even",), peers=False),
    *_shares("LLaMA-2-7B, s=128", 4096, 4096, 128, 86),
)


def main(out: str | None) -> None:
    """Measures, prints a table, and writes ``out`` and a page with the curves."""
    check_out(out)
    about = machine(("torch",))
    on_cpu = jax.default_backend() == "cpu"
    rows = []
    for point in CPU if on_cpu else ACCELERATOR:
        for routing in point.routings:
            rows += measure(point, routing, repeats=15 if on_cpu else 20, calls=1 if on_cpu else 20,
                            dtype=jnp.float32 if on_cpu else jnp.bfloat16)
    notes = [" ".join((__doc__ or "").split("Sides: ")[1].split()), "ms: median of one call, router and top-k included"]
    publish("a sparse expert layer", rows, COLUMNS, about, notes, out)
    if out is not None:
        print(draw(rows, Path(out).with_suffix(".html")))


def measure(point: Point, routing: str, *, repeats: int, calls: int = 1, dtype: Any = jnp.float32
            ) -> list[dict[str, Any]]:
    """A row for each side and pass. calls: of the layer in one timed program, each fed by the one before."""
    rng = np.random.default_rng(0)
    layer, router, x = weights(point, rng, dtype)
    bias = jnp.asarray(preferences(point, routing), jnp.float32)
    ours, (dense, whole, small) = sides(point), dense_layer(point, layer)
    rows = []
    for passed, flops in PASSES.items():
        programs, memory, notes = {}, {}, {}
        routed = {**layer, "router": router, "bias": bias}
        every = {"dense": (dense, whole), "static": (dense, small), **{name: (f, routed) for name, f in ours.items()}}
        for name, (function, held) in every.items():
            compiled = jax.jit(_program(function, passed, calls)).lower(held, x).compile()
            planned = compiled.memory_analysis()
            memory[name] = None if planned is None else planned.temp_size_in_bytes / 2**20
            programs[name] = functools.partial(_run, compiled, held, x)
        if point.peers and _torch_here():
            programs["torch loop"] = torch_loop(point, layer, router, bias, x, passed)
            notes["torch loop"] = "per-expert index_add, eager"
        samples = take_turns(programs, repeats)
        reference = samples["dense"].median
        for name, sample in samples.items():
            summary = sample.summary()
            per_call = 1 if name == "torch loop" else calls
            seconds = summary["median_s"] / per_call
            active = point.E if name == "dense" else point.k
            work = flops * point.T * active * point.D * point.s
            rows.append({
                "point": point.name, "routing": routing, "pass": passed, "side": name, "ms": seconds * 1e3,
                "p10": summary["p10_s"] / per_call * 1e3, "p90": summary["p90_s"] / per_call * 1e3,
                "TFLOP/s": work / seconds / 1e12, "speed-up": reference / calls / seconds,
                "of bound": seconds / (reference / calls * point.share), "temporary MiB": memory.get(name),
                "note": notes.get(name, ""), "tokens": point.T, "d_model": point.D, "expert_size": point.s,
                "experts": point.E, "top_k": point.k, "share": point.share, "dtype": jnp.dtype(dtype).name,
                "samples": summary,
            })
    return rows


def weights(point: Point, rng: np.random.Generator, dtype: Any) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """Experts [E, D, s] and [E, s, D], a router [D, E], tokens [T, D]."""
    draw = lambda *shape, scale: jnp.asarray(rng.standard_normal(shape, np.float32) * scale, dtype)  # noqa: E731
    E, D, s = point.E, point.D, point.s
    layer = {name: draw(E, D, s, scale=D**-0.5) for name in ("gate", "up")} | {"down": draw(E, s, D, scale=s**-0.5)}
    return layer, draw(D, E, scale=D**-0.5).astype(jnp.float32), draw(point.T, D, scale=1.0)


def preferences(point: Point, routing: str) -> np.ndarray:
    """What is added to the router's scores, [T or 1, E]: `even` loads all experts alike, `zipf` the first the most."""
    if routing == "even":
        first = np.arange(point.T)[:, None] * point.k
        return 1e3 * ((np.arange(point.E) - first) % point.E < point.k)
    if routing == "zipf":
        return -2.0 * np.log(np.arange(1, point.E + 1))[None]
    if routing == "random":
        return np.zeros((1, point.E))
    raise ValueError(f"routing {routing!r} is not even, random or zipf")


def sides(point: Point) -> dict[str, Callable[[Mapping[str, jax.Array], jax.Array], jax.Array]]:
    """Routed layers: (weights with `router` and `bias`, x [T, D]) -> y [T, D]."""

    def routed(w: Mapping[str, jax.Array], x: jax.Array, block: int, implementation: str | None) -> jax.Array:
        scores = jnp.dot(x.astype(jnp.float32), w["router"]) + jax.lax.stop_gradient(w["bias"])
        if block > 1:
            scores = scores.reshape(-1, block, point.E).sum(1)
        chosen, active = jax.lax.top_k(scores, point.k)
        experts = {name: w[name] for name in ("gate", "up", "down")}
        return expert_ffn(experts, x, active, jax.nn.softmax(chosen), block=block, implementation=implementation)

    found = {"token": functools.partial(routed, block=1, implementation=None)}
    if point.T % BLOCK == 0:
        found["block"] = functools.partial(routed, block=BLOCK, implementation=None)
    if jax.default_backend() == "cpu":  # where there are two of our own
        found["token, cpu"] = functools.partial(routed, block=1, implementation="cpu")
    if point.peers:
        found["token, ragged_dot"] = functools.partial(routed, block=1, implementation="xla")
    return found


def dense_layer(point: Point, layer: Mapping[str, jax.Array]) -> tuple[Callable, dict, dict]:
    """The layer of all neurons, and of the first k experts' alone."""

    def whole(w: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
        return dense_ffn(w, x, activation="silu")[0]

    def joined(count: int) -> dict[str, jax.Array]:
        wide = {name: jnp.moveaxis(layer[name][:count], 0, 1).reshape(point.D, -1) for name in ("gate", "up")}
        return wide | {"down": layer["down"][:count].reshape(-1, point.D)}

    return whole, joined(point.E), joined(point.k)


def _program(function: Callable, passed: str, calls: int) -> Callable:
    """`calls` turns of a layer or of its gradient, each fed by the one before."""

    def once(w: Any, x: jax.Array) -> jax.Array:
        if passed == "forward":
            return function(w, x)
        gradient, dx = jax.grad(lambda w, x: (function(w, x).astype(jnp.float32) ** 2).sum(), (0, 1))(w, x)
        if calls == 1:
            return gradient, dx
        # Reads every gradient, so that none is left out.
        return dx + 1e-30 * sum(leaf.sum().astype(dx.dtype) for leaf in jax.tree.leaves(gradient))

    if calls == 1:
        return once
    return lambda w, x: jax.lax.fori_loop(0, calls, lambda _, x: x + (1e-30 * once(w, x)).astype(x.dtype), x)


def _run(compiled: Any, *arguments: Any) -> None:
    jax.block_until_ready(compiled(*arguments))


def _torch_here() -> bool:
    return importlib.util.find_spec("torch") is not None and jax.default_backend() == "cpu"


def torch_loop(point: Point, layer: Mapping[str, jax.Array], router: jax.Array, bias: jax.Array, x: jax.Array,
               passed: str) -> Callable[[], None]:
    """The loop over experts of transformers' eager mixtures, on the same numbers."""
    import torch

    torch.set_num_threads(cores())
    to = lambda a, grad: torch.tensor(np.asarray(a)).requires_grad_(grad)  # noqa: E731
    backward = passed != "forward"
    experts = {name: [to(w, backward) for w in layer[name]] for name in ("gate", "up", "down")}
    weight, shift, tokens = to(router, backward), to(bias, False), to(x, backward)

    def forward() -> Any:
        chosen, active = torch.topk(tokens @ weight + shift, point.k)
        amount = torch.softmax(chosen, -1)
        y = torch.zeros_like(tokens)
        for e in range(point.E):
            row, place = torch.where(active == e)
            if len(row):
                inside = tokens[row]
                hidden = torch.nn.functional.silu(inside @ experts["gate"][e]) * (inside @ experts["up"][e])
                y = y.index_add(0, row, hidden @ experts["down"][e] * amount[row, place, None])
        return y

    def run() -> None:
        if not backward:
            with torch.no_grad():
                forward()
            return
        leaves = [tokens, weight, *(w for ws in experts.values() for w in ws)]
        torch.autograd.grad((forward() ** 2).sum(), leaves, allow_unused=True)

    return run


def draw(rows: list[dict[str, Any]], path: Path) -> Path:
    """A page with speed-up against dense by active share, one figure a pass."""
    from analysis.report import style
    from analysis.report.html import Report

    report = Report("A sparse expert layer", "Speed-up against the dense layer by active share, measured in one run.")
    families = sorted({row["point"].rpartition(",")[0] for row in rows if row["point"].endswith("%")})
    for passed in PASSES:
        report.section(passed, "The grey line is 1 / share, what sparsity could give at most.")
        for family in families:
            figure, axes = style.new_figure(7, 3.4)
            chosen = [row for row in rows if row["point"].startswith(f"{family},") and row["pass"] == passed]
            shares = sorted({row["share"] for row in chosen})
            axes.plot(shares, [1 / share for share in shares], color=style.GRID)
            for side in dict.fromkeys(row["side"] for row in chosen if row["side"] != "dense"):
                points = [(row["share"], row["speed-up"]) for row in chosen if row["side"] == side]
                axes.plot(*zip(*sorted(points), strict=True), marker="o", label=side)
            axes.axhline(1, color=style.GRID)
            axes.set(xlabel="active share", ylabel="times faster than dense", title=family, yscale="log")
            axes.legend()
            keys = ("point", "side", "share", "ms", "speed-up", "of bound")
            report.figure(figure, f"{family}: {passed}.", [{key: row[key] for key in keys} for row in chosen],
                          f"{family}-{passed}")
    report.section("All rows")
    report.table([{key: row.get(key) for key in COLUMNS} for row in rows], None, "Every side at every point.", "rows")
    return report.save(path)
