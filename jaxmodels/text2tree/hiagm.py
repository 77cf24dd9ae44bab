"""A head like HiAGM's: every label node has a state made of the text, passed along the tree with prior weights.

Zhou et al. 2020, "Hierarchy-Aware Global Model for Hierarchical Text Classification" (ACL), its text propagation and
hierarchy-GCN, from memory and not checked against its code (text2tree.md section 10). Unlike there: the width of a node
is 32, not 300, and each node's logit is read from its own state, not from those of all nodes together, which for 2,226
nodes would be more than a billion weights.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.layers.linear import linear
from jaxmodels.layers.param import param
from jaxmodels.text2tree._dropout import dropout
from jaxmodels.text2tree.tree import LabelTree

_WIDTH = 32


def prior(labels: np.ndarray, tree: LabelTree) -> np.ndarray:
    """P(node | its parent), counted on training labels, int[n] or {0, 1}[n, K]: float32[N - 1], all nodes but the root.

    0 below the root, which has no state of its own, and for nodes without a text.
    """
    texts = tree.texts_below(np.asarray(labels))
    above = texts[tree.parent[1:]]
    return np.float32(np.where((tree.parent[1:] > 0) & (above > 0), texts[1:] / np.maximum(above, 1), 0))


class HiagmHead(nnx.Module):
    """v_k = M_k dropout(tanh(h W_p + b_p)); s_k = relu(Σ_d g_kd (m_kd + b_kd)), g_kd = sigmoid(w_d·v_k + c_kd); logits
    w_k·s_k + b_k, of all nodes but the root.

    d: from the parent, m = P(k | parent) v_parent; from the children, m = Σ v_child; from itself, m = v_k. The prior is
    all 1 until it is set (`prior`); it is saved with the weights and not trained.
    """

    def __init__(self, d_model: int, tree: LabelTree, rate: float, *, rngs: nnx.Rngs):
        self.tree, self.rate, D, N, W = tree, rate, d_model, len(tree) - 1, _WIDTH
        self.pooler = param(rngs, (D, D), ("embed", None), std=0.02)
        self.pooler_bias = param(rngs, (D,), (None,), value=0.0)
        self.nodes = param(rngs, (N, W, D), ("vocab", None, "embed"), std=D ** -0.5)
        self.gate = param(rngs, (W, 3), (None, None), std=0.02)
        self.gate_bias = param(rngs, (N, 3), ("vocab", None), value=0.0)
        self.bias = param(rngs, (3, N, W), (None, "vocab", None), value=0.0)
        self.out = param(rngs, (W, N), (None, "vocab"), std=W ** -0.5)
        self.out_bias = param(rngs, (N,), ("vocab",), value=0.0)
        self.prior = nnx.Variable(jnp.ones(N))

    def features(self, h: jax.Array, there: jax.Array | None = None, key: jax.Array | None = None) -> jax.Array:
        """h [B, D] itself; of texts in chunks, [B, C, D] and bool[B, C], their mean."""
        if there is None:
            return h
        return jnp.where(there[..., None], h, 0).sum(1) / jnp.maximum(there.sum(1, keepdims=True), 1)

    def __call__(self, features: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """[P, D] -> float32[P, N - 1]."""
        x = jnp.tanh(linear(features.astype(jnp.float32), self.pooler[...], self.pooler_bias[...]))
        # Nodes first: they are what is cut. Their weights end in d: their gradient comes so, and the optimizer's
        # passes over it and its moments would each transpose it (27 million weights on the ICD phrases).
        v = jnp.einsum("pd,nwd->npw", dropout(x, self.rate, key), self.nodes[...])
        parent = self.tree.parent[1:] - 1
        child = np.flatnonzero(parent >= 0)
        weight = jnp.where(jnp.asarray(parent >= 0), self.prior[...], 0)
        messages = (weight[:, None, None] * v[np.maximum(parent, 0)], jnp.zeros_like(v).at[parent[child]].add(v[child]),
                    v)
        gates = jax.nn.sigmoid(v @ self.gate[...] + self.gate_bias[...][:, None])
        bias = self.bias[...][:, :, None]
        states = jax.nn.relu(sum(gates[..., d, None] * (message + bias[d]) for d, message in enumerate(messages)))
        return jnp.einsum("npw,wn->pn", states, self.out[...]) + self.out_bias[...]
