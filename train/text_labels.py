"""The labels of a classifier of texts in its run folder: the tree, so that no later step needs the data again."""

from collections.abc import Mapping

import numpy as np

from jaxmodels.text2tree.tree import LabelTree


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
