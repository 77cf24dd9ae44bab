"""Training a CNN-CNN-LSTM tagger on sentences with entities, and using it.

When to stop is chosen by entity F1 on the development part, which also calibrates the confidences; the test part is
read once, at the end.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.cnn_cnn_lstm import tokens
from jaxmodels.cnn_cnn_lstm.config import CnnCnnLstmConfig
from jaxmodels.cnn_cnn_lstm.network import CnnCnnLstm
from jaxmodels.cnn_cnn_lstm.passes import entity_votes
from jaxmodels.cnn_cnn_lstm.schemes import entities
from jaxmodels.cnn_cnn_lstm.tagger import Tagged, Tagger, confidence
from jaxmodels.cnn_cnn_lstm.vocabulary import SPECIAL, Vocabulary
from jaxmodels.errors import UserError
from train import entity_metrics, experiment, ner_peers, skipgram, tag_confidence
from train.data import records
from train.data.coded_texts import SOURCES as CODED_TEXTS
from train.data.coded_texts import coded_texts
from train.data.conll import Sentence
from train.data.tagged import TaggedTexts, tagged_texts
from train.data.tagged_rows import tagged_rows
from train.data.word_vectors import read_vectors, wordllama_vectors
from train.ner_config import NerRun, TaggerConfig
from train.objectives.tagging import Tagging
from train.optimizers import make_optimizer, make_schedule
from train.predict import Predictions
from train.runtime import loop
from train.runtime.config import config_hash
from train.runtime.files import load_npz, save_npz, write_atomic
from train.runtime.mesh import check_batch, make_mesh
from train.runtime.run_folder import RunFolder
from train.runtime.state import Blueprint, State, blueprint
from train.runtime.step import TrainStep

CHOSEN_BY = "dev_f1"
SETTLED = 25  # steps between evaluations at least: a smaller epoch says little


def run(cfg: NerRun, folder: RunFolder) -> None:
    """Trains or finishes one tagger in a run folder."""
    if folder.results().get("finished"):
        return
    experiment.check_epochs(cfg)
    ner_peers.check_peers(cfg.peers)
    mesh = make_mesh(cfg.mesh)
    check_batch(cfg.data.batch, cfg.loop.accumulate, mesh)
    source = tagged_texts(cfg.data.name, illformed=cfg.data.illformed, limit=cfg.data.limit)
    experiment.check_data(folder, source.digest, f"sentences or tags of {cfg.data.name}")
    folder.write_results({f"data.{name}": value for name, value in source.counts.items()} |
                         {experiment.DATA: source.digest})
    start = starting_tagger(cfg, source, folder)
    best = train(cfg, folder, source, start, mesh)
    if jax.process_index() == 0:
        results = finish(cfg, folder, source, best)
        folder.write_results(results | ner_peers.peer_scores(cfg.peers, source, cfg.seed, folder) | {"finished": True})


# Model


def starting_tagger(cfg: NerRun, source: TaggedTexts, folder: RunFolder) -> Tagger:
    """The tagger before training. Its words and characters are those of the training part, and words with vectors."""
    sentences = [one.words for one in source.parts["train"]]
    vectors = starting_vectors(cfg, sentences, folder)
    vocabulary = Vocabulary.build(sentences, source.types, more_words=vectors, floor=cfg.model.floor,
                                  length=cfg.model.chars)
    model = CnnCnnLstm(model_config(cfg.model, vocabulary, bool(vectors)), rngs=nnx.Rngs(cfg.seed))
    if vectors:
        put_vectors(model, vocabulary, vectors)
    return Tagger(model, vocabulary, tokens.joins_of(sentences))


def model_config(cfg: TaggerConfig, vocabulary: Vocabulary, with_vectors: bool = False) -> CnnCnnLstmConfig:
    values = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)
              if field.name not in ("floor", "chars", "word_drop")}
    drop = cfg.word_drop if cfg.word_drop is not None else 0.5 if with_vectors else 0.3
    return CnnCnnLstmConfig(**vocabulary.sizes, **values, word_drop=drop)


def starting_vectors(cfg: NerRun, sentences: Sequence[Sequence[str]], folder: RunFolder) -> dict[str, np.ndarray]:
    """Vectors by word, none for vectors.name=random. Raises UserError for those of another width than the model's."""
    if cfg.vectors.name == "random":
        return {}
    known = {word.lower() for words in sentences for word in words}
    if cfg.vectors.name == "skipgram":
        found = own_vectors(cfg, sentences, folder)
    elif cfg.vectors.name == "wordllama":
        found = wordllama_vectors(known, cfg.model.d_word, cfg.vectors.limit)
    else:
        found = read_vectors(cfg.vectors.path, known, cfg.vectors.limit)
        width = len(next(iter(found.values())))
        if width != cfg.model.d_word:
            raise UserError(f"model.d_word={cfg.model.d_word}, the vectors of {cfg.vectors.path} have {width}; set "
                            f"model.d_word={width}")
    folder.write_results({"data.words_with_vectors": len(known & set(found)), "data.words": len(known)})
    return found


def own_vectors(cfg: NerRun, sentences: Sequence[Sequence[str]], folder: RunFolder) -> dict[str, np.ndarray]:
    """Skip-gram vectors of the training sentences and of vectors.texts; kept beside the run (or its sweep)."""
    about = {"data": [getattr(cfg.data, key) for key in ("name", "illformed", "limit")], "width": cfg.model.d_word,
             "vectors": dataclasses.asdict(cfg.vectors), "seed": cfg.seed}
    path = folder.shared / f"vectors-{config_hash(about)}.npz"
    with folder.alone(path):
        kept = load_npz(path)
        if kept is None:
            texts = [*sentences, *(words for name in cfg.vectors.texts for words in unlabelled(name, sentences))]
            total = skipgram.steps_of(skipgram.frequent(texts), cfg.vectors.epochs)
            with folder.progress(total, "word vectors") as advance:
                found = skipgram.skipgram(texts, cfg.model.d_word, window=cfg.vectors.window, epochs=cfg.vectors.epochs,
                                          seed=cfg.seed, advance=advance, check=folder.check_stop)
            kept = {"words": np.array(list(found)), "vectors": np.stack(list(found.values()))}
            save_npz(path, kept)
    return dict(zip(kept["words"].tolist(), kept["vectors"], strict=True))


def unlabelled(name: str, sentences: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """The words of a source's training part: of tagged sentences, or of running text, cut as `sentences` are."""
    if name.partition(":")[0] not in CODED_TEXTS:
        return [one.words for one in tagged_texts(name).parts["train"]]
    pattern = tokens.pattern_of(tokens.joins_of(sentences))
    return [[word.text for word in words] for text in coded_texts(name).parts["train"].texts
            for words in tokens.sentences_of(text, pattern)]


def put_vectors(model: CnnCnnLstm, vocabulary: Vocabulary, vectors: Mapping[str, np.ndarray]) -> None:
    """Rows of the table of words, so scaled that they are as large as those that are drawn; others stay drawn."""
    rows = [i for i, word in enumerate(vocabulary.words, SPECIAL) if word in vectors]
    values = np.stack([vectors[vocabulary.words[i - SPECIAL]] for i in rows])
    values = values / max(np.sqrt((values ** 2).mean() * values.shape[1]), 1e-9)
    table = model.words.embed
    table[...] = table[...].at[np.array(rows)].set(values)


# Training


def train(cfg: NerRun, folder: RunFolder, source: TaggedTexts, start: Tagger, mesh: Any) -> Tagger:
    """The tagger of the best F1 on the development part, which also lies in ``folder/model``."""
    model = start.model
    data = prepare_data(cfg, folder, source, start)
    part = records.open_records(data, "train")
    if len(part) < cfg.data.batch:
        raise UserError(f"data.batch={cfg.data.batch} is more than the {len(part)} rows of {cfg.data.length} positions "
                        "that the training sentences fill; lower it, or data.length")
    epoch = len(part) // cfg.data.batch
    every = epoch * math.ceil(SETTLED / epoch)
    steps = math.ceil(max(cfg.epochs * epoch, cfg.least_steps) / every) * every
    cfg = dataclasses.replace(cfg, loop=dataclasses.replace(cfg.loop, steps=steps, evaluate_every=every))
    optimizer, schedule = make_optimizer(cfg.optimizer, steps), make_schedule(cfg.optimizer, steps)
    plan = blueprint(lambda key: model, optimizer, mesh, seed=cfg.seed)
    step = TrainStep(plan.graphdef, Tagging(), optimizer, cfg.loop.accumulate, schedule)
    batches = experiment.open_batches(cfg, data, "train", f"{cfg.data.name}/train")
    example = {name: jax.ShapeDtypeStruct((cfg.data.batch, *array.shape), array.dtype)
               for name, array in part[0].items()}
    words = cfg.data.batch * source.words // len(part)  # of a batch, in the mean
    cost = model.cfg.flops_per_word(cfg.model.chars)
    best = Best(cfg, folder, plan, start, source.parts["dev"])
    task = loop.Task(plan, step, batches, example, words, cost * words, best.evaluate, best.over)
    trained = experiment.train(cfg, folder, task, mesh)
    chosen, score = max(best.scores.items(), key=lambda one: (one[1], -one[0]))
    folder.write_results(experiment.run_numbers(trained, trained.state["params"], words, cost)
                         | {"epochs": trained.step / epoch, "chosen_step": chosen, CHOSEN_BY: score,
                            "epoch_seconds": epoch * float(np.median(trained.step_seconds or [np.nan]))})
    return Tagger.load(folder.dir / "model")


def prepare_data(cfg: NerRun, folder: RunFolder, source: TaggedTexts, tagger: Tagger) -> Path:
    """Packed rows of the training part, in a ``data-*`` folder of the run (or its sweep)."""
    about = {"data": {key: getattr(cfg.data, key) for key in ("name", "illformed", "length", "limit")},
             "gap": tagger.model.cfg.reach, "vectors": dataclasses.asdict(cfg.vectors), "floor": cfg.model.floor,
             "chars": cfg.model.chars, "seed": cfg.seed, "sentences": source.digest,
             # of words that files of vectors have, too: rows are numbers in it
             "vocabulary": hashlib.sha256(repr(tagger.vocabulary).encode()).hexdigest()}

    def prepare(data: Path) -> None:
        rows = tagged_rows(source.parts["train"], tagger.vocabulary, cfg.data.length, tagger.model.cfg.reach, cfg.seed)
        records.prepare(data, {"train": rows})

    return experiment.prepared(folder, about, prepare)


class Best:
    """Evaluates on the development part, keeps the best tagger in ``folder/model`` and says when to stop."""

    def __init__(self, cfg: NerRun, folder: RunFolder, plan: Blueprint, start: Tagger, dev: Sequence[Sentence]):
        self.cfg, self.folder, self.plan, self.start, self.dev = cfg, folder, plan, start, dev
        # What an earlier start has logged; lines after the step that is restored are cut, and evaluated again alike.
        self.scores = {line["step"]: line[CHOSEN_BY] for line in folder.metrics() if CHOSEN_BY in line}

    def evaluate(self, state: State, check: Callable[[], None]) -> dict[str, float]:
        step = int(jax.device_get(state["step"]))
        host = experiment.model_on_host(self.plan, state)
        model = nnx.merge(self.plan.graphdef, jax.tree.map(jnp.asarray, nnx.state(host)))
        tagger = Tagger(model, self.start.vocabulary, self.start.joins)
        found = tagger.tag([one.words for one in self.dev], check=check)
        scores = entity_metrics.entity_scores([one.tags for one in self.dev], [one.tags for one in found])
        self.scores = {at: score for at, score in self.scores.items() if at < step}
        better = scores["f1"] > max(self.scores.values(), default=-1.0)
        self.scores[step] = scores["f1"]
        if better and jax.process_index() == 0:
            tagger.save(self.folder.dir / "model", overwrite=True)
        return {CHOSEN_BY: scores["f1"], "dev_precision": scores["precision"], "dev_recall": scores["recall"]}

    def over(self, step: int) -> bool:
        """Whether `patience` evaluations up to `step` brought nothing better; while all tags are O, they do not count:
        a tagger begins so, and may need some passes to say the first right entity."""
        known = {at: score for at, score in self.scores.items() if at <= step and score > 0}
        if not known:
            return False
        best = max(known, key=lambda at: (known[at], -at))
        return sum(at > best for at in known) >= self.cfg.patience


# The end


def finish(cfg: NerRun, folder: RunFolder, source: TaggedTexts, tagger: Tagger) -> dict[str, Any]:
    """Calibrates the tagger on the development part, saves it, and gives ``dev.METRIC`` and ``test.METRIC``."""
    dev = source.parts["dev"]
    found = tagger.tag([one.words for one in dev], check=folder.check_stop)
    tagger.calibration = tag_confidence.fitted([one.tags for one in dev], found)
    tagger.save(folder.dir / "model", overwrite=True)
    results = scores_of("dev", cfg, dev, found, tagger)
    test = source.parts["test"]
    words = [one.words for one in test]
    began = time.perf_counter()
    found = tagger.tag(words, check=folder.check_stop)
    results["test.words_per_second"] = sum(map(len, words)) / (time.perf_counter() - began)  # compiled on dev
    votes = entity_votes(tagger, words, [entities(one.tags) for one in found], cfg.votes, seed=cfg.seed,
                         check=folder.check_stop) if cfg.votes else None
    results |= scores_of("test", cfg, test, found, tagger, votes)
    if cfg.beam > 1:
        wide = tagger.tag(words, beam=cfg.beam, check=folder.check_stop)
        results[f"test.beam_{cfg.beam}.f1"] = entity_metrics.f1([one.tags for one in test], [one.tags for one in wide])
    write_predictions(folder.path("predictions.jsonl"), test, found, tagger, votes)
    return results


def scores_of(part: str, cfg: NerRun, sentences: Sequence[Sentence], found: Sequence[Tagged], tagger: Tagger,
              votes: Sequence[Sequence[float]] | None = None) -> dict[str, float]:
    truth, said = [one.tags for one in sentences], [one.tags for one in found]
    low, high = entity_metrics.f1_interval(truth, said, cfg.bootstrap, cfg.seed)
    numbers = entity_metrics.entity_scores(truth, said) | {"f1_low": low, "f1_high": high}
    numbers |= entity_metrics.surface_f1([one.words for one in sentences], truth, said)
    numbers |= tag_confidence.numbers(truth, found, tagger.calibration, votes)
    return {f"{part}.{name}": value for name, value in numbers.items()}


def write_predictions(path: Path, sentences: Sequence[Sentence], found: Sequence[Tagged], tagger: Tagger,
                      votes: Sequence[Sequence[float]] | None = None) -> Path:
    """A sentence a line: words, entities (truth; said with confidence, and votes if there are) by their words,
    confidence of the whole."""
    rows = []
    for i, (one, tagged) in enumerate(zip(sentences, found, strict=True)):
        said = [(*each, round(tagger.entity_confidence(tagged, each), 4)) for each in entities(tagged.tags)]
        if votes is not None:
            said = [(*each, share) for each, share in zip(said, votes[i], strict=True)]
        rows.append({"words": one.words, "truth": entities(one.tags), "said": said,
                     "confidence": round(float(confidence(tagged.total, tagger.calibration.sentence)), 4)})
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    return write_atomic(path, lambda file: file.write(data))


# What `jaxmodels predict` asks of a run

PIECE = 512  # texts that are in memory at once
COLUMNS = ("start", "end", "type", "entity", "confidence", "sentence_start", "sentence_end", "sentence_confidence")


def predict(config: Mapping[str, Any], folder: Path, texts: Sequence[str], top: int | None = None) -> Predictions:
    """See `train.predict`. A row an entity, in the order of the text; places count characters (code points) from 0,
    the end not included. top: of each text at most so many, the surest. Entities' confidences are what the config's
    `confidence` says, a sentence's is of its probability."""
    tagger = Tagger.load(folder / "model")
    votes = config["votes"] if config.get("confidence") == "votes" else 0

    def rows() -> Iterator[tuple[int, tuple[Any, ...]]]:
        for at in range(0, len(texts), PIECE):
            for i, sentences in enumerate(tagger.annotate_all(texts[at:at + PIECE], votes=votes), at):
                found = [(one.start, one.stop, one.type, one.text, one.confidence, sentence.start, sentence.stop,
                          sentence.confidence) for sentence in sentences for one in sentence.entities]
                if top is not None and len(found) > top:
                    found = sorted(sorted(found, key=lambda row: -row[4])[:top])
                for row in found:
                    yield i, row

    return Predictions(COLUMNS, rows(), "no entity")
