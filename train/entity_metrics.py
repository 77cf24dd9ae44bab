"""Entity-level precision, recall and F1 (ner_active_learning.md section 7): type and both ends have to be right.

Tags of any scheme and however ill-formed are repaired to IOB2 first, as `jaxmodels.cnn_cnn_lstm.schemes` says, and then
compared: the rule of the CoNLL script on IOB2.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from jaxmodels.cnn_cnn_lstm.schemes import Entity, entities

Tags = Sequence[Sequence[str]]  # of sentences


def entity_scores(truth: Tags, said: Tags) -> dict[str, float]:
    """precision, recall, f1 over all entities; macro_f1 over types; ``TYPE.precision`` ... of each; token_accuracy.

    Types are those of `truth`; what is said of another counts as wrong. 0 where nothing is there to divide by.
    Raises ValueError for sentences of other lengths.
    """
    right, there, found = _counts(truth, said)
    scores = _named("", sum(right.values()), sum(there.values()), sum(found.values()))
    for kind in sorted(there):
        scores |= _named(f"{kind}.", right[kind], there[kind], found[kind])
    f1s = [scores[f"{kind}.f1"] for kind in there]
    scores["macro_f1"] = sum(f1s) / len(f1s) if f1s else 0.0
    same = sum(a == b for one, other in zip(truth, said, strict=True) for a, b in zip(one, other, strict=True))
    scores["token_accuracy"] = same / max(sum(map(len, truth)), 1)
    return scores


def f1(truth: Tags, said: Tags) -> float:
    """Micro F1 alone."""
    right, there, found = map(Counter.total, _counts(truth, said))
    return 2 * right / (there + found) if there + found else 0.0


def f1_interval(truth: Tags, said: Tags, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of micro F1, over `draws` resamplings of the sentences."""
    rows = [(a, b) for one, other in zip(truth, said, strict=True)
            for a, b in [(set(entities(one)), set(entities(other)))] if a or b]  # others change nothing
    if not rows:
        return 0.0, 0.0
    counts = np.array([(2 * len(a & b), len(a) + len(b)) for a, b in rows], float)
    # How often each sentence is drawn of n: Poisson(1) each, which draws n in the mean and needs no array of places.
    r = np.random.default_rng(seed)
    totals = np.stack([r.poisson(1.0, len(rows)) @ counts for _ in range(draws)])
    found = totals[:, 0] / np.maximum(totals[:, 1], 1)
    return tuple(float(end) for end in np.quantile(found, (0.025, 0.975)))


def surface_f1(words: Sequence[Sequence[str]], truth: Tags, said: Tags) -> dict[str, float]:
    """surface_precision, surface_recall, surface_f1 over distinct (text, type): WNUT 2017 (Derczynski et al.)."""
    def forms(tags: Tags) -> set[tuple[str, str]]:
        return {(" ".join(one[e.start:e.stop]), e.type) for one, row in zip(words, tags, strict=True)
                for e in entities(row)}

    a, b = forms(truth), forms(said)
    return _named("surface_", len(a & b), len(a), len(b))


def errors(truth: Sequence[str], said: Sequence[str]) -> list[tuple[str, Entity | None, Entity | None]]:
    """What is wrong in a sentence: (kind, true entity, said entity).

    kind: ``type`` (both ends are right), ``boundary`` (the type is, and they overlap), ``both`` (they overlap),
    ``missed``, ``spurious``. Each entity is in one of them; of several that overlap, the first.
    """
    a, b = entities(truth), entities(said)
    same = set(a) & set(b)
    a, b = [e for e in a if e not in same], [e for e in b if e not in same]
    found: list[tuple[str, Entity | None, Entity | None]] = []
    rules = (("type", lambda x, y: x[:2] == y[:2]),
             ("boundary", lambda x, y: x.type == y.type and x.start < y.stop and y.start < x.stop),
             ("both", lambda x, y: x.start < y.stop and y.start < x.stop))
    for kind, fits in rules:
        for x in list(a):
            y = next((y for y in b if fits(x, y)), None)
            if y is not None:
                found.append((kind, x, y))
                a.remove(x)
                b.remove(y)
    return found + [("missed", x, None) for x in a] + [("spurious", None, y) for y in b]


def _counts(truth: Tags, said: Tags) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Entities by type: right, in the truth, said."""
    right, there, found = Counter(), Counter(), Counter()
    for one, other in zip(truth, said, strict=True):
        if len(one) != len(other):
            raise ValueError(f"a sentence of {len(one)} tags and {len(other)} that are said of it")
        a, b = set(entities(one)), set(entities(other))
        there.update(e.type for e in a)
        found.update(e.type for e in b)
        right.update(e.type for e in a & b)
    return right, there, found


def _named(prefix: str, right: int, there: int, found: int) -> dict[str, float]:
    return {f"{prefix}precision": right / found if found else 0.0, f"{prefix}recall": right / there if there else 0.0,
            f"{prefix}f1": 2 * right / (there + found) if there + found else 0.0}
