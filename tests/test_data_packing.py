"""Packing into rows: nothing lost, nothing mixed, bytes counted."""

import numpy as np
import pytest

from jaxmodels.errors import UserError
from train.data.packing import pack

EOS, VOCABULARY = 0, 50
SIZES = np.concatenate([[0], np.random.default_rng(1).integers(1, 9, VOCABULARY - 1)]).astype(np.int32)


def some_documents(count=40, longest=30, seed=0):
    r = np.random.default_rng(seed)
    return [r.integers(1, VOCABULARY, size).tolist() for size in r.integers(0, longest, count)]


def pieces(packed):
    """Token lists of every segment, row by row."""
    for row, segments in zip(packed["tokens"], packed["segments"], strict=True):
        for number in range(1, segments.max() + 1):
            yield row[segments == number].tolist()


@pytest.mark.parametrize("length", [2, 3, 7, 16, 64, 5000])
def test_every_document_is_there_once(length):
    documents = some_documents()
    packed = pack(documents, length, EOS, SIZES)
    tokens = sum(map(len, documents)) + sum(map(bool, documents))
    assert {name: (a.shape, a.dtype) for name, a in packed.items()} == {
        "tokens": ((-(-tokens // length), length), np.int32),
        "segments": ((-(-tokens // length), length), np.int32),
        "bytes": ((-(-tokens // length),), np.int32),
    }
    found, document = [], []
    for piece in pieces(packed):
        document += piece
        if piece[-1] == EOS:
            found.append(document[:-1])
            document = []
    assert not document and sorted(found) == sorted(filter(None, documents))
    assert found != [one for one in documents if one]  # shuffled

    # padding: at the end of the last row only; segments count up from 1 without a gap
    assert (packed["segments"][:-1] > 0).all() and (packed["segments"] > 0).sum() == tokens
    for segments in packed["segments"]:
        real = segments[segments > 0]
        assert real[0] == 1 and set(np.diff(real)) <= {0, 1} and not segments[len(real) :].any()


@pytest.mark.parametrize("length", [2, 7, 64])
def test_bytes_are_those_of_the_predicted_tokens(length):
    packed = pack(some_documents(), length, EOS, SIZES)
    for row, segments, count in zip(packed["tokens"], packed["segments"], packed["bytes"], strict=True):
        expected = 0
        for t in range(1, length):
            if segments[t] and segments[t] == segments[t - 1]:
                expected += SIZES[row[t]]
        assert count == expected


def test_bytes_against_the_text_itself():
    texts = ["héllo\n", "𝛼", "", "x\ty"]
    documents = [list(text.encode()) for text in texts]  # a token a byte
    sizes = np.ones(257, np.int32)
    sizes[256] = 0
    (count,) = pack(documents, 100, 256, sizes)["bytes"]
    assert count == sum(len(text.encode()) - 1 for text in texts if text)  # the first token has nothing before it


def test_the_order_is_the_seeds():
    one, same, other = (pack(some_documents(), 16, EOS, SIZES, seed)["tokens"] for seed in (3, 3, 4))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_bad_input():
    with pytest.raises(UserError, match="length 1 leaves nothing to predict"):
        pack([[1, 2]], 1, EOS, SIZES)
    with pytest.raises(UserError, match="no document has a token"):
        pack([[], []], 8, EOS, SIZES)
