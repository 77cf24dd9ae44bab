"""Which sentences to label next: learning curves of a tagger under random choice, LC, MNLP and BALD.

Deep active learning after Shen et al. 2018 (arXiv 1707.05928) on a corpus whose labels are there: BC5CDR by default,
start 2 % of the words, 6 rounds of 4 %, 3 seeds, the small CNN-CNN-LSTM (docs/ner.md). Vocabulary from
the text of the whole pool, tags from its labels, no development part.

Recorded (2026-11-26, nine rounds, three seeds): 95 % of the F1 on all labels with 28.8 % of the words (MNLP), 30.3 %
(BALD), 32.2 % (LC), and not within 38 % at random.

    jaxmodels run ner_active_learning
    jaxmodels run ner_active_learning protocol.rounds=9                    # to 38 % of the words
    jaxmodels run ner_active_learning data.source=craft strategies=mnlp    # one strategy, another corpus
    jaxmodels run ner_active_learning strategies=random,bald_decoder       # more, in the folder of the first
    jaxmodels run ner_active_learning protocol.mode=scratch                # warm against scratch
    jaxmodels run ner_active_learning preset=quick
    jaxmodels run ner_active_learning preset=tiny                          # checks an installation
    jaxmodels run ner_active_learning preset=paper                         # 54 rounds of 1.83 %: for a GPU

Two cores decide the sizes: 4 strategies x 3 seeds x about 20 passes over all words in sum, and 3 references of 40; a
step of the default's 4 rows was seen to take 0.020 to 0.047 s of one core, and a learner takes about 5,400 of them, a
reference about 10,700.
"""

from analysis.active_learning.config import StudyConfig

PRESETS: dict[str, dict[str, object]] = {
    "tiny": {
        "model.char_filters": 16, "model.d_word": 24, "model.word_filters": 32, "model.d_hidden": 32,
        "model.dropout": 0.2, "optimizer.learning_rate": 5e-3,
        "data.limit": 120, "data.length": 64, "protocol.init": "20%", "protocol.words": "15%",
        "protocol.rounds": 2, "protocol.first_epochs": 10, "protocol.epochs": 6, "protocol.least_steps": 100,
        "protocol.passes": 4, "seeds": 1, "reference_epochs": 20,
    },
    "quick": {
        "model.word_filters": 100, "model.d_hidden": 64, "optimizer.learning_rate": 2e-3, "protocol.rounds": 4,
        "protocol.first_epochs": 20, "protocol.epochs": 6, "seeds": 1, "reference_epochs": 6,
    },
    # Shen et al. 2018: start 1 %, rounds of 20,000 of about 1.09 M words, 50 passes each, 100 passes with dropout,
    # batches of 128 sentences (about 30 rows); sizes of section 3.4, AdamW in place of their SGD.
    "paper": {
        "model.word_filters": 800, "model.word_width": 3, "model.char_width": 5, "model.d_hidden": 256,
        "data.batch": 30, "protocol.init": "1%", "protocol.words": "1.83%", "protocol.rounds": 54,
        "protocol.first_epochs": 50, "protocol.epochs": 50, "protocol.passes": 100, "reference_epochs": 50,
        "seeds": 4,
    },
}
NEEDS = ("bc5cdr",)
MINUTES: dict[str, float] = {}


def get_config() -> StudyConfig:
    return StudyConfig()
