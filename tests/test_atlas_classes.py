"""Expert classes against their definitions, one expert at a time (moe_split.md 4.5)."""

import numpy as np
import pytest

from analysis.atlas import classes as cl

LABELS = ["Romance", "Romance", "Slavic", "Slavic", "Slavic", "Basque", None]
A, L, E = len(LABELS), 5, 40


def profiles(seed=0):
    """Values around 1 with heavy tails, partly by family and partly for all, so that every class occurs."""
    rng = np.random.default_rng(seed)
    everybody = rng.gamma(0.3, 1, (L, E))
    family = {name: rng.gamma(0.3, 1, (L, E)) for name in set(LABELS)}
    f = np.stack([everybody + family[name] + rng.gamma(0.15, 1, (L, E)) for name in LABELS])
    return f / f.mean(-1, keepdims=True)


def kind_of(users, here, labels):
    """The definition for one expert, in words."""
    families = {x: {a for a in here if labels[a] == x} for x in {labels[a] for a in here} - {None}}
    if users == here:
        return "shared", -1
    if len(users) == 1:
        return "language", next(iter(users))
    names = sorted(x for x, members in families.items() if len(members) > 1)
    for index, name in enumerate(names):
        if users == families[name]:
            return "family", index
    return ("other", -1) if users else ("low", -1)


@pytest.mark.parametrize("percentile", cl.PERCENTILES)
@pytest.mark.parametrize("absent", [None, 3])
def test_every_expert_has_its_class(percentile, absent):
    f = profiles()
    if absent is not None:
        f[absent] = 0
    here = {a for a in range(A) if a != absent}
    found = cl.classify(f, LABELS, percentile)
    assert found.threshold == np.percentile(f[sorted(here)], percentile)
    seen = set()
    for layer in range(L):
        for e in range(E):
            users = {a for a in here if f[a, layer, e] >= found.threshold}
            assert set(np.flatnonzero(found.used[:, layer, e])) == users
            kind, owner = kind_of(users, here, LABELS)
            assert cl.CLASSES[found.kind[layer, e]] == kind and found.owner[layer, e] == owner
            seen.add(kind)
    assert seen == set(cl.CLASSES) or percentile > 97, "the test must meet every class"


def test_counts_and_lists():
    f = profiles()
    found = cl.classify(f, LABELS)
    counts = found.counts()
    assert counts.shape == (L, 5) and (counts.sum(1) == E).all()
    lists = [np.argwhere((found.kind == cl.LANGUAGE) & (found.owner == a)) for a in range(A)]
    assert sum(map(len, lists)) == counts[:, cl.LANGUAGE].sum() > 0
    for a, own in enumerate(lists):
        for layer, e in own:
            assert f[a, layer, e] >= found.threshold > np.delete(f, a, 0)[:, layer, e].max()
    assert counts[:, cl.FAMILY].sum() > 0 and found.families == ("Romance", "Slavic")
    by_language = found.by_language()
    assert np.array_equal(by_language.sum(1), found.used.sum((1, 2)))
    assert (by_language[:, cl.SHARED] == counts[:, cl.SHARED].sum()).all()
    assert not by_language[:, cl.LOW].any()
    assert [len(x) for x in lists] == by_language[:, cl.LANGUAGE].tolist()


def test_higher_thresholds_use_fewer_experts():
    tables = cl.sensitivity(profiles(), LABELS)
    assert list(tables) == [90.0, 95.0, 97.5]
    low, middle, high = tables.values()
    assert low.threshold < middle.threshold < high.threshold
    assert (low.used >= middle.used).all() and (middle.used >= high.used).all()
    assert low.counts()[:, cl.LOW].sum() < high.counts()[:, cl.LOW].sum()
    share = middle.used.mean()
    assert share == pytest.approx(0.05, abs=1 / middle.used.size + 1e-9)


def test_everybody_is_stronger_than_family_or_language():
    f = np.zeros((2, 1, 4))
    f[:, 0, 0] = 4
    assert cl.classify(f, ["x", "x"], 75).kind.tolist() == [[cl.SHARED] + [cl.LOW] * 3]
    alone = cl.classify(f[:1], ["x"], 75)
    assert alone.kind[0, 0] == cl.SHARED and alone.owner[0, 0] == -1


def test_no_activity_at_all_is_refused():
    with pytest.raises(ValueError, match="no language"):
        cl.classify(np.zeros((2, 1, 4)), ["x", "y"])
