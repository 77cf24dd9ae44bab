"""Load and save: safetensors and GGUF under Hugging Face names, tokenizers; never pickle."""

from jaxmodels.hub.checkpoint import Checkpoint, open_checkpoint
from jaxmodels.hub.entries import Entry, Source
from jaxmodels.hub.load import load_arrays, save_arrays
from jaxmodels.hub.resolve import resolve
from jaxmodels.hub.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Checkpoint",
    "Entry",
    "Source",
    "Tokenizer",
    "load_arrays",
    "load_tokenizer",
    "open_checkpoint",
    "resolve",
    "save_arrays",
]
