"""Held-out proteins that are not near copies of the others: whole families go to one side.

A random split of UniProt entries holds out the fifth strain of a virus whose other four are learned by heart. Here two
proteins are of one family if their sketches, the 20 words of 8 residues with the smallest hashes (MinHash, Broder
1997), have a word in common, or are joined by a chain of such pairs: identities above about 60 %. Remote homologs
remain on both sides; an identity clustering (MMseqs2) would be stricter and is not needed to install this.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

from jaxmodels.esm.alphabet import encode
from train.data.proteins import Protein

WORD, SKETCH = 8, 20
HELD_OUT = 1 / 20  # of families
_SALT = "proteins"
P = TypeVar("P", bound=Protein)


def families(sequences: Iterable[str], word: int = WORD, sketch: int = SKETCH) -> np.ndarray:
    """A family number for each sequence, int[n]; those shorter than a word are families of their own."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    owners, words = [], []
    count = 0
    for count, sequence in enumerate(sequences, 1):
        found = _sketch(sequence, word, sketch)
        owners.append(np.full(len(found), count - 1))
        words.append(found)
    if not count:
        return np.zeros(0, int)
    owner = np.concatenate(owners)
    known, column = np.unique(np.concatenate(words), return_inverse=True)
    size = count + len(known)
    graph = coo_matrix((np.ones(len(owner), np.int8), (owner, count + column)), shape=(size, size))
    return connected_components(graph, directed=False)[1][:count]


def hold_out(proteins: Sequence[P], share: float = HELD_OUT) -> tuple[list[P], list[P]]:
    """(training, validation) proteins, families whole, in the order given.

    A family is held out by a hash of its first sequence in alphabetical order: the same proteins give the same split,
    whatever their order. At least one family is held out of two or more.
    """
    number = families(protein.sequence for protein in proteins)
    first: dict[int, str] = {}
    for family, protein in zip(number.tolist(), proteins, strict=True):
        first[family] = min(first.get(family, protein.sequence), protein.sequence)
    shares = {family: _share(sequence) for family, sequence in first.items()}
    held = {family for family, value in shares.items() if value < share}
    if not held and len(shares) > 1:
        held = {min(shares, key=shares.__getitem__)}
    sides: tuple[list[P], list[P]] = [], []
    for family, protein in zip(number.tolist(), proteins, strict=True):
        sides[family in held].append(protein)
    return sides


def _sketch(sequence: str, word: int, sketch: int) -> np.ndarray:
    """The smallest hashes of the words of a sequence, uint64[at most sketch], sorted."""
    ids = encode(sequence, special=False)[0].astype(np.uint64)
    places = len(ids) - word + 1
    if places < 1:
        return np.zeros(0, np.uint64)
    code = np.zeros(places, np.uint64)
    for offset in range(word):  # 33^8 fits into 64 bits; longer words would wrap, which a hash may
        code = code * np.uint64(33) + ids[offset:offset + places]
    # A multiplicative mix (constants of SplitMix64), so that the smallest are a random choice of words and not those
    # of the first letters of the alphabet.
    code *= np.uint64(0x9E3779B97F4A7C15)
    code ^= code >> np.uint64(29)
    code *= np.uint64(0xBF58476D1CE4E5B9)
    code ^= code >> np.uint64(32)
    return np.unique(code)[:sketch]


def _share(sequence: str) -> float:
    digest = hashlib.blake2b(f"{_SALT}:{sequence}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
