"""Between Hugging Face's names and configs and ours: EsmForMaskedLM and its kin, and RoBERTa."""

import functools
import json
from typing import Any

import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.esm.alphabet import CLS, EOS, MASK, PAD, TOKENS
from jaxmodels.esm.config import EsmConfig
from jaxmodels.hub.config_values import check
from jaxmodels.hub.entries import (
    Entry,
    Source,
    heads_in,
    heads_in_back,
    heads_out,
    heads_out_back,
    transpose,
)

MODEL_TYPES = frozenset(("esm", "roberta"))
_NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_KINDS = {  # what config.json may hold -> the keys that hold it
    "a positive integer": (*_NEEDED, "max_position_embeddings", "num_labels"),
    "a positive number": ("layer_norm_eps", "rope_theta"),
    "true or false": ("token_dropout", "emb_layer_norm_before"),
    "an object": ("rope_parameters", "id2label"),
    "a list": ("architectures",),
    "an integer": ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id"),
}
_NAMES = {"esm": "Esm", "roberta": "Roberta"}


def config_from_hf(hf: dict[str, Any]) -> EsmConfig:
    """A config.json as EsmConfig; the heads are those that its ``architectures`` name. `prepare` looks at the tensors.

    UserError names what is missing or not supported.
    """
    hf = {key: value for key, value in hf.items() if value is not None}
    family = str(hf.get("model_type", "esm"))
    if family not in MODEL_TYPES:
        raise UserError(f"model_type {family!r} is not one that the encoder reads; supported: "
                        f"{', '.join(sorted(MODEL_TYPES))}")
    check(dict.fromkeys(_NEEDED) | hf, _KINDS)
    check(hf.get("rope_parameters", {}), _KINDS)
    read = ("pad_token_id", "mask_token_id") if hf.get("token_dropout") else ("pad_token_id",)
    for key in read:  # rows of the embedding, and of tables that follow it
        if not 0 <= hf.get(key, 0) < hf["vocab_size"]:
            raise UserError(f"config.json: {key} is {hf[key]}, vocab_size {hf['vocab_size']}; it must be one of its "
                            "tokens; fetch the model's own config.json")
    if hf["num_hidden_layers"] > 10_000:  # each costs memory before the weights are looked at
        raise UserError(f"num_hidden_layers {hf['num_hidden_layers']} is over the limit of 10000; fetch the model's "
                        "own config.json")
    for key in ("is_folding_model", "is_decoder", "add_cross_attention"):
        if hf.get(key):
            raise UserError(f"config.json: {key} is set; only encoders are read, without a folding trunk")
    position = str(hf.get("position_embedding_type", "absolute"))
    if position not in ("absolute", "rotary"):
        raise UserError(f"config.json: position_embedding_type {position!r} is not supported; supported: absolute, "
                        "rotary")
    if family == "roberta" and hf.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"config.json: hidden_act {hf['hidden_act']!r} is not supported; supported: gelu")
    known = hf["vocab_size"] == len(TOKENS)  # else the ids of the special tokens are the file's to tell
    token_dropout = family == "esm" and bool(hf.get("token_dropout", False))  # transformers' default
    if token_dropout and not known and "mask_token_id" not in hf:
        raise UserError(f"config.json has no mask_token_id, which token_dropout needs with a vocabulary of "
                        f"{hf['vocab_size']} tokens; add it")
    heads = _heads(hf)
    ours = _ours(hf)
    return EsmConfig(
        d_model=hf["hidden_size"], num_heads=hf["num_attention_heads"],
        ffn_widths=tuple(ours.get("ffn_widths", [hf["intermediate_size"]] * hf["num_hidden_layers"])),
        vocab_size=hf["vocab_size"], norm_placement="post" if family == "roberta" else "pre",
        position="rotary" if position == "rotary" else "learned",
        embed_norm=family == "roberta" or bool(hf.get("emb_layer_norm_before", False)), token_dropout=token_dropout,
        norm_eps=float(hf.get("layer_norm_eps", 1e-12)),  # transformers' default; the released files say 1e-5
        max_positions=hf.get("max_position_embeddings", 1026 if family == "esm" else 512),
        rope_theta=float(hf.get("rope_theta", (hf.get("rope_parameters") or {}).get("rope_theta", 10_000.0))),
        lm_head=heads["lm_head"], contact_head=family == "esm", classes=heads["classes"],
        pool="cls" if heads["classes"] else ours.get("pool", "mean"), family=family, cls_id=hf.get("bos_token_id", CLS),
        pad_id=hf.get("pad_token_id", PAD), eos_id=hf.get("eos_token_id", EOS),
        mask_id=hf.get("mask_token_id", MASK if known else hf["vocab_size"] - 1))


def _heads(hf: dict[str, Any]) -> dict[str, Any]:
    """What the file's architecture promises; a masked-LM head where it names none."""
    architecture = str((hf.get("architectures") or ["ForMaskedLM"])[0])
    labels = hf.get("id2label")
    count = len(labels) if isinstance(labels, dict) and labels else hf.get("num_labels", 2)
    return {"lm_head": architecture.endswith("ForMaskedLM"),
            "classes": count if architecture.endswith("ForSequenceClassification") else 0}


def _ours(hf: dict[str, Any]) -> dict[str, Any]:
    ours = hf.get("jaxmodels", {})
    widths = ours.get("ffn_widths") if isinstance(ours, dict) else 0
    if widths is not None and (not isinstance(widths, list) or len(widths) != hf["num_hidden_layers"] or not all(
            type(w) is int and w > 0 for w in widths)) or ours.get("pool", "cls") not in ("cls", "mean"):
        raise UserError(f"config.json: jaxmodels is {ours!r:.200}; save the model again")
    return ours


def config_to_hf(config: EsmConfig) -> dict[str, Any]:
    """The config.json that transformers reads; what it cannot express stands under ``jaxmodels``."""
    name = _NAMES[config.family]
    # Of the two classifiers transformers has the one that reads <cls>, and must not take the other for it.
    reads_cls = config.classes and config.pool == "cls"
    kind = "ForSequenceClassification" if reads_cls else "ForMaskedLM" if config.lm_head else "Model"
    hf = {
        "architectures": [name + kind], "model_type": config.family, "vocab_size": config.vocab_size,
        "hidden_size": config.d_model, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "intermediate_size": max(config.ffn_widths),
        "layer_norm_eps": config.norm_eps, "hidden_act": "gelu", "max_position_embeddings": config.max_positions,
        "position_embedding_type": "rotary" if config.position == "rotary" else "absolute",
        "pad_token_id": config.pad_id, "mask_token_id": config.mask_id, "bos_token_id": config.cls_id,
        "eos_token_id": config.eos_id, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "tie_word_embeddings": True, "torch_dtype": config.param_dtype,
    }
    expressed = {"esm": ("pre", config.embed_norm, config.position), "roberta": ("post", True, "learned")}
    if expressed[config.family] != (config.norm_placement, config.embed_norm, config.position) or (
            config.family == "roberta" and config.token_dropout):
        raise UserError(f"no {name} of transformers has norm_placement {config.norm_placement}, position "
                        f"{config.position}, embed_norm {config.embed_norm} and token_dropout {config.token_dropout}; "
                        "family 'esm' is for norm_placement pre, 'roberta' for post with learned positions")
    if config.family == "esm":
        hf |= {"emb_layer_norm_before": config.embed_norm, "token_dropout": config.token_dropout,
               "rope_theta": config.rope_theta}
    else:
        hf["type_vocab_size"] = 1
    if config.classes:
        hf["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.classes)}
        hf["label2id"] = {label: int(i) for i, label in hf["id2label"].items()}
    ours: dict[str, Any] = {}
    if config.classes and config.pool != "cls":
        ours["pool"] = config.pool
    if len(set(config.ffn_widths)) > 1:
        ours["ffn_widths"] = list(config.ffn_widths)
    return hf | ({"jaxmodels": ours} if ours else {})


def entries(config: EsmConfig) -> list[Entry]:
    """Every parameter leaf of ``Esm(config)``: its path in the pure-dict state and the tensors it is made of."""
    V, D, N, H = config.vocab_size, config.d_model, config.num_heads, config.head_dim
    base = config.family
    out: list[Entry] = []

    def matrix(path, name, rows, columns):
        out.append(Entry(path, (rows, columns), (Source(name, (columns, rows), transpose, transpose),)))

    def plain(path, name, *shape):
        out.append(Entry(path, shape, (Source(name, shape),)))

    def norm(path, name):
        plain((*path, "scale"), f"{name}.weight", D)
        plain((*path, "bias"), f"{name}.bias", D)

    plain(("embed",), f"{base}.embeddings.word_embeddings.weight", V, D)
    if config.position == "learned":
        plain(("positions",), f"{base}.embeddings.position_embeddings.weight", config.max_positions, D)
    if config.embed_norm:
        norm(("embed_norm",), f"{base}.embeddings.{'layer_norm' if base == 'esm' else 'LayerNorm'}")
    if config.norm_placement == "pre":
        norm(("norm",), f"{base}.encoder.emb_layer_norm_after")
    for g, (start, stop) in enumerate(config.groups):
        _layer_entries(out, config, g, range(start, stop), D, N, H)
    if config.lm_head:
        matrix(("lm_head", "dense"), "lm_head.dense.weight", D, D)
        plain(("lm_head", "dense_bias"), "lm_head.dense.bias", D)
        norm(("lm_head", "norm"), "lm_head.layer_norm")
        plain(("lm_head", "bias"), "lm_head.bias", V)
    if config.contact_head:
        maps = config.num_layers * N
        out.append(Entry(("contact_head", "weight"), (maps,), (Source(
            f"{base}.contact_head.regression.weight", (1, maps), np.ravel, lambda w: w.reshape(1, -1)),)))
        plain(("contact_head", "bias"), f"{base}.contact_head.regression.bias", 1)
    if config.classes:
        matrix(("classifier", "dense"), "classifier.dense.weight", D, D)
        plain(("classifier", "dense_bias"), "classifier.dense.bias", D)
        matrix(("classifier", "out"), "classifier.out_proj.weight", D, config.classes)
        plain(("classifier", "out_bias"), "classifier.out_proj.bias", config.classes)
    return out


def buffers(config: EsmConfig) -> list[tuple[Entry, np.ndarray]]:
    """Tensors of a saved file that are no parameters of ours: what transformers would otherwise make up."""
    out = []
    if config.position == "rotary" and config.inv_freq is not None and config.rope_inv_freq == "checkpoint":
        value = np.asarray(config.inv_freq, np.float32)
        out.append((Entry(("inv_freq",), value.shape, (Source("esm.rotary_embeddings.inv_freq", value.shape),)), value))
    if config.family == "roberta":  # the table of positions holds it already
        value = np.zeros((1, config.d_model), config.param_dtype)
        name = "roberta.embeddings.token_type_embeddings.weight"
        out.append((Entry(("token_types",), value.shape, (Source(name, value.shape),)), value))
    return out


def files(config: EsmConfig) -> dict[str, str]:
    """The tokenizer that transformers expects beside ESM's weights; none where the vocabulary is another."""
    if config.vocab_size != len(TOKENS) or config.family != "esm":
        return {}
    about = {"tokenizer_class": "EsmTokenizer", "cls_token": "<cls>", "pad_token": "<pad>", "eos_token": "<eos>",
             "unk_token": "<unk>", "mask_token": "<mask>"}
    return {"vocab.txt": "\n".join(TOKENS), "tokenizer_config.json": json.dumps(about, indent=2) + "\n"}


def _layer_entries(out: list[Entry], config: EsmConfig, g: int, layers: range, D: int, N: int, H: int) -> None:
    F = config.ffn_widths[layers[0]]
    first, second = (("attention.LayerNorm", "LayerNorm") if config.family == "esm"
                     else ("attention.output.LayerNorm", "output.LayerNorm"))

    def leaf(path, shape, name, hf_shape=None, *ways):
        sources = tuple(Source(f"{config.family}.encoder.layer.{i}.{name}", hf_shape or shape, *ways) for i in layers)
        out.append(Entry(("groups", g, *path), (len(layers), *shape), sources, lead=(len(layers),)))

    for ours, theirs in (("attention_norm", first), ("ffn_norm", second)):
        leaf((ours, "scale"), (D,), f"{theirs}.weight")
        leaf((ours, "bias"), (D,), f"{theirs}.bias")
    for name in ("query", "key", "value"):
        leaf(("attention", name), (D, N, H), f"attention.self.{name}.weight", (D, D),
             functools.partial(heads_out, shape=(D, N, H)), heads_out_back)
        leaf(("attention", f"{name}_bias"), (N, H), f"attention.self.{name}.bias", (D,),
             functools.partial(np.reshape, shape=(N, H)), np.ravel)
    leaf(("attention", "out"), (N, H, D), "attention.output.dense.weight", (D, D),
         functools.partial(heads_in, shape=(N, H, D)), heads_in_back)
    leaf(("attention", "out_bias"), (D,), "attention.output.dense.bias")
    leaf(("ffn", "up"), (D, F), "intermediate.dense.weight", (F, D), transpose, transpose)
    leaf(("ffn", "up_bias"), (F,), "intermediate.dense.bias")
    leaf(("ffn", "down"), (F, D), "output.dense.weight", (D, F), transpose, transpose)
    leaf(("ffn", "down_bias"), (D,), "output.dense.bias")
