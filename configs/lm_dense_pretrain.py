"""The dense twin of lm_moe_pretrain: the same text, and as many active parameters for each token.

    jaxmodels run lm_dense_pretrain                    # about ten minutes on two cores
    jaxmodels report RUN1 RUN2                         # compares two runs in one page
"""

from configs._pretrain import PRESETS
from train.pretrain_config import ModelConfig, PretrainConfig
from train.settings import LoopConfig

__all__ = ["MINUTES", "NEEDS", "PRESETS", "get_config"]

NEEDS = ()
MINUTES: dict[str, float] = {}


def get_config() -> PretrainConfig:
    return PretrainConfig(model=ModelConfig(), loop=LoopConfig(steps=450))
