"""jaxmodels: find out which parts of a network do the work, and act on it.

    import jaxmodels
    model = jaxmodels.load("smollm2-135m-instruct")
    logits, aux = model(tokens, taps=jaxmodels.Taps(record=("ffn.hidden",)))

Everything is imported when it is first used, so ``import jaxmodels`` costs nothing.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "load": "jaxmodels.hub.models", "save": "jaxmodels.hub.models",
    "split": "jaxmodels.experts.models", "prune": "jaxmodels.experts.models",
    "Taps": "jaxmodels.taps", "Decoder": "jaxmodels.decoder.model", "DecoderConfig": "jaxmodels.decoder.config",
    "Esm": "jaxmodels.esm.model", "EsmConfig": "jaxmodels.esm.config",
    "Bert": "jaxmodels.bert.model", "BertConfig": "jaxmodels.bert.config",
    "UserError": "jaxmodels.errors",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'jaxmodels' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__():
    return sorted(__all__)
