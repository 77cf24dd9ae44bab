"""Between Hugging Face's names and configs and ours, for every family of the decoder."""

import dataclasses
import functools
from typing import Any

import numpy as np

from jaxmodels.decoder.config import DecoderConfig, ExpertConfig
from jaxmodels.errors import UserError
from jaxmodels.experts.module import router_shapes
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
from jaxmodels.layers.rotary import RopeConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "olmo2": "Olmo2ForCausalLM", "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM", "olmoe": "OlmoeForCausalLM",
}
MODEL_TYPES = frozenset(ARCHITECTURES)
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
                "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_ROPE_FIELDS = {  # Hugging Face's name -> ours
    "factor": "factor", "original_max_position_embeddings": "original_max_positions",
    "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor", "beta_fast": "beta_fast",
    "beta_slow": "beta_slow", "attention_factor": "attention_factor", "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim", "truncate": "truncate",
}
_ROPE_WRITTEN = {
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale",
             "mscale_all_dim", "truncate"),
}
_DEFAULTS = {  # transformers' own for keys that a config.json leaves out, where they differ from Llama's
    "olmo2": {"rms_norm_eps": 1e-5}, "olmoe": {"rms_norm_eps": 1e-5, "num_experts_per_tok": 8},
    "mixtral": {"rms_norm_eps": 1e-5, "rope_theta": 1e6}, "qwen3_moe": {"num_experts_per_tok": 8},
    "mistral": {"sliding_window": 4096},
}
_ROPE_KINDS = tuple(_ROPE_WRITTEN)
_NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_KINDS = {  # what config.json may hold -> the keys that hold it
    "a positive integer": (*_NEEDED, "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window",
                           "num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
                           "decoder_sparse_step", "original_max_position_embeddings"),
    "a positive number": ("rms_norm_eps", "rope_theta", "clip_qkv", "factor", "low_freq_factor", "high_freq_factor",
                          "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
    "true or false": ("attention_bias", "mlp_bias", "tie_word_embeddings", "norm_topk_prob", "use_sliding_window",
                      "truncate"),
    "an object": ("rope_parameters", "rope_scaling", "jaxmodels"),
    "a list": ("layer_types",),
    "a list of integers": ("mlp_only_layers",),
    "an integer": ("bos_token_id", "pad_token_id", "max_window_layers"),
}
_NOT_WRITTEN = ("dtype", "param_dtype", "scan_layers", "remat")  # how a model runs, not what it is


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """A config.json as DecoderConfig. Reads transformers' 4.x and 5.x spellings, and the ``jaxmodels`` key that
    ``jaxmodels.save`` adds for split and pruned models. UserError names what is missing or not supported."""
    family = str(hf.get("model_type"))
    if family not in MODEL_TYPES:
        raise UserError(f"model_type {family!r} is not one that the decoder reads; supported: "
                        f"{', '.join(sorted(MODEL_TYPES))}")
    # A key that is null has no default: no sliding_window, say.
    hf = {key: value for key, value in (_DEFAULTS.get(family, {}) | hf).items() if value is not None}
    check(hf, _KINDS)
    missing = [k for k in _NEEDED if k not in hf]
    if missing:
        raise UserError(f"config.json has no {missing[0]!r}; fetch the model's own config.json")
    layers, heads = hf["num_hidden_layers"], hf["num_attention_heads"]
    if layers > 10_000:  # each costs memory before the weights are looked at
        raise UserError(f"num_hidden_layers {layers} is over the limit of 10000; fetch the model's own config.json")
    kv_heads = hf.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise UserError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    if head_dim % 2:
        raise UserError(f"head_dim {head_dim} is odd, and rotary positions turn pairs; check config.json")
    activation = _ACTIVATIONS.get(str(hf.get("hidden_act", "silu")))
    if activation is None:
        raise UserError(f"hidden_act {hf['hidden_act']!r} is not supported; supported: {', '.join(_ACTIVATIONS)}")
    experts, expert_layers = _experts(family, hf, layers)
    width = hf["intermediate_size"]
    if experts is not None:
        expert_width = hf.get("moe_intermediate_size", width)
        widths = tuple(expert_width if expert_layers is None or e else width
                       for e in expert_layers or (True,) * layers)
    else:
        widths = (width,) * layers
    eos = hf.get("eos_token_id")
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if any(type(i) is not int or abs(i) >= 2**31 for i in eos):
        raise UserError(f"config.json: eos_token_id is {eos!r:.80}; an integer or a list of integers is needed")
    config = DecoderConfig(
        vocab_size=hf["vocab_size"], d_model=hf["hidden_size"], num_heads=heads, num_kv_heads=kv_heads,
        head_dim=head_dim, ffn_widths=widths, activation=activation, rope=_rope(hf),
        norm_eps=float(hf.get("rms_norm_eps", 1e-6)), max_positions=hf.get("max_position_embeddings", 2048),
        windows=_windows(family, hf, layers),
        qkv_bias=family == "qwen2" or bool(hf.get("attention_bias", False)),
        out_bias=family != "qwen2" and bool(hf.get("attention_bias", False)),
        mlp_bias=bool(hf.get("mlp_bias", False)),
        qk_norm={"qwen3": "head", "qwen3_moe": "head", "olmo2": "full", "olmoe": "full"}.get(family),
        norm_placement="post" if family == "olmo2" else "pre",
        clip_qkv=float(hf["clip_qkv"]) if "clip_qkv" in hf else None,
        tied=bool(hf.get("tie_word_embeddings", False)), experts=experts, expert_layers=expert_layers, family=family,
        bos_id=hf.get("bos_token_id"), pad_id=hf.get("pad_token_id"),
        eos_ids=tuple(eos))
    return _with_ours(config, hf.get("jaxmodels", {}))


def _with_ours(config: DecoderConfig, ours: dict[str, Any]) -> DecoderConfig:
    if "ffn_widths" in ours:
        widths = ours["ffn_widths"]
        if not isinstance(widths, list) or len(widths) != config.num_layers or not all(
                type(w) is int and w > 0 for w in widths):
            raise UserError(f"config.json: ffn_widths is {widths!r:.200}; {config.num_layers} positive integers are "
                            "needed, one a layer; prune the model again")
        config = dataclasses.replace(config, ffn_widths=tuple(ours["ffn_widths"]))
    if "experts" in ours:
        fields = {f.name: f.type for f in dataclasses.fields(ExpertConfig)}
        given = ours["experts"]
        if not isinstance(given, dict) or any(type(v) is not fields.get(k) for k, v in given.items()) or not (
                {"num_experts", "top_k", "router"} <= given.keys()):
            raise UserError(f"config.json: jaxmodels.experts is {given!r:.200}; split the model again")
        if given["router"] == "softmax":  # trained experts are the family's own, whose number `_experts` limits
            raise UserError("config.json: jaxmodels.experts has the router softmax, which no split model has; split "
                            "the model again")
        config = dataclasses.replace(config, experts=ExpertConfig(**given))
        E = config.experts.num_experts
        bad = [w for w in config.ffn_widths if E < 1 or w % E]
        if bad:
            raise UserError(f"config.json splits a feed-forward width of {bad[0]} into {E} experts, which does not "
                            "divide it; split the model again")
        config = dataclasses.replace(config, ffn_widths=tuple(w // E for w in config.ffn_widths))
    if "balance_bias" in ours:
        if type(ours["balance_bias"]) is not bool or config.experts is None:
            raise UserError(f"config.json: jaxmodels.balance_bias is {ours['balance_bias']!r:.80}; true or false is "
                            "needed, in a model with trained experts; save the model again")
        config = dataclasses.replace(
            config, experts=dataclasses.replace(config.experts, balance_bias=ours["balance_bias"]))
    return dataclasses.replace(config, down_bias=bool(ours.get("down_bias", config.down_bias)))


def _experts(family: str, hf: dict[str, Any], layers: int):
    if family not in ("mixtral", "qwen3_moe", "olmoe"):
        return None, None
    step, dense = hf.get("decoder_sparse_step", 1) or 1, set(hf.get("mlp_only_layers") or ())
    sparse = tuple((i + 1) % step == 0 and i not in dense for i in range(layers)) if family == "qwen3_moe" else None
    if sparse and not any(sparse):
        return None, None
    count = hf.get("num_local_experts") or hf.get("num_experts")
    if not count:
        raise UserError(f"config.json of a {family} model has no num_experts; fetch the model's own config.json")
    if count * layers > 1_000_000:  # each is listed before the weights are looked at
        raise UserError(f"config.json: {count} experts in {layers} layers are over the limit of a million; fetch the "
                        "model's own config.json")
    renormalise = True if family == "mixtral" else bool(hf.get("norm_topk_prob", False))
    experts = ExpertConfig(num_experts=count, top_k=hf.get("num_experts_per_tok", 2), renormalise=renormalise)
    return experts, None if sparse is None or all(sparse) else sparse


def _rope(hf: dict[str, Any]) -> RopeConfig:
    """``rope_theta`` and ``rope_scaling`` (transformers 4.x) or ``rope_parameters`` (5.x)."""
    given = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    parameters = {key: value for key, value in given.items() if value is not None}
    check(parameters, _KINDS)
    theta = parameters.get("rope_theta", hf.get("rope_theta", 10_000.0))
    kind = str(parameters.get("rope_type", parameters.get("type", "default")))
    if parameters.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1)) != 1:
        raise UserError("config.json: partial_rotary_factor is not supported; every dimension of a head is turned")
    if kind not in _ROPE_KINDS:
        raise UserError(f"rope type {kind!r} is not supported; supported: {', '.join(_ROPE_KINDS)}")
    fields = {ours: parameters[name] if name in ("truncate", "original_max_position_embeddings")
              else float(parameters[name])
              for name, ours in _ROPE_FIELDS.items() if name in parameters}
    if kind != "default" and "factor" not in fields:
        raise UserError(f"config.json: rope type {kind!r} has no factor; fetch the model's own config.json")
    if fields.get("low_freq_factor", 1.0) >= fields.get("high_freq_factor", 4.0):
        raise UserError(f"config.json: rope's low_freq_factor {fields.get('low_freq_factor', 1.0)} must be below its "
                        f"high_freq_factor {fields.get('high_freq_factor', 4.0)}; fetch the model's own config.json")
    if kind == "yarn" and theta <= 1:  # its range of dimensions is a logarithm to this base
        raise UserError(f"config.json: rope_theta {theta} must be above 1 for rope type 'yarn'; fetch the model's own "
                        "config.json")
    if kind in ("llama3", "yarn"):
        fields.setdefault("original_max_positions", hf.get("original_max_position_embeddings")
                          or hf.get("max_position_embeddings", 2048))
    if kind == "default":
        fields = {}
    return RopeConfig(theta=float(theta), kind=kind, **fields)


def _windows(family: str, hf: dict[str, Any], layers: int):
    window = hf.get("sliding_window")
    if window is None or family not in ("mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"):
        return None
    if family.startswith("qwen"):
        if not hf.get("use_sliding_window", False):
            return None
        if family != "qwen3_moe":
            types = hf.get("layer_types") or ["sliding_attention" if i >= hf.get("max_window_layers", 28)
                                              else "full_attention" for i in range(layers)]
            if len(types) != layers:
                raise UserError(f"config.json lists {len(types)} layer_types for {layers} layers; fetch the model's "
                                "own config.json")
            windows = tuple(window if t == "sliding_attention" else None for t in types)
            return windows if any(windows) else None
    return (window,) * layers


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json that transformers reads; what it cannot express stands under ``jaxmodels``.

    UserError for a setting that the family does not have: the file would be read back as another model."""
    family, experts = config.family, config.experts
    trained = experts is not None and experts.router == "softmax"
    split = experts is not None and not trained
    if trained and not any(map(config.has_experts, range(config.num_layers))):
        raise UserError("no layer of this configuration has experts; set experts and expert_layers to None")
    widths = tuple(w * experts.num_experts for w in config.ffn_widths) if split else config.ffn_widths
    dense = [w for i, w in enumerate(widths) if split or not config.has_experts(i)]
    rope: dict[str, Any] = {"rope_type": config.rope.kind, "rope_theta": config.rope.theta}
    if config.rope.kind != "default":
        rope |= {name: getattr(config.rope, _ROPE_FIELDS[name]) for name in _ROPE_WRITTEN[config.rope.kind]
                 if getattr(config.rope, _ROPE_FIELDS[name]) is not None}
    hf: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]], "model_type": family, "vocab_size": config.vocab_size,
        "hidden_size": config.d_model, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "intermediate_size": max(dense or widths), "rms_norm_eps": config.norm_eps,
        "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation),
        "max_position_embeddings": config.max_positions, "tie_word_embeddings": config.tied,
        "attention_bias": config.out_bias, "rope_theta": config.rope.theta, "rope_parameters": rope,
        "bos_token_id": config.bos_id, "pad_token_id": config.pad_id, "torch_dtype": config.param_dtype,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None,
    }
    if config.rope.kind != "default":
        hf["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if family == "llama":
        hf["mlp_bias"] = config.mlp_bias
    if config.clip_qkv is not None:
        hf["clip_qkv"] = config.clip_qkv
    if any(w is not None for w in config.windows or ()):
        sliding = [w is not None for w in config.windows]
        hf["sliding_window"] = next(w for w in config.windows if w is not None)
        if family.startswith("qwen"):
            hf["use_sliding_window"] = True
            hf["max_window_layers"] = 0 if family == "qwen3_moe" else sliding.index(True)
            if family != "qwen3_moe":
                hf["layer_types"] = ["sliding_attention" if s else "full_attention" for s in sliding]
    else:
        hf["sliding_window"] = None
    if trained:
        hf["num_local_experts" if family == "mixtral" else "num_experts"] = experts.num_experts
        hf["num_experts_per_tok"] = experts.top_k
        if family != "mixtral":
            hf["norm_topk_prob"] = experts.renormalise
        if family == "qwen3_moe":
            sparse = [config.has_experts(i) for i in range(config.num_layers)]
            hf["moe_intermediate_size"] = config.ffn_widths[sparse.index(True)]
            hf["decoder_sparse_step"] = 1
            hf["mlp_only_layers"] = [i for i, s in enumerate(sparse) if not s]
    elif family == "qwen3_moe":  # transformers builds experts where it is not told otherwise
        hf["mlp_only_layers"] = list(range(config.num_layers))
    ours: dict[str, Any] = {}
    if split:
        ours["experts"] = {k: getattr(experts, k) for k in ("num_experts", "top_k", "router", "renormalise", "shared",
                                                            "block")}
    if trained and experts.balance_bias:
        ours["balance_bias"] = True
    if not trained and len(set(widths)) > 1:
        ours["ffn_widths"] = list(widths)
    if config.down_bias and not config.mlp_bias:
        ours["down_bias"] = True
    hf |= {"jaxmodels": ours} if ours else {}
    _check_expressed(config, config_from_hf(hf))
    return hf


def _check_expressed(config: DecoderConfig, back: DecoderConfig) -> None:
    """``back`` is what a reader makes of the file that is written for ``config``."""
    def comparable(cfg: DecoderConfig) -> dict[str, Any]:
        frequencies, factor = cfg.rope.frequencies(cfg.head_dim)
        return vars(cfg) | {
            "rope": (*frequencies.tolist(), factor),
            "expert_layers": [cfg.has_experts(i) for i in range(cfg.num_layers)],
            "windows": cfg.windows or (None,) * cfg.num_layers,
            "down_bias": cfg.has_down_bias} | dict.fromkeys(_NOT_WRITTEN)

    wanted, got = comparable(config), comparable(back)
    lost = next((name for name in wanted if wanted[name] != got[name]), None)
    if lost is not None:
        raise UserError(f"a {config.family} model has no {lost} {getattr(config, lost)!r:.80}, and would be read back "
                        f"with {getattr(back, lost)!r:.80}; set family to one that has it ({', '.join(ARCHITECTURES)})")


def entries(config: DecoderConfig) -> list[Entry]:
    """Every parameter leaf of ``Decoder(config)``: its path in the pure-dict state and the tensors it is made of."""
    V, D, N, K, H = config.vocab_size, config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
    out = [_entry(("embed",), (V, D), "model.embed_tokens.weight"),
           _entry(("norm", "scale"), (D,), "model.norm.weight")]
    if not config.tied:
        out.append(Entry(("head",), (D, V), (Source("lm_head.weight", (V, D), transpose, transpose),)))
    first, second = (("input_layernorm", "post_attention_layernorm") if config.norm_placement == "pre"
                     else ("post_attention_layernorm", "post_feedforward_layernorm"))
    norm_widths = {"head": (H, H), "full": (N * H, K * H)}.get(config.qk_norm)
    for g, (start, stop) in enumerate(config.groups):
        layers = range(start, stop)

        def leaf(path, shape, name, hf_shape=None, to_ours=None, to_hf=None, dtype=None, g=g, layers=layers):
            sources = tuple(_source(f"model.layers.{i}.{name}", shape, hf_shape, to_ours, to_hf) for i in layers)
            out.append(Entry(("groups", g, *path), (len(layers), *shape), sources, (len(layers),), dtype))

        leaf(("attention_norm", "scale"), (D,), f"{first}.weight")
        leaf(("ffn_norm", "scale"), (D,), f"{second}.weight")
        for ours, theirs, n in (("query", "q", N), ("key", "k", K), ("value", "v", K)):
            leaf(("attention", ours), (D, n, H), f"self_attn.{theirs}_proj.weight", (n * H, D),
                 functools.partial(heads_out, shape=(D, n, H)), heads_out_back)
            if config.qkv_bias:
                leaf(("attention", f"{ours}_bias"), (n, H), f"self_attn.{theirs}_proj.bias", (n * H,),
                     functools.partial(np.reshape, shape=(n, H)), np.ravel)
        leaf(("attention", "out"), (N, H, D), "self_attn.o_proj.weight", (D, N * H),
             functools.partial(heads_in, shape=(N, H, D)), heads_in_back)
        if config.out_bias:
            leaf(("attention", "out_bias"), (D,), "self_attn.o_proj.bias")
        if norm_widths:
            leaf(("attention", "query_norm", "scale"), (norm_widths[0],), "self_attn.q_norm.weight")
            leaf(("attention", "key_norm", "scale"), (norm_widths[1],), "self_attn.k_norm.weight")
        _ffn_entries(config, start, layers, leaf, out, g)
    return out


def _ffn_entries(config: DecoderConfig, start: int, layers: range, leaf, out: list[Entry], g: int) -> None:
    D, F = config.d_model, config.ffn_widths[start]
    if not config.has_experts(start):
        for ours in ("gate", "up"):
            leaf(("ffn", ours), (D, F), f"mlp.{ours}_proj.weight", (F, D), transpose, transpose)
            if config.mlp_bias:
                leaf(("ffn", f"{ours}_bias"), (F,), f"mlp.{ours}_proj.bias")
        leaf(("ffn", "down"), (F, D), "mlp.down_proj.weight", (D, F), transpose, transpose)
    elif config.experts.router != "softmax":
        # A split layer is stored as the dense layer with its neurons in expert order: transformers reads it too.
        E = config.experts.num_experts
        for ours in ("gate", "up"):
            leaf(("ffn", ours), (E, D, F), f"mlp.{ours}_proj.weight", (E * F, D),
                 functools.partial(_split_columns, experts=E), _merge_columns)
            if config.mlp_bias:
                leaf(("ffn", f"{ours}_bias"), (E, F), f"mlp.{ours}_proj.bias", (E * F,),
                     functools.partial(np.reshape, shape=(E, F)), np.ravel)
        leaf(("ffn", "down"), (E, F, D), "mlp.down_proj.weight", (D, E * F),
             functools.partial(_split_rows, experts=E), _merge_rows)
        for name, shape in router_shapes(config.experts.router, D, E, config.experts.shared,
                                         bias=config.mlp_bias).items():
            leaf(("ffn", "router", name), shape, f"mlp.router.{name}")
    else:
        E, n = config.experts.num_experts, len(layers)
        prefix, names = (("block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}) if config.family == "mixtral"
                         else ("mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}))
        leaf(("ffn", "router", "weight"), (D, E), f"{prefix}.gate.weight", (E, D), transpose, transpose)
        if config.experts.balance_bias:  # a tensor of our own: these families have none, transformers ignores it
            leaf(("ffn", "router", "bias"), (E,), f"{prefix}.router.bias", dtype="float32")  # as RouterBias is
        for ours, theirs in names.items():
            shape = (F, D) if ours == "down" else (D, F)
            sources = tuple(Source(f"model.layers.{i}.{prefix}.experts.{e}.{theirs}.weight", shape[::-1], transpose,
                                   transpose) for i in layers for e in range(E))
            out.append(Entry(("groups", g, "ffn", ours), (n, E, *shape), sources, lead=(n, E)))
    if config.has_down_bias:
        leaf(("ffn", "down_bias"), (D,), "mlp.down_proj.bias")


def _entry(path, shape, name) -> Entry:
    return Entry(path, shape, (Source(name, shape),))


def _source(name, shape, hf_shape, to_ours, to_hf) -> Source:
    return Source(name, shape) if to_ours is None else Source(name, hf_shape, to_ours, to_hf)


def _split_columns(w: np.ndarray, experts: int) -> np.ndarray:  # [E*s, D] -> [E, D, s]
    return w.reshape(experts, -1, w.shape[-1]).swapaxes(1, 2)


def _merge_columns(w: np.ndarray) -> np.ndarray:
    return w.swapaxes(1, 2).reshape(-1, w.shape[1])


def _split_rows(w: np.ndarray, experts: int) -> np.ndarray:  # [D, E*s] -> [E, s, D]
    return w.T.reshape(experts, -1, w.shape[0])


def _merge_rows(w: np.ndarray) -> np.ndarray:
    return w.reshape(-1, w.shape[-1]).T
