"""A byte-level BPE tokenizer of one's own text, on the `tokenizers` package.

Every text comes back exactly: no normaliser, no added space, and a byte that no merge covers is a token itself.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxmodels.errors import UserError
from train.runtime.files import write_atomic

END_OF_TEXT = "<|endoftext|>"
EOS = 0  # its id


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` tokens (fewer if the texts have no more pairs to merge).

    The same texts give the same tokenizer, whatever the number of threads. Id 0 is ``<|endoftext|>``; then the 256
    bytes, then the merges. Raises UserError below 257 tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise UserError(f"vocab_size {vocab_size} is below 257, the 256 bytes and end of text; set it to 257 or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _as_text(tokenizer)


def save(tokenizer: Tokenizer, path: Path) -> Path:
    """Writes tokenizer.json, whole or not at all; any program that reads Hugging Face's files reads it."""
    return write_atomic(path, lambda file: file.write(tokenizer.to_str(pretty=True).encode()))


def load(path: Path) -> Tokenizer:
    """The tokenizer of `save`. Raises UserError if the file is missing, damaged or another kind."""
    try:
        tokenizer = Tokenizer.from_str(path.read_bytes().decode())
    except Exception as error:  # `tokenizers` raises bare Exception
        told = " ".join(str(error).split())
        raise UserError(f"{path} is not a tokenizer ({told}); remove it and it is trained again") from error
    if tokenizer.token_to_id(END_OF_TEXT) != EOS or not isinstance(tokenizer.decoder, decoders.ByteLevel):
        raise UserError(f"{path} is not byte-level with {END_OF_TEXT} as token 0; use one that train.data.bpe made")
    return _as_text(tokenizer)


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of every text, int32 ``[tokens]`` each, without end-of-text; in parallel."""
    rows = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.asarray(row.ids, np.int32) for row in rows]


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """UTF-8 bytes that each token stands for, int32 ``[V]``; 0 for end-of-text, which no byte of the text is."""
    size = tokenizer.get_vocab_size()
    # Byte-level tokens are spelt in an alphabet of 256 characters, one a byte.
    return np.array([0 if i == EOS else len(tokenizer.id_to_token(i)) for i in range(size)], np.int32)


def _as_text(tokenizer: Tokenizer) -> Tokenizer:
    # Source code that mentions <|endoftext|> must not become the token that ends documents. Not stored in the file.
    tokenizer.encode_special_tokens = True
    return tokenizer
