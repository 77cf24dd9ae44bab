"""Classifies texts of your own by codes of a label tree (ICD, MeSH), with Text2Tree (Yan et al. 2023).

A CSV with a column of texts and one of codes is all it needs: the tree is read off the codes, or taken from a table.
The report shows macro-F1 beside TF-IDF, for rare, middling and frequent codes. method.name=plain (focal, mixup, ...)
trains what it is compared with.

    jaxmodels run text2tree data.path=notes.csv data.text=note data.labels=codes
    jaxmodels run text2tree data.path=notes.csv method.name=plain
"""

from train.text2tree_config import Text2TreeRun, TextDataConfig

PRESETS: dict[str, dict[str, object]] = {
    "tiny": {
        "encoder.name": "cnn", "encoder.words": 400, "encoder.filters": 8, "data.length": 32, "data.batch": 16,
        "data.limit": 64, "epochs": 2, "bootstrap": 100,
    },
}
NEEDS = ()
MINUTES: dict[str, float] = {}


def get_config() -> Text2TreeRun:
    return Text2TreeRun(data=TextDataConfig())
