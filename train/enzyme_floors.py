"""What an encoder must beat: the largest class, composition, and the most similar known sequence.

Settings are those that gave the floors recorded with ``enzyme_ec`` (its SOURCE.md); they are fixed, not tuned.
"""

from collections.abc import Sequence

import numpy as np

from jaxmodels.esm.alphabet import STANDARD, encode

FIRST, SIZE = STANDARD[0], len(STANDARD)
WORD = 4
NAMES = ("majority", "logistic", "neighbour")


def majority(labels: np.ndarray, count: int) -> np.ndarray:
    """The commonest class (the first of equals), `count` times."""
    return np.full(count, np.bincount(labels).argmax())


def logistic(known: Sequence[str], labels: np.ndarray, asked: Sequence[str]) -> np.ndarray:
    """Balanced multinomial logistic regression on standardised composition, dipeptides and log length (C = 0.01)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=3000, class_weight="balanced"))
    return model.fit(composition(known), labels).predict(composition(asked))


def composition(sequences: Sequence[str]) -> np.ndarray:
    """Shares of the 20 residues and of the 400 neighbouring pairs, and the log of the length: float64[n, 421]."""
    rows = []
    for sequence in sequences:
        ids = encode(sequence, special=False)[0] - FIRST
        standard = (ids >= 0) & (ids < SIZE)
        pair = standard[:-1] & standard[1:]
        single = np.bincount(ids[standard], minlength=SIZE) / max(len(ids), 1)
        double = np.bincount((ids[:-1] * SIZE + ids[1:])[pair], minlength=SIZE**2) / max(len(ids) - 1, 1)
        rows.append(np.concatenate([single, double, [np.log(max(len(ids), 1))]]))
    return np.stack(rows)


def nearest(known: Sequence[str], asked: Sequence[str], word: int = WORD) -> tuple[np.ndarray, np.ndarray]:
    """(which known sequence is the most similar, int[n]; its `similarity`, float[n]) for each that is asked about; the
    first of equals.
    """
    found = similarity(known, asked, word)
    best = found.argmax(1)
    return best, found[np.arange(len(best)), best]


def similarity(known: Sequence[str], asked: Sequence[str], word: int = WORD) -> np.ndarray:
    """Words of `word` letters in common, over those in either (Jaccard): float32[asked, known]."""
    from scipy.sparse import csr_matrix

    vocabulary: dict[str, int] = {}

    def words(sequences: Sequence[str]) -> tuple[list[int], list[int]]:
        ends, columns = [0], []
        for sequence in sequences:
            found = {sequence[i:i + word] for i in range(len(sequence) - word + 1)}
            columns += [vocabulary.setdefault(one, len(vocabulary)) for one in sorted(found)]
            ends.append(len(columns))
        return ends, columns

    tables = [words(known), words(asked)]
    left, right = (csr_matrix((np.ones(len(columns), np.float32), columns, ends), (len(ends) - 1, len(vocabulary)))
                   for ends, columns in tables)
    sizes = [np.diff(ends).astype(np.float32) for ends, _ in tables]
    common = (right @ left.T).toarray()
    either = sizes[1][:, None] + sizes[0][None] - common
    return np.divide(common, either, out=np.zeros_like(common), where=either > 0)


def floor_predictions(known: Sequence[str], labels: np.ndarray, asked: Sequence[str]) -> dict[str, np.ndarray]:
    """Classes int[n] that each floor predicts, by name."""
    return {"majority": majority(labels, len(asked)), "logistic": logistic(known, labels, asked),
            "neighbour": labels[nearest(known, asked)[0]]}
