"""Gives clinical cases their ICD-10-CM categories, those with five training texts, with Text2Tree (Yan et al. 2023).

445 cases to train on, far too few for most of the 230 categories.

    jaxmodels run text2tree_codiesp
    jaxmodels run text2tree_codiesp data.source=codiesp:es
    jaxmodels run text2tree_codiesp preset=tiny                # under a minute: checks an installation
"""

from train.text2tree_config import Text2TreeRun, TextDataConfig

PRESETS: dict[str, dict[str, object]] = {
    "tiny": {
        "encoder.name": "cnn", "encoder.words": 400, "encoder.filters": 8, "data.length": 32, "data.batch": 16,
        "data.limit": 64, "epochs": 2, "bootstrap": 100,
    },
}
NEEDS = ("codiesp",)
MINUTES: dict[str, float] = {}


def get_config() -> Text2TreeRun:
    return Text2TreeRun(data=TextDataConfig(source="codiesp", floor=5))
