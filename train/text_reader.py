"""Texts to tokens, and to the states of layers that do not move, for `train.text2tree`."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import jaxmodels
from jaxmodels.errors import UserError
from jaxmodels.esm.config import EsmConfig
from jaxmodels.esm.model import Esm
from jaxmodels.hub.resolve import resolve
from jaxmodels.hub.tokenizer import Tokenizer, load_tokenizer
from jaxmodels.text2tree.encoders import CnnConfig, CnnEncoder, TransformerEncoder, batch_of, chunks_of, pretrained
from train.runtime.files import write_atomic
from train.text2tree_config import OWN, FreshConfig, TextEncoderConfig

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
STORED = np.float16  # of states on disk: half the bytes, and what reads them is trained on just these
BATCH = 64
STEP = 16  # widths of batches are multiples of it, so that few are compiled


@dataclasses.dataclass(frozen=True)
class Reader:
    """tokenizer; encoder: what is trained; pooler: a checkpoint's, or None; lower: the frozen layers, or None."""

    tokenizer: Tokenizer
    encoder: nnx.Module
    pooler: tuple[Any, Any] | None
    lower: nnx.Module | None

    def tokens(self, texts: Sequence[str], length: int, chunks: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """(int32[n, T], bool[n, T]), T at most length; where there may be several chunks a text [n, C, T]."""
        rows = self.tokenizer.encode_batch(texts)
        longest = max(map(len, rows), default=1)
        T = min(length, -(-longest // STEP) * STEP)
        if chunks == 1:
            return batch_of(rows, T)
        needed = -(-(longest - 2) // (T - 2))  # each has a [CLS] and a [SEP] of its own
        return chunks_of(rows, T, min(chunks, max(needed, 1)))

    def inputs(self, texts: Sequence[str], length: int, chunks: int = 1, check: Callable[[], None] = lambda: None
               ) -> dict[str, np.ndarray]:
        """What the trained part reads: tokens int32[n, T], or states float16[n, T, D]; and mask bool[n, T].

        With several chunks a text [n, C, T] each.
        """
        tokens, mask = self.tokens(texts, length, chunks)
        if self.lower is None:
            return {"tokens": tokens, "mask": mask}
        T = mask.shape[-1]
        states = self._states(tokens.reshape(-1, T), mask.reshape(-1, T), check)
        return {"tokens": states.reshape(*mask.shape, -1), "mask": mask}

    def _states(self, tokens: np.ndarray, mask: np.ndarray, check: Callable[[], None]) -> np.ndarray:
        """Of the frozen layers, float16[n, T, D]; 0 where there is no token."""
        graphdef, state = nnx.split(self.lower)
        states = np.zeros((*tokens.shape, self.lower.cfg.d_model), STORED)
        order = np.argsort(mask.sum(1), kind="stable")  # batches of like length, that little is spent on padding
        order = order[np.count_nonzero(~mask.any(1)):]  # without chunks that a text lacks
        batch = min(BATCH, len(order))
        for start in range(0, len(order), batch):
            check()
            here = order[start:start + batch]
            here = np.resize(here, batch)  # one shape for each length; what is there twice is written twice
            width = min(-(-int(mask[here].sum(1).max()) // STEP) * STEP, tokens.shape[1])
            states[here, :width] = _hidden(graphdef, state, tokens[here, :width], mask[here, :width])
        states[~mask] = 0
        return states


def make_reader(cfg: TextEncoderConfig, texts: Sequence[str] | None, seed: int, folder: Path,
                start: Path | None = None) -> Reader:
    """What reads the texts of a run.

    Args:
      texts: those to learn the pieces of a cnn from; they are kept in ``folder``. None: they are there.
      start: of ``fresh``, the folder of the pre-trained encoder, whose pieces are kept in ``folder``. None: they are
        there, and of the encoder there are shapes alone: a finished run has all its weights in model.npz.
    Raises UserError for a model that is not here or is no BERT-like encoder, and for too many frozen layers.
    """
    if cfg.name == "cnn":
        tokenizer = load_tokenizer(folder) if texts is None else kept_pieces(texts, cfg.words, folder)
        options = CnnConfig(tokenizer.vocab_size, filters=cfg.filters, pad_id=0)
        # As wide as what comes out, 300 and 300 by default: label states may begin with the embedding's rows.
        options = dataclasses.replace(options, d_embed=len(options.widths) * cfg.filters)
        return Reader(tokenizer, CnnEncoder(options, rngs=nnx.Rngs(seed)), None, None)
    if cfg.name == "fresh":
        if start is None:
            tokenizer = load_tokenizer(folder)
            options = dataclasses.replace(fresh_config(cfg.fresh, tokenizer), lm_head=False)
            shapes = nnx.eval_shape(lambda: Esm(options, rngs=nnx.Rngs(seed)))  # of weights that are not here
            return Reader(tokenizer, TransformerEncoder(shapes, cfg.pool), None, None)
        tokenizer = load_tokenizer(start)
        _keep(tokenizer, folder)
        return Reader(tokenizer, TransformerEncoder(jaxmodels.load(start, lm_head=False), cfg.pool), None, None)
    tokenizer = load_tokenizer(resolve(cfg.name))
    whole, pooler = pretrained(cfg.name, cfg.pool, seed)
    if not cfg.frozen:
        return Reader(tokenizer, whole, pooler, None)
    if cfg.frozen >= whole.bert.cfg.num_layers:
        raise UserError(f"encoder.frozen={cfg.frozen} must be below the {whole.bert.cfg.num_layers} layers of "
                        f"{cfg.name}")
    lower, upper = whole.split(cfg.frozen)
    return Reader(tokenizer, upper, pooler, lower)


def fresh_config(cfg: FreshConfig, tokenizer: Tokenizer) -> EsmConfig:
    """A transformer with a masked-LM head over the pieces of a tokenizer: pre-norm, rotary positions, so that rows of
    any length can be read."""
    pad, _, cls, sep, mask = map(tokenizer.inner.token_to_id, SPECIAL)
    return EsmConfig(cfg.d_model, cfg.heads, (4 * cfg.d_model,) * cfg.layers, vocab_size=tokenizer.vocab_size,
                     token_dropout=False, contact_head=False, cls_id=cls, pad_id=pad, eos_id=sep, mask_id=mask)


def fingerprint(cfg: TextEncoderConfig) -> str | None:
    """SHA-256 of what a finished run reads from elsewhere: the tokenizer of a pretrained model, and its weights where
    lower layers are frozen (else the run holds them all). None for encoders that the run holds alone."""
    if cfg.name in OWN:
        return None
    path = resolve(cfg.name)
    folder = path if path.is_dir() else path.parent
    weights = (sorted(folder.glob("*.safetensors")) if path.is_dir() else [path]) if cfg.frozen else []
    digest = hashlib.sha256()
    for file in (folder / "tokenizer.json", *weights):
        if file.is_file():  # a GGUF file brings its own tokenizer
            with open(file, "rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def kept_pieces(texts: Sequence[str], words: int, folder: Path) -> Tokenizer:
    """The tokenizer in ``folder``; learned from texts if there is none."""
    if not (folder / "tokenizer.json").exists():
        _keep(learned(texts, words), folder)
    return load_tokenizer(folder)


def _keep(tokenizer: Tokenizer, folder: Path) -> None:
    for name, text in reversed(tokenizer.files().items()):  # tokenizer.json, which tells that they are there, last
        write_atomic(folder / name, lambda file, text=text: file.write(text.encode()))


def learned(texts: Sequence[str], words: int) -> Tokenizer:
    """Lower-cased byte-level pieces (Radford et al. 2019) learned from texts, with BERT's special tokens.

    Not word pieces: those that `tokenizers` learns from the same texts differ from one time to the next.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    inner = tokenizers.Tokenizer(models.BPE())
    inner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    inner.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=words, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    cls, sep = inner.token_to_id("[CLS]"), inner.token_to_id("[SEP]")
    inner.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    return Tokenizer(inner, cls, sep, inner.token_to_id("[PAD]"))


@functools.partial(jax.jit, static_argnums=0)
def _hidden(graphdef: Any, state: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state).forward(tokens, mask, output="hidden")[0]
