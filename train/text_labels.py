"""The labels of a classifier of texts in its run folder: their tree, so that no later step needs the data again; what
training made of their states; examples of those it does worst on."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxmodels.taps import Taps
from jaxmodels.text2tree.hlr import LabelEmbeddings
from jaxmodels.text2tree.tree import LabelTree
from train import text_metrics

SHARES = ("parent", "itself", "siblings")
EXAMPLE = 300  # characters of a text that are kept


def tree_arrays(tree: LabelTree) -> dict[str, np.ndarray]:
    """What ``classes.npz`` holds. codes, names str[K]: of the classes, and in words; nodes, words str[N] ('' without a
    description), parent, depth int32[N], leaf_index int32[K]: the tree."""
    return {"codes": np.array(tree.classes), "names": np.array([tree.name_of(int(node)) for node in tree.leaf_index]),
            "nodes": np.array(tree.names), "words": np.array([tree.descriptions.get(name, "") for name in tree.names]),
            "parent": tree.parent, "depth": tree.depth, "leaf_index": tree.leaf_index}


def tree_from(arrays: Mapping[str, np.ndarray]) -> LabelTree:
    """The tree that `tree_arrays` has written."""
    names = tuple(arrays["nodes"].tolist())
    described = {name: words for name, words in zip(names, arrays["words"].tolist(), strict=True) if words}
    return LabelTree(names, arrays["parent"], arrays["depth"], arrays["leaf_index"], described)


def label_states(labels: LabelEmbeddings) -> tuple[np.ndarray, np.ndarray]:
    """(the states of the classes float16[K, D]; float32[levels, 3], what part of its attention a node of each level
    gives to its parent, itself and all siblings together, on average)."""
    attended = bool(len(labels.layers))  # start=fixed has no layers
    states, aux = labels(taps=Taps(record=("label.attention",)) if attended else Taps())
    layers = aux["label.attention"] if attended else ()
    shares = [_shares(labels.tree, level, np.asarray(p)) for level, p in enumerate(layers, 1)]
    return np.asarray(states, np.float16), np.array(shares, np.float32).reshape(-1, len(SHARES))


def _shares(tree: LabelTree, level: int, p: np.ndarray) -> tuple[float, float, float]:
    """p: [N, N], or [P, C, C + 1] of families, whose column 0 is the parent (`hlr.Layer`)."""
    if p.ndim == 2:
        nodes = np.flatnonzero(tree.depth == level)
        parent, itself = p[nodes, tree.parent[nodes]], p[nodes, nodes]
    else:
        real = tree.families(level).children >= 0
        parent, itself = p[..., 0][real], np.diagonal(p[..., 1:], axis1=1, axis2=2)[real]
    return float(parent.mean()), float(itself.mean()), float((1 - parent - itself).mean())


def examples(texts: Sequence[str], truth: np.ndarray, said: np.ndarray, codes: Sequence[str]) -> list[dict]:
    """One text for each of the worst codes, one that has the code and was not given it if there is any: code, text (its
    beginning), codes, given. truth, said bool[n, K]. A run folder of private texts is thus as private as they are."""
    found = []
    for code in text_metrics.worst(text_metrics.counts(truth, said)):
        has = np.flatnonzero(truth[:, code])
        i = int(next(iter(has[~said[has, code]]), has[0]))
        short = " ".join(texts[i].split())
        found.append({"code": codes[code], "text": short[:EXAMPLE] + ("..." if len(short) > EXAMPLE else ""),
                      "codes": [codes[k] for k in np.flatnonzero(truth[i])],
                      "given": [codes[k] for k in np.flatnonzero(said[i])]})
    return found
