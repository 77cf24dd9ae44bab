"""Small GGUF files, as llama.cpp's converter would write them, for the tests of the hub."""

import gguf
import numpy as np

KINDS = {kind.name: kind for kind in gguf.GGMLQuantizationType}


def permute(value, heads):
    """llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute."""
    return value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def random_blocks(kind, shape, rng):
    """Valid stored bytes of a K-quantised tensor, for which the package has no quantiser: finite, small scales."""
    block, size = gguf.GGML_QUANT_SIZES[KINDS[kind]]
    raw = rng.integers(0, 256, (int(np.prod(shape)) // block, size), dtype=np.uint8)
    scales = rng.normal(size=(len(raw), 2)).astype(np.float16).view(np.uint8)
    if kind == "Q4_K":
        raw[:, :4] = scales
    else:  # Q6_K keeps its one scale at the end
        raw[:, -2:] = scales[:, :2]
    return raw.reshape(*shape[:-1], -1)


def write(path, architecture, metadata, tensors, kind="F32", per_tensor=None):
    """tensors: name -> float32 array or stored uint8 bytes; norms and other vectors stay F32, as llama.cpp has it."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        key = key.replace("{}", architecture)
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, value in tensors.items():
        its = (per_tensor or {}).get(name, kind if value.ndim > 1 else "F32")
        if value.dtype == np.uint8:
            writer.add_tensor(name, value, raw_dtype=KINDS[its])
        elif its in ("F32", "F16"):
            writer.add_tensor(name, value.astype({"F32": np.float32, "F16": np.float16}[its]))
        else:
            writer.add_tensor(name, gguf.quants.quantize(value, KINDS[its]), raw_dtype=KINDS[its])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sizes(D=64, F=96, N=4, K=2, L=2, **more):
    return {
        "{}.embedding_length": D,
        "{}.feed_forward_length": F,
        "{}.attention.head_count": N,
        "{}.attention.head_count_kv": K,
        "{}.block_count": L,
        "{}.context_length": 128,
        "{}.attention.layer_norm_rms_epsilon": 1e-6,
        "{}.rope.freq_base": 5000.0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | more


def decoder(rng, D=64, F=96, N=4, K=2, L=2, V=10, H=16, permuted=False, tied=True):
    """(GGUF tensors, Hugging Face tensors) of the same dense decoder, float32."""
    stored, hf = {}, {}

    def add(name, hf_name, *shape, heads=0):
        value = rng.normal(size=shape).astype(np.float32)
        hf[hf_name] = value
        stored[name] = permute(value, heads) if permuted and heads else value

    add("token_embd.weight", "model.embed_tokens.weight", V, D)
    add("output_norm.weight", "model.norm.weight", D)
    if not tied:
        add("output.weight", "lm_head.weight", V, D)
    for i in range(L):
        ours, theirs = f"blk.{i}.", f"model.layers.{i}."
        add(ours + "attn_norm.weight", theirs + "input_layernorm.weight", D)
        add(ours + "ffn_norm.weight", theirs + "post_attention_layernorm.weight", D)
        add(ours + "attn_q.weight", theirs + "self_attn.q_proj.weight", N * H, D, heads=N)
        add(ours + "attn_k.weight", theirs + "self_attn.k_proj.weight", K * H, D, heads=K)
        add(ours + "attn_v.weight", theirs + "self_attn.v_proj.weight", K * H, D)
        add(ours + "attn_output.weight", theirs + "self_attn.o_proj.weight", D, N * H)
        add(ours + "ffn_gate.weight", theirs + "mlp.gate_proj.weight", F, D)
        add(ours + "ffn_up.weight", theirs + "mlp.up_proj.weight", F, D)
        add(ours + "ffn_down.weight", theirs + "mlp.down_proj.weight", D, F)
    return stored, hf
