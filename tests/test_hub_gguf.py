"""GGUF read as a Hugging Face checkpoint: names, rows, configs, quantisations, and damaged files."""

import struct

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("gguf")

from jaxmodels.errors import UserError
from jaxmodels.hub import open_checkpoint, resolve
from jaxmodels.hub.gguf_config import llama3_factors
from tests import gguf_files


def error_of(path):
    with pytest.raises(UserError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same_tensors(checkpoint, expected):
    assert sorted(checkpoint.names()) == sorted(expected)
    for name, value in expected.items():
        assert checkpoint.shape(name) == value.shape
        np.testing.assert_array_equal(checkpoint.read(name), value, err_msg=name)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_dense_families(tmp_path, architecture, tied):
    rng = np.random.default_rng(0)
    stored, hf = gguf_files.decoder(rng, permuted=architecture in ("llama", "mistral"), tied=tied)
    if architecture == "qwen2":
        for i in range(2):
            for ours, theirs, rows in (("q", "q", 64), ("k", "k", 32), ("v", "v", 32)):
                bias = rng.normal(size=rows).astype(np.float32)
                stored[f"blk.{i}.attn_{ours}.bias"] = hf[f"model.layers.{i}.self_attn.{theirs}_proj.bias"] = bias
    if architecture == "qwen3":
        for i in range(2):
            for part in "qk":
                norm = rng.normal(size=16).astype(np.float32)
                stored[f"blk.{i}.attn_{part}_norm.weight"] = hf[f"model.layers.{i}.self_attn.{part}_norm.weight"] = norm
    checkpoint = open_checkpoint(gguf_files.write(tmp_path / "m.gguf", architecture, gguf_files.sizes(), stored))
    same_tensors(checkpoint, hf)
    config = checkpoint.config
    assert config["model_type"] == architecture and config["tie_word_embeddings"] is tied
    assert (config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]) == (64, 96, 2)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 16)
    assert config["rms_norm_eps"] == 1e-6 and config["rope_theta"] == 5000.0 and config["vocab_size"] == 10
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, None)
    assert config["attention_bias"] is (architecture == "qwen2") and config["rope_scaling"] is None


def test_biases_of_llama_are_unpermuted_too(tmp_path):
    stored, hf = gguf_files.decoder(np.random.default_rng(0), L=1, permuted=True)
    bias = np.arange(64, dtype=np.float32)
    stored["blk.0.attn_q.bias"] = gguf_files.permute(bias, 4)
    hf["model.layers.0.self_attn.q_proj.bias"] = bias
    checkpoint = open_checkpoint(gguf_files.write(tmp_path / "m.gguf", "llama", gguf_files.sizes(L=1), stored))
    same_tensors(checkpoint, hf)
    assert checkpoint.config["attention_bias"] is True


def test_olmo2_norms_come_after(tmp_path):
    stored, hf = gguf_files.decoder(np.random.default_rng(0), L=1)
    moves = {
        "attn_norm": ("input_layernorm", "post_attention_norm", "post_attention_layernorm"),
        "ffn_norm": ("post_attention_layernorm", "post_ffw_norm", "post_feedforward_layernorm"),
    }
    values = {
        old: (stored.pop(f"blk.0.{old}.weight"), hf.pop(f"model.layers.0.{move[0]}.weight"))
        for old, move in moves.items()
    }
    for old, (_, ours, theirs) in moves.items():
        stored[f"blk.0.{ours}.weight"], hf[f"model.layers.0.{theirs}.weight"] = values[old]
    stored["blk.0.attn_q_norm.weight"] = hf["model.layers.0.self_attn.q_norm.weight"] = np.ones(64, np.float32)
    checkpoint = open_checkpoint(gguf_files.write(tmp_path / "m.gguf", "olmo2", gguf_files.sizes(L=1), stored))
    same_tensors(checkpoint, hf)


@pytest.mark.parametrize(
    "architecture, kind", [("qwen3moe", "F32"), ("olmoe", "F32"), ("llama", "F32"), ("qwen3moe", "Q8_0")]
)
def test_stacked_experts_are_split(tmp_path, architecture, kind):
    rng = np.random.default_rng(0)
    stored, hf = gguf_files.decoder(rng, L=1, permuted=architecture == "llama")
    for part in ("gate", "up", "down"):
        del stored[f"blk.0.ffn_{part}.weight"], hf[f"model.layers.0.mlp.{part}_proj.weight"]
    prefix, names = "mlp.", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    if architecture == "llama":
        prefix, names = "block_sparse_moe.", {"gate": "w1", "up": "w3", "down": "w2"}
    for part, shape in (("gate", (3, 32, 64)), ("up", (3, 32, 64)), ("down", (3, 64, 32))):
        stored[f"blk.0.ffn_{part}_exps.weight"] = value = rng.normal(size=shape).astype(np.float32)
        hf |= {f"model.layers.0.{prefix}experts.{e}.{names[part]}.weight": value[e] for e in range(3)}
    router = rng.normal(size=(3, 64)).astype(np.float32)
    stored["blk.0.ffn_gate_inp.weight"] = hf[f"model.layers.0.{prefix}gate.weight"] = router
    metadata = gguf_files.sizes(L=1, F=32) | {
        "{}.expert_count": 3,
        "{}.expert_used_count": 2,
        "{}.expert_feed_forward_length": 32,
    }
    per_tensor = {"blk.0.ffn_gate_inp.weight": "F32"}
    checkpoint = open_checkpoint(
        gguf_files.write(tmp_path / "m.gguf", architecture, metadata, stored, kind, per_tensor)
    )
    if kind == "F32":
        same_tensors(checkpoint, hf)
    else:
        for name, value in hf.items():
            step = np.abs(value).max() / 127
            np.testing.assert_allclose(checkpoint.read(name), value, atol=step, err_msg=name)
    config = checkpoint.config
    assert config["model_type"] == {"qwen3moe": "qwen3_moe", "olmoe": "olmoe", "llama": "mixtral"}[architecture]
    assert config.get("num_experts", config.get("num_local_experts")) == 3 and config["num_experts_per_tok"] == 2
    assert config.get("norm_topk_prob") == {"qwen3moe": True, "olmoe": False, "llama": None}[architecture]


def test_rope_scaling(tmp_path):
    def config(name, metadata, more=None):
        stored, _ = gguf_files.decoder(np.random.default_rng(0), L=1, permuted=True)
        path = gguf_files.write(tmp_path / name, "llama", gguf_files.sizes(L=1) | metadata, stored | (more or {}))
        return open_checkpoint(path).config["rope_scaling"]

    assert config("a.gguf", {"{}.rope.scaling.type": "none"}) is None
    linear = {"{}.rope.scaling.type": "linear", "{}.rope.scaling.factor": 2.0}
    assert config("b.gguf", linear) == {"rope_type": "linear", "factor": 2.0}
    yarn = linear | {"{}.rope.scaling.type": "yarn", "{}.rope.scaling.original_context_length": 64}
    assert config("c.gguf", yarn) == {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    fast = {"{}.rope.scaling.yarn_beta_fast": 16.0, "{}.rope.scaling.yarn_ext_factor": 1.0}
    assert config("g.gguf", yarn | fast)["beta_fast"] == 16.0 and "beta_slow" not in config("h.gguf", yarn | fast)
    for key in ("yarn_attn_factor", "attn_factor", "yarn_ext_factor", "yarn_log_multiplier"):
        with pytest.raises(UserError, match=f"rope.scaling.{key} is 0.5, which is not supported"):
            config(f"{key}.gguf", yarn | {"{}.rope.scaling." + key: 0.5})
    # llama.cpp takes a factor without a type, and the name that it had before 2023-10, for linear.
    for number, key in enumerate(("{}.rope.scaling.factor", "{}.rope.scale_linear")):
        assert config(f"l{number}.gguf", {key: 4.0}) == {"rope_type": "linear", "factor": 4.0}
    with pytest.raises(UserError, match="rope.scaling.factor is missing"):
        config("m.gguf", {"{}.rope.scaling.type": "linear"})
    with pytest.raises(UserError, match="longrope"):
        config("d.gguf", {"{}.rope.scaling.type": "longrope"})
    # Llama 3.2: factor 32, low 1, high 4, 8192; the converter stores the factors only.
    theta = {"{}.rope.freq_base": 500000.0}
    scaling = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = llama3_factors(scaling, 500000.0, 16).astype(np.float32)
    assert factors[0] == 1 and factors[-1] == 32
    assert config("e.gguf", theta, {"rope_freqs.weight": factors}) == scaling | {"rope_type": "llama3"}
    with pytest.raises(UserError, match="rope_freqs.weight"):
        config("f.gguf", theta, {"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)})


@pytest.mark.parametrize("kind, dtype", [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")])
def test_plain_types_keep_their_bytes(tmp_path, kind, dtype):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    stored, hf = gguf_files.decoder(np.random.default_rng(0), L=1, permuted=True)
    checkpoint = open_checkpoint(gguf_files.write(tmp_path / "m.gguf", "llama", gguf_files.sizes(L=1), stored, kind))
    for name, value in hf.items():
        expected = value if value.ndim == 1 else value.astype(dtype)
        assert checkpoint.dtype(name) == expected.dtype and checkpoint.read(name).tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind, steps", [("Q8_0", 254), ("Q4_0", 14), ("Q4_1", 14)])
def test_quantised_values_lie_within_one_step(tmp_path, kind, steps):
    stored, hf = gguf_files.decoder(np.random.default_rng(0), L=1, permuted=True)
    checkpoint = open_checkpoint(gguf_files.write(tmp_path / "m.gguf", "llama", gguf_files.sizes(L=1), stored, kind))
    for name, value in hf.items():
        read = checkpoint.read(name)
        assert read.dtype == np.float32 == checkpoint.dtype(name)
        span = value.max() - value.min()
        np.testing.assert_allclose(read, value, atol=span / steps * 1.3 if value.ndim > 1 else 0, err_msg=name)
        assert value.ndim == 1 or not np.array_equal(read, value)


def q4_k(block):
    """One block of 256, after ggml-quants.c, dequantize_row_q4_K."""
    d, least = block[:4].view(np.float16).astype(np.float64)
    packed, quants, out = block[4:16].astype(int), block[16:].astype(int), []
    for j in range(8):
        if j < 4:
            scale, minimum = packed[j] & 63, packed[j + 4] & 63
        else:
            scale = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4)
            minimum = (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4)
        group = quants[32 * (j // 2) : 32 * (j // 2) + 32]
        out += list(d * scale * ((group >> 4) if j % 2 else (group & 15)) - least * minimum)
    return np.array(out)


def q6_k(block):
    """One block of 256, after ggml-quants.c, dequantize_row_q6_K."""
    low, high, scales = block[:128].astype(int), block[128:192].astype(int), block[192:208].view(np.int8).astype(int)
    d, out = float(block[208:210].view(np.float16)[0]), np.zeros(256)
    for half in range(2):
        ql, qh, sc = low[64 * half :], high[32 * half :], scales[8 * half :]
        for i in range(32):
            values = (ql[i] & 15, ql[i + 32] & 15, ql[i] >> 4, ql[i + 32] >> 4)
            for part, value in enumerate(values):
                value |= ((qh[i] >> (2 * part)) & 3) << 4
                out[128 * half + 32 * part + i] = d * sc[i // 16 + 2 * part] * (value - 32)
    return out


@pytest.mark.parametrize("kind, reference", [("Q4_K", q4_k), ("Q6_K", q6_k)])
def test_k_quantisations_against_the_published_layout(tmp_path, kind, reference):
    rng = np.random.default_rng(0)
    stored, _ = gguf_files.decoder(rng, L=1, D=256, permuted=True)
    raw = stored["blk.0.ffn_up.weight"] = gguf_files.random_blocks(kind, (96, 256), rng)
    metadata = gguf_files.sizes(L=1, D=256) | {"{}.attention.key_length": 16, "{}.attention.value_length": 16}
    path = gguf_files.write(tmp_path / "m.gguf", "llama", metadata, stored, per_tensor={"blk.0.ffn_up.weight": kind})
    read = open_checkpoint(path).read("model.layers.0.mlp.up_proj.weight")
    np.testing.assert_allclose(read, np.stack([reference(row) for row in raw]), rtol=1e-5, atol=1e-5)


def test_unknown_architecture_quantisation_and_tensor(tmp_path):
    stored, _ = gguf_files.decoder(np.random.default_rng(0), L=1)
    message = error_of(gguf_files.write(tmp_path / "a.gguf", "mamba", gguf_files.sizes(L=1), stored))
    assert "'mamba'" in message and "qwen3" in message
    message = error_of(gguf_files.write(tmp_path / "b.gguf", "qwen2", gguf_files.sizes(L=1), stored, "Q5_0"))
    assert "Q5_0" in message and "Q8_0" in message and "token_embd.weight" in message
    odd = stored | {"blk.0.ssm_a.weight": np.ones(3, np.float32)}
    assert "blk.0.ssm_a.weight" in error_of(gguf_files.write(tmp_path / "c.gguf", "qwen2", gguf_files.sizes(L=1), odd))
    del stored["token_embd.weight"]
    assert "token_embd" in error_of(gguf_files.write(tmp_path / "d.gguf", "qwen2", gguf_files.sizes(L=1), stored))


@pytest.mark.parametrize(
    "key, value",
    [("embedding_length", None), ("attention.head_count", [4, 4]), ("attention.head_count", 0), ("block_count", "x"),
     ("rope.dimension_count", "x")],
)
def test_metadata_that_is_missing_or_odd(tmp_path, key, value):
    stored, _ = gguf_files.decoder(np.random.default_rng(0), L=1)
    metadata = gguf_files.sizes(L=1) | {"{}." + key: value}
    if value is None:
        del metadata["{}." + key]
    message = error_of(gguf_files.write(tmp_path / "m.gguf", "qwen2", metadata, stored))
    assert key in message or "0 heads" in message


def small_file(tmp_path):
    stored, _ = gguf_files.decoder(np.random.default_rng(0), L=1)
    return gguf_files.write(tmp_path / "m.gguf", "qwen2", gguf_files.sizes(L=1) | {"some.list": ["a", "b"]}, stored)


def test_every_truncation_is_refused(tmp_path):
    path = small_file(tmp_path)
    whole = path.read_bytes()
    header = whole.index(b"ffn_down.weight") + 64
    for size in [*range(0, header, 7), len(whole) // 2, len(whole) - 200]:
        path.write_bytes(whole[:size])
        assert "m.gguf" in error_of(path)


@pytest.mark.parametrize(
    "at, value, word",
    [
        (0, b"GGML", "does not begin with GGUF"),
        (4, struct.pack("<I", 1), "version 1"),
        (4, struct.pack(">I", 3), "big-endian"),
        (8, struct.pack("<Q", 2**60), "tensors"),
        (16, struct.pack("<Q", 2**60), "metadata fields"),
        (24, struct.pack("<Q", 2**40), "bytes of text"),
    ],
)
def test_damaged_counts_are_refused_before_anything_is_allocated(tmp_path, at, value, word):
    path = small_file(tmp_path)
    whole = bytearray(path.read_bytes())
    whole[at : at + len(value)] = value
    path.write_bytes(whole)
    assert word in error_of(path)


def test_a_damaged_array_length_and_type(tmp_path):
    path = small_file(tmp_path)
    whole = path.read_bytes()
    at = whole.index(b"some.list") + len(b"some.list")
    for item, length, word in ((8, 2**60, "strings"), (5, 2**60, "values"), (9, 1, "type 9"), (77, 1, "type 77")):
        path.write_bytes(whole[:at] + struct.pack("<IIQ", 9, item, length) + whole[at + 16 :])
        assert word in error_of(path) and "some.list" in error_of(path)


def test_a_tensor_beyond_the_end_or_of_impossible_shape(tmp_path):
    path = small_file(tmp_path)
    whole = path.read_bytes()
    at = whole.index(b"token_embd.weight") + len(b"token_embd.weight") + 4  # after the number of dimensions
    path.write_bytes(whole[:at] + struct.pack("<Q", 2**50) + whole[at + 8 :])
    assert "token_embd.weight ends at byte" in error_of(path)
    path.write_bytes(whole[:at] + struct.pack("<Q", 0) + whole[at + 8 :])
    assert "token_embd.weight of shape" in error_of(path)
    path.write_bytes(whole[: at + 16] + struct.pack("<I", 999) + whole[at + 20 :])
    assert "quantisation number 999" in error_of(path)


def test_a_folder_with_one_gguf_opens_and_with_two_asks(tmp_path):
    path = small_file(tmp_path)
    assert open_checkpoint(tmp_path).path == path
    (tmp_path / "n.gguf").write_bytes(path.read_bytes())
    assert "2 GGUF files" in error_of(tmp_path)


@pytest.fixture(scope="module")
def smollm():
    try:
        return open_checkpoint(resolve("smollm2-135m-instruct"))
    except UserError as error:
        pytest.skip(str(error))


def test_the_real_model(smollm):
    config = smollm.config
    assert (config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]) == (576, 1536, 30)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (9, 3, 64)
    assert config["vocab_size"] == 49152 and config["tie_word_embeddings"] and config["rope_theta"] == 100000.0
    assert len(smollm.names()) == 2 + 30 * 9
    norms = [float(np.linalg.norm(smollm.read(f"model.layers.{i}.self_attn.q_proj.weight"))) for i in (0, 29)]
    assert all(1 < norm < 1000 for norm in norms)


def test_the_real_model_agrees_with_the_packages_own_reader(smollm):
    """The reader and the permutation of the gguf package and transformers, on one layer."""
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(smollm.path)).tensors}
    for part, heads in (("q", 9), ("k", 3)):
        tensor = tensors[f"blk.7.attn_{part}.weight"]
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        ours = smollm.read(f"model.layers.7.self_attn.{part}_proj.weight")
        np.testing.assert_array_equal(gguf_files.permute(ours, heads), value)
    embedding = gguf.quants.dequantize(tensors["token_embd.weight"].data, tensors["token_embd.weight"].tensor_type)
    np.testing.assert_array_equal(smollm.read("model.embed_tokens.weight"), embedding)


def test_heads_that_do_not_divide_the_rows(tmp_path):
    stored, _ = gguf_files.decoder(np.random.default_rng(0), L=1, permuted=True)
    metadata = gguf_files.sizes(L=1, N=7) | {"{}.attention.key_length": 16, "{}.attention.value_length": 16}
    message = error_of(gguf_files.write(tmp_path / "m.gguf", "llama", metadata, stored))
    assert "blk.0.attn_q.weight has 64 rows, no multiple of 2 x 7 heads" in message


def test_names_that_are_not_text_stay_out_of_messages(tmp_path):
    path = small_file(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"some.list", b"some\nlist"))
    assert "metadata key" in error_of(path)
    path.write_bytes(whole.replace(b"blk.0.attn_q.weight", b"blk.0.attn_\x1b.weight"))
    assert "tensor name" in error_of(path)
