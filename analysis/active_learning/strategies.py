"""Strategies by name: from a tagger and a pool to the sentences that are labelled next.

    places = choose("mnlp", tagger, pool, budget=2000)
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from analysis.active_learning import acquisition, selection
from jaxmodels.cnn_cnn_lstm.network import UNK
from jaxmodels.cnn_cnn_lstm.passes import dropout_passes
from jaxmodels.cnn_cnn_lstm.tagger import Tagger

Words = Sequence[str]
Score = Callable[[np.ndarray, np.ndarray], np.ndarray]
VECTORS = ("submod", "k_means_pp", "core_set")  # choose among vectors of sentences
PER_SENTENCE = ("lc", "mnlp", "entropy", "entropy_sum")
# Sentences that are padded together: M x N x T ids of all would not fit, and one of 5,000 words would make all so long.
GROUP = 512
WIDER = 4  # budgets of doubtful sentences among which `submod` looks for representatives


def choose(name: str, tagger: Tagger | None, pool: Sequence[Words], budget: int, *,
           available: np.ndarray | None = None, seed: int = 0, passes: int = 10, overshoot: bool = True,
           check: Callable[[], None] = lambda: None) -> np.ndarray:
    """Places in the pool, int[k], in the order of the choice; the same seed gives the same.

    tagger: may be None for `random`. available bool[N]: what is not labelled yet. check: called before every batch.
    """
    left = np.ones(len(pool), bool) if available is None else np.asarray(available, bool)
    free = np.flatnonzero(left & (np.array([len(words) for words in pool], int) > 0))
    rest = [pool[i] for i in free]
    lengths = np.array([len(words) for words in rest], int)

    def by_score(name: str, budget: int, available: np.ndarray | None = None) -> np.ndarray:
        found = scores(name, tagger, rest, seed=seed, passes=passes, check=check)
        return selection.by_score(found, lengths, budget, seed=seed, overshoot=overshoot, available=available)

    if name not in VECTORS:
        return free[by_score(name, budget)]
    if name == "submod":
        selection.take((), lengths, budget, overshoot=overshoot)  # takes none, but tells of a budget that buys none
        # The most doubtful may be long ones alone, which fit into the wider budget and not into this one.
        doubtful = by_score("mnlp", WIDER * budget, None if overshoot else lengths <= budget)
        return free[selection.facility_location(vectors(tagger, rest), lengths, budget, candidates=doubtful,
                                                overshoot=overshoot)]
    if name == "k_means_pp":
        return free[selection.k_means_pp(vectors(tagger, rest), lengths, budget, seed=seed, overshoot=overshoot)]
    labelled = vectors(tagger, [pool[i] for i in np.flatnonzero(~left)])
    return free[selection.core_set(vectors(tagger, rest), lengths, budget, labelled=labelled, seed=seed,
                                   overshoot=overshoot)]


def scores(name: str, tagger: Tagger | None, sentences: Sequence[Words], *, seed: int = 0, passes: int = 10,
           check: Callable[[], None] = lambda: None) -> np.ndarray:
    """float64[N]; higher: label first."""
    if name == "random":
        return acquisition.random(len(sentences), seed)
    if name in PER_SENTENCE:  # evaluation mode, no dropout
        tagged = tagger.tag(sentences, check=check)
        values = [one.entropy if name.startswith("entropy") else one.log_prob for one in tagged]
    else:
        where, informed = "decoder" if name == "bald_decoder" else "all", name == "bald_mi"
        found = dropout_passes(tagger, sentences, passes, seed=seed, where=where, information=informed, check=check)
        values = [one.information if informed else one.tags.T for one in found]
    parts = [SCORES[name](*padded(values[at:at + GROUP])) for at in range(0, len(values), GROUP)]
    return np.concatenate(parts) if parts else np.zeros(0)


def _passes_first(score: Score) -> Score:
    """For tags [N, T, M]."""
    return lambda tags, mask: score(np.moveaxis(tags, 2, 0), mask)


SCORES: dict[str, Score] = {
    "lc": acquisition.least_confidence, "mnlp": acquisition.mnlp, "entropy": acquisition.token_entropy,
    "entropy_sum": functools.partial(acquisition.token_entropy, mean=False), "bald_mi": acquisition.mean_score,
    "bald": _passes_first(acquisition.bald_vote), "bald_decoder": _passes_first(acquisition.bald_vote),
    "sequence": _passes_first(acquisition.whole_sequence),
}


def vectors(tagger: Tagger, sentences: Sequence[Words]) -> np.ndarray:
    """Mean of the learned embeddings of a sentence's words, float32[N, d_word]; of those that have one."""
    table = np.asarray(tagger.model.words.embed[...], np.float32)
    found = np.zeros((len(sentences), table.shape[1]), np.float32)
    for i, words in enumerate(sentences):
        ids = np.array(tagger.vocabulary.word_ids(words), int)
        known = ids[ids != UNK]
        if len(known):
            found[i] = table[known].mean(0)
    return found


def padded(values: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Arrays [n_i, ...] as one [N, T, ...], zeros where bool[N, T] is False."""
    lengths = np.array([len(one) for one in values], int)
    mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
    first = values[0] if values else np.zeros(0)
    out = np.zeros((*mask.shape, *first.shape[1:]), first.dtype)
    for row, one in zip(out, values, strict=True):
        row[:len(one)] = one
    return out, mask
