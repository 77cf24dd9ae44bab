"""Gives clinical cases their ICD-10-CM categories, those with five training texts, with Text2Tree (Yan et al. 2023).

445 cases to train on, far too few for most of the 230 categories. They make 6 steps an epoch, and every score begins
at one half. After 6 steps the best threshold still gives all codes to all texts, for a macro-F1 of 0.087 on the
development part; after 24 the scores have fallen to how often codes occur and it is 0.017 (plain, 64 tokens, one
seed), from where it has to climb past the former. The 5 epochs of patience of other tasks, 30 steps, would end the
training there with the model of step 6, so this one has 25, of 150.

    jaxmodels run text2tree_codiesp
    jaxmodels run text2tree_codiesp data.source=codiesp:es
    jaxmodels run text2tree_codiesp data.chunks=8              # whole cases, not their first 128 tokens alone
    jaxmodels run text2tree_codiesp preset=tiny                # under a minute: checks an installation
"""

from configs._text2tree import PRESETS, grids
from train.text2tree_config import Text2TreeRun, TextDataConfig

__all__ = ["GRIDS", "MINUTES", "NEEDS", "PRESETS", "get_config"]

NEEDS = ("codiesp",)
MINUTES: dict[str, float] = {}
GRIDS = grids(without=("oversampling",))


def get_config() -> Text2TreeRun:
    return Text2TreeRun(data=TextDataConfig(source="codiesp", floor=5), epochs=150, patience=25)
