"""Whole EC numbers by transfer: a protein gets those of the known protein that it is most like.

The class head knows seven classes; CARE's accuracy by levels and DeepFRI's Fmax and AUPR ask for whole numbers. Two
likenesses, side by side: 4-letter words in common (the floor), and the cosine of the encoder's mean hidden states, less
the mean of the known ones.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.esm.alphabet import CLS, EOS, PAD, encode
from jaxmodels.esm.model import Esm
from train import enzyme_floors, metrics
from train.data.buckets import LENGTHS, bucketed
from train.data.proteins import STRATA, Protein, protein_source


def embed(model: Esm, sequences: Sequence[str], check: Callable[[], None] = lambda: None) -> np.ndarray:
    """Mean final hidden state over the residues of each protein (its first 1022), float32[n, D]."""
    rows = [encode(sequence[:LENGTHS[-1] - 2])[0] for sequence in sequences]
    found = np.zeros((len(rows), model.cfg.d_model), np.float32)
    for batch in bucketed(rows):
        check()
        hidden = np.asarray(model(batch.tokens, output="hidden")[0], np.float32)
        residues = ~np.isin(batch.tokens, (CLS, EOS, PAD))
        mean = np.einsum("btd,bt->bd", hidden, residues) / np.maximum(residues.sum(1, keepdims=True), 1)
        found[batch.index] = mean[:len(batch.index)]
    return found


def cosine(known: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Cosines float32[n, K] of asked [n, D] and known [K, D], both less the mean of the known."""
    centre = known.mean(0)
    left, right = (one - centre for one in (asked, known))
    left, right = (one / np.maximum(np.linalg.norm(one, axis=1, keepdims=True), 1e-12) for one in (left, right))
    return left @ right.T


def transferred(model: Esm, known: Sequence[Protein], check: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """``SET.LIKENESS.METRIC``: level_4 ... level_1 on CARE's sets; fmax and aupr on nrpdb_ec and its strata.

    LIKENESS is neighbour (words) or embedding. Terms that no known protein has are never predicted and count all the
    same. Sets that are not on this machine are left out.
    """
    sets: dict[str, list[Protein]] = {}
    with contextlib.suppress(UserError):
        for protein in protein_source("care_task1").proteins:
            sets.setdefault(f"care_{protein.split}", []).append(protein)
    with contextlib.suppress(UserError):
        chains = protein_source("nrpdb_ec").proteins
        sets |= {"nrpdb": chains} | {f"nrpdb_{stratum}": [p for p in chains if stratum in p.strata]
                                     for stratum in STRATA}
    sequences = list(dict.fromkeys(protein.sequence for one in sets.values() for protein in one))
    if not sequences:
        return {}
    place = {sequence: i for i, sequence in enumerate(sequences)}
    of_known = [protein.sequence for protein in known]
    likeness = {"neighbour": enzyme_floors.similarity(of_known, sequences),
                "embedding": cosine(embed(model, of_known, check), embed(model, sequences, check))}
    results: dict[str, Any] = {}
    for name, members in sets.items():
        rows = [place[protein.sequence] for protein in members]
        for kind, like in likeness.items():
            found = ec_levels(known, members, like[rows]) if name.startswith("care") else \
                ec_terms(known, members, like[rows])
            results |= {f"{name}.{kind}.{metric}": value for metric, value in found.items()}
    return results


def ec_levels(known: Sequence[Protein], asked: Sequence[Protein], like: np.ndarray) -> dict[str, float]:
    """level_1 ... level_4: CARE's k=1 accuracy of the nearest protein's most specific EC number; like [n, K]."""
    guesses = [min(known[i].ec, key=lambda number: number.count("-")) for i in like.argmax(1)]
    truth = [protein.ec for protein in asked]
    return {f"level_{level}": metrics.ec_accuracy(truth, guesses, level) for level in (4, 3, 2, 1)}


def ec_terms(known: Sequence[Protein], asked: Sequence[Protein], like: np.ndarray) -> dict[str, float]:
    """fmax, aupr over EC terms; a term's score is the likeness (at least 0) of the nearest protein that has it."""
    terms = sorted({number for protein in (*known, *asked) for number in protein.ec})
    truth = np.array([[number in protein.ec for number in terms] for protein in asked])
    scores = np.zeros((len(asked), len(terms)), np.float32)
    for column, number in enumerate(terms):
        having = [i for i, protein in enumerate(known) if number in protein.ec]
        if having:
            scores[:, column] = np.maximum(like[:, having].max(1), 0)
    return {"fmax": metrics.fmax(truth, scores)[0], "aupr": metrics.macro_aupr(truth, scores)}
