"""BERT (Devlin et al. 2019, arXiv 1810.04805): the encoder of `jaxmodels.esm.model` under BERT's names and sizes.

Text pairs are not supported: the one token type that a single text has is part of the table of positions.
"""

from jaxmodels.bert.config import BertConfig
from jaxmodels.esm.model import Esm


class Bert(Esm):
    """``output, aux = model(tokens)``, int32[B, T], as `Esm`: ``logits`` of the masked-LM head, ``hidden`` states, or
    ``class``, which is BERT's pooler (dense, tanh of [CLS]) and a linear head, float32[B, C]."""

    cfg: BertConfig
