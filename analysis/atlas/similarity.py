"""How alike languages use the experts: activation frequencies and their comparison (moe_split.md 4.2 and 4.3).

A profile is a language's normalised frequencies over layers and experts, f[a, l, e]; 1 is chance. Languages share
most of their profile (the model's habits), so comparisons are made on profiles *centred* over languages as well.

A language without any token has a profile of zeros: it is left out of means, and correlates 0 with everything.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import entr

Profiles = Float[np.ndarray, "A L E"]
Square = Float[np.ndarray, "A A"]


def frequencies(counts: Int[np.ndarray, "A L E"], tokens: Int[np.ndarray, "A"], k: int, ties: float = 0) -> Profiles:
    """f = F E / k, where F is the share of a language's tokens that have the expert among their k highest.

    Args:
      counts: tokens that have the expert in their top k. tokens: tokens counted, by language.
      ties: share by which counts may exceed k times tokens. Counts of single neurons take everything that equals the
        k-th highest, and two of a million float32 numbers are soon equal; f then still sums to E.
    Raises ValueError unless counts add up to k times tokens in every layer: sum_e F = k, exactly without ties.
    """
    counts, tokens = np.asarray(counts, np.int64), np.asarray(tokens, np.int64)
    total, expected = counts.sum(-1), k * tokens[:, None]
    wrong = (total < expected) | (total > expected * (1 + ties))
    if wrong.any():
        a, layer = np.argwhere(wrong)[0]
        raise ValueError(f"language {a}, layer {layer}: counts add up to {total[a, layer]}, "
                         f"not to k * tokens = {k} * {tokens[a]}; the counts are damaged or k is another")
    return counts / np.maximum(total, 1)[..., None] * counts.shape[-1]


def present(profiles: Float[np.ndarray, "A ..."]) -> np.ndarray:
    """bool[A]: languages with any activity."""
    return profiles.reshape(len(profiles), -1).any(1)


def centre(profiles: Float[np.ndarray, "A ..."]) -> np.ndarray:
    """What sets each language apart: profiles less their mean over the languages that have one."""
    here = present(profiles)
    centred = np.zeros(profiles.shape, np.float64)
    if here.any():
        centred[here] = profiles[here] - profiles[here].mean(0)
    return centred


def _standardise(rows: np.ndarray) -> np.ndarray:
    """Rows [..., N] with mean 0 and length 1, so that their products are Pearson's r; constant rows become 0."""
    rows = rows - rows.mean(-1, keepdims=True)
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    # Round-off of a constant row is not variation.
    return np.where(length > 1e-12 * np.sqrt(rows.shape[-1]), rows / np.where(length > 0, length, 1), 0.0)


def correlation(profiles: Float[np.ndarray, "A ..."]) -> Square:
    """Pearson's r between the languages' whole profiles (all layers in one row)."""
    rows = _standardise(np.asarray(profiles, np.float64).reshape(len(profiles), -1))
    return np.clip(rows @ rows.T, -1, 1)


def correlation_by_layer(profiles: Profiles) -> Float[np.ndarray, "L A A"]:
    """Pearson's r between the languages in every layer."""
    rows = _standardise(np.asarray(profiles, np.float64).swapaxes(0, 1))
    return np.clip(rows @ rows.swapaxes(1, 2), -1, 1)


def divergence(shares: Float[np.ndarray, "A N"]) -> Square:
    """Jensen-Shannon divergence in bits (0 to 1) between rows, each scaled to sum 1; 1 beside a row of zeros."""
    total = shares.sum(1, keepdims=True)
    shares = shares / np.where(total > 0, total, 1)
    out = np.zeros((len(shares), len(shares)))
    for a, p in enumerate(shares):
        # Outside p's own columns the mixture is q / 2, which costs q / 2 bits: only p's columns need logarithms.
        columns = np.flatnonzero(p)
        p, q = p[columns], shares[a:, columns]
        inside = entr((p + q) / 2).sum(1) - (entr(p).sum() + entr(q).sum(1)) / 2
        out[a, a:] = inside / np.log(2) + (1 - q.sum(1)) / 2
    empty = total[:, 0] == 0
    out = np.clip(out + np.triu(out, 1).T, 0, 1)
    out[empty] = out[:, empty] = 1
    np.fill_diagonal(out, 0)
    return out


def jensen_shannon(profiles: Profiles) -> Square:
    """Mean over layers of the Jensen-Shannon divergence of F / k, in bits."""
    # Every layer of a profile sums to E, so the layers side by side are one distribution with layers weighted alike.
    return divergence(profiles.reshape(len(profiles), -1))


def jaccard_top(profiles: Float[np.ndarray, "A ..."], share: float = 0.1) -> Square:
    """Jaccard index of the languages' most frequent experts, the first `share` of all; ties: lower index first."""
    rows = profiles.reshape(len(profiles), -1)
    count = max(1, round(share * rows.shape[1]))
    top = np.zeros(rows.shape, np.float64)
    np.put_along_axis(top, np.argsort(-rows, 1, kind="stable")[:, :count], 1.0, axis=1)
    top *= rows > 0
    both = top @ top.T
    either = top.sum(1)[:, None] + top.sum(1) - both
    return both / np.where(either > 0, either, 1)


class SplitHalf(NamedTuple):
    """Pearson's r between two halves of each language's text; each float[A].

    raw, centred: of profiles as they are, and centred over languages within each half. others_raw, others_centred:
    mean r with the *other* languages' second halves: what the ceiling must stand clear of. floor: 95th percentile of
    the centred r after the second half's expert labels are shuffled within each layer.
    """

    raw: np.ndarray
    centred: np.ndarray
    others_raw: np.ndarray
    others_centred: np.ndarray
    floor: np.ndarray


def split_half(half1: Profiles, half2: Profiles, permutations: int = 200, seed: int = 0) -> SplitHalf:
    """How well the amount of text fixes a profile: the ceiling of every similarity between languages.

    Judge by the centred r (moe_split.md 4.3 asks for 0.96): the raw one is near 1 even with random experts, because
    so is the raw r between languages.
    """
    languages, layers, experts = half1.shape

    def rows(profiles):
        return _standardise(np.asarray(profiles, np.float64).reshape(languages, -1))

    def own_and_others(first, second):
        r = rows(first) @ rows(second).T
        own = np.diagonal(r).copy()
        return own, (r.sum(1) - own) / max(languages - 1, 1)

    raw, others_raw = own_and_others(half1, half2)
    first, second = centre(half1), centre(half2)
    centred, others_centred = own_and_others(first, second)
    rng = np.random.default_rng(seed)
    labels = np.broadcast_to(np.arange(experts), (layers, experts))
    first = rows(first)
    shuffled = [(first * rows(np.take_along_axis(second, rng.permuted(labels, axis=1)[None], 2))).sum(1)
                for _ in range(permutations)]
    return SplitHalf(raw, centred, others_raw, others_centred, np.percentile(shuffled, 95, axis=0))
