"""Hierarchy-aware label representations: cascade attention down the tree (Yan et al. 2023; text2tree.md section 4).

Two forms of one computation. ``dense`` has N x N scores in every layer, as the paper; ``sparse`` has those of each
parent's family only, so that a tree of 47 thousand nodes trains. They agree but for the random numbers of dropout.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.errors import UserError
from jaxmodels.layers import stack
from jaxmodels.layers.linear import linear
from jaxmodels.layers.norms import LayerNorm
from jaxmodels.layers.param import param
from jaxmodels.shapes import Array, Float
from jaxmodels.taps import NO_TAPS, Probe, Taps
from jaxmodels.text2tree._dropout import dropout
from jaxmodels.text2tree.tree import LabelTree

POINTS = ("label.embedding", "label.link", "label.attention")
_CHOICES = {"attention": ("auto", "dense", "sparse", "gcn"), "start": ("random", "label", "fixed")}
_HIDDEN = -10_000.0  # section 4.2: what is added to a score that the mask hides
_DENSE_NODES = 512   # beyond them, N x N costs more than gathering families


@dataclasses.dataclass(frozen=True)
class HlrConfig:
    """d_model: width of the text encoder. attention: ``dense``, ``sparse`` or ``auto`` (by the number of nodes);
    ``gcn`` has none and convolves over the tree in its place, an ablation (`Convolution`).

    start: of the node table. ``random``; ``label``: given rows (the mean word-piece embedding of each label's name);
    ``fixed``: these, frozen, and no attention: the ablation without the tree (section 4.4).
    """

    d_model: int
    dropout: float = 0.1
    attention: str = "auto"
    start: str = "random"
    norm_eps: float = 1e-5

    def __post_init__(self):
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise UserError(f"{field} {getattr(self, field)!r} is not one of {', '.join(choices)}")


class Layer(nnx.Module):
    """One layer of the cascade: nodes of one level look at their parent, themselves and, by learned links, siblings.

    Tap points: ``label.link`` (G) and ``label.attention`` (P): [N, N] if dense; [P, C, C + 1] if sparse, the columns of
    a family being its parent, then its children; such layers cannot be stacked and are recorded one by one.
    """

    def __init__(self, tree: LabelTree, level: int, cfg: HlrConfig, *, rngs: nnx.Rngs):
        self.tree, self.level, self.cfg, D = tree, level, cfg, cfg.d_model
        matrix = functools.partial(_uniform, rngs, (D, D), ("embed", None), D)
        bias = functools.partial(_uniform, rngs, (D,), (None,), D)
        self.query, self.key, self.value, self.link = matrix(), matrix(), matrix(), matrix()
        self.query_bias, self.key_bias, self.value_bias = bias(), bias(), bias()
        self.link_bias = param(rngs, (), (), value=0.01)
        self.norm = LayerNorm(D, eps=cfg.norm_eps, rngs=rngs)

    def __call__(self, nodes: jax.Array, probe: Probe, key: jax.Array | None = None) -> jax.Array:
        """nodes [N, D] -> [N, D], the next level's rows made anew and all rows normalised."""
        return self.norm(self.attend(nodes, probe, key))

    def attend(self, nodes: jax.Array, probe: Probe, key: jax.Array | None = None) -> jax.Array:
        """E' of section 4.2, before the norm: rows of other levels stay as they are."""
        return (self._dense if is_dense(self.tree, self.cfg) else self._sparse)(nodes, probe, key)

    def _dense(self, nodes, probe, key):
        fixed, sibling, row = self.tree.masks(self.level)
        q, k, v = (self._project(nodes, name) for name in ("query", "key", "value"))
        links = probe("label.link", self._links(jnp.matmul(q, self.link[...]) @ k.T))
        p = self._attention(q @ k.T, fixed + links * sibling, probe, key)
        return jnp.where(row[:, None], p @ v, nodes)

    def _sparse(self, nodes, probe, key):
        parents, children = self.tree.families(self.level)
        real, C = children >= 0, children.shape[1]
        own = children[real]
        # every node is projected once, then families are gathered: they are as wide as the largest, half of it padding
        place = np.zeros(children.shape, np.int32)  # of a child among its level's nodes; padding takes any
        place[real] = np.arange(len(own))
        members = np.concatenate([np.arange(len(parents))[:, None], place + len(parents)], axis=1)  # [P, C + 1]
        below, both = nodes[own], nodes[np.concatenate([parents, own])]
        q = self._project(below, "query")
        linked = linear(q, self.link[...])[place]
        q, k, v = q[place], self._project(both, "key")[members], self._project(both, "value")
        links = probe("label.link", self._links(jnp.einsum("pcd,pmd->pcm", linked, k)))
        itself = np.concatenate([np.zeros((C, 1), bool), np.eye(C, dtype=bool)], axis=1)
        fixed = itself | (np.arange(C + 1) == 0)  # the parent is column 0
        sibling = np.concatenate([np.zeros_like(real[:, :1]), real], axis=1)[:, None] & ~itself
        p = self._attention(jnp.einsum("pcd,pmd->pcm", q, k), fixed + links * sibling, probe, key)
        new = jnp.einsum("pcm,pmd->pcd", p, v[members])[real]
        nodes = nodes.at[own].set(new, unique_indices=True)
        if self.level == 1:  # the root looks at itself: softmax over one score is 1
            nodes = nodes.at[0].set(v[0])
        return nodes

    def _project(self, x, name):
        return linear(x, getattr(self, name)[...], getattr(self, f"{name}_bias")[...])

    def _links(self, scores):
        """G: 0 or 1, with the sigmoid's gradient (straight-through)."""
        soft = jax.nn.sigmoid(scores + self.link_bias[...])
        return soft + jax.lax.stop_gradient((soft > 0.5) - soft)

    def _attention(self, scores, mask, probe, key):
        p = jax.nn.softmax(scores * self.cfg.d_model ** -0.5 + _HIDDEN * (1 - mask), axis=-1)
        return dropout(probe("label.attention", p), self.cfg.dropout, key)


class Convolution(nnx.Module):
    """norm(dropout(relu(Â X W + b))), Â = D^-½ (A + I) D^-½ over the edges of the tree (Kipf and Welling 2017, eq. 2).

    Every node hears its parent and its children alike; nothing is learned about who listens to whom.
    """

    def __init__(self, tree: LabelTree, cfg: HlrConfig, *, rngs: nnx.Rngs):
        self.tree, self.cfg, D = tree, cfg, cfg.d_model
        self.weight = _uniform(rngs, (D, D), ("embed", None), D)
        self.bias = _uniform(rngs, (D,), (None,), D)
        self.norm = LayerNorm(D, eps=cfg.norm_eps, rngs=rngs)

    def __call__(self, nodes: jax.Array, probe: Probe, key: jax.Array | None = None) -> jax.Array:
        """nodes [N, D] -> [N, D]; there is nothing to probe inside."""
        parent, child = self.tree.parent[1:], np.arange(1, len(self.tree))
        degree = 1 + np.bincount(parent, minlength=len(self.tree)) + (self.tree.depth > 0)
        scale = jnp.asarray(degree ** -0.5, nodes.dtype)[:, None]
        x = scale * linear(nodes, self.weight[...])
        x = scale * (x.at[child].add(x[parent]).at[parent].add(x[child])) + self.bias[...]
        return self.norm(dropout(jax.nn.relu(x), self.cfg.dropout, key))


class LabelEmbeddings(nnx.Module):
    """The node table and the cascade over it: ``states, aux = labels()`` gives one vector a class."""

    def __init__(self, tree: LabelTree, cfg: HlrConfig, *, start: Any = None, rngs: nnx.Rngs):
        """start: float[N, D], rows of the node table, for ``label`` and ``fixed`` (see `label_rows`)."""
        self.tree, self.cfg, shape = tree, cfg, (len(tree), cfg.d_model)
        if (start is None) != (cfg.start == "random"):
            raise UserError(f"start={cfg.start} {'needs' if start is None else 'takes no'} rows of the node table; give"
                            " label_rows(...) with 'label' and 'fixed' only")
        if start is not None and np.shape(start) != shape:
            raise UserError(f"the node table has shape {np.shape(start)}; give {shape}, one row for each of the "
                            f"{len(tree)} nodes")
        names = (None, "embed")
        if start is None:
            self.nodes = _uniform(rngs, shape, names, cfg.d_model)
        else:
            kind = nnx.Variable if cfg.start == "fixed" else nnx.Param
            self.nodes = kind(jnp.asarray(start, jnp.float32), out_sharding=names, eager_sharding=False)
        levels = () if cfg.start == "fixed" else range(1, tree.num_levels + 1)
        # attention can be looked into and convolutions cannot, so these are no `layers`
        gcn = cfg.attention == "gcn"
        self.layers = nnx.List([] if gcn else [Layer(tree, level, cfg, rngs=rngs) for level in levels])
        self.convolutions = nnx.List([Convolution(tree, cfg, rngs=rngs) for _ in levels] if gcn else [])

    def __call__(self, key: jax.Array | None = None, taps: Taps = NO_TAPS
                 ) -> tuple[Float[Array, "K D"], dict[str, Any]]:
        """(H float32[K, D], aux). key: of dropout; without one there is none.

        aux: ``label.embedding`` [D + 1, N, d], the table and what each layer makes of it; ``label.link`` and
        ``label.attention`` stacked over layers if dense, a tuple of them if sparse.
        """
        nodes, aux = self.cascade(key, taps)
        return nodes[self.tree.leaf_index], aux

    def cascade(self, key: jax.Array | None = None, taps: Taps = NO_TAPS) -> tuple[jax.Array, dict[str, Any]]:
        """(the states of all nodes float32[N, D], aux)."""
        layers = [*self.layers, *self.convolutions]
        N, L = len(self.tree), len(layers)
        table = stack.select(taps, lambda name: name == "label.embedding")
        inner = stack.select(taps, lambda name: name != "label.embedding")
        table.check(POINTS, L + 1)
        inner.check(POINTS[:1] if self.convolutions else POINTS, L)
        keys = [None] * L if key is None else jax.random.split(key, L)
        nodes, probes = self.nodes[...], []
        for i in range(L + 1):
            probes.append(_probe(table, i, N))
            nodes = probes[-1]("label.embedding", nodes)
            if i < L:
                probes.append(_probe(inner, i, N))
                nodes = layers[i](nodes, probes[-1], keys[i])
        names = dict.fromkeys(name for probe in probes for name in probe.out)
        return nodes, {name: _stacked([probe.out[name] for probe in probes if name in probe.out]) for name in names}


def is_dense(tree: LabelTree, cfg: HlrConfig) -> bool:
    return cfg.attention == "dense" or (cfg.attention == "auto" and len(tree) <= _DENSE_NODES)


def label_rows(tree: LabelTree, pieces: list[list[int]], embedding: Any, root: int) -> np.ndarray:
    """Rows of the node table from a text encoder (section 4.4): float32[N, D].

    pieces: word pieces of every node's name (`LabelTree.name_of`), no special tokens; embedding [V, D]: of the pieces;
    root: the piece that the root and names without any piece take, ``[MASK]``.
    """
    table = np.asarray(embedding, np.float32)
    rows = [table[ids].mean(0) if ids and i else table[root] for i, ids in enumerate(pieces)]
    if len(rows) != len(tree):
        raise UserError(f"{len(rows)} names are given for {len(tree)} nodes; give one a node, in the order of the tree")
    return np.stack(rows)


def _uniform(rngs, shape, names, fan_in) -> nnx.Param:
    """Kaiming-uniform with a = √5, which is also torch's default for linear layers and their biases: ± 1/√fan_in."""
    bound = fan_in ** -0.5
    value = jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
    return nnx.Param(value, out_sharding=names, eager_sharding=False)


def _probe(taps: Taps, i: int, nodes: int) -> Probe:
    """Of the i-th entry of some taps."""
    return jax.tree.map(lambda a: a[0], taps.layers(i, i + 1)).probe(jnp.ones(nodes, bool))


def _stacked(values: list[Any]) -> Any:
    try:
        return jax.tree.map(lambda *parts: jnp.stack(parts), *values)
    except (TypeError, ValueError):  # families of other sizes
        return tuple(values)
