"""Trains a tagger of named entities on sentences of your own, or on a biomedical corpus: CNN-CNN-LSTM.

Give a folder with train, dev and test files (CoNLL: word, tab, tag; JSON lines with character spans; brat), or one of
the corpora that are named. Shen et al. 2018, arXiv 1707.05928.

Recorded (2026-11-26, three seeds, one CPU): F1 82.1 on BC5CDR (a feature CRF 79.5, spaCy's CNN 78.3), 82.0 on
NCBI-disease (77.5, 78.6), 77.9 on CRAFT (78.5 with model.head=crf).

    jaxmodels run ner data.path=FOLDER
    jaxmodels run ner data.source=bc5cdr
    jaxmodels run ner data.source=bc5cdr model.head=crf
    jaxmodels run ner data.source=bc5cdr preset=tiny           # under a minute: checks an installation
"""

from train.ner_config import NerRun

PRESETS: dict[str, dict[str, object]] = {
    "tiny": {
        "data.limit": 120, "data.length": 64, "model.char_filters": 16, "model.d_word": 24, "model.word_filters": 32,
        "model.d_hidden": 32, "model.dropout": 0.2, "optimizer.learning_rate": 5e-3, "epochs": 4, "least_steps": 100,
        "bootstrap": 100,
    },
    "quick": {"model.word_filters": 100, "model.d_hidden": 64, "optimizer.learning_rate": 2e-3, "epochs": 5},
}
NEEDS = ()
MINUTES: dict[str, float] = {}


def get_config() -> NerRun:
    return NerRun()
