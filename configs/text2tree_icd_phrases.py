"""Finds the ICD-10-CM category of a phrase, one of 1,918, with Text2Tree (Yan et al. 2023).

Trained on the descriptions of the codes (1 to 338 a category), tested on 13,487 inclusion terms.

    jaxmodels run text2tree_icd_phrases
    jaxmodels run text2tree_icd_phrases preset=tiny            # under a minute: checks an installation
"""

from configs._text2tree import PRESETS, grids
from train.text2tree_config import Text2TreeRun, TextDataConfig

__all__ = ["GRIDS", "MINUTES", "NEEDS", "PRESETS", "get_config"]

NEEDS = ("icd_phrases",)
MINUTES: dict[str, float] = {}
GRIDS = grids(without=("db",))


def get_config() -> Text2TreeRun:
    return Text2TreeRun(data=TextDataConfig(source="icd_phrases", length=32))
