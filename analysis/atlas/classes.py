"""Which experts serve everybody, a family, one language, or nobody in particular (moe_split.md 4.5)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from analysis.atlas.similarity import present

CLASSES = ("shared", "family", "language", "other", "low")
SHARED, FAMILY, LANGUAGE, OTHER, LOW = range(5)
PERCENTILES = (90.0, 95.0, 97.5)  # 95 is the definition, the others show how much hangs on it


class Classes(NamedTuple):
    """Experts by who uses them. An expert is *used* by a language where f reaches the threshold.

    used: bool[A, L, E]. kind: int8[L, E], an index of CLASSES: shared (used by every language), family (by all
    members of one family of two or more and by no outsider), language (by exactly one), other, low (by none).
    owner: int32[L, E], the language of a language expert, the family of a family expert (index of `families`), or -1.
    """

    threshold: float
    used: Bool[np.ndarray, "A L E"]
    kind: Int[np.ndarray, "L E"]
    owner: Int[np.ndarray, "L E"]
    families: tuple[str, ...]

    def counts(self) -> Int[np.ndarray, "L 5"]:
        """Experts of each class, by layer; in the order of CLASSES."""
        return np.stack([(self.kind == c).sum(1) for c in range(len(CLASSES))], 1)

    def by_language(self) -> Int[np.ndarray, "A 5"]:
        """How many experts each language uses, by class; the last column (low) is 0."""
        return np.stack([(self.used & (self.kind == c)).sum((1, 2)) for c in range(len(CLASSES))], 1)


def classify(profiles: Float[np.ndarray, "A L E"], labels: Sequence[str | None], percentile: float = 95.0) -> Classes:
    """Classes at the threshold that `percentile` % of all values of f (languages, layers, experts) lie below.

    Languages without any activity are nobody: they take no part in the threshold, nor in "every language".
    """
    here = present(profiles)
    if not here.any():
        raise ValueError("no language has any activity; there is nothing to classify")
    threshold = float(np.percentile(profiles[here], percentile))
    used = (profiles >= threshold) & here[:, None, None]
    users = used.sum(0)
    kind = np.where(users == 0, LOW, OTHER).astype(np.int8)
    owner = np.full(users.shape, -1, np.int32)

    members = {name: [a for a, x in enumerate(labels) if x == name and here[a]] for name in set(labels) - {None}}
    families = tuple(sorted(name for name, who in members.items() if len(who) > 1))
    for index, name in enumerate(families):
        exclusive = used[members[name]].all(0) & (users == len(members[name]))
        kind[exclusive], owner[exclusive] = FAMILY, index
    single = users == 1
    kind[single], owner[single] = LANGUAGE, used.argmax(0)[single]
    # Last: with one family, or one language, "everybody" is the stronger statement.
    everybody = users == here.sum()
    kind[everybody], owner[everybody] = SHARED, -1
    return Classes(threshold, used, kind, owner, families)


def sensitivity(profiles: Float[np.ndarray, "A L E"], labels: Sequence[str | None],
                percentiles: Sequence[float] = PERCENTILES) -> dict[float, Classes]:
    """The classes at several thresholds."""
    return {p: classify(profiles, labels, p) for p in percentiles}
