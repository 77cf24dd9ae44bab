"""Finds the ICD-10-CM category of a phrase, one of 1,918, with Text2Tree (Yan et al. 2023).

Trained on the descriptions of the codes (1 to 338 a category), tested on 13,487 inclusion terms.

    jaxmodels run text2tree_icd_phrases
    jaxmodels run text2tree_icd_phrases preset=tiny            # under a minute: checks an installation
"""

from train.text2tree_config import Text2TreeRun, TextDataConfig

PRESETS: dict[str, dict[str, object]] = {
    "tiny": {
        "encoder.name": "cnn", "encoder.words": 400, "encoder.filters": 8, "data.length": 32, "data.batch": 16,
        "data.limit": 64, "epochs": 2, "bootstrap": 100,
    },
}
NEEDS = ("icd_phrases",)
MINUTES: dict[str, float] = {}


def get_config() -> Text2TreeRun:
    return Text2TreeRun(data=TextDataConfig(source="icd_phrases", length=32))
