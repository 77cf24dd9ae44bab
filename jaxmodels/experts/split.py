"""Split a dense feed-forward layer into experts (moe_split.md section 1). An exact decomposition: nothing is lost.

NumPy and SciPy only, so that `split_many` can use processes that never start jax. Weights may be NumPy or jax
arrays, named as in `layer.py`: dense `gate`/`up` [D, F], `down` [F, D]; experts [E, D, s] and [E, s, D].
"""

import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxmodels.errors import UserError
from jaxmodels.experts import _coactivation
from jaxmodels.experts.assign import assign_exact, balanced_kmeans, members_mean, objective, unit_rows

METHODS = ("kmeans", "coactivation", "random", "markers", "importance")
VECTORS = ("gate", "up", "concat")
FORMAT = "jaxmodels.split/1"


@dataclass(frozen=True, eq=False)
class Split:
    """Which neuron went to which expert; enough to redo, undo or reuse a split without the model.

    `labels[perm] == repeat(arange(E), s)`; `perm` ascends inside an expert. The first `num_shared` experts are
    always on. With padding, F counts the zero neurons, which are the last `padded` indices.
    """

    labels: Int[np.ndarray, "F"]
    perm: Int[np.ndarray, "F"]
    centres: Float[np.ndarray, "E D"]  # means of the unit vectors of the members, whatever the method
    objective: float  # sum of squared distances to them: comparable between methods for one `vector`
    method: str
    seed: int
    vector: str = "gate"
    num_shared: int = 0
    padded: int = 0
    representatives: Int[np.ndarray, "R"] | None = None  # method "markers": one neuron per routed expert

    @property
    def num_experts(self) -> int:
        return self.centres.shape[0]

    @property
    def expert_size(self) -> int:
        return self.labels.size // self.num_experts

    def to_arrays(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays and a JSON-able description, to be saved without the model."""
        arrays = {"labels": self.labels, "perm": self.perm, "centres": self.centres}
        if self.representatives is not None:
            arrays["representatives"] = self.representatives
        names = ("objective", "method", "seed", "vector", "num_shared", "padded")
        return arrays, {"format": FORMAT} | {name: getattr(self, name) for name in names}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> "Split":
        """The inverse of `to_arrays`; refuses arrays that do not describe a split."""
        if meta.get("format") != FORMAT:
            raise UserError(f"split format {meta.get('format')!r} is not {FORMAT!r}; save the split again")
        missing = {"labels", "perm", "centres"} - set(arrays)
        if missing:
            raise UserError(f"a saved split lacks {', '.join(sorted(missing))}; save the split again")
        split = cls(**{k: np.asarray(v) for k, v in arrays.items()}, **{k: v for k, v in meta.items() if k != "format"})
        wanted = np.repeat(np.arange(split.num_experts), split.expert_size)
        if not np.array_equal(np.sort(split.perm), np.arange(split.labels.size)) or not np.array_equal(
            split.labels[split.perm], wanted
        ):
            raise UserError("a saved split's perm and labels disagree; the file is damaged, save the split again")
        return split


def split_ffn(
    ffn: Mapping[str, Any],
    *,
    num_experts: int | None = None,
    expert_size: int | None = None,
    method: str = "kmeans",
    activations: Float[Any, "T D"] | None = None,
    importance: Float[Any, "C F"] | None = None,
    seed: int = 0,
    vector: str = "gate",
    num_shared: int = 0,
    pad: bool = False,
    restarts: int = 3,
    activation: str = "silu",
    markers: int = 10,
) -> tuple[dict[str, Any], Split]:
    """Experts and the `Split` that made them, from one dense FFN. Give `num_experts` or `expert_size`.

    - kmeans: balanced k-means on the unit neuron vectors (`vector`: gate, up, or both).
    - coactivation: neurons that fire together (1.2); spectral embedding and balanced k-means.
    - markers: columns of top-`markers` activation markers (1.4), `num_shared` experts of the most active neurons.
    - importance: rows of `importance` are data clusters (1.5); E - num_shared must be a multiple of their number.
    - random: the baseline.

    `activations` (coactivation, markers): inputs x of this FFN, [tokens, D]. `activation` is the model's function.
    Raises UserError for sizes that do not divide (listing those that do; `pad=True` appends zero neurons instead).
    """
    split = find_split(
        ffn,
        num_experts=num_experts,
        expert_size=expert_size,
        method=method,
        activations=activations,
        importance=importance,
        seed=seed,
        vector=vector,
        num_shared=num_shared,
        pad=pad,
        restarts=restarts,
        activation=activation,
        markers=markers,
    )
    return apply_split(ffn, split), split


def find_split(
    ffn: Mapping[str, Any],
    *,
    num_experts: int | None = None,
    expert_size: int | None = None,
    method: str = "kmeans",
    activations: Float[Any, "T D"] | None = None,
    importance: Float[Any, "C F"] | None = None,
    seed: int = 0,
    vector: str = "gate",
    num_shared: int = 0,
    pad: bool = False,
    restarts: int = 3,
    activation: str = "silu",
    markers: int = 10,
) -> Split:
    """The search of `split_ffn` without touching the weights; `down` is not needed."""
    _check_choice("method", method, METHODS)
    _check_choice("vector", vector, VECTORS)
    if seed < 0:
        raise UserError(f"seed = {seed} must be at least 0")
    neurons = ffn["up"].shape[1]
    experts, size = expert_shape(neurons, num_experts, expert_size, pad)
    padded = experts * size - neurons
    if num_shared and method not in ("markers", "importance"):
        raise UserError(f"num_shared = {num_shared} needs method markers or importance, not {method}; set it to 0")
    if not 0 <= num_shared < experts:
        raise UserError(f"num_shared = {num_shared} must lie in 0..{experts - 1} for {experts} experts")
    if method in ("coactivation", "markers"):
        if activations is None:
            raise UserError(f"method {method} needs activations: the inputs of this layer, [tokens, D]")
        activations = np.asarray(activations, np.float32)
        if activations.ndim != 2 or activations.shape[1] != ffn["up"].shape[0] or not len(activations):
            raise UserError(f"activations have shape {activations.shape}; [tokens, {ffn['up'].shape[0]}] is needed")
        if not np.isfinite(activations).all():
            raise UserError("activations contain NaN or infinity; drop those tokens")
    points = unit_rows(np.pad(_neuron_rows(ffn, vector), ((0, padded), (0, 0))))
    if not np.isfinite(points).all():
        raise UserError("the weights contain NaN or infinity; load the checkpoint again")

    representatives = None
    if method == "kmeans":
        labels = balanced_kmeans(points, experts, seed=seed, restarts=restarts).labels
    elif method == "random":
        labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(experts), size))
    elif method == "coactivation":
        graph = _coactivation.adjacency(_coactivation.firing(ffn, activations, activation, markers))
        embedding = np.pad(_coactivation.spectral_embedding(graph, experts), ((0, padded), (0, 0)))
        labels = balanced_kmeans(embedding, experts, seed=seed, restarts=restarts).labels
    elif method == "markers":
        marks = np.pad(_coactivation.marker_matrix(ffn, activations, activation, markers), ((0, 0), (0, padded)))
        labels, representatives = _by_markers(marks, experts, size, num_shared)
    else:
        labels = _by_importance(importance, neurons, experts, size, num_shared)
    labels = labels.astype(np.int32)
    centres = members_mean(points, labels, experts)
    return Split(
        labels=labels,
        perm=np.argsort(labels, kind="stable").astype(np.int32),
        centres=centres.astype(np.float32),
        objective=objective(points, labels, centres),
        method=method,
        seed=seed,
        vector=vector,
        num_shared=num_shared,
        padded=padded,
        representatives=representatives,
    )


def apply_split(ffn: Mapping[str, Any], split: Split) -> dict[str, Any]:
    """Expert weights: columns of gate, up and their biases and rows of down, all taken by the same `perm`."""
    experts, size, total = split.num_experts, split.expert_size, split.labels.size
    if ffn["up"].shape[1] + split.padded != total:
        raise UserError(f"a split of {total - split.padded} neurons does not fit a layer of {ffn['up'].shape[1]}")

    def take(name: str, weight: Any) -> Any:
        if name == "down_bias":
            return weight
        axis = 1 if name in ("gate", "up") else 0
        if split.padded:
            # Through `__array_namespace__`, so that jax arrays stay on their device.
            numpy = weight.__array_namespace__() if hasattr(weight, "__array_namespace__") else np
            tail = list(weight.shape)
            tail[axis] = split.padded
            weight = numpy.concatenate([weight, numpy.zeros(tail, weight.dtype)], axis=axis)
        if axis == 1:
            return weight[:, split.perm].reshape(-1, experts, size).transpose(1, 0, 2)
        return weight[split.perm].reshape(experts, size, *weight.shape[1:])

    return {name: take(name, weight) for name, weight in ffn.items()}


def merge_experts(experts: Mapping[str, Any], split: Split) -> dict[str, Any]:
    """The dense FFN again, bit for bit: the inverse of `apply_split`."""
    inverse = np.argsort(split.perm)[: split.labels.size - split.padded]

    def put(name: str, weight: Any) -> Any:
        if name == "down_bias":
            return weight
        if name in ("gate", "up"):
            return weight.transpose(1, 0, 2).reshape(weight.shape[1], -1)[:, inverse]
        return weight.reshape(split.labels.size, *weight.shape[2:])[inverse]

    return {name: put(name, weight) for name, weight in experts.items()}


def split_many(
    ffns: Sequence[Mapping[str, Any]],
    *,
    activations: Sequence[Float[Any, "T D"]] | None = None,
    importance: Sequence[Float[Any, "C F"]] | None = None,
    seed: int = 0,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> list[tuple[dict[str, Any], Split]]:
    """`split_ffn` for every layer, in parallel processes; layer l has seed + l. Results do not depend on `processes`.

    `activations` and `importance` hold one array a layer. `progress(done, total)` is called after each layer.
    `processes`: None for the processors this process may use, 1 to stay in this process.
    """
    for name, given in (("activations", activations), ("importance", importance)):
        if given is not None and len(given) != len(ffns):
            raise UserError(f"{name} holds {len(given)} layers, the model has {len(ffns)}; give one array a layer")
    # Only what the search reads travels to a worker; the weights are permuted here.
    needed = ("gate", "up", "gate_bias", "up_bias")
    if processes is None:
        processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(processes, len(ffns))

    def job(layer: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        weights = {name: np.asarray(ffns[layer][name]) for name in needed if name in ffns[layer]}
        extra = {} if activations is None else {"activations": np.asarray(activations[layer])}
        extra |= {} if importance is None else {"importance": np.asarray(importance[layer])}
        return weights, options | extra | {"seed": seed + layer}

    splits: list[Split | None] = [None] * len(ffns)

    def done(layer: int, split: Split) -> None:
        splits[layer] = split
        if progress is not None:
            progress(sum(s is not None for s in splits), len(ffns))

    if processes <= 1:
        for layer in range(len(ffns)):
            done(layer, _worker(job(layer)))
    else:
        # Spawned, not forked: a fork of a process with jax's threads may hang. One BLAS thread in each.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context, initializer=_one_thread) as pool:
            futures = {pool.submit(_worker, job(layer)): layer for layer in range(len(ffns))}
            try:
                for future in as_completed(futures):
                    done(futures[future], future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [(apply_split(ffn, split), split) for ffn, split in zip(ffns, splits, strict=True)]


def expert_shape(neurons: int, num_experts: int | None, expert_size: int | None, pad: bool) -> tuple[int, int]:
    """(E, s) for a layer of F neurons, or UserError with the sizes that would do."""
    if (num_experts is None) == (expert_size is None):
        raise UserError("give num_experts or expert_size, one of the two")
    name, value = ("num_experts", num_experts) if expert_size is None else ("expert_size", expert_size)
    if not 1 <= value <= neurons:
        raise UserError(f"{name} = {value} must lie in 1..{neurons}, the number of neurons")
    if neurons % value and not pad:
        divisors = ", ".join(str(n) for n in range(1, neurons + 1) if neurons % n == 0)
        raise UserError(f"{name} = {value} does not divide {neurons} neurons; choose from {divisors}, or set pad=True")
    other = -(-neurons // value)
    return (value, other) if expert_size is None else (other, value)


def _neuron_rows(ffn: Mapping[str, Any], vector: str) -> Float[np.ndarray, "F D"]:
    """The vector that stands for each neuron; a plain FFN has only its input weights, named up."""
    up = np.asarray(ffn["up"], np.float32).T
    if "gate" not in ffn or vector == "up":
        return up
    gate = np.asarray(ffn["gate"], np.float32).T
    return gate if vector == "gate" else np.concatenate([unit_rows(gate), unit_rows(up)], 1) / np.sqrt(2)


def _by_markers(marks: np.ndarray, experts: int, size: int, num_shared: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and representatives by CMoE (arXiv 2502.04416): one exact round from the busiest neurons' columns."""
    busiest = np.argsort(-marks.mean(0), kind="stable")
    labels = np.empty(marks.shape[1], np.int64)
    shared, routed = np.split(busiest, [num_shared * size])
    labels[shared] = np.arange(shared.size) // size
    routed_experts = experts - num_shared
    clusters = balanced_kmeans(
        marks[:, routed].T,
        routed_experts,
        init_centres=marks[:, routed[:routed_experts]].T,
        max_iterations=1,
        normalise=False,
    )
    labels[routed] = clusters.labels + num_shared
    distance = ((marks[:, routed].T - clusters.centres[clusters.labels]) ** 2).sum(1)
    nearest = [np.where(clusters.labels == e, distance, np.inf).argmin() for e in range(routed_experts)]
    return labels, routed[nearest].astype(np.int32)


def _by_importance(importance: Any, neurons: int, experts: int, size: int, num_shared: int) -> np.ndarray:
    """Labels by the importance of neurons to data clusters (LLaMA-MoE, arXiv 2406.16554)."""
    if importance is None:
        raise UserError("method importance needs importance: [data clusters, F] a layer, as "
                        "analysis.statistics.neuron_importance measures it")
    importance = np.asarray(importance, np.float64)
    routed = experts - num_shared
    if importance.ndim != 2 or importance.shape[1] != neurons or not len(importance):
        raise UserError(f"importance has shape {importance.shape}; [data clusters, {neurons}] is needed")
    if routed % len(importance) or not np.isfinite(importance).all() or (importance < 0).any():
        raise UserError(
            f"importance needs finite values >= 0 and a number of clusters ({len(importance)}) that divides "
            f"the {routed} routed experts"
        )
    importance = np.pad(importance, ((0, 0), (0, experts * size - neurons)))
    importance = importance / np.maximum(importance.sum(1, keepdims=True), np.finfo(float).tiny)
    labels = np.empty(experts * size, np.int64)
    shared, rest = np.split(np.argsort(-importance.min(0), kind="stable"), [num_shared * size])
    labels[shared] = np.arange(shared.size) // size
    per_cluster = routed // len(importance)
    owner = assign_exact(-importance[:, rest].T, per_cluster * size)
    for cluster, row in enumerate(importance):
        mine = rest[owner == cluster]
        mine = mine[np.argsort(-row[mine], kind="stable")]
        labels[mine] = num_shared + cluster * per_cluster + np.arange(mine.size) // size
    return labels


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{name} = {value!r} is unknown; choose from {', '.join(choices)}")


def _worker(job: tuple[dict[str, np.ndarray], dict[str, Any]]) -> Split:
    weights, options = job
    return find_split(weights, **options)


def _one_thread() -> None:
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)
