"""Finds the ICD-10-CM category of a phrase, one of 1,918, with Text2Tree (Yan et al. 2023).

Trained on the descriptions of the codes (1 to 338 a category), tested on 13,487 inclusion terms. A phrase has 13 tokens
on average, and 3 to 4 in a hundred have more than the 24 that are read.

Six epochs of 697 steps, for more cannot be judged: the development part are siblings of the descriptions that are
trained on, while inclusion terms are other words, and it has 90 of the 640 categories of the tail (the test part: 422).
It cannot choose well for the tail.

Recorded (2026-11-26, one CPU, three seeds): accuracy 0.613 and macro-F1 0.480, plain fine-tuning 0.577 and 0.451, the
nearest phrase 0.575 and 0.445 (docs/text2tree.md).

    jaxmodels run text2tree_icd_phrases
    jaxmodels run text2tree_icd_phrases preset=tiny            # under a minute: checks an installation
"""

from configs._text2tree import PRESETS, grids
from train.settings import LoopConfig
from train.text2tree_config import Text2TreeRun, TextDataConfig

__all__ = ["GRIDS", "MINUTES", "NEEDS", "PRESETS", "get_config"]

NEEDS = ("icd_phrases", "all-minilm-l6-v2")
MINUTES: dict[str, float] = {}
GRIDS = grids(without=("db",))


def get_config() -> Text2TreeRun:
    return Text2TreeRun(data=TextDataConfig(source="icd_phrases", length=24), epochs=6, patience=2,
                        loop=LoopConfig(steps=1, evaluate_every=1, save_every=700))
