"""Gives clinical cases their ICD-10-CM categories, those with five training texts, with Text2Tree (Yan et al. 2023).

445 cases to train on, far too few for most of the 230 categories, make 6 steps an epoch; the development part has 55.

Recorded (2026-11-26, one CPU, three seeds): macro-F1 0.234, plain fine-tuning 0.224, TF-IDF of whole texts 0.244; with
data.chunks=4, one seed, 0.304 and 0.289 (docs/text2tree.md).

    jaxmodels run text2tree_codiesp
    jaxmodels run text2tree_codiesp data.source=codiesp:es
    jaxmodels run text2tree_codiesp data.chunks=4              # 512 tokens of a case, not 128: better, and takes longer
    jaxmodels run text2tree_codiesp preset=tiny                # under a minute: checks an installation
"""

from configs._text2tree import PRESETS, grids
from train.text2tree_config import Text2TreeRun, TextDataConfig

__all__ = ["GRIDS", "MINUTES", "NEEDS", "PRESETS", "get_config"]

NEEDS = ("codiesp", "icd_phrases", "all-minilm-l6-v2")  # icd_phrases: the file with the tree
MINUTES: dict[str, float] = {}
GRIDS = grids(without=("oversampling",))


def get_config() -> Text2TreeRun:
    return Text2TreeRun(data=TextDataConfig(source="codiesp", floor=5), epochs=80, patience=15)
