"""Gives PubMed abstracts their MeSH labels, 100 of the second level, with Text2Tree (Yan et al. 2023).

1,861 abstracts to train on, 8.5 labels each. The four lower layers of MiniLM do not move; their states are stored.

Recorded (2026-11-26, one CPU, three seeds): macro-F1 0.470 and P@5 0.698, plain fine-tuning 0.464 and 0.706, TF-IDF
0.444 and 0.692 (docs/text2tree.md).

    jaxmodels run text2tree_mesh
    jaxmodels run text2tree_mesh method.name=plain
    jaxmodels sweep text2tree_mesh grid=methods                # all methods; grid=paper: 16 settings of one
    jaxmodels sweep text2tree_mesh grid=main seeds=3           # those that matter, in the same folder
    jaxmodels run text2tree_mesh preset=tiny                   # under a minute: checks an installation
"""

from configs._text2tree import PRESETS, grids
from train.text2tree_config import Text2TreeRun, TextDataConfig

__all__ = ["GRIDS", "MINUTES", "NEEDS", "PRESETS", "get_config"]

NEEDS = ("mesh_pubmed", "all-minilm-l6-v2")
MINUTES: dict[str, float] = {}
GRIDS = grids(without=("oversampling",))


def get_config() -> Text2TreeRun:
    return Text2TreeRun(data=TextDataConfig(source="mesh_pubmed"))
