"""Gives PubMed abstracts their MeSH labels, 100 of the second level, with Text2Tree (Yan et al. 2023).

1,861 abstracts to train on, 8.5 labels each. The four lower layers of MiniLM do not move; their states are stored.

    jaxmodels run text2tree_mesh
    jaxmodels run text2tree_mesh method.name=plain
    jaxmodels run text2tree_mesh preset=tiny                   # under a minute: checks an installation
"""

from train.text2tree_config import Text2TreeRun, TextDataConfig

PRESETS: dict[str, dict[str, object]] = {
    "tiny": {
        "encoder.name": "cnn", "encoder.words": 400, "encoder.filters": 8, "data.length": 32, "data.batch": 16,
        "data.limit": 64, "epochs": 2, "bootstrap": 100,
    },
}
NEEDS = ("mesh_pubmed",)
MINUTES: dict[str, float] = {}


def get_config() -> Text2TreeRun:
    return Text2TreeRun(data=TextDataConfig(source="mesh_pubmed"))
