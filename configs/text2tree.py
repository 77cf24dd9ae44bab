"""Classifies texts of your own by codes of a label tree (ICD, MeSH), with Text2Tree (Yan et al. 2023).

A CSV with a column of texts and one of codes is all it needs: the tree is read off the codes, or taken from a table.
The report shows macro-F1 beside TF-IDF, for rare, middling and frequent codes. method.name=plain (focal, mixup, ...)
trains what it is compared with.

    jaxmodels run text2tree data.path=notes.csv data.text=note data.labels=codes
    jaxmodels run text2tree data.path=notes.csv method.name=plain
"""

from configs._text2tree import PRESETS, grids
from train.text2tree_config import Text2TreeRun, TextDataConfig

__all__ = ["GRIDS", "MINUTES", "NEEDS", "PRESETS", "get_config"]

NEEDS = ("all-minilm-l6-v2",)
MINUTES: dict[str, float] = {}
GRIDS = grids(without=("db", "oversampling"))


def get_config() -> Text2TreeRun:
    return Text2TreeRun(data=TextDataConfig())
