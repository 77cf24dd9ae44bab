"""The tagger beside spaCy's CNN and the same network in PyTorch, and what BALD costs beside MNLP.

    jaxmodels bench ner [--out FILE]     # two quiet CPU cores: about seven minutes; peers: spacy, torch

The 2 x 200-filter model as `jaxmodels run ner` builds it, on BC5CDR where it is here (else on made-up sentences of its
lengths), random weights, float32; in turns in one process.

Tagging: sentences of words to tags, BC5CDR's test part. Ours gives tags and their probabilities as Python values;
spaCy's blank pipeline (train/ner_peers.py; a few steps old, so that it finds some entities) its documents. Its matrix
products take one core, ours all.
Training: the same batches of 8 rows of 128 positions, optimizer step included, beside PyTorch on as many threads as
there are cores (benchmarks/_ner_peers.py), whose logits are compared with ours first, and beside our own CRF.
BALD: scoring a fixed sample of sentences with 100 passes, dropout in all layers or in the decoder alone (the encoder
runs once), beside one MNLP pass.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from analysis.active_learning.strategies import scores
from benchmarks._report import check_out, machine, publish
from benchmarks._timing import Samples, take_turns
from jaxmodels.cnn_cnn_lstm.network import CnnCnnLstm, is_word
from jaxmodels.cnn_cnn_lstm.tagger import Tagger
from jaxmodels.cnn_cnn_lstm.vocabulary import Vocabulary
from jaxmodels.errors import UserError
from train import ner_peers
from train.data.conll import Sentence
from train.data.tagged import TaggedTexts, tagged_texts
from train.data.tagged_rows import tagged_rows
from train.experiment import plan_step
from train.ner import model_config
from train.ner_config import NerDataConfig, NerRun, TaggerConfig
from train.objectives.tagging import Tagging
from train.optimizers import make_optimizer, make_schedule
from train.runtime.mesh import make_mesh, use_mesh
from train.runtime.state import blueprint
from train.runtime.step import TrainStep
from train.settings import MeshConfig

COLUMNS = ("what", "side", "words/s", "s", "p10", "p90", "ratio", "bar", "result")
WORDS_A_SECOND = 30_000
# The bar of a side's ratio, and whether the ratio has to reach it or stay below.
BARS = {"tagging": (3.0, True), "training": (1.0, False), "BALD": (100.0, False), "BALD, decoder": (25.0, False)}
PEERS = {"spaCy": "spacy", "PyTorch": "torch"}
# Quantiles of the words of a sentence of BC5CDR's test part; with these ten thousand forms a text has about as many.
SHARES, LENGTHS = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.97, 1), (2, 11, 16, 23, 32, 44, 63, 165)
FORMS, ENTITIES = 10_000, 0.08


def main(out: str | None, *, source: str | None = "bc5cdr", limit: int | None = None,
         model: Mapping[str, Any] | None = None, batch: int = 8, length: int = 128, steps: int = 16, sample: int = 400,
         passes: int = 100, repeats: Sequence[int] = (5, 9, 5)) -> None:
    """Measures, prints a table, and writes ``out``.

    source: as `data.source`; None: made-up sentences. limit: sentences of a part. model: changes of `TaggerConfig`.
    steps: of training, one timing. sample: sentences that are scored. repeats: of tagging, training and scoring.
    """
    check_out(out)
    about = machine(("spacy", "torch"))
    data, what = corpus(source, limit)
    cfg = NerRun(data=NerDataConfig(source=source or "bc5cdr", batch=batch, length=length),
                 model=TaggerConfig(**model or {}), mesh=MeshConfig(data=1))
    tagger = untrained(cfg, data)
    rows = tagging(tagger, data, repeats[0])
    rows += training(cfg, tagger, data, steps, repeats[1])
    rows += scoring(tagger, data, sample, passes, repeats[2])
    elsewhere = max(row["samples"]["elsewhere"] for row in rows if "samples" in row)
    notes = [f"sentences: {what}",
             "s, p10, p90: of the whole test part; of an epoch, from the steps that were timed; of the sample",
             "ratio: words/s over spaCy's; time over PyTorch's; time over MNLP's; medians of turns",
             f"other processes took up to {elsewhere:.0%} of the cores meanwhile",
             *(" ".join(part.split()) for part in (__doc__ or "").split("\n\n")[2:])]
    publish("Tagging named entities, float32", rows, COLUMNS, about, notes, out)


# Sentences


def corpus(source: str | None, limit: int | None = None) -> tuple[TaggedTexts, str]:
    """(sentences, what they are): made-up ones where the source is not here."""
    if source is not None:
        try:
            return tagged_texts(source, limit=limit), source
        except UserError as error:
            return made_up(limit or 4500), f"made up, {error}"
    return made_up(limit or 4500), "made up"


def made_up(count: int, seed: int = 0) -> TaggedTexts:
    """`count` sentences in train and test, as long as BC5CDR's; words by Zipf's law, 2 to 12 letters long."""
    r = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    forms = ["".join(r.choice(letters, r.integers(2, 13))) for _ in range(FORMS)]
    upto = np.cumsum(1 / np.arange(1, FORMS + 1))

    def sentence() -> Sentence:
        n = round(float(np.interp(r.random(), SHARES, LENGTHS)))
        words = tuple(forms[i] for i in np.searchsorted(upto, r.random(n) * upto[-1]))
        return Sentence(words, tuple(r.choice(["O", "B-Chemical", "B-Disease"],
                                              n, p=[1 - ENTITIES, ENTITIES / 2, ENTITIES / 2]).tolist()))

    parts = {part: [sentence() for _ in range(count)] for part in ("train", "test")}
    return TaggedTexts(parts, ("Chemical", "Disease"), {})


def untrained(cfg: NerRun, data: TaggedTexts) -> Tagger:
    vocabulary = Vocabulary.build([one.words for one in data.parts["train"]], data.types, length=cfg.model.chars)
    return Tagger(CnnCnnLstm(model_config(cfg.model, vocabulary), rngs=nnx.Rngs(cfg.seed)), vocabulary)


# Tagging


def tagging(tagger: Tagger, data: TaggedTexts, repeats: int) -> list[dict[str, Any]]:
    sentences = [one.words for one in data.parts["test"]]
    sides: dict[str, Callable[[], Any]] = {"jaxmodels": lambda: tagger.tag(sentences)}
    if here("spaCy"):
        sides["spaCy"] = spacy(data.parts["train"], sentences)
    samples, count = take_turns(sides, repeats, warmup=1), sum(map(len, sentences))
    rows = compare("tagging", samples, count, "spaCy", filters=tagger.model.cfg.word_filters)
    return rows + absent("tagging", "spaCy")


def spacy(train: Sequence[Sentence], sentences: Sequence[Sequence[str]], updates: int = 20, batch: int = 32
          ) -> Callable[[], list[Any]]:
    nlp, examples = ner_peers.blank_pipeline(train[:updates * batch])
    optimizer = nlp.create_optimizer()
    for at in range(0, len(examples), batch):
        nlp.update(examples[at:at + batch], sgd=optimizer, drop=0.1)
    return lambda: ner_peers.spacy_documents(nlp, sentences)


# Training


def training(cfg: NerRun, tagger: Tagger, data: TaggedTexts, steps: int, repeats: int) -> list[dict[str, Any]]:
    start = tagger.model
    packed = tagged_rows(data.parts["train"], tagger.vocabulary, cfg.data.length, start.cfg.reach, cfg.seed)
    size = cfg.data.batch
    epoch = len(packed["words"]) // size
    if not epoch:
        raise UserError(f"batch={size} is more than the {len(packed['words'])} rows of the training part; lower it")
    batches = [{name: array[at * size:(at + 1) * size] for name, array in packed.items()}
               for at in range(min(steps, epoch))]
    crf = CnnCnnLstm(dataclasses.replace(start.cfg, head="crf"), rngs=nnx.Rngs(cfg.seed))
    sides: dict[str, Callable[[], float]] = {"jaxmodels": Training(cfg, start, batches),
                                             "jaxmodels, CRF": Training(cfg, crf, batches)}
    more: dict[str, Any] = {"batch": size, "length": cfg.data.length, "steps": len(batches), "epoch_steps": epoch}
    if here("PyTorch"):
        from benchmarks._ner_peers import Torch

        theirs = Torch(start, batches, cfg.optimizer, cfg.seed)
        first = batches[0]
        ours = start(first["words"], first["chars"], first["tags"])[0]
        more["logits_apart"] = check_logits(np.asarray(ours)[is_word(first["words"])], theirs.logits())
        sides["PyTorch"] = theirs
    words = sum(int(is_word(one["words"]).sum()) for one in batches)
    samples = take_turns(sides, repeats, warmup=1)
    return compare("training", samples, words, "PyTorch", epoch / len(batches), **more) + absent("training", "PyTorch")


class Training:
    """Steps as `train.ner` plans them and the loop compiles and calls them."""

    def __init__(self, cfg: NerRun, start: CnnCnnLstm, batches: Sequence[dict[str, np.ndarray]]):
        mesh = make_mesh(cfg.mesh, jax.devices()[:1])
        optimizer, schedule = make_optimizer(cfg.optimizer, 1000), make_schedule(cfg.optimizer, 1000)
        plan = blueprint(lambda key: start, optimizer, mesh, seed=cfg.seed)
        step = TrainStep(plan.graphdef, Tagging(), optimizer, cfg.loop.accumulate, schedule)
        shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in batches[0].items()}
        with use_mesh(mesh):
            self.compiled = plan_step(cfg, plan, step, shapes, 0.0, mesh).lowered.compile()
            self.state = plan.init()
        self.batches = [jax.device_put(batch) for batch in batches]

    def __call__(self) -> float:
        """One step on every batch; the last loss, nats a word."""
        for batch in self.batches:
            self.state, metrics = self.compiled(self.state, batch)
        jax.block_until_ready(self.state)
        loss, skipped = float(metrics["loss"]), int(metrics["skipped"])
        if skipped:
            raise RuntimeError(f"{skipped} steps were skipped, the last loss was {loss}: nothing was trained")
        return loss


def check_logits(ours: np.ndarray, theirs: np.ndarray) -> float:
    """How far apart they are at most. RuntimeError above 1e-4: other work, whose time would tell nothing."""
    if ours.shape != theirs.shape or not np.allclose(theirs, ours, rtol=1e-4, atol=1e-4):
        raise RuntimeError("PyTorch's logits are not ours from the same weights: they did not do the same work")
    return float(np.abs(ours - theirs).max())


# Choosing what to label


def scoring(tagger: Tagger, data: TaggedTexts, sample: int, passes: int, repeats: int) -> list[dict[str, Any]]:
    test = data.parts["test"]
    places = np.random.default_rng(0).permutation(len(test))[:sample]
    sentences = [test[i].words for i in places]

    def side(name: str) -> Callable[[], np.ndarray]:
        return lambda: scores(name, tagger, sentences, passes=passes)

    sides = {"MNLP": side("mnlp"), "BALD": side("bald"), "BALD, decoder": side("bald_decoder")}
    samples = take_turns(sides, repeats, warmup=1)
    return compare("scoring", samples, sum(map(len, sentences)), "MNLP", passes=passes, sentences=len(sentences))


# Rows


def compare(what: str, samples: Mapping[str, Samples], words: int, reference: str, scale: float = 1.0, **more: Any
            ) -> list[dict[str, Any]]:
    """A row a side. words: of one timing; scale: from a timing to what s, p10 and p90 tell."""
    rows = []
    for name, one in samples.items():
        summary = one.summary()
        row = {"what": what, "side": name, "words/s": words / one.median, "s": summary["median_s"] * scale,
               "p10": summary["p10_s"] * scale, "p90": summary["p90_s"] * scale, "samples": summary, **more}
        if reference in samples and name != reference:
            time = one.median / samples[reference].median
            row["ratio"] = 1 / time if what == "tagging" else time
        if name in BARS or name == "jaxmodels":
            row |= judged(what if name == "jaxmodels" else name, row.get("ratio"), row["words/s"])
        rows.append(row)
    return rows


def judged(what: str, ratio: float | None, words_a_second: float) -> dict[str, Any]:
    """bar and result; a bar against a peer that is not here is left open."""
    bar, least = BARS[what]
    told, met = [f"{'>=' if least else '<='} {bar:g}"], []
    if ratio is not None:
        met.append(ratio >= bar if least else ratio <= bar)
    if what == "tagging":
        told.append(f">= {WORDS_A_SECOND} words/s")
        met.append(words_a_second >= WORDS_A_SECOND)
    return {"bar": ", ".join(told), "result": "missed" if not all(met) else "met" if ratio is not None else "open"}


def here(peer: str) -> bool:
    return importlib.util.find_spec(PEERS[peer]) is not None


def absent(what: str, peer: str) -> list[dict[str, Any]]:
    """The row of a peer that is not here."""
    return [] if here(peer) else [{"what": what, "side": peer, "result": f"{PEERS[peer]} is not installed"}]
