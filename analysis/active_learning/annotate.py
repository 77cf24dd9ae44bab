"""What ``jaxmodels annotate RUN`` does: picks the sentences that people should label next, with what the tagger says.

The pool is running text (or JSON lines with ``text``); a sentence is the unit. What has been labelled in earlier
batches comes back as exports, is left out of the choice and can be written as training data.
"""

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from analysis.active_learning import strategies
from analysis.active_learning.config import STRATEGIES
from jaxmodels.cnn_cnn_lstm import tokens
from jaxmodels.cnn_cnn_lstm.schemes import entities
from jaxmodels.cnn_cnn_lstm.tagger import Tagger, confidence
from jaxmodels.errors import UserError
from train.data.annotations import FORMATS, Item, identity, item_tags, matched, read_items, write_items
from train.data.conll import Sentence, read_text, write_conll
from train.data.spans import Span, parse_text
from train.runtime.config import did_you_mean

Words = list[tokens.Word]


@dataclasses.dataclass(frozen=True)
class Unlabelled:
    """A sentence of the pool; places of its words count from its beginning."""

    text: str
    words: tuple[str, ...]
    places: tuple[tuple[int, int], ...]


def command(arguments: argparse.Namespace) -> None:
    """``jaxmodels annotate``: run; pool; budget, out, format, strategy, passes, seed; labelled (exports), train."""
    if arguments.out is None and arguments.train is None:
        raise UserError("nothing to write; give --budget N --out FILE for a batch, or --labelled FILE --train FILE for "
                        "training data")
    if (arguments.out is None) != (arguments.budget is None):
        raise UserError("--budget N and --out FILE belong together; give both")
    if arguments.train is not None and not arguments.labelled:
        raise UserError("--train writes what exports hold; give them with --labelled FILE")
    for option, value, known in (("strategy", arguments.strategy, STRATEGIES), ("format", arguments.format, FORMATS)):
        if value not in known:
            raise UserError(f"--{option} {value!r} is unknown; {did_you_mean(value, known)}")
    tagger = Tagger.load(model_folder(Path(arguments.run)))
    counts: Counter[str] = Counter()
    pool = read_pool(arguments.pool, tagger, counts)
    done = labelled(arguments.labelled or (), pool, counts)
    if arguments.train is not None:
        if not done:  # an earlier file of that name is worth more than an empty one
            raise UserError(f"{', '.join(arguments.labelled)}: no text is labelled ({counts['not_labelled']} are not "
                            f"yet); nothing is written to {arguments.train}")
        write_conll(arguments.train, training_data(done, pool, counts))
        print(arguments.train)
    if arguments.out is not None:
        batch = choose(tagger, pool, arguments.budget, strategy=arguments.strategy, done=done, seed=arguments.seed,
                       passes=arguments.passes)
        write_items(arguments.out, batch, arguments.format)
        words = sum(len(pool[item.id].words) for item in batch)
        told = f"{len(batch)} of {len(pool) - len(done)} unlabelled sentences, {words} words"
        print(f"jaxmodels: {told}", file=sys.stderr)
        print(arguments.out)
    for name, count in (+counts).items():
        print(f"jaxmodels: {name}: {count}", file=sys.stderr)


def model_folder(run: Path) -> Path:
    """Where a run of ner, or a learner of the study, keeps its tagger."""
    if (run / "model").is_dir():
        return run / "model"
    found = sorted(str(path.parent.relative_to(run)) for path in run.glob("*/seed*/model")) if run.is_dir() else []
    if found:
        raise UserError(f"{run} holds {len(found)} taggers; give the folder of one, such as {run / found[0]}")
    raise UserError(f"{run} has no folder `model`; give the folder of a finished run of ner")


def read_pool(path: str | Path, tagger: Tagger, counts: Counter[str]) -> dict[str, Unlabelled]:
    """The sentences of a file by their ids; sentences that come again are counted and left out."""
    path = Path(path).expanduser()
    text = read_text(path, counts)
    texts: Iterable[str] = [text]
    if path.name.removesuffix(".gz").endswith((".jsonl", ".ndjson")):
        lines = enumerate(text.split("\n"), 1)
        texts = [parse_text(line, f"{path}:{number}")[1] for number, line in lines if line.strip()]
    pool: dict[str, Unlabelled] = {}
    for one in texts:
        for words in tokens.sentences_of(one, tagger.pattern):
            sentence = _unlabelled(one, words)
            name = identity(sentence.text)
            counts["repeated_sentences"] += name in pool
            pool[name] = sentence
    if not pool:
        raise UserError(f"{path} has no sentence; give text with at least one word")
    return pool


def labelled(paths: Sequence[str], pool: Mapping[str, Unlabelled], counts: Counter[str]) -> dict[str, Item]:
    """What exports hold, by id; of a text that comes again, which is counted, the last. Raises UserError with the ids
    of what is not of the pool."""
    items = [item for path in paths for item in read_items(path, counts)]
    found = matched(items, {name: one.text for name, one in pool.items()})
    counts["labelled_again"] += len(items) - len(found)
    return found


def training_data(done: Mapping[str, Item], pool: Mapping[str, Unlabelled], counts: Counter[str]) -> list[Sentence]:
    """Labelled sentences in the pool's words, tags IOB2; entities that end within a word are widened and counted."""
    return [Sentence(pool[name].words, tuple(item_tags(item, pool[name].places, counts)))
            for name, item in done.items()]


def choose(tagger: Tagger, pool: Mapping[str, Unlabelled], budget: int, *, strategy: str = "mnlp",
           done: Mapping[str, Item] | None = None, seed: int = 0, passes: int = 10,
           check: Callable[[], None] = lambda: None) -> list[Item]:
    """The next sentences within a budget of words, the most useful first, with the entities that the tagger finds.

    A sentence that does not fit into what is left of the budget is passed over: people were promised no more.
    """
    names = list(pool)
    available = np.array([name not in (done or {}) for name in names])
    places = strategies.choose(strategy, tagger, [pool[name].words for name in names], budget, available=available,
                               seed=seed, passes=passes, overshoot=False, check=check)
    chosen = [names[i] for i in places]
    found = tagger.tag([pool[name].words for name in chosen], check=check)
    items = []
    for name, tagged in zip(chosen, found, strict=True):
        here, said = pool[name], entities(tagged.tags)
        spans = tuple(Span(here.places[one.start][0], here.places[one.stop - 1][1], one.type) for one in said)
        items.append(Item(name, here.text, spans, tuple(tagger.entity_confidence(tagged, one) for one in said),
                          float(confidence(tagged.total, tagger.calibration.sentence))))
    return items


def _unlabelled(text: str, words: Words) -> Unlabelled:
    start = words[0].start
    return Unlabelled(text[start:words[-1].stop], tuple(word.text for word in words),
                      tuple((word.start - start, word.stop - start) for word in words))
