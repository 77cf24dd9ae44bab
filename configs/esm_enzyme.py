"""Fine-tunes an ESM encoder for the top-level EC class of enzymes, and shows three floors beside it.

Trains on enzyme_ec's training part (and, as the easy setting, on homologs of the test enzymes too), chooses by macro-F1
on its validation part, then tests on the test chains, their identity strata (nrpdb_ec) and CARE's two sets. Floors:
the commonest class, logistic regression on composition, the most similar known sequence. See docs/proteins.md.

    jaxmodels run esm_enzyme pretrained=runs/esm_pretrain-0123abcd
    jaxmodels run esm_enzyme                                   # from random weights: what pre-training is worth
    jaxmodels run esm_enzyme preset=tiny                       # under a minute: checks an installation
"""

from train.enzyme_config import EnzymeConfig

PRESETS: dict[str, dict[str, object]] = {
    "tiny": {
        "model.d_model": 32, "model.layers": 2, "model.heads": 2, "data.length": 128, "data.batch": 8,
        "data.limit": 60, "data.external": False, "settings": ("strict",), "bootstrap": 200, "loop.steps": 12,
        "loop.evaluate_every": 6, "loop.save_every": 6,
    },
    "quick": {"loop.steps": 192, "loop.evaluate_every": 48, "settings": ("strict",)},
}
NEEDS = ("enzyme_ec", "nrpdb_ec", "care_task1")
MINUTES: dict[str, float] = {}


def get_config() -> EnzymeConfig:
    return EnzymeConfig()
