"""What is in an ESM checkpoint: names brought to one spelling, heads found, doubtful tensors looked at.

Files under these names come from several versions of transformers and from fine-tuning programs: with ``esm.`` in front
or not, LayerNorm.gamma for LayerNorm.weight, rotary frequencies in every layer, once for the model, or under a literal
asterisk (transformers 5.23), the tied output matrix present or left out.
"""

import dataclasses
import re
from typing import Any

import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.esm.config import EsmConfig
from jaxmodels.esm.convert import config_from_hf
from jaxmodels.hub.checkpoint import Checkpoint

# What says nothing, or has been looked at before the parameters are read.
_UNUSED = (r"position_ids$", r"\.pooler\.", r"rotary_embeddings\.inv_freq$", r"^lm_head\.decoder\.(weight|bias)$",
           r"^roberta\.embeddings\.token_type_embeddings\.weight$")
_BARE = ("embeddings.", "encoder.", "pooler.", "contact_head.", "rotary_embeddings.")
_INV_FREQ = re.compile(r"(^|\.)rotary_embeddings\.inv_freq$")
_LAYER = re.compile(r"\.layer\.(\d+)\.")
_HEADS = {"lm_head": "lm_head.dense.weight", "contact_head": "contact_head.regression.weight",
          "classifier": "classifier.out_proj.weight"}  # a tensor that tells a head


class Named:
    """A checkpoint under the names that `convert.entries` uses."""

    def __init__(self, inner: Checkpoint, family: str):
        self.inner, self.path, self.config, self.metadata = inner, inner.path, inner.config, inner.metadata
        self._stored: dict[str, str] = {}
        self._hidden: tuple[str, ...] = ()
        for name in inner.names():
            ours = f"{family}.{name}" if name.startswith(_BARE) else name
            ours = re.sub(r"(LayerNorm|layer_norm\w*)\.gamma$", r"\1.weight", ours)
            ours = re.sub(r"(LayerNorm|layer_norm\w*)\.beta$", r"\1.bias", ours)
            if ours in self._stored:
                raise UserError(f"{inner.path} holds the tensor {ours} twice, as {self._stored[ours]} and {name}; "
                                "remove one of them")
            self._stored[ours] = name

    def hide(self, *patterns: str) -> None:
        """Leaves tensors out of `names`, so that nobody is warned of them."""
        self._hidden += patterns

    def names(self) -> list[str]:
        return [name for name in self._stored if not any(re.search(pattern, name) for pattern in self._hidden)]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.inner.shape(self._stored[name])

    def dtype(self, name: str) -> np.dtype:
        return self.inner.dtype(self._stored[name])

    def read(self, name: str) -> np.ndarray:
        value = self.inner.read(self._stored[name])
        # RoBERTa adds the one row of its token types to every position: the table of positions takes it in.
        if name == "roberta.embeddings.position_embeddings.weight" and _TOKEN_TYPES in self._stored:
            value = value + self.inner.read(self._stored[_TOKEN_TYPES])[:1]
        return value


_TOKEN_TYPES = "roberta.embeddings.token_type_embeddings.weight"


def prepare(checkpoint: Checkpoint, *, lm_head: bool | None = None, contact_head: bool | None = None,
            classes: int | None = None, pool: str | None = None,
            rope_inv_freq: str = "checkpoint") -> tuple[Checkpoint, EsmConfig, tuple[str, ...]]:
    """(the checkpoint under our names, its config, the heads that it lacks and that are asked for).

    Args:
      lm_head, contact_head: None: as the checkpoint has it; True: a fresh one if it has none; False: left out.
      classes: of the classifier. None: as the checkpoint has it; 0: left out; N: a fresh one if it has none.
      pool: what the classifier reads, ``mean`` or ``cls``; default: as the checkpoint says, ``mean`` for a fresh one.
      rope_inv_freq: ``checkpoint`` or ``exact``, see EsmConfig.

    Raises UserError for a head that the architecture promises and the tensors lack (unless told what to do), for a
    classifier of another number of classes, for layers that turn differently, and for an output matrix that is not the
    embedding.
    """
    config = config_from_hf(checkpoint.config)
    named = Named(checkpoint, config.family)
    names, fresh = set(named.names()), []
    config = dataclasses.replace(config, rope_inv_freq=rope_inv_freq)
    _check_tied(named, config.family, names)
    changes: dict[str, Any] = {}
    if config.position == "rotary" and config.rope_inv_freq == "checkpoint":
        changes["inv_freq"] = _frequencies(named, config)
    for head, wanted in (("lm_head", lm_head), ("contact_head", contact_head)):
        present = _HEADS[head] in names or f"{config.family}.{_HEADS[head]}" in names
        if wanted is None and head == "lm_head" and config.lm_head and not present:
            raise UserError(f"{named.path}: its config.json promises a masked-LM head, its tensors hold none; load it "
                            "with lm_head=False to do without, or lm_head=True for a fresh one to be trained")
        changes[head] = present if wanted is None else wanted
        if not changes[head]:
            named.hide(rf"^(\w+\.)?{head}\.")
        if wanted and not present:
            fresh.append(head)
    changes |= _classifier(named, config, names, classes, pool)
    if changes["classes"] and _HEADS["classifier"] not in names:
        fresh.append("classifier")
    if changes["classes"] == 0 and classes == 0:
        named.hide(r"^classifier\.")
    if config.position == "rotary":  # transformers stored a table that nothing reads
        named.hide(r"position_embeddings\.weight$")
    named.hide(*_UNUSED)
    return named, dataclasses.replace(config, **changes), tuple(fresh)


def _classifier(named: Named, config: EsmConfig, names: set[str], classes, pool) -> dict[str, Any]:
    stored = named.shape(_HEADS["classifier"])[0] if _HEADS["classifier"] in names else None
    if classes is None:
        if config.classes and stored is None:
            raise UserError(f"{named.path}: its config.json promises a sequence classifier, its tensors hold none; load"
                            " it with classes=0 to do without, or classes=N for a fresh one to be trained")
        classes = stored or 0
    elif type(classes) is not int or classes < 0:
        raise UserError(f"classes {classes!r} must be an integer, 0 for no classifier")
    elif stored is not None and classes not in (0, stored):
        raise UserError(f"{named.path} has a classifier of {stored} classes, {classes} are asked for; leave classes "
                        "out to load it, or load with classes=0 and train a new one")
    # A file that says nothing about the pool comes from transformers, and means <cls>.
    told = config.classes or "pool" in (named.config.get("jaxmodels") or {})
    kept = (config.pool if told else "cls") if stored is not None and classes else "mean"
    return {"classes": classes, "pool": pool or kept}


def _frequencies(named: Named, config: EsmConfig) -> tuple[float, ...] | None:
    """The rotary frequencies that the file stores, the same for all layers; None if it stores none."""
    first = None
    for name in sorted(filter(_INV_FREQ.search, named.names()), key=_layer_number):
        value = np.asarray(named.read(name), np.float64)
        if value.shape != (config.head_dim // 2,) or not np.isfinite(value).all():
            raise UserError(f"{named.path}: tensor {name} of shape {value.shape} is not {config.head_dim // 2} "
                            "frequencies; load with rope_inv_freq='exact' to compute them")
        if first is None:
            first = name, value
        elif not np.array_equal(value, first[1]):
            apart = np.abs(value - first[1]).max()
            raise UserError(f"{named.path}: {first[0]} and {name} differ by up to {apart:.3g}; all layers "
                            "must turn alike: load with rope_inv_freq='exact' to compute the frequencies")
    return None if first is None else tuple(first[1].tolist())


def _layer_number(name: str) -> int:
    found = _LAYER.search(name)
    return int(found[1]) if found else -1


def _check_tied(named: Named, family: str, names: set[str]) -> None:
    pairs = (("lm_head.decoder.weight", f"{family}.embeddings.word_embeddings.weight"),
             ("lm_head.decoder.bias", "lm_head.bias"))
    for second, first in pairs:
        if second in names and first in names:
            a, b = named.read(second), named.read(first)
            if a.shape != b.shape or not np.array_equal(a, b):
                raise UserError(f"{named.path}: {second} differs from {first}; these models have one matrix for both, "
                                "so it cannot be loaded without changing what it computes: tie them, or remove the "
                                "former from the file")
