"""A tokenizer rebuilt from the metadata of a GGUF file (keys `tokenizer.ggml.*`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmodels.errors import UserError
from jaxmodels.hub.tokenizer import Tokenizer

# tokenizer.ggml.token_type (llama.cpp, enum llama_token_type)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
LONGEST = 512  # characters of a SentencePiece piece that is cut everywhere to find its merges

_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CASELESS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before byte-pair merging; the names are llama.cpp's `tokenizer.ggml.pre`.

    regex: None is GPT-2's own, built into ByteLevel. bos: whether a bos token is added when the file does not say.
    """

    regex: str | None = None
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    bos: bool = False


PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(single_digits=True),
    "llama-bpe": PreTokenizer(_LLAMA3, ignore_merges=True, bos=True),
    "qwen2": PreTokenizer(_QWEN2, nfc=True),
    "olmo": PreTokenizer(nfc=True),  # OLMo-1 and OLMoE: GPT-NeoX's
    "dbrx": PreTokenizer(_LLAMA3),  # OLMo-2: cl100k's
}


def build(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """Tokenizer of the kinds "gpt2" (byte-level BPE) and "llama" (SentencePiece BPE with byte fallback)."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise UserError(f"{path} carries no tokenizer; load the tokenizer from the model's folder with tokenizer.json")
    for key, item in (("tokens", str), ("merges", str), ("token_type", int), ("scores", float)):
        value = metadata.get(f"tokenizer.ggml.{key}")
        if value is not None and not (isinstance(value, list) and all(type(one) is item for one in value)):
            raise UserError(f"{path}: tokenizer.ggml.{key} is no list of {item.__name__}; convert the model again")
    vocab = {token: index for index, token in enumerate(tokens)}
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    ids = {name: _token_id(path, metadata, key, len(tokens)) for name, key in _IDS.items()}
    if len(types) != len(tokens):
        raise UserError(f"{path}: {len(types)} token types for {len(tokens)} tokens; convert the model again")
    if kind == "gpt2":
        inner, bos = _byte_level(path, metadata, vocab)
    elif kind == "llama":
        inner, bos = _sentencepiece(path, metadata, vocab, tokens, ids["unk"]), True
    else:
        raise UserError(f"{path}: tokenizer kind {kind!r:.80} is not supported; supported: gpt2, llama")
    _add_special(inner, tokens, types)
    if metadata.get("tokenizer.ggml.add_bos_token", bos) and ids["bos"] is not None:
        _prepend(inner, tokens[ids["bos"]], ids["bos"])
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(inner, ids["bos"], ids["eos"], ids["pad"], template if isinstance(template, str) else None)


_IDS = {
    name: f"tokenizer.ggml.{name_in_file}_token_id"
    for name, name_in_file in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items()
}


def _token_id(path: Path, metadata: Mapping[str, Any], key: str, size: int) -> int | None:
    value = metadata.get(key)
    if value is not None and not (type(value) is int and 0 <= value < size):
        raise UserError(f"{path}: {key} is {value}, the vocabulary has {size} tokens; convert the model again")
    return value


def _byte_level(path: Path, metadata: Mapping[str, Any], vocab: dict[str, int]) -> tuple[Any, bool]:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre")
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise UserError(
            f"{path}: pre-tokenizer {pre!r:.80} is not supported; supported: {', '.join(PRE_TOKENIZERS)}; "
            "load the tokenizer from the model's folder with tokenizer.json"
        )
    rule = PRE_TOKENIZERS[pre]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges") or []]
    broken = next((m for m in merges if len(m) != 2 or not {m[0], m[1], "".join(m)} <= vocab.keys()), None)
    if broken is not None:
        raise UserError(f"{path}: the merge {' '.join(broken)!r} is not in the vocabulary; convert the model again")
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=rule.ignore_merges))
    if rule.nfc:
        inner.normalizer = normalizers.NFC()
    steps = []
    if rule.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if rule.regex:
        steps.append(pre_tokenizers.Split(Regex(rule.regex), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.regex is None))
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
    inner.decoder = decoders.ByteLevel()
    return inner, rule.bos


def _sentencepiece(
    path: Path, metadata: Mapping[str, Any], vocab: dict[str, int], tokens: list[str], unknown: int | None
) -> Any:
    """Pieces with scores instead of merges: every split of a piece into two pieces is a merge, best score first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise UserError(f"{path}: a tokenizer of kind llama needs one score per token; convert the model again")
    longest = max(map(len, tokens))
    if longest > LONGEST:  # cutting a piece everywhere takes the square of its length
        raise UserError(f"{path}: a token of {longest} characters is over the limit of {LONGEST}; convert the model "
                        "again")
    merges = []
    for piece, index in vocab.items():
        # Ids, not the halves themselves: of many long pieces the copies would fill the memory.
        splits = ((vocab.get(piece[:cut]), vocab.get(piece[cut:])) for cut in range(1, len(piece)))
        merges += [(scores[index], pair) for pair in sorted(pair for pair in splits if None not in pair)]
    merges.sort(key=lambda item: item[0], reverse=True)
    inner = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(tokens[left], tokens[right]) for _, (left, right) in merges],
            unk_token=tokens[unknown] if unknown is not None else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        spaces.append(decoders.Strip(" ", 1, 0))
    else:
        inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence(spaces)
    return inner


def _add_special(inner: Any, tokens: list[str], types: list[int]) -> None:
    """Control tokens are matched whole in text and skipped by decode(skip_special=True); user-defined only matched."""
    from tokenizers import AddedToken

    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        found = [token for token, its in zip(tokens, types, strict=True) if its == kind and token]
        if found:
            inner.add_tokens([AddedToken(token, special=special, normalized=False) for token in found])


def _prepend(inner: Any, token: str, index: int) -> None:
    from tokenizers import processors

    name = token.replace(":", "")  # the template's own syntax is "token:type"
    template = {"id": name, "ids": [index], "tokens": [token]}
    inner.post_processor = processors.TemplateProcessing(
        single=[name, "$A"], pair=[name, "$A", name, "$B"], special_tokens=[template]
    )
