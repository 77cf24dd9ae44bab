"""What neurons do on text, folded while the model runs: reductions for ``Taps(reduce=…)``.

Two notions that are easily mixed up, and give different neurons (moe_split.md section 3):
- *positive gate*: the gate is above 0 (what LAPE counts). True for very many neurons; says nothing about size.
- *contribution*: |h_j| · ‖down_j‖₂, the most that neuron j can add to the layer's output; *top mass* counts the
  neurons, or experts, of the highest contribution.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmodels.decoder.model import Decoder
from jaxmodels.experts.models import ffn_layers
from jaxmodels.taps import Taps


def down_norms(model: Decoder) -> Float[Array, "L F"]:
    """‖down_j‖₂ of every neuron of a dense decoder with layers of one width."""
    return jnp.stack([jnp.linalg.norm(ffn["down"].astype(jnp.float32), axis=-1) for ffn in ffn_layers(model)])


def kth_largest(values: Float[Array, "*B F"], k: int) -> Float[Array, "*B 1"]:
    """The k-th largest of non-negative values along the last axis, exactly.

    Found bit by bit from the top: non-negative floats order as their bit patterns do. Thirty-one counts over the row
    are far cheaper than a sort on every backend.
    """
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)

    def step(i, found):
        candidate = found | (1 << (30 - i))
        enough = (bits >= candidate).sum(-1, keepdims=True) >= k
        return jnp.where(enough, candidate, found)

    found = jax.lax.fori_loop(0, 31, step, jnp.zeros((*values.shape[:-1], 1), jnp.int32))
    return jax.lax.bitcast_convert_type(found, jnp.float32)


def top_counts(scores: Float[Array, "B T E"], counted: Bool[Array, "B T"], ks: tuple[int, ...]
               ) -> dict[int, Int[Array, "B E"]]:
    """{k: how many counted tokens have each expert among their k highest}; ties go to the lower index.

    Each sums to k · tokens.
    """
    _, chosen = jax.lax.top_k(scores, max(ks))  # sorted: the first k of them are the top k
    hits = jax.nn.one_hot(chosen, scores.shape[-1], dtype=jnp.int32) * counted[..., None, None]
    return {k: hits[..., :k, :].sum((1, 2)) for k in ks}


def _fold_hidden(options, norms, order, counted, hidden, mask):
    """One layer. norms float[F]; order int[F]: neurons in expert order; counted bool[B, T]."""
    num_experts, expert_ks, neuron_k = options
    counted = counted & mask
    contribution = jnp.abs(hidden.astype(jnp.float32)) * norms
    live = jnp.where(counted[..., None], contribution, 0)
    out = {"sum": live.sum(1), "square": (live * live).sum(1)}
    # A product with the 0/1 matrix of who is in which expert: 2.2 ms on CPU where gathering neurons took 3.4.
    expert_of = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)) // (len(order) // num_experts))
    experts = contribution @ jax.nn.one_hot(expert_of, num_experts, dtype=jnp.float32)
    out |= {f"expert_top_{k}": hits for k, hits in top_counts(experts, counted, expert_ks).items()}
    if neuron_k:
        out["neuron_top"] = ((contribution >= kth_largest(contribution, neuron_k)) & counted[..., None]).sum(
            1, dtype=jnp.int32)
    return out


def _fold_gate(counted, gate, mask):
    return ((gate > 0) & (counted & mask)[..., None]).sum(1, dtype=jnp.int32)


class _Fold:
    """A function with static options that compares by value, so that jit compiles once for all batches."""

    def __init__(self, function, *options):
        self.function, self.options = function, options

    def __call__(self, *args):
        return self.function(self.options, *args)

    def __eq__(self, other):
        return isinstance(other, _Fold) and (self.function, self.options) == (other.function, other.options)

    def __hash__(self):
        return hash((self.function, self.options))


def activity_taps(norms: Float[Array, "L F"], order: Int[Array, "L F"], counted: Bool[Array, "B T"], *,
                  num_experts: int, expert_ks: tuple[int, ...], neuron_k: int = 0) -> Taps:
    """Taps that fold one batch into counts and sums for each row (all tokens of a row are one language).

    Args:
      norms: ``down_norms(model)``. order: the split's ``perm``. counted: tokens to count (not the first positions).
      expert_ks: k of the expert-level top-k counts. neuron_k: the same for single neurons; 0 leaves it out.

    Recorded under ``ffn.hidden``: sum, square: float32[L, B, F], of contributions; expert_top_<k>: int32[L, B, E];
    neuron_top: int32[L, B, F]. Under ``ffn.gate``: int32[L, B, F], positive gates.
    """
    layers = norms.shape[0]
    counted = jnp.broadcast_to(counted, (layers, *counted.shape))
    fold = _Fold(_fold_hidden, num_experts, tuple(expert_ks), neuron_k)
    return Taps(reduce={"ffn.hidden": jax.tree_util.Partial(fold, norms, order, counted),
                        "ffn.gate": jax.tree_util.Partial(_fold_gate, counted)})


def _pick(index, value, mask):
    return value[..., index]


def pick_taps(index: Int[Array, "L M"], point: str = "ffn.hidden") -> Taps:
    """Taps that record M chosen neurons of each layer: ``aux[point]``: [L, B, T, M]."""
    return Taps(reduce={point: jax.tree_util.Partial(_pick, jnp.asarray(index))})


def flatten_activity(aux: Mapping[str, object]) -> dict[str, Array]:
    """The recordings of ``activity_taps`` in one dict; positive gates under ``positive_gate``."""
    return {**aux["ffn.hidden"], "positive_gate": aux["ffn.gate"]}
