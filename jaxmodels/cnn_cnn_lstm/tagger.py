"""A tagger that is ready for use: network, vocabulary, and how text is cut; in a folder of safetensors and JSON.

    tagger = Tagger.load("run/model")
    for sentence in tagger.annotate("Aspirin helps against headache."):
        for entity in sentence.entities: print(entity.start, entity.stop, entity.type, entity.text, entity.confidence)
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.cnn_cnn_lstm import schemes, tokens
from jaxmodels.cnn_cnn_lstm.config import CnnCnnLstmConfig
from jaxmodels.cnn_cnn_lstm.network import END, PAD, START, CnnCnnLstm, Decoded, is_word
from jaxmodels.cnn_cnn_lstm.vocabulary import Vocabulary, pieces
from jaxmodels.errors import UserError

LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128)  # positions of rows, START and END included: one compiled shape each
BATCH, FEW = 1024, 256  # positions of a batch, which fits the caches of a core; where there is little to tag
FORMS = 512  # distinct words whose characters are read at once
KIND = "cnn_cnn_lstm"  # model_type in config.json
FILE = "vocabulary.json"
LAYERS = 1000  # that a folder may ask for: each costs memory before the weights are looked at


class Tagged(NamedTuple):
    """A sentence's tags IOB2; log_prob float32[n] of each word's tag, of a CRF the log of the marginal; entropy
    float32[n] of the same distributions; total: log P of all tags together."""

    tags: list[str]
    log_prob: np.ndarray
    entropy: np.ndarray
    total: float


class Found(NamedTuple):
    """An entity in a text: text[start:stop]. confidence: that its type and both ends are right."""

    start: int
    stop: int
    type: str
    text: str
    confidence: float


class Annotated(NamedTuple):
    """A sentence of a text and what is in it. confidence: that every tag of it is right."""

    start: int
    stop: int
    words: list[tokens.Word]
    entities: list[Found]
    confidence: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """From the model's own probabilities to confidences: σ(logit(p) · scale + shift), (scale, shift) fitted on dev.

    scale is one over the temperature of Guo et al. 2017 (arXiv 1706.04599); shift is Platt's (1999).
    """

    entity: tuple[float, float] = (1.0, 0.0)
    sentence: tuple[float, float] = (1.0, 0.0)


def confidence(log_prob: np.ndarray | float, fitted: tuple[float, float] = (1.0, 0.0)) -> Any:
    """Of what has this log-probability, float64 of its shape."""
    low = np.minimum(np.asarray(log_prob, float), -1e-12)  # logit(1) is infinite
    scale, shift = fitted
    return 1 / (1 + np.exp(-np.clip((low - np.log(-np.expm1(low))) * scale + shift, -500, 500)))


class Tagger:
    """joins: where words go on, see `tokens`; calibration: of confidences."""

    def __init__(self, model: CnnCnnLstm, vocabulary: Vocabulary, joins: Sequence[str] = tokens.PLAIN,
                 calibration: Calibration = Calibration()):
        sizes = vocabulary.sizes
        if wrong := next((name for name, size in sizes.items() if getattr(model.cfg, name) != size), None):
            raise UserError(f"the model has {getattr(model.cfg, wrong)} {wrong}, the vocabulary {sizes[wrong]}; they "
                            "do not belong together")
        self.model, self.vocabulary, self.joins, self.calibration = model, vocabulary, tuple(joins), calibration
        self.pattern = tokens.pattern_of(self.joins)
        graphdef, state = nnx.split(model)
        self._split = _Static(graphdef), state

    # Use

    def annotate(self, text: str, beam: int = 1, votes: int = 0) -> list[Annotated]:
        """Sentences of a text with their entities.

        votes: an entity's confidence is the share of so many passes with dropout that find it too; 0: it is made of
        the probabilities of its tags, and calibrated.
        """
        return self.annotate_all([text], beam, votes)[0]

    def annotate_all(self, texts: Sequence[str], beam: int = 1, votes: int = 0) -> list[list[Annotated]]:
        """The same for many texts, whose sentences share batches."""
        from jaxmodels.cnn_cnn_lstm.passes import entity_votes

        cut = [tokens.sentences_of(text, self.pattern) for text in texts]
        words = [[word.text for word in sentence] for text in cut for sentence in text]
        tagged = self.tag(words, beam)
        said = [schemes.entities(one.tags) for one in tagged]
        sure = entity_votes(self, words, said, votes) if votes else [
            [self.entity_confidence(one, entity) for entity in found] for one, found in zip(tagged, said, strict=True)]
        found = zip(tagged, said, sure, strict=True)
        return [[self._annotated(text, sentence, *next(found)) for sentence in sentences]
                for text, sentences in zip(texts, cut, strict=True)]

    def tag(self, sentences: Sequence[Sequence[str]], beam: int = 1, check: Callable[[], None] = lambda: None
            ) -> list[Tagged]:
        """Tags of sentences of words, in their order. Sentences longer than the longest bucket are tagged in parts.

        check: called before every batch.
        """
        if beam < 1:
            raise UserError(f"beam={beam} must be at least 1")
        names, ids = self.vocabulary.tags, [np.zeros(len(words), int) for words in sentences]
        numbers = [np.zeros((2, len(words)), np.float32) for words in sentences]
        totals = np.zeros(len(sentences))
        waiting: list[tuple[list[tuple[int, int, int]], Decoded]] = []

        def read(parts: list[tuple[int, int, int]], decoded: Decoded) -> None:
            tags, log_prob, entropy, total = map(np.asarray, decoded[:4])
            for row, (i, start, stop) in enumerate(parts):
                inside = slice(1, 1 + stop - start)
                ids[i][start:stop] = tags[row, inside]
                numbers[i][:, start:stop] = log_prob[row, inside], entropy[row, inside]
                totals[i] += total[row]

        for batch in self.batches(sentences):
            check()
            waiting.append((batch.parts, _decode(*self._split, batch.words, batch.vectors, beam)))
            if len(waiting) > 1:  # read one batch late, so that the device does not wait for Python
                read(*waiting.pop(0))
        for parts, decoded in waiting:
            read(parts, decoded)
        return [Tagged(schemes.iob2([names[k] for k in here.tolist()]), *both, float(total))
                for here, both, total in zip(ids, numbers, totals, strict=True)]

    def batches(self, sentences: Sequence[Sequence[str]], lengths: Sequence[int] = LENGTHS, positions: int | None = None
                ) -> Iterator["Batch"]:
        """Sentences of like length together, short ones first; empty sentences are in none.

        All batches of a length have one shape, so that each is compiled once: what is missing is padding. The
        characters of every distinct word are read once, not at every place. positions: of a batch.
        """
        if positions is None:
            positions = BATCH if sum(map(len, sentences)) > BATCH else FEW
        parts = [(i, start, stop) for i, words in enumerate(sentences) if len(words)
                 for start, stop in pieces(len(words), lengths[-1] - 2)]
        sizes = np.array([stop - start + 2 for _, start, stop in parts], int)
        order, bucket = np.argsort(sizes, kind="stable"), np.searchsorted(lengths, np.sort(sizes))
        places: dict[str, int] = {}  # of every distinct word: what is asked once a word is asked of these
        flat = np.array([places.setdefault(word, len(places)) for words in sentences for word in words], np.int32)
        begins = np.cumsum([0, *map(len, sentences)])
        ids = np.array(self.vocabulary.word_ids(list(places)), np.int32)
        table = self.vocabulary.char_table(places)
        vectors = self.char_vectors(table)
        for number, length in enumerate(lengths):
            members, size = order[bucket == number], max(positions // length, 1)
            for at in range(0, len(members), size):
                here = [parts[k] for k in members[at:at + size]]
                words = np.full((size, length), PAD, np.int32)
                forms = np.full((size, length), len(places), np.int32)
                for row, (i, start, stop) in enumerate(here):
                    inside = flat[begins[i] + start:begins[i] + stop]
                    n = len(inside) + 1
                    forms[row, 1:n] = inside
                    words[row, 0], words[row, 1:n], words[row, n] = START, ids[inside], END
                yield Batch(words, vectors[forms], here, forms, table)

    def char_vectors(self, chars: np.ndarray) -> np.ndarray:
        """What the character encoder says of words, int32[n, M] -> float32[n, W]."""
        padded = np.pad(chars, ((0, -len(chars) % FORMS), (0, 0)))
        return np.concatenate([_characters(*self._split, padded[at:at + FORMS])
                               for at in range(0, len(padded), FORMS)])[:len(chars)]

    def _annotated(self, text: str, words: list[tokens.Word], tagged: Tagged, said: Sequence[schemes.Entity],
                   sure: Sequence[float]) -> Annotated:
        found = []
        for entity, share in zip(said, sure, strict=True):
            start, stop = words[entity.start].start, words[entity.stop - 1].stop
            found.append(Found(start, stop, entity.type, text[start:stop], share))
        sure = float(confidence(tagged.total, self.calibration.sentence))
        return Annotated(words[0].start, words[-1].stop, words, found, sure)

    def entity_confidence(self, tagged: Tagged, entity: schemes.Entity) -> float:
        """From the product of the probabilities of its words' tags."""
        return float(confidence(entity_log_prob(tagged, entity), self.calibration.entity))

    # Files

    def save(self, folder: str | os.PathLike, overwrite: bool = False) -> Path:
        """Writes config.json, model.safetensors and vocabulary.json; the folder appears whole or not at all."""
        from jaxmodels.hub.load import save_arrays

        config = {"model_type": KIND, **dataclasses.asdict(self.model.cfg)}
        about = self.vocabulary.to_json() | {"joins": list(self.joins),
                                             "calibration": dataclasses.asdict(self.calibration)}
        text = json.dumps(about, ensure_ascii=False) + "\n"
        state = nnx.state(self.model)
        leaves = {path: value[...] for path, value in nnx.to_flat_state(state)}
        return save_arrays(folder, _entries(state), leaves, config, extra_files={FILE: text}, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike, dtype: str | None = None) -> "Tagger":
        """Reads what `save` wrote. dtype: of the computation; default: as it was saved.

        Raises UserError for a folder that holds something else, or something damaged.
        """
        from jaxmodels.hub.checkpoint import open_checkpoint
        from jaxmodels.hub.load import load_arrays

        folder = Path(folder)
        checkpoint = open_checkpoint(folder)
        if checkpoint.config.get("model_type") != KIND:
            raise UserError(f"{folder} holds a {checkpoint.config.get('model_type')!r}, not a tagger; give the folder "
                            "`model` of a run of ner")
        cfg = _config(checkpoint.config, folder)
        cfg = cfg if dtype is None else dataclasses.replace(cfg, dtype=dtype)
        about = _about(folder / FILE)
        graphdef, state = nnx.split(nnx.eval_shape(lambda: CnnCnnLstm(cfg, rngs=nnx.Rngs(0))))
        arrays = load_arrays(checkpoint, _entries(state))
        flat = {path: variable.replace(arrays[path]) for path, variable in nnx.to_flat_state(state)}
        model = nnx.merge(graphdef, nnx.from_flat_state(flat))
        return cls(model, Vocabulary.from_json(about), about["joins"], about["calibration"])


class Batch(NamedTuple):
    """words int32[B, T]; vectors float32[B, T, W] of their characters; parts: (sentence, start, stop) of the words in
    the first rows, each behind a START. forms int32[B, T]: where in the table of distinct words, int32[n, M]."""

    words: np.ndarray
    vectors: np.ndarray
    parts: list[tuple[int, int, int]]
    forms: np.ndarray
    table: np.ndarray


def entity_log_prob(tagged: Tagged, entity: schemes.Entity) -> float:
    """log P of the tags of an entity's words."""
    return float(tagged.log_prob[entity.start:entity.stop].sum())


def _entries(state: Any) -> list[Any]:
    """Every parameter under its own path, as `jaxmodels.hub.load` takes them."""
    from jaxmodels.hub.entries import Entry, Source

    return [Entry(path, leaf.shape, (Source(".".join(map(str, path)), leaf.shape),))
            for path, leaf in nnx.to_flat_state(state)]


def _config(found: Mapping[str, Any], folder: Path) -> CnnCnnLstmConfig:
    path = folder / "config.json"
    types = {field.name: field.type for field in dataclasses.fields(CnnCnnLstmConfig) if field.name in found}
    for name, kind in types.items():
        if kind is int and not (type(found[name]) is int and found[name] < 2**31):
            raise UserError(f"{path} is damaged ({name} is {found[name]!r:.80}, no size); save the tagger again")
    for name in ("char_layers", "word_layers"):
        if (layers := found.get(name, 1)) > LAYERS:
            raise UserError(f"{path}: {name} {layers} is over the limit of {LAYERS}; save the tagger again")
    try:
        return CnnCnnLstmConfig(**{name: found[name] for name in types})
    except TypeError as error:
        raise UserError(f"{path} is damaged ({error}); save the tagger again") from None


def _about(path: Path) -> dict[str, Any]:
    """What is beside the weights, joins and calibration as `Tagger` takes them."""
    try:
        about = json.loads(path.read_text("utf-8"))
        if not isinstance(about, dict):
            raise ValueError(f"it holds a JSON {type(about).__name__}, not an object")
        joins, fitted = about.get("joins", tokens.PLAIN), about.get("calibration", {})
        if not isinstance(joins, list | tuple) or not all(isinstance(join, str) for join in joins):
            raise ValueError(f"joins is {joins!r:.80}, no list of strings")
        tokens.pattern_of(joins)
        known = {field.name for field in dataclasses.fields(Calibration)}
        if not isinstance(fitted, dict) or not fitted.keys() <= known or not all(map(_is_pair, fitted.values())):
            raise ValueError(f"calibration is {fitted!r:.80}, no two numbers each for {' and '.join(sorted(known))}")
    except (OSError, ValueError, RecursionError, re.error) as error:
        told = getattr(error, "strerror", None) or error
        raise UserError(f"{path} is missing or damaged ({told}); save the tagger again") from None
    return about | {"joins": joins, "calibration": Calibration(**{name: tuple(pair) for name, pair in fitted.items()})}


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(v) in (int, float) and abs(v) < 1e30 for v in value)


class _Static:
    """A graphdef whose hash is taken once: jit asks for it at every call, and it takes milliseconds."""

    def __init__(self, graphdef: Any):
        self.graphdef, self._hash = graphdef, hash(graphdef)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Static) and self.graphdef == other.graphdef)


@functools.partial(jax.jit, static_argnums=0)
def _characters(static, state, chars):
    return nnx.merge(static.graphdef, state).chars(chars)[0].astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _decode(static, state, words, w_char, beam) -> Decoded:
    model = nnx.merge(static.graphdef, state)
    return model.decode_encoded(model.words(words, w_char)[0], is_word(words), beam=beam)
