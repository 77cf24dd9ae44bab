"""Sentences with tags as rows of one length, several to a row: one shape to compile, and little padding.

A sentence stands between START and END. Between two of them stay as many empty positions as a convolution reaches, so
that none sees its neighbour. Sentences that are longer than a row are cut into nearly equal parts.
"""

from collections.abc import Sequence

import numpy as np

from jaxmodels.cnn_cnn_lstm.network import END, PAD, START
from jaxmodels.cnn_cnn_lstm.schemes import iobes
from jaxmodels.cnn_cnn_lstm.vocabulary import Vocabulary, pieces
from train.data.conll import Sentence
from train.data.packing import pack_whole


def tagged_rows(sentences: Sequence[Sentence], vocabulary: Vocabulary, length: int, gap: int, seed: int = 0
                ) -> dict[str, np.ndarray]:
    """words, tags int32[R, T], chars int32[R, T, M], in an order drawn from `seed`; tags are 0 where no word is.

    gap: empty positions between two sentences, `CnnCnnLstmConfig.reach`.
    """
    words, tags, forms, places = [PAD], [0], [""], []
    for sentence in sentences:
        ids, gold = vocabulary.word_ids(sentence.words), vocabulary.encode_tags(iobes(sentence.tags))
        for start, stop in pieces(len(ids), length - 2):
            places.append(np.arange(len(words), len(words) + stop - start + 2))
            words += [START, *ids[start:stop], END]
            tags += [0, *gold[start:stop], 0]
            forms += ["", *sentence.words[start:stop], ""]
    # What is packed are places in the lists above; a gap goes with each but where it would be at a row's end.
    padded = [np.pad(one, (0, min(gap, length - len(one)))) for one in places]
    rows = pack_whole(padded, length, 0, seed)["tokens"]
    distinct = {form: i for i, form in enumerate(dict.fromkeys(form for form in forms if form))}
    of = np.array([distinct.get(form, len(distinct)) for form in forms])
    chars = vocabulary.char_table(distinct)
    return {"words": np.array(words, np.int32)[rows], "tags": np.array(tags, np.int32)[rows], "chars": chars[of[rows]]}
