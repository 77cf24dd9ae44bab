"""The tile map of the grouped products: the golden table of moe_split.md 6.3, its bound, and what it must cover."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.kernels.grouped_matmul.tilemap import make_visits

GOLDEN = [  # group_sizes, slots, visits (group, tile, first row, last row) to tiles of 8 rows
    ([5, 0, 11, 4], 6, [(0, 0, 0, 4), (2, 0, 5, 7), (2, 1, 8, 15), (3, 2, 16, 19)]),
    ([0, 0, 0, 16], 5, [(3, 0, 0, 7), (3, 1, 8, 15)]),
    ([8, 8, 0, 8], 6, [(0, 0, 0, 7), (1, 1, 8, 15), (3, 2, 16, 23)]),
    ([1] * 8, 8, [(e, 0, e, e) for e in range(8)]),
    ([3, 6, 7], 4, [(0, 0, 0, 2), (1, 0, 3, 7), (1, 1, 8, 8), (2, 1, 9, 15)]),
]


def visits(sizes, rows, size, **which):
    found = make_visits(jnp.asarray(sizes, jnp.int32), rows, size, **which)
    count = int(found.count)
    assert all(array.dtype == jnp.int32 for array in found)
    assert count <= len(found.group) == -(-rows // size) + len(sizes) - 1
    group, tile, first, stop = (np.asarray(array) for array in found[1:])
    assert (stop[count:] == first[count:]).all(), "unused slots hold no rows"
    assert ((tile >= 0) & (tile < -(-rows // size)) & (group >= 0) & (group < len(sizes))).all()
    return list(zip(*(array[:count].tolist() for array in (group, tile, first, stop)), strict=True))


@pytest.mark.parametrize("sizes, slots, expected", GOLDEN)
def test_golden_visits(sizes, slots, expected):
    assert visits(sizes, sum(sizes), 8) == [(e, t, first, last + 1) for e, t, first, last in expected]
    assert len(make_visits(jnp.asarray(sizes, jnp.int32), sum(sizes), 8).group) == slots


def test_tiles_and_groups_without_rows_are_visited_on_request():
    sizes = [5, 0, 11, 4]  # 20 rows of 40
    assert visits(sizes, 40, 8, every_tile=True)[4:] == [(3, 3, 20, 20), (3, 4, 20, 20)]
    assert visits(sizes, 40, 8, every_group=True)[1] == (1, 0, 5, 5)
    assert visits([0, 0], 17, 8, every_tile=True) == [(1, 0, 0, 0), (1, 1, 0, 0), (1, 2, 0, 0)]
    assert visits([0, 0], 17, 8, every_group=True) == [(0, 0, 0, 0), (1, 0, 0, 0)]
    assert visits([0, 0], 17, 8) == []
    with pytest.raises(ValueError, match="more visits than there are slots"):
        make_visits(jnp.array([1]), 8, 8, every_tile=True, every_group=True)


@pytest.mark.parametrize("rows, size", [(24, 8), (29, 8), (29, 5), (3, 8), (1, 1)])
def test_visits_cover_every_row_once_in_order(rows, size):
    rng = np.random.default_rng(0)
    compiled = jax.jit(make_visits, static_argnums=(1, 2), static_argnames=("every_tile", "every_group"))
    patterns = [rng.multinomial(n, p / max(p.sum(), 1)) for p in map(np.array, itertools.product([0, 1], repeat=4))
                for n in (rows, rows // 2) if p.any()]  # fmt: skip
    for sizes in [*patterns[::3], np.zeros(4, int)]:
        owner = np.repeat(np.arange(4), sizes)
        for which in ({}, {"every_tile": True}, {"every_group": True}):
            found = visits(sizes, rows, size, **which)
            again = compiled(jnp.asarray(sizes, jnp.int32), rows, size, **which)
            assert [tuple(int(a[i]) for a in again[1:]) for i in range(int(again.count))] == found
            assert [row for _, _, first, stop in found for row in range(first, stop)] == list(range(sizes.sum()))
            assert all((owner[first:stop] == e).all() for e, _, first, stop in found)
            assert all(first // size == t and (stop - 1) // size == t for _, t, first, stop in found if first < stop)
            # Sorted: blocks that a kernel writes are revisited at once or never.
            assert [t for _, t, _, _ in found] == sorted(t for _, t, _, _ in found)
            assert [e for e, _, _, _ in found] == sorted(e for e, _, _, _ in found)
            if which == {"every_tile": True}:
                assert {t for _, t, _, _ in found} == set(range(-(-rows // size)))
            if which == {"every_group": True}:
                assert {e for e, _, _, _ in found} == set(range(4))
