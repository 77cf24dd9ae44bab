"""Integrated gradients of every neuron of a model (Sundararajan et al. 2017; on neurons: Dai et al. 2022, eq. 2).

A *site* is one tap point in one layer, with activation h on an example and baseline b. Three paths
(esm_knowledge_neurons.md 4.4), which rank neurons differently:

``site``         one site at a time goes from b to h, everything before it stays, everything after it is computed anew.
                 Complete for every site by itself. Only the layers from the site on are run.
``gate``         all sites together are b + α (h' - b), h' being what they compute from one another: one backward pass a
                 node for all layers. Complete for all sites together.
``conductance``  the embedding goes from its baseline to its value (Dhamdhere et al. 2019): ∫ ∂F/∂h · dh/dα dα.
                 Complete for the residual stream, not for one site inside a layer.

Completeness is checked against the patched forward pass itself, F(site at h) - F(site at b). (captum's delta compares
with F(input) - F(baseline input), although its path changes one module: inside a residual network the two differ by
design, and neither says that the other failed to converge.) Under the zero baseline q = 0 and k = 0 both give uniform
attention, so the totals over ``attention.query`` and ``attention.key`` of a layer are equal: a finding about keys can
only come from how the total spreads.

Everything runs through taps: no hooks, one compilation for all layers, nodes and examples of a shape, memory for one
chunk of nodes whatever their number. Parameters are constants: their gradient is not formed.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array, Int

from jaxmodels.errors import UserError
from jaxmodels.taps import Taps

SITES = {"q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "attention.output",
         "fc1": "ffn.hidden", "fc2": "ffn.output"}  # short names, as reports and golden files use them
RULES = ("gauss", "midpoint", "left", "trapezoid", "end")
MAX_CHUNKS = 256


class Attribution(NamedTuple):
    """What neurons contribute to the target.

    values: [L, B, T, *site], of a list of points a dict of such arrays; without T for tokens="sum". error: how far the
    sum of a path is from the change of the target along it, absolute: [L, B] for `site` and
    `conductance` (of a list, a dict; of conductance it says something for the residual stream only), [B] for `gate`.
    steps: nodes that were used: [L, B], [B] for `gate` and `conductance`. end, start: the target with the example's
    activations, [B], and with the baseline's, shaped as steps. (B is 1 for a target that gives one number.)
    """

    values: Any
    error: Any
    steps: Any
    end: Array
    start: Any


def nodes(rule: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """α and weights of a rule, float64[steps] each; weights sum to 1.

    ``gauss``: Gauss-Legendre. ``left``: 0, 1/n, ... (the original program of Dai et al.). ``trapezoid``: ends halved
    (and, unlike captum's, divided by n - 1). ``end``: α = 1 alone, gradient times activation.
    """
    if rule not in RULES or steps < 1:
        raise UserError(f"rule {rule!r} with {steps} steps: choose from {', '.join(RULES)}, and at least 1 step")
    if rule == "gauss":
        x, w = np.polynomial.legendre.leggauss(steps)
        return (x + 1) / 2, w / 2
    if rule == "end":
        return np.ones(1), np.ones(1)
    if rule == "trapezoid":
        if steps < 2:
            raise UserError("rule trapezoid needs at least 2 steps")
        w = np.full(steps, 1.0)
        w[[0, -1]] = 0.5
        return np.linspace(0, 1, steps), w / (steps - 1)
    return (np.arange(steps) + (0.5 if rule == "midpoint" else 0)) / steps, np.full(steps, 1 / steps)


# Targets: output -> float[B], or one number


def class_probability(labels: Int[Any, "B"]) -> Partial:
    """Softmax probability of each example's class, from logits [B, C]: the F of Dai et al. NaN where there is none.

    Raises UserError, when used, for another number of labels than examples.
    """
    return Partial(_picked_class, jnp.asarray(labels))


def class_logit(labels: Int[Any, "B"]) -> Partial:
    return Partial(_picked_logit, jnp.asarray(labels))


def token_probability(positions: Int[Any, "B"], tokens: Int[Any, "B"]) -> Partial:
    """Softmax probability of a token at a position of each example, from logits [B, T, V]; what stands there is not
    looked at, padding included."""
    return Partial(_picked_token, jnp.asarray(positions), jnp.asarray(tokens))


def _picked_class(labels, logits):
    return _picked_logit(labels, jax.nn.softmax(logits))


def _picked_logit(labels, logits):  # of its own: a functools.partial, made anew in every call, would compile again
    if len(labels) != len(logits):  # take_along_axis would give one label to all
        raise UserError(f"{len(labels)} labels for {len(logits)} examples; give one for each")
    return jnp.take_along_axis(logits, jnp.where(labels < 0, logits.shape[-1], labels)[:, None], -1, mode="fill")[:, 0]


def _picked_token(positions, tokens, logits):
    if len(positions) != len(logits):
        raise UserError(f"{len(positions)} positions for {len(logits)} examples; give one for each")
    row = jnp.where((positions < 0) | (positions >= logits.shape[1]), -1, positions)
    chosen = jnp.take_along_axis(logits, jnp.maximum(row, 0)[:, None, None], 1)[:, 0]
    return jnp.where(row < 0, jnp.nan, _picked_class(tokens, chosen))


# The engine


def integrated_gradients(
    model: nnx.Module,
    inputs: Any,
    *,
    point: str | Sequence[str],
    target: Callable[[Array], Array],
    steps: int = 20,
    rule: str = "gauss",
    mode: Literal["site", "gate", "conductance"] = "site",
    baseline: Literal["zero", "mask", "pad"] | Mapping[str, Any] = "zero",
    tokens: Literal["each", "sum"] = "each",
    counted: Any = None,
    options: Mapping[str, Any] | None = None,
    tolerance: float = 0.01,
    max_steps: int = 80,
    chunk: int | None = None,
    force: bool = False,
) -> Attribution:
    """Attribution of a target to every neuron of a point, or of several, in all layers.

    Args:
      model: any model with ``forward(..., taps=...) -> (output, aux, ...)``.
      inputs: tokens [B, T], or a dict of the arrays that ``forward`` takes. options: of its other arguments.
      point: a tap point, or several (SITES names them). Several are a dict in the result, and one path in `gate`.
      target: output -> a number for each example [B], or one for all. Made once, not in every call, or it compiles
        again; what differs between calls goes through ``jax.tree_util.Partial``, as `class_probability` does.
      steps, rule: see `nodes`. Doubled, up to max_steps, where the error is more than ``tolerance`` of the change.
      baseline: ``zero``; ``mask`` and ``pad``, the activations of the same inputs with every token but the special
        ones masked, or padding; or {point: array} that broadcasts to [L, B, T, *site]: a mean, or what `record` gives
        for other inputs. For `conductance`, {"embedding": ...}.
      tokens: ``each``, or ``sum`` over the ``counted`` tokens (bool[B, T]; default all: padding that the target
        does not read adds 0), which is done inside: [L, B, T, *site] then never exists in `gate`. The error counts all
        tokens.
      chunk: nodes at once; default: by the device's free memory, 3 on CPU.
      force: also for a model that computes in less than float32, whose small gradients completeness needs; and with
        the products of float32 as the device takes them by default (TF32 or bfloat16 passes, on many).

    Raises UserError for points the model lacks, numbers that are not finite (also a target that does not exist), and
    models of less than float32.
    """
    if mode not in ("site", "gate", "conductance"):
        raise UserError(f"mode {mode!r} is not one of site, gate, conductance")
    if tokens not in ("each", "sum"):
        raise UserError(f"tokens {tokens!r} is not each or sum")
    if chunk is not None and chunk < 1:
        raise UserError(f"chunk {chunk} must be at least 1 node")
    if isinstance(baseline, str) and baseline not in ("zero", "mask", "pad"):
        raise UserError(f"baseline {baseline!r} is not zero, mask or pad; give others as {{point: array}}, see "
                        "`record`")
    points = (point,) if isinstance(point, str) else tuple(point)
    rounds = _rounds(rule, steps, max_steps)
    with jax.default_matmul_precision(None if force else "highest"):
        run = _Run(model, inputs, points, target, tokens, counted, dict(options or {}), baseline, force, mode)
        found = {"site": _sites, "gate": _gates, "conductance": _conductances}[mode](run, rounds, tolerance, chunk)
    if isinstance(point, str):
        return Attribution(*(a[point] if isinstance(a, dict) else a for a in found))
    return found


def record(model: nnx.Module, inputs: Any, points: Sequence[str], options: Mapping[str, Any] | None = None
           ) -> dict[str, Array]:
    """The activations [L, B, T, *site] of some inputs, for use as a baseline."""
    graphdef, state = nnx.split(model)
    return _record((graphdef, _static(options)), state, _named(inputs), None, tuple(points))[1]


class _Run:
    """One call: the compiled program's arguments, and the activations of the example."""

    def __init__(self, model, inputs, points, target, tokens, counted, options, baseline, force, mode):
        graphdef, self.state = nnx.split(model)
        _check_precision(model, self.state, force)
        self.program = (graphdef, _static(options))
        self.inputs, self.points, self.tokens = _named(inputs), points, tokens
        self.target = target if isinstance(target, Partial) else Partial(target)
        self.suffix = mode == "site" and len(getattr(model, "groups", ())) == 1
        wanted = [*points, *(["residual"] if self.suffix else []), *(["embedding"] if mode == "conductance" else [])]
        self.end, self.aux = _record(self.program, self.state, self.inputs, self.target, tuple(dict.fromkeys(wanted)))
        self._check_finite()
        self.base = self._baselines(model, baseline, ("embedding",) if mode == "conductance" else points)
        self.counted = None if counted is None or tokens == "each" else jnp.asarray(counted, bool)

    def activation(self, point):
        """[L, B, T, *site]; the embedding has one layer."""
        return _layered(point, self.aux[point])

    def _check_finite(self):
        if not bool(jnp.isfinite(self.end).all()):
            raise UserError(f"the target is {np.asarray(self.end).tolist()}: not finite; does it exist in the output?")
        for point in self.aux:
            good = np.asarray(jnp.isfinite(self.activation(point)).all(tuple(range(1, self.activation(point).ndim))))
            if not good.all():
                raise UserError(f"activations at {point}, layer {int(np.argmin(good))}, are not finite; attribution of "
                                "them would mean nothing")

    def _baselines(self, model, baseline, points):
        if baseline == "zero":
            return {point: jnp.zeros((1,) * self.activation(point).ndim) for point in points}
        if isinstance(baseline, str):
            inputs = self.inputs | _emptied(model, self.inputs, baseline)
            baseline = _record(self.program, self.state, inputs, None, points)[1]
        if missing := [point for point in points if point not in baseline]:
            raise UserError(f"the baseline has no {missing[0]!r}; it has {', '.join(baseline) or 'nothing'}")
        out = {}
        for point in points:
            shape = self.activation(point).shape
            out[point] = jnp.asarray(baseline[point], jnp.float32)
            if not bool(jnp.isfinite(out[point]).all()):
                raise UserError(f"the baseline of {point} is not finite; attribution from there would mean nothing")
            wanted = shape[1:] if point == "embedding" else shape
            try:
                fits = jnp.broadcast_shapes(out[point].shape, wanted) == wanted
            except ValueError:
                fits = False
            if not fits:
                raise UserError(f"the baseline of {point} has shape {out[point].shape}; it must broadcast to {wanted}")
            out[point] = _layered(point, jnp.broadcast_to(out[point], wanted) if point == "embedding" else out[point])
            out[point] = out[point].reshape((1,) * (len(shape) - out[point].ndim) + out[point].shape)
        return out

    def chunk(self, wanted: int | None, compile_one: Callable[[], Any]) -> int:
        """Nodes at once: as many as fit into half of the free memory, by what one takes."""
        if wanted is not None:
            return wanted
        device = jax.devices()[0]
        if device.platform == "cpu":
            return 3  # with the start, 21 nodes are 7 chunks; more at once leave the caches (docs/log.md)
        stats = device.memory_stats() or {}
        free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
        one = compile_one().memory_analysis().temp_size_in_bytes
        return int(min(max(free // 2 // max(one, 1), 1), 16))


def _gates(run: _Run, rounds, tolerance, chunk) -> Attribution:
    def compute(steps):
        arguments = (run.program, run.points, run.tokens, run.state, run.inputs, run.target,
                     {p: run.activation(p) for p in run.points}, run.base, run.counted)
        size = run.chunk(chunk, lambda: _gate.lower(*arguments, *_chunks(steps, 1)).compile())
        return _gate(*arguments, *_chunks(steps, size))

    return Attribution(*_doubled(compute, rounds, tolerance, run.end))


def _conductances(run: _Run, rounds, tolerance, chunk) -> Attribution:
    def compute(steps):
        arguments = (run.program, run.points, run.tokens, run.state, run.inputs, run.target,
                     {p: run.activation(p) for p in run.points}, run.aux["embedding"], run.base["embedding"][0],
                     run.counted)
        size = run.chunk(chunk, lambda: _conductance.lower(*arguments, *_chunks(steps, 1)).compile())
        return _conductance(*arguments, *_chunks(steps, size))

    # No doubling: what a point misses of the whole change is mostly not the rule's fault.
    values, totals, start = compute(rounds[0])
    errors = {p: jnp.abs(total - (run.end - start)) for p, total in totals.items()}
    _check_path(*errors.values())
    return Attribution(values, errors, jnp.full(start.shape, len(rounds[0][0])), run.end, start)


def _sites(run: _Run, rounds, tolerance, chunk) -> Attribution:
    values, errors, used, starts = {}, {}, {}, {}
    for point in run.points:
        h, parts = run.activation(point), []
        for layer in range(len(h)):
            def compute(steps, point=point, layer=layer, h=h):
                suffix = run.suffix and point not in ("embedding", "residual")
                place = "embedding" if point == "embedding" else "suffix" if suffix else len(h)
                arguments = (run.program, point, run.tokens, place, run.state, run.inputs, run.target,
                             jnp.int32(layer), run.aux["residual"][layer] if suffix else None, h[layer],
                             run.base[point][min(layer, len(run.base[point]) - 1)], run.counted)
                size = run.chunk(chunk, lambda: _site.lower(*arguments, *_chunks(steps, 1)).compile())
                return _site(*arguments, *_chunks(steps, size))

            parts.append(_doubled(compute, rounds, tolerance, run.end))
        values[point], errors[point], used[point], _, starts[point] = map(jnp.stack, zip(*parts, strict=True))
    return Attribution(values, errors, used, run.end, starts)


def _doubled(compute, rounds, tolerance, end):
    """(values, error, steps, end, start), of every example the most complete round, up to one complete enough."""
    values, total, start = compute(rounds[0])
    error, steps = jnp.abs(total - (end - start)), jnp.full(end.shape, len(rounds[0][0]))
    _check_path(error)
    for more in rounds[1:]:
        # Of a change that is nothing beside the target itself, a share says nothing.
        poor = error > tolerance * jnp.maximum(jnp.abs(end - start), 1e-3 * jnp.abs(end))
        if not bool(poor.any()):
            break
        again, total, _ = compute(more)
        new = jnp.abs(total - (end - start))
        better = poor & (new < error)
        if len(end) == 1:  # one number for all examples
            values = again if bool(better[0]) else values
        else:
            keep = lambda new, old: jnp.where(_along(better, new, values), new, old)  # noqa: B023, E731
            values = jax.tree.map(keep, again, values)
        error, steps = jnp.where(better, new, error), jnp.where(better, len(more[0]), steps)
    return values, error, steps, end, start


def _check_path(*errors):
    if not all(bool(jnp.isfinite(error).all()) for error in errors):
        raise UserError("the target or its gradients are not finite on the way from the baseline; take another one")


def _along(some, value, values):
    """some [B] beside [L, B, ...] (a dict of points) or [B, ...]."""
    lead = 1 if isinstance(values, dict) else 0
    return some.reshape((1,) * lead + some.shape + (1,) * (value.ndim - lead - 1))


# Compiled programs. `program`: the model's structure and the options of its forward pass.


def _forward(program, state, inputs, taps, **more):
    graphdef, options = program
    return nnx.merge(graphdef, state).forward(**inputs, **dict(options), taps=taps, **more)[:2]


@functools.partial(jax.jit, static_argnums=(0, 4))
def _record(program, state, inputs, target, points):
    output, aux = _forward(program, state, inputs, Taps(record=points))
    return None if target is None else _numbers(target, output), {p: aux[p].astype(jnp.float32) for p in points}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _gate(program, points, tokens, state, inputs, target, h, base, counted, alphas, weights, count):
    lengths = {p: (a.shape[2] if tokens == "each" else 1) for p, a in h.items()}
    gates = {p: jnp.zeros((*a.shape[:2], lengths[p], *a.shape[3:])) for p, a in h.items()}
    rest = {p: jnp.zeros((*a.shape[:2], *(1,) * (a.ndim - 2))) for p, a in h.items()}

    def value(gates, rest, alpha):
        edits = {}
        for p in points:
            arrays = gates[p], rest[p], base[p], jnp.reshape(alpha, (1,)), None if counted is None else counted[None]
            edits[p] = Partial(_gated, *(jax.tree.map(lambda a: a[0], arrays) if p == "embedding" else arrays))
        return _numbers(target, _forward(program, state, inputs, Taps(edit=edits))[0])

    def node(alpha):
        return _with_value(lambda a: value(*a, alpha), (gates, rest))

    start, (values, left) = _accumulate(node, alphas, weights, count)
    total = sum(a.sum((0, *range(2, a.ndim))) for a in values.values())
    if counted is not None:
        total += sum(a.sum((0, *range(2, a.ndim))) for a in left.values())
    if tokens == "sum":
        values = {p: a[:, :, 0] for p, a in values.items()}
    return values, total if len(start) > 1 else total.sum(keepdims=True), start


def _gated(gate, rest, base, alpha, counted, value, mask):
    """base + (α + gate) (value - base), the gates being zeros that are differentiated."""
    gate, base = _fit(gate, value), _fit(base, value)
    if counted is not None:
        gate = jnp.where(counted.reshape(*counted.shape, *(1,) * (value.ndim - 2)), gate, rest)
    return base + (alpha + gate) * (value - base)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _site(program, point, tokens, place, state, inputs, target, layer, x, h, base, counted, alphas, weights, count):
    """place: "suffix" (run from the layer on), "embedding", or how many entries the point has."""
    change = h - base

    def value(path):
        if place == "suffix":
            edit, more = Partial(_replaced, path[None]), {"start": (layer, x)}
        elif place == "embedding":
            edit, more = Partial(_replaced, path), {}
        else:  # the place in the depth is data, so that one program serves all
            edit, more = Partial(functools.partial(_replaced_at, path, layer), jnp.arange(place)), {}
        return _numbers(target, _forward(program, state, inputs, Taps(edit={point: edit}), **more)[0])

    def node(alpha):
        number, slope = _with_value(value, base + alpha * change)
        a = slope * change
        return number, (a if tokens == "each" else _token_sum(a, counted), a.sum(tuple(range(1, a.ndim))))

    start, (values, total) = _accumulate(node, alphas, weights, count)
    return values, total if len(start) > 1 else total.sum(keepdims=True), start


def _replaced(path, value, mask):
    return _fit(path, value)


def _replaced_at(path, layer, here, value, mask):
    return jnp.where(here == layer, _fit(path, value), value)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _conductance(program, points, tokens, state, inputs, target, h, embedding, base, counted, alphas, weights, count):
    zeros = {p: jnp.zeros_like(a) for p, a in h.items()}

    def run(alpha, added):
        path = base + alpha * (embedding - base)
        output, aux = _forward(program, state, inputs,
                               Taps(record=points, edit={"embedding": Partial(_replaced, path)},
                                    add={p: a[0] if p == "embedding" else a for p, a in added.items()}))
        return _numbers(target, output), {p: _layered(p, aux[p]) for p in points}

    def node(alpha):
        # dh/dα, which is the transpose of a transpose: kernels have gradients of their own and no forward mode.
        back = jax.vjp(lambda a: run(a, zeros)[1], alpha)[1]
        slopes = jax.grad(lambda cotangent: back(cotangent)[0])(zeros)
        number, gradients = _with_value(lambda added: run(alpha, added)[0], zeros)
        product = jax.tree.map(jnp.multiply, slopes, gradients)
        totals = jax.tree.map(lambda a: a.sum(tuple(range(2, a.ndim))), product)
        return number, (product if tokens == "each" else
                        jax.tree.map(lambda a: _token_sum(a, counted, lead=1), product), totals)

    start, (values, totals) = _accumulate(node, alphas, weights, count)
    if len(start) == 1:
        totals = jax.tree.map(lambda a: a.sum(1, keepdims=True), totals)
    return values, totals, start


def _with_value(function, arguments):
    """(F [B], gradient of its sum): examples do not meet, so that of the sum is each one's own."""
    def total(arguments):
        numbers = function(arguments)
        return numbers.sum(), numbers

    (_, numbers), gradient = jax.value_and_grad(total, has_aux=True)(arguments)
    return numbers, gradient


def _accumulate(node, alphas, weights, count):
    """(F at α = 0, Σ w · what `node(α)` gives beside F) over the first ``count`` chunks; one chunk is in memory.

    weights [2, chunks, size]: of F, 1 at the node that was added for it, and of the sum. The start costs a node and not
    a program of its own, which would take as long to compile as this one.
    """
    def step(i, total):
        if alphas.shape[1] == 1:  # plain: what vmap would batch stays as the model wrote it
            found = [jax.tree.map(lambda a, w=w: a * w[i, 0], part)
                     for part, w in zip(node(alphas[i, 0]), weights, strict=True)]
        else:
            found = [jax.tree.map(lambda a, w=w: jnp.tensordot(w[i], a, 1), part)
                     for part, w in zip(jax.vmap(node)(alphas[i]), weights, strict=True)]
        return jax.tree.map(jnp.add, total, tuple(found))

    like = jax.eval_shape(node, alphas[0, 0])
    return jax.lax.fori_loop(0, count, step, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like))


def _token_sum(a, counted, lead: int = 0):
    """[*lead, B, T, *site] -> [*lead, B, *site]."""
    if counted is not None:
        a = jnp.where(counted.reshape(*counted.shape, *(1,) * (a.ndim - lead - 2)), a, 0)
    return a.sum(lead + 1)


def _layered(point, a):
    """With a layer axis, which taps do not give the embedding."""
    return a[None] if point == "embedding" else a


def _fit(a, value):
    """Layers of unequal width share one array, as wide as the widest."""
    return a[..., :value.shape[-1]] if a.shape[-1] > value.shape[-1] else a


def _numbers(target, output):
    return jnp.reshape(target(output), -1).astype(jnp.float32)


def _rounds(rule, steps, max_steps):
    rounds = [nodes(rule, steps)]
    while rule != "end" and 2 * len(rounds[-1][0]) <= max_steps:
        rounds.append(nodes(rule, 2 * len(rounds[-1][0])))
    return rounds


def _chunks(steps, size):
    """α float32[MAX_CHUNKS, size], weights float32[2, MAX_CHUNKS, size] for `_accumulate`, unused ones 0, and how many
    chunks count: any number of nodes, one program."""
    alphas, weights = steps
    count = -(-(len(alphas) + 1) // size)
    if count > MAX_CHUNKS:
        raise UserError(f"{len(alphas)} steps in chunks of {size} are more than {MAX_CHUNKS} chunks; raise chunk")
    padded = np.zeros((3, MAX_CHUNKS * size), np.float32)
    padded[1, 0] = 1  # the first node is α = 0
    padded[0, 1:len(alphas) + 1], padded[2, 1:len(alphas) + 1] = alphas, weights
    padded = padded.reshape(3, MAX_CHUNKS, size)
    return padded[0], padded[1:], np.int32(count)


def _named(inputs):
    return dict(inputs) if isinstance(inputs, Mapping) else {"tokens": jnp.asarray(inputs)}


def _emptied(model, inputs, kind):
    """The inputs that say nothing: every token but the special ones is the mask token, or padding that still counts."""
    ids = {name: getattr(model.cfg, f"{name}_id", None) for name in ("cls", "eos", "sep", "pad", "mask")}
    if ids[kind] is None or "tokens" not in inputs:
        raise UserError(f"baseline {kind!r} needs a model with a {kind} token, and tokens as its input; give the "
                        "baseline as {point: array}")
    tokens = jnp.asarray(inputs["tokens"])
    special = jnp.isin(tokens, jnp.array([i for i in (ids["cls"], ids["eos"], ids["sep"], ids["pad"])
                                          if i is not None]))
    there = inputs["mask"] if inputs.get("mask") is not None else tokens != ids["pad"]
    return {"tokens": jnp.where(special, tokens, ids[kind])} | ({"mask": there} if kind == "pad" else {})


def _static(options):
    return tuple(sorted((options or {}).items()))


def _check_precision(model, state, force):
    kinds = {jnp.dtype(a.dtype).name for a in jax.tree.leaves(state) if jnp.issubdtype(a.dtype, jnp.floating)}
    # A part may compute in another type than its weights have, whatever the whole's config says.
    kinds |= {jnp.dtype(getattr(getattr(part, "cfg", None), "dtype", "float32")).name
              for _, part in nnx.iter_modules(model)}
    if (low := sorted(kinds & {"bfloat16", "float16"})) and not force:
        raise UserError(f"the model computes in {low[0]}, which loses the small gradients that completeness needs; "
                        "load it with dtype='float32', or pass force=True")


