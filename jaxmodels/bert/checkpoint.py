"""What is in a BERT checkpoint: names with ``bert.`` in front or not; masked-LM head, pooler, classifier or none."""

import dataclasses

import numpy as np

from jaxmodels.bert.config import BertConfig
from jaxmodels.bert.convert import POSITIONS, TOKEN_TYPES, config_from_hf
from jaxmodels.errors import UserError
from jaxmodels.esm.checkpoint import Named as EsmNamed
from jaxmodels.hub.checkpoint import Checkpoint

_POOLER, _LM_HEAD = "bert.pooler.dense.weight", "cls.predictions.transform.dense.weight"
_CLASSIFIER = "classifier.weight"
_DECODER, _EMBEDDING = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"


class Named(EsmNamed):
    """A checkpoint under the names that `convert.entries` uses, the first token type added to every position."""

    def read(self, name: str) -> np.ndarray:
        value = super().read(name)
        return value + super().read(TOKEN_TYPES)[:1] if name == POSITIONS and TOKEN_TYPES in self._stored else value


def prepare(checkpoint: Checkpoint, *, lm_head: bool | None = None, classes: int | None = None,
            pool: str | None = None) -> tuple[Checkpoint, BertConfig, tuple[str, ...]]:
    """(the checkpoint under our names, its config, the parameters that it lacks and that are asked for).

    Args:
      lm_head: None: as the checkpoint has it; True: a fresh one if it has none; False: left out.
      classes: of the classifier, whose dense layer is the checkpoint's pooler where it has one. None: as the checkpoint
        has it; 0: left out; N: a fresh one if it has none.
      pool: what the classifier reads, ``cls`` or ``mean``; default: as the checkpoint says, else ``cls``.

    Raises UserError for a classifier of another number of classes, and for an output matrix that is not the embedding.
    """
    named = Named(checkpoint, "bert")
    names = set(named.names())
    stored = named.shape(_CLASSIFIER)[0] if _CLASSIFIER in names and _POOLER in names else 0
    if classes and stored and classes != stored:
        raise UserError(f"{named.path} has a classifier of {stored} classes, {classes} are asked for; load with "
                        "classes=0 and train a new one")
    lm_head = _LM_HEAD in names if lm_head is None else lm_head
    if lm_head and _DECODER in names and not np.array_equal(named.read(_DECODER), named.read(_EMBEDDING)):
        raise UserError(f"{named.path}: {_DECODER} differs from {_EMBEDDING}; this model has one matrix for both: tie "
                        "them, or load with lm_head=False")
    classes = stored if classes is None else classes
    config = config_from_hf(checkpoint.config)
    config = dataclasses.replace(config, lm_head=lm_head, classes=classes, pool=pool or config.pool)
    fresh = ["lm_head"] if lm_head and _LM_HEAD not in names else []
    if classes and not stored:
        fresh += ["classifier.out", "classifier.out_bias"] if _POOLER in names else ["classifier"]
    named.hide(r"^bert\.embeddings\.(token_type_embeddings|position_ids)", r"^cls\.seq_relationship",
               r"^cls\.predictions\.decoder")
    if not classes:
        named.hide(r"^bert\.pooler\.", r"^classifier\.")
    if not lm_head:
        named.hide(r"^cls\.")
    return named, config, tuple(fresh)
