"""Trains a small mixture-of-experts language model from random weights on the source code of Python's library.

Reads the standard library that is on every machine, trains a byte-pair tokenizer on it, holds whole packages out for
validation, packs the rest into rows and trains a decoder with 8 experts in a layer, 2 of them active for a token. The
report shows loss, bits per byte, the load of the experts, throughput, goodput and samples of what the model writes.

    jaxmodels run lm_moe_pretrain                      # about a quarter of an hour on two cores
    jaxmodels run lm_moe_pretrain preset=tiny          # under a minute: checks an installation
    jaxmodels sweep lm_moe_pretrain grid=twins seeds=3                    # against its dense twin
    jaxmodels run lm_moe_pretrain mesh.data=2 mesh.expert=4               # eight devices; several hosts: docs/launch.md
    jaxmodels compile lm_moe_pretrain --topology v5e:2x4 mesh.expert=4    # for a TPU that is not here
"""

from configs._pretrain import PRESETS
from train.pretrain_config import ModelConfig, PretrainConfig
from train.settings import LoopConfig

__all__ = ["GRIDS", "MINUTES", "NEEDS", "PRESETS", "get_config"]

NEEDS = ()
MINUTES: dict[str, float] = {}
GRIDS = {"twins": {"mixture": {}, "dense": {"model.experts": 0}}}  # as many active parameters for each token


def get_config() -> PretrainConfig:
    return PretrainConfig(model=ModelConfig(experts=8, top_k=2), loop=LoopConfig(steps=450))
