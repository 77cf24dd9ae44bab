"""What else is trained on a tagger's sentences and scored by the same scorer: a feature CRF, and spaCy's CNN.

    peer_scores(("crf", "spacy"), source, seed, folder)      # {"test.crf.f1": ..., "test.spacy.f1": ..., ...}

* ``crf``: CRFsuite's linear chain over hand-made features, ner_active_learning.md section 9; no seed changes it
* ``spacy``: a blank pipeline with an ``ner`` component, trained by spaCy's own loop with its own settings, on the words
  as they are (no tokenizer); the step is chosen on the development part

Both are optional packages (``pip install 'jaxmodels[peers]'``), imported only when they are asked for.
"""

import functools
import importlib.util
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

from jaxmodels.errors import UserError
from train import entity_metrics
from train.data.conll import Sentence
from train.data.tagged import TaggedTexts
from train.runtime.progress import progress
from train.runtime.run_folder import RunFolder

Words = Sequence[str]
PACKAGES = {"crf": ("sklearn_crfsuite", "sklearn-crfsuite"), "spacy": ("spacy", "spacy")}  # module, name on PyPI
NEIGHBOURS, AFFIXES, LBFGS, C1, C2 = 2, (2, 3, 4), 100, 0.1, 0.1  # section 9
# spaCy's defaults but for the rows of its hash tables, 2,000 there: with 5,000 (12,500 in all four tables) it has 1.7 M
# parameters and 0.4 M products a word, where the 2 x 200-filter tagger has 1.5 M and 0.6 M.
TOK2VEC = {"@architectures": "spacy.HashEmbedCNN.v2", "pretrained_vectors": None, "width": 96, "depth": 4,
           "embed_size": 5000, "window_size": 1, "maxout_pieces": 3, "subword_features": True}


def missing(name: str) -> str | None:
    """Why a peer cannot run here, or None."""
    if name not in PACKAGES:
        raise UserError(f"peers={name} is not one of {', '.join(PACKAGES)}")
    module, package = PACKAGES[name]
    return None if importlib.util.find_spec(module) else f"{package} is not installed"


def check_peers(names: Iterable[str]) -> None:
    """UserError for a peer whose package is not here, before a tagger is trained for an hour."""
    for name in names:
        if reason := missing(name):
            raise UserError(f"peers={name}: {reason}; pip install 'jaxmodels[peers]', or leave {name} out of peers")


def peer_scores(names: Sequence[str], source: TaggedTexts, seed: int, folder: RunFolder) -> dict[str, float]:
    """``test.NAME.METRIC`` of every peer: `entity_scores`, train_seconds, words_per_second.

    A peer's numbers are in the run's results as soon as it is done, and it is not trained again.
    """
    check_peers(names)
    known, found = folder.results(), {}
    test = source.parts["test"]
    for name in names:
        prefix = f"test.{name}."
        if f"{prefix}f1" not in known:
            began = time.perf_counter()
            tag = TRAIN[name](source, seed, folder.check_stop)
            trained = time.perf_counter()
            said = tag([one.words for one in test])
            seconds = time.perf_counter() - trained
            scores = entity_metrics.entity_scores([one.tags for one in test], said)
            scores |= {"train_seconds": trained - began, "words_per_second": sum(map(len, test)) / seconds}
            folder.write_results({prefix + key: value for key, value in scores.items()})
            known = folder.results()
        found |= {key: value for key, value in known.items() if key.startswith(prefix)}
    return found


# The feature CRF


def train_crf(source: TaggedTexts, seed: int = 0, check: Callable[[], None] = lambda: None, steps: int = LBFGS
              ) -> Callable[[Sequence[Words]], list[list[str]]]:
    """What tags sentences, IOB2. One call of a C library: it cannot be interrupted between its steps."""
    import sklearn_crfsuite

    check()
    crf = sklearn_crfsuite.CRF(algorithm="lbfgs", c1=C1, c2=C2, max_iterations=steps)
    train = source.parts["train"]
    crf.fit(features([one.words for one in train]), [one.tags for one in train])
    return lambda sentences: [list(map(str, tags)) for tags in crf.predict(features(sentences))]


def features(sentences: Iterable[Words]) -> Iterator[list[list[str]]]:
    """Of every word of every sentence: what it looks like, and its neighbours."""
    @functools.cache
    def looks(word: str, place: int) -> tuple[str, ...]:
        named = [("word", word.lower()), ("shape", shape(word)), ("length", str(len(word)))]
        named += [(f"first{n}", word[:n]) for n in AFFIXES] + [(f"last{n}", word[-n:]) for n in AFFIXES]
        return tuple(f"{place:+d}:{name}={value}" for name, value in named)

    for words in sentences:
        rows = []
        for i in range(len(words)):
            row = ["bias"]
            for place in range(-NEIGHBOURS, NEIGHBOURS + 1):
                at = i + place
                row += looks(words[at], place) if 0 <= at < len(words) else (f"{place:+d}:none",)
            rows.append(row)
        yield rows


def shape(word: str) -> str:
    """``Xx-d`` of Cox-2: runs of capitals, small letters and digits, one sign each."""
    return re.sub(r"(.)\1+", r"\1", "".join("X" if c.isupper() else "x" if c.isalpha() else "d" if c.isdigit() else c
                                            for c in word))


# spaCy's CNN


def train_spacy(source: TaggedTexts, seed: int = 0, check: Callable[[], None] = lambda: None, **training: Any
                ) -> Callable[[Sequence[Words]], list[list[str]]]:
    """What tags sentences, IOB2. training: changes of spaCy's settings of that name (max_steps, patience ...)."""
    import_spacy()
    from spacy.schemas import ConfigSchemaTraining
    from spacy.training.loop import create_train_batches, train_while_improving
    from spacy.util import fix_random_seed, registry

    fix_random_seed(seed)
    nlp, examples = blank_pipeline(source.parts["train"])
    settings = registry.resolve(nlp.config.interpolate()["training"] | training, schema=ConfigSchemaTraining)
    dev = source.parts["dev"]
    words, truth = [one.words for one in dev], [one.tags for one in dev]
    batches = create_train_batches(nlp, lambda _: examples, settings["batcher"], settings["max_epochs"])
    asked = ("dropout", "accumulate_gradient", "patience", "max_steps", "eval_frequency", "annotating_components",
             "before_update")
    # Its own loop asks for the score of the dev part and says which step is the best so far.
    steps = train_while_improving(nlp, settings["optimizer"], batches,
                                  lambda: (entity_metrics.f1(truth, spacy_tags(nlp, words)), {}), exclude=[],
                                  **{name: settings[name] for name in asked})
    model, best = nlp.get_pipe("ner").model, b""
    with progress(settings["max_steps"], "training spaCy, at most") as advance:
        for _, _, is_best in steps:
            check()
            advance()
            if is_best:
                best = model.to_bytes()
    model.from_bytes(best)
    return functools.partial(spacy_tags, nlp)


def blank_pipeline(sentences: Sequence[Sentence]) -> tuple[Any, list[Any]]:
    """(a pipeline of random weights whose labels are those of the sentences, the sentences as examples)."""
    spacy = import_spacy()
    from spacy.tokens import Doc
    from spacy.training import Example

    nlp = spacy.blank("xx")  # no language's own rules: words are given
    nlp.add_pipe("ner", config={"model": {"tok2vec": TOK2VEC}})
    examples = [Example(Doc(nlp.vocab, list(one.words)), Doc(nlp.vocab, list(one.words), ents=list(one.tags)))
                for one in sentences]
    nlp.initialize(lambda: examples)
    return nlp, examples


def spacy_documents(nlp: Any, sentences: Iterable[Words]) -> list[Any]:
    """Sentences of words as spaCy's documents, with entities."""
    from spacy.tokens import Doc

    return list(nlp.pipe(Doc(nlp.vocab, list(words)) for words in sentences))


def spacy_tags(nlp: Any, sentences: Iterable[Words]) -> list[list[str]]:
    """Tags IOB2 of sentences of words."""
    return [[f"{word.ent_iob_}-{word.ent_type_}" if word.ent_type_ else "O" for word in doc]
            for doc in spacy_documents(nlp, sentences)]


def import_spacy() -> ModuleType:
    # Its thinc imports TensorFlow where it is installed, for wrappers that nothing here uses: seconds, and a gigabyte.
    absent = "tensorflow" not in sys.modules
    if absent:
        sys.modules["tensorflow"] = None  # type: ignore[assignment]
    try:
        import spacy
    finally:
        if absent:
            del sys.modules["tensorflow"]
    return spacy


TRAIN = {"crf": train_crf, "spacy": train_spacy}
