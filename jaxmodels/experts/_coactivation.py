"""What fires with what: markers, the co-activation graph and its spectral embedding (moe_split.md 1.2, 1.4)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.special
from jaxtyping import Float

from jaxmodels.errors import UserError

ACTIVATIONS = {
    "silu": lambda x: x * scipy.special.expit(x),
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * scipy.special.ndtr(x),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def hidden(ffn: Mapping[str, Any], x: Float[np.ndarray, "T D"], activation: str) -> Float[np.ndarray, "T F"]:
    """h, what multiplies the down projection, in NumPy."""
    if activation not in ACTIVATIONS:
        raise UserError(f"activation {activation!r} is unknown; choose from {', '.join(ACTIVATIONS)}")
    up = x @ np.asarray(ffn["up"], np.float32) + np.asarray(ffn.get("up_bias", 0), np.float32)
    if "gate" not in ffn:
        return ACTIVATIONS[activation](up)
    gate = x @ np.asarray(ffn["gate"], np.float32) + np.asarray(ffn.get("gate_bias", 0), np.float32)
    return ACTIVATIONS[activation](gate) * up


def top_markers(h: Float[np.ndarray, "T F"], count: int) -> Float[np.ndarray, "T F"]:
    """1 where |h| is among the `count` largest of its token, else 0."""
    if not 1 <= count <= h.shape[1]:
        raise UserError(f"markers = {count} must lie in 1..{h.shape[1]}, the number of neurons")
    marks = np.zeros(h.shape, np.float32)
    np.put_along_axis(marks, np.argpartition(-np.abs(h), count - 1, axis=1)[:, :count], 1.0, axis=1)
    return marks


def marker_matrix(ffn: Mapping[str, Any], x: Float[np.ndarray, "T D"], activation: str, count: int) -> np.ndarray:
    """Markers [T, F] of the hidden values of unit inputs and unit weight vectors, without biases (CMoE)."""

    def unit(a: np.ndarray, axis: int) -> np.ndarray:
        norm = np.linalg.norm(a, axis=axis, keepdims=True)
        return a / np.where(norm > 0, norm, 1)

    weights = {name: unit(np.asarray(ffn[name], np.float32), 0) for name in ("gate", "up") if name in ffn}
    return top_markers(hidden(weights, unit(x, 1), activation), count)


def firing(ffn: Mapping[str, Any], x: Float[np.ndarray, "T D"], activation: str, count: int) -> np.ndarray:
    """How strongly each neuron fires [T, F]: h for ReLU; top markers of h where there are no exact zeros."""
    h = hidden(ffn, x, activation)
    return np.maximum(h, 0) if activation == "relu" else top_markers(h, count)


def adjacency(fires: Float[np.ndarray, "T F"], batch: int = 8) -> scipy.sparse.csr_array:
    """Integer edge weights [F, F] of the co-activation graph, no loops (MoEfication, arXiv 2110.01786).

    Every `batch` tokens add min(1, sum_b r_b r_b^T); then the first non-zero decile, times 0.99, is the unit, and
    edges below it go.
    """
    neurons = fires.shape[1]
    total = scipy.sparse.csr_array((neurons, neurons), dtype=np.float32)
    sparse = scipy.sparse.csr_array(fires)
    parts: list[Any] = []
    for start in range(0, fires.shape[0], batch):
        part = sparse[start : start + batch]
        part = (part.T @ part).tocsr()
        part.data = np.minimum(part.data, 1.0)
        parts.append(part)
        if len(parts) == 64:  # adding in bulk: one addition costs as much as the graph is large
            total, parts = total + sum(parts[1:], parts[0]), []
    if parts:
        total = total + sum(parts[1:], parts[0])
    total.setdiag(0)
    total.eliminate_zeros()
    # Percentiles of all F x F entries, most of which are zeros that are not stored.
    zeros = neurons * neurons - total.nnz
    data = np.sort(total.data)
    ranks = [int(np.ceil(tenth * neurons * neurons / 10)) - zeros for tenth in range(1, 11)]
    positive = [data[rank - 1] for rank in ranks if rank > 0 and data.size]
    if not positive:
        raise UserError("no two neurons ever fire together; give more activations or more markers")
    total.data = np.floor(total.data / (0.99 * positive[0]))
    total.eliminate_zeros()
    return total


def spectral_embedding(graph: scipy.sparse.csr_array, num_experts: int) -> Float[np.ndarray, "F V"]:
    """Leading eigenvectors of the normalised Laplacian, 32 to 64 of them; a neuron without edges is a zero row.

    Each is weighted by its eigenvalue of the similarity (a diffusion map): where the graph has fewer communities
    than that, the rest is noise and must not count as much.
    """
    neurons = graph.shape[0]
    degree = np.asarray(graph.sum(1), np.float64).reshape(-1)
    scale = np.where(degree > 0, 1 / np.sqrt(np.maximum(degree, 1e-300)), 0.0)
    count = min(neurons, max(32, min(64, num_experts)))
    similarity = graph.astype(np.float64).toarray() * scale[:, None] * scale
    values, vectors = scipy.linalg.eigh(similarity, subset_by_index=[neurons - count, neurons - 1])
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(count)])
    return np.where(degree[:, None] > 0, vectors * np.maximum(values, 0.0), 0.0)
