"""Text to token ids and back, on the `tokenizers` package, from a model folder or from inside a GGUF file."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmodels.errors import UserError
from jaxmodels.hub.checkpoint import read_json


@dataclass(frozen=True)
class Tokenizer:
    """inner: a tokenizers.Tokenizer. The ids are None where the model has no such token."""

    inner: Any
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    chat_template: str | None = None

    @property
    def vocab_size(self) -> int:
        """Tokens known to the tokenizer, added ones included; a model's V may be larger (padding)."""
        return self.inner.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text. special: add what the model expects around a text (a bos token, for some).

        Special tokens written out in the text ("<|im_start|>") become their ids.
        """
        return self.inner.encode(_encodable(text), add_special_tokens=special).ids

    def encode_batch(self, texts: Iterable[str], special: bool = True) -> list[list[int]]:
        """`encode` of many texts, in parallel."""
        rows = self.inner.encode_batch_fast([_encodable(text) for text in texts], add_special_tokens=special)
        return [row.ids for row in rows]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of some ids; bytes that are not UTF-8 (a character cut in two) read as U+FFFD.

        Ids beyond the tokenizer's own (a model's V is often padded) read as nothing.
        """
        negative = next((i for i in ids if i < 0), None)
        if negative is not None:
            raise UserError(f"token id {negative} is below 0; ids are 0 to {self.vocab_size - 1}")
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token(self, token_id: int) -> str | None:
        """The vocabulary's spelling of an id (byte-level: a leading space reads as "Ġ")."""
        return self.inner.id_to_token(int(token_id))

    def apply_chat(self, messages: Sequence[dict[str, str]], prompt: bool = True) -> str:
        """The text of a conversation in the model's own format; prompt: end where the assistant's answer begins.

        messages: [{"role": "user", "content": "..."}]. Encode the result with special=False: it has its bos token.
        """
        if not self.chat_template:
            raise UserError("this model has no chat template; give plain text, or a model tuned for instructions")
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        tokens = {name: self.token(i) for name, i in names.items() if i is not None}
        return render_chat(self.chat_template, messages, prompt, tokens)

    def files(self) -> dict[str, str]:
        """File name -> text: what a model folder needs for `load_tokenizer` and for transformers to read it back."""
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= {name: self.token(i) for name, i in names.items() if i is not None}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        return {"tokenizer.json": self.inner.to_str(pretty=True),
                "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n"}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model folder (tokenizer.json, tokenizer_config.json), of a file in one, or of a .gguf file."""
    path = Path(path)
    if path.is_dir() and not (path / "tokenizer.json").exists():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) != 1:
            raise UserError(f"{path} has no tokenizer.json; copy it there from the model's home")
        path = ggufs[0]
    if not path.exists():
        raise UserError(f"no tokenizer at {path}; give a model folder with tokenizer.json, or a .gguf file")
    if path.suffix.lower() == ".gguf":
        from jaxmodels.hub.gguf_header import GgufFile
        from jaxmodels.hub.gguf_tokenizer import build

        return build(path, GgufFile(path).metadata)
    return _from_folder(path if path.is_dir() else path.parent)


def has_tokenizer(path: str | Path) -> bool:
    """Whether ``load_tokenizer`` finds one at a model's path; a damaged one counts."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    ggufs = [path] if path.suffix.lower() == ".gguf" else sorted(path.glob("*.gguf"))
    if (folder / "tokenizer.json").exists() and path not in ggufs:
        return True
    if len(ggufs) != 1:
        return False
    from jaxmodels.hub.gguf_header import GgufFile

    return "tokenizer.ggml.tokens" in GgufFile(ggufs[0]).metadata


def _from_folder(folder: Path) -> Tokenizer:
    import tokenizers

    file = folder / "tokenizer.json"
    if not file.exists():
        raise UserError(f"{folder} has no tokenizer.json; copy it there from the model's home")
    try:
        inner = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises bare Exception
        raise UserError(f"{file} is not a tokenizer ({str(error)[:120]}); fetch the file again") from None
    inner.no_padding()
    inner.no_truncation()
    read = {name: read_json(folder / name) if (folder / name).exists() else {} for name in _SIDE_FILES}
    ids = {}
    for kind in ("bos", "eos", "pad"):
        token = next((read[name][f"{kind}_token"] for name in _SIDE_FILES if read[name].get(f"{kind}_token")), None)
        content = token.get("content") if isinstance(token, dict) else token
        ids[kind] = inner.token_to_id(content) if isinstance(content, str) else None
    return Tokenizer(inner, ids["bos"], ids["eos"], ids["pad"], _chat_template(folder, read["tokenizer_config.json"]))


_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json")


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} is not readable text ({error}); fetch the file again") from None
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = next((item.get("template") for item in reversed(template)
                         if isinstance(item, dict) and item.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def render_chat(template: str, messages: Sequence[dict[str, str]], prompt: bool, tokens: dict[str, str | None]) -> str:
    """Run a chat template in jinja2's sandbox (it comes with the weights, so it is not to be trusted)."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise UserError(f"the chat template refuses these messages: {message}")

    extensions = ["jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        compiled = environment.from_string(template)
        return compiled.render(messages=list(messages), add_generation_prompt=prompt, **tokens)
    except UserError:
        raise
    except Exception as error:  # a foreign program: anything may come out of it
        raise UserError(f"the chat template fails ({str(error)[:120]}); give role and content, or plain text") from None


_SURROGATES = re.compile("[\ud800-\udfff]")


def _encodable(text: str) -> str:
    """Lone surrogates (from a file read with errors="surrogateescape") have no UTF-8 and would panic in Rust."""
    return _SURROGATES.sub("\ufffd", text)
