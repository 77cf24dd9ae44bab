"""The label tree (text2tree.md section 3): ragged, any node may be a class.

Nodes are ordered by depth, then by name; the root is node 0. Depth is explicit, never inferred from dots.
"""

import collections
import csv
import dataclasses
import functools
import gzip
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.text2tree import codes as spelling

if TYPE_CHECKING:
    from scipy.sparse import csr_array

ROOT = "ROOT"


class Masks(NamedTuple):
    """Who may look at whom in one layer (section 4.1): fixed, sibling bool[N, N], row bool[N]."""

    fixed: np.ndarray
    sibling: np.ndarray
    row: np.ndarray


class Families(NamedTuple):
    """The same without N x N: the parents with children at one level, int32[P], and these, int32[P, C], -1 where a
    parent has fewer."""

    parents: np.ndarray
    children: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class LabelTree:
    """names: of the N nodes. parent, depth: int32[N]; the root's are -1 and 0. leaf_index: int32[K], the node of each
    class, in the order of the classes. descriptions: name -> text, of those nodes that have one.

    Equal trees are equal and hash alike, so a tree may be a static part of a model.
    """

    names: tuple[str, ...]
    parent: np.ndarray
    depth: np.ndarray
    leaf_index: np.ndarray
    descriptions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    # Construction

    @classmethod
    def from_codes(cls, codes: Iterable[str], descriptions: Mapping[str, str] | None = None,
                   counts: Mapping[str, int] | None = None) -> "LabelTree":
        """The tree that code strings spell: ``A41.9`` lies below ``A41``, below ``A``, below the root; MeSH likewise.

        The classes are the distinct codes, sorted. counts: how often each occurs, for errors to tell. Raises UserError
        for no code, malformed ones, and ICD-9 codes among ICD-10 codes.
        """
        classes = sorted(set(codes))
        spelling.check(classes, counts)
        parents = {}
        for code in classes:
            path = spelling.path(code)
            parents |= zip(path, [ROOT, *path[:-1]], strict=True)
        return cls.from_table(parents.items(), classes, descriptions)

    @classmethod
    def from_table(cls, rows: Iterable[tuple[str, str | None]], classes: Sequence[str] | None = None,
                   descriptions: Mapping[str, str] | None = None) -> "LabelTree":
        """From (child, parent) rows. The root is the one node without a parent: with an empty one, or without a row.

        classes: names of any nodes, in the order of the head; default: the leaves, sorted. Nodes that lie on no path
        to a class are kept (see `restrict`).
        Raises UserError for two parents of a node, two roots, cycles, and classes that are not in the tree or twice.
        """
        parents: dict[str, str | None] = {}
        for child, parent in rows:
            if child in parents and parents[child] != (parent or None):
                raise UserError(f"{child!r} has two parents, {parents[child]!r} and {parent!r}; remove a row")
            parents[child] = parent or None
        for parent in [p for p in parents.values() if p is not None]:
            parents.setdefault(parent, None)
        names, depth = _order(parents)
        index = {name: i for i, name in enumerate(names)}
        parent = np.array([-1 if parents[name] is None else index[parents[name]] for name in names], np.int32)
        if classes is None:
            inner = set(parents.values())
            classes = sorted(name for name in names if name not in inner)
        return cls(names, parent, depth, _indices(classes, index), dict(descriptions or {}))

    @classmethod
    def from_tsv(cls, path: str | Path, classes: Sequence[str] | None = None) -> "LabelTree":
        """From a tab-separated table with the columns ``code`` and ``parent`` (and ``description``), plain or gzipped;
        see `from_table`."""
        path = Path(path)
        parents, descriptions = [], {}
        for row in _rows(path):
            parents.append((row["code"], row["parent"]))
            descriptions[row["code"]] = row.get("description") or ""
        if not parents:
            raise UserError(f"{path} has no rows; a header with code and parent and one row a node are needed")
        return cls.from_table(parents, classes, descriptions)

    def restrict(self, classes: Sequence[str], counts: Mapping[str, int] | None = None) -> "LabelTree":
        """The sub-tree that some nodes and their ancestors span, with those as classes, in the order given.

        counts: how often each occurs, for the UserError about those that are not in the tree.
        """
        chosen = leaves = _indices(classes, self.index, counts)
        kept = np.zeros(len(self.names), bool)
        while len(leaves):
            kept[leaves] = True
            leaves = self.parent[leaves]
            leaves = leaves[leaves >= 0]
        kept[0] = True
        new = np.cumsum(kept) - 1  # order by depth and name stays
        names = tuple(self.names[i] for i in np.flatnonzero(kept))
        parent = np.where(self.parent[kept] < 0, -1, new[self.parent[kept]]).astype(np.int32)
        described = {name: self.descriptions[name] for name in names if name in self.descriptions}
        return LabelTree(names, parent, self.depth[kept], new[chosen].astype(np.int32), described)

    # What is asked of it

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_classes(self) -> int:
        return len(self.leaf_index)

    @property
    def num_levels(self) -> int:
        """Levels below the root: D."""
        return int(self.depth[-1])

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.names[i] for i in self.leaf_index)

    @functools.cached_property
    def index(self) -> dict[str, int]:
        """name -> node."""
        return {name: i for i, name in enumerate(self.names)}

    @functools.cached_property
    def paths(self) -> np.ndarray:
        """int32[K, D + 1]: the nodes from the root to each class, by depth; -1 below the class."""
        out = np.full((self.num_classes, self.num_levels + 1), -1, np.int32)
        rows, nodes = np.arange(self.num_classes), self.leaf_index
        while len(nodes):
            out[rows, self.depth[nodes]] = nodes
            rows, nodes = rows[self.depth[nodes] > 0], self.parent[nodes[self.depth[nodes] > 0]]
        return out

    def ancestors(self) -> "csr_array":
        """bool[K, N], sparse: the closure, a class and all that lies above it, the root among them."""
        from scipy.sparse import csr_array

        rows, levels = np.nonzero(self.paths >= 0)
        there = (np.ones(len(rows), bool), (rows, self.paths[rows, levels]))
        return csr_array(there, shape=(self.num_classes, len(self)))

    def texts_below(self, labels: np.ndarray) -> np.ndarray:
        """Texts of each node, those of the classes below it among them: int[N]; labels int[n] or {0, 1}[n, K]."""
        from scipy.sparse import csr_array

        closure = self.ancestors().astype(np.int64)
        if labels.ndim == 1:
            return np.bincount(labels, minlength=self.num_classes) @ closure
        return (csr_array(labels).astype(np.int64) @ closure > 0).sum(0)

    def masks(self, level: int) -> Masks:
        """The masks of layer ``level``, 1 to D, dense: for trees of a few thousand nodes."""
        here = self.depth == level
        fixed = np.diag(here)
        fixed[here, self.parent[here]] = True
        fixed[0, 0] |= level == 1
        sibling = here[:, None] & here & (self.parent[:, None] == self.parent) & ~np.eye(len(self), dtype=bool)
        return Masks(fixed, sibling, fixed.any(1) | sibling.any(1))

    def families(self, level: int) -> Families:
        """Who may look at whom in layer ``level``, for trees of any size."""
        nodes = np.flatnonzero(self.depth == level).astype(np.int32)
        nodes = nodes[np.argsort(self.parent[nodes], kind="stable")]
        parents, starts, sizes = np.unique(self.parent[nodes], return_index=True, return_counts=True)
        slots = np.arange(sizes.max())
        children = np.where(slots < sizes[:, None], nodes[np.minimum(starts[:, None] + slots, len(nodes) - 1)], -1)
        return Families(parents.astype(np.int32), children.astype(np.int32))

    def path(self, name: str) -> tuple[str, ...]:
        """The names from below the root to a node."""
        node, out = int(_indices([name], self.index)[0]), []
        while node > 0:
            out.append(self.names[node])
            node = int(self.parent[node])
        return tuple(reversed(out))

    def name_of(self, node: int) -> str:
        """What a node is called in words: its description, or else its code."""
        return self.descriptions.get(self.names[node]) or self.names[node]

    @functools.cached_property
    def _key(self):
        return self.names, self.parent.tobytes(), self.leaf_index.tobytes()

    def __eq__(self, other) -> bool:
        return isinstance(other, LabelTree) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def _order(parents: Mapping[str, str | None]) -> tuple[tuple[str, ...], np.ndarray]:
    """(names by depth and name, depth int32[N]); UserError for two roots, none, and cycles."""
    roots = sorted(name for name, parent in parents.items() if parent is None)
    if len(roots) > 1:
        raise UserError(f"the tree has {len(roots)} roots, {_some(roots)}; give all but one a parent")
    children: dict[str, list[str]] = {name: [] for name in parents}
    for child, parent in parents.items():
        if parent is not None:
            children[parent].append(child)
    levels, level = [], roots
    while level:
        levels.append(sorted(level))
        level = [child for name in level for child in children[name]]
    reached = {name for level in levels for name in level}
    if stray := [name for name in parents if name not in reached]:
        seen, node = [], stray[0]
        while node not in seen:
            seen.append(node)
            node = parents[node]
        cycle = [*seen[seen.index(node):], node]
        raise UserError(f"the tree has a cycle, {' -> '.join(map(repr, cycle[:8]))}; every path must end at the root")
    if not levels:
        raise UserError("the tree has no node; give at least one (child, parent) row")
    depth = np.repeat(np.arange(len(levels)), [len(level) for level in levels]).astype(np.int32)
    return tuple(name for level in levels for name in level), depth


def _indices(classes: Sequence[str], index: Mapping[str, int], counts: Mapping[str, int] | None = None) -> np.ndarray:
    """The nodes of some classes, int32[K]."""
    if not len(classes):
        raise UserError("no class is given; name at least one node of the tree")
    if twice := [name for name, count in collections.Counter(classes).items() if count > 1]:
        raise UserError(f"{_some(twice)} is given as a class twice; name each class once")
    if missing := [name for name in classes if name not in index]:
        raise UserError(f"{len(missing)} of {len(classes)} classes are not in the tree: "
                        f"{spelling.listed(missing, index, counts)}; correct or drop them")
    return np.array([index[name] for name in classes], np.int32)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")


def _rows(path: Path) -> Iterator[dict[str, str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:  # Excel begins with a byte order mark
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            if missing := {"code", "parent"} - set(reader.fieldnames or ()):
                raise UserError(f"{path} has no column {sorted(missing)[0]!r}; it has {reader.fieldnames}")
            yield from reader
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); give a tab-separated file in UTF-8, plain or .gz") from None
