"""jaxmodels.load and jaxmodels.save: what is wrong with a folder reaches the user as one line; tokenizers travel."""

import dataclasses
import json
import struct

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers

import jaxmodels
from jaxmodels import DecoderConfig, UserError
from jaxmodels.decoder.config import ExpertConfig
from jaxmodels.decoder.convert import config_from_hf, config_to_hf
from jaxmodels.hub import load_tokenizer, resolve
from jaxmodels.hub.safetensors_file import SafetensorsFile
from jaxmodels.hub.tokenizer import Tokenizer
from tests.tiny_models import EXPERT, random_model

TINY = DecoderConfig.tiny(ffn_widths=(24, 24), vocab_size=40)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return jaxmodels.save(random_model(TINY), tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def broken(saved, tmp_path):
    """Writes a copy of the model with another config or other tensors; returns its folder."""
    def write(config=None, tensors=None, drop=()):
        weights = {k: v for k, v in load_file(saved / "model.safetensors").items() if k not in drop}
        save_file(weights | (tensors or {}), tmp_path / "model.safetensors")
        base = json.loads((saved / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(base | (config or {})))
        return tmp_path
    return write


def refused(folder, words):
    with pytest.raises(UserError, match=words) as caught:
        jaxmodels.load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("change, words", [
    ({"model_type": "gpt2"}, "'gpt2' is not one that this library reads; supported: bert, esm, llama"),
    ({"model_type": None}, "None"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope' is not supported; supported: default"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "'yarn' has no factor"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "rope_theta": 1.0}}, "rope_theta 1.0 must be above 1"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4}}, "must be below"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"hidden_act": "mish"}, "'mish' is not supported"),
    ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ({"head_dim": 7}, "head_dim 7 is odd"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 is over the limit"),
    ({"model_type": "mixtral", "num_local_experts": 10**9}, "1000000000 experts in 2 layers are over the limit"),
    ({"eos_token_id": [2, 2**40]}, "eos_token_id is .2, 1099511627776."),
    ({"vocab_size": None}, "no 'vocab_size'"),
    ({"vocab_size": 41}, "embed_tokens.weight has shape .40, 32., the config asks for .41, 32."),
    ({"num_hidden_layers": 3}, "lacks tensor model.layers.2"),
    ({"attention_bias": True}, "lacks tensor model.layers.0.self_attn.q_proj.bias"),
    ({"jaxmodels": {"ffn_widths": [24]}}, "2 positive integers are needed"),
    ({"jaxmodels": {"ffn_widths": [24, "24"]}}, "2 positive integers are needed"),
    ({"jaxmodels": {"ffn_widths": [24, 23]}}, r"shape .24, 32., the config asks for .23, 32."),
    ({"jaxmodels": {"experts": {"num_experts": 5, "top_k": 2, "router": "all"}}}, "24 into 5 experts"),
    ({"jaxmodels": {"experts": {"num_experts": 4, "top_k": 9, "router": "all"}}}, "top_k 9 must lie in 1..4"),
    ({"jaxmodels": {"experts": {"num_experts": 4, "top_k": 2, "router": "best"}}}, "'best' is not one of"),
    ({"jaxmodels": {"experts": {"num_experts": 4, "top_k": 2, "rooter": "all"}}}, "split the model again"),
    ({"jaxmodels": {"experts": {"num_experts": 4, "top_k": 2, "router": "linear"}}}, "lacks tensor .*router.weight"),
    ({"jaxmodels": {"experts": {"num_experts": 4, "top_k": 2, "router": "softmax"}}}, "which no split model has"),
])  # fmt: skip
def test_configs_that_do_not_fit(broken, change, words):
    refused(broken(change), words)


@pytest.mark.parametrize("name", ["dense", "experts"])
def test_configs_of_wrong_kinds(name):
    """Whatever stands at a key: a configuration, or one line that names the key; never another exception."""
    good = config_to_hf(TINY if name == "dense" else dataclasses.replace(
        EXPERT, family="qwen3_moe", qk_norm="head", norm_placement="pre"))
    good |= {"layer_types": ["full_attention"] * 9, "mlp_only_layers": [], "rope_scaling": {}, "max_window_layers": 1,
             "use_sliding_window": False, "sliding_window": 4, "clip_qkv": 1.0, "jaxmodels": {}}
    config_from_hf(good)
    for key in good:
        for value in ("x", -1, 0, 1.5, 10**400, 2**31, True, None, [], [[]], {}, {"a": {}}, float("nan"), float("inf")):
            for config in (good | {key: value}, good | {"rope_parameters": {"rope_type": "yarn", "factor": 2.0,
                                                                            key: value}}):
                try:
                    config_from_hf(config)
                except UserError as error:
                    assert "\n" not in str(error)
    for key in ("factor", "beta_fast", "original_max_position_embeddings", "rope_type", "truncate", "rope_theta"):
        for value in ("x", -1, [], {}, float("nan")):
            with pytest.raises(UserError):
                config_from_hf(good | {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, key: value}})


def test_tensors_that_do_not_fit(broken):
    name = "model.layers.1.mlp.up_proj.weight"
    wrong = np.zeros((24, 32), np.float32)
    wrong[3, 5] = np.nan
    refused(broken(tensors={name: wrong}), f"{name} holds 1 NaN or infinite weights of 768")
    refused(broken(tensors={name: wrong[:, :31]}), f"{name} has shape .24, 31., the config asks for .24, 32.")
    refused(broken(drop=[name]), f"lacks tensor {name};")
    with pytest.warns(UserWarning, match="1 tensors are not used by this model: model.more"):
        jaxmodels.load(broken(tensors={"model.more": wrong[:1]}))
    with pytest.raises(UserError, match="too large for float16; load with dtype bfloat16 or float32"):
        jaxmodels.load(broken(tensors={name: np.full((24, 32), 1e6, np.float32)}), "float16")


def test_folders_and_files_that_are_no_models(saved, tmp_path):
    with pytest.raises(UserError, match="'int8' is not one of float32"):
        jaxmodels.load(saved, "int8")
    refused(tmp_path, "holds no weights")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    refused(tmp_path, "is a pickle")
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:-100])
    refused(tmp_path, "no config.json")
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    refused(tmp_path, "truncated")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "not readable JSON")


def test_header_lengths_that_look_like_a_pickle(tmp_path):
    """128 bytes: the first byte of the file is 0x80, as that of a pickle; 640: so are the first two."""
    for length in (128, 640):
        header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).ljust(length).encode()
        file = tmp_path / f"{length}.safetensors"
        file.write_bytes(struct.pack("<Q", length) + header + np.array([1, 2], np.float32).tobytes())
        assert SafetensorsFile(file).read("a").tolist() == [1, 2]
    file.write_bytes(b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94.")
    with pytest.raises(UserError, match="pickle"):
        SafetensorsFile(file)


@pytest.mark.parametrize("change, words", [
    ({"qk_norm": "head"}, "a llama model has no qk_norm 'head', and would be read back with None; set family to"),
    ({"norm_placement": "post"}, "a llama model has no norm_placement 'post'"),
    ({"qkv_bias": True}, "a llama model has no qkv_bias True"),
    ({"windows": (4, 4)}, "a llama model has no windows"),
    ({"windows": (4, 3), "family": "mistral"}, "a mistral model has no windows"),
    ({"experts": ExpertConfig(4, 2)}, "a llama model has no experts"),
    ({"experts": ExpertConfig(4, 2, renormalise=False), "family": "mixtral"}, "a mixtral model has no experts"),
    ({"mlp_bias": True, "family": "mistral"}, "a mistral model has no mlp_bias True"),
])  # fmt: skip
def test_settings_that_the_family_does_not_have(tmp_path, change, words):
    """Written, they would be lost: the folder would load as another model."""
    with pytest.raises(UserError, match=words):
        jaxmodels.save(random_model(dataclasses.replace(TINY, **change)), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_bias_that_the_family_has_and_repair_asks_for(tmp_path):
    """`prune --repair` sets down_bias in every family: where mlp_bias has it already, nothing is lost."""
    model = random_model(dataclasses.replace(TINY, mlp_bias=True, down_bias=True))
    saved = jaxmodels.save(model, tmp_path / "m")
    assert "jaxmodels" not in json.loads((saved / "config.json").read_text())
    assert jaxmodels.load(saved).cfg.mlp_bias


def test_experts_wider_than_the_dense_layers_beside_them(tmp_path):
    model = random_model(dataclasses.replace(TINY, family="qwen3_moe", qk_norm="head", ffn_widths=(24, 12),
                                             experts=ExpertConfig(4, 2), expert_layers=(True, False)))
    assert jaxmodels.load(jaxmodels.save(model, tmp_path / "m")).cfg.ffn_widths == (24, 12)


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    model = random_model(TINY)
    target = tmp_path / "out"
    with pytest.raises(UserError, match="no tokenizer.json"):
        jaxmodels.save(model, target, tokenizer=tmp_path)
    assert not target.exists() and list(tmp_path.iterdir()) == []
    jaxmodels.save(model, target)
    with pytest.raises(UserError, match="is not empty"):
        jaxmodels.save(model, target)
    before = (target / "model.safetensors").read_bytes()
    jaxmodels.save(random_model(TINY, seed=1), target, overwrite=True)
    assert (target / "model.safetensors").read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    # A file in one of the two ways: the folder, or the weights beside their config.
    a, b = jaxmodels.load(target), jaxmodels.load(target / "model.safetensors")
    assert np.array_equal(a.embed[...], b.embed[...])


# Tokenizers beside the weights


def tiny_tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *letters, "he", "ll", "Ġh"])}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e"), ("l", "l"), ("Ġ", "h")]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    inner.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(inner, 0, 1, None, "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}ü")


TEXTS = ["hello hell", " two  spaces\n\n", "don't I'LL 2026", "Größe 你好 हिन्दी 👩‍👩‍👧", "a<s>b</s>", "", "x , y . z ?"]


def check_round_trip(tokenizer, folder):
    back = load_tokenizer(folder)
    assert back.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert [back.decode(i) for i in back.encode_batch(TEXTS)] == [tokenizer.decode(i) for i in
                                                                 tokenizer.encode_batch(TEXTS)]
    for field in ("bos_id", "eos_id", "pad_id", "chat_template", "vocab_size"):
        assert getattr(back, field) == getattr(tokenizer, field), field
    transformers = pytest.importorskip("transformers")
    for reader in (transformers.PreTrainedTokenizerFast, transformers.AutoTokenizer):
        theirs = reader.from_pretrained(folder)
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert theirs(text)["input_ids"] == ids, (reader, text)
            assert theirs.decode(ids) == tokenizer.decode(ids)
        assert [theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id] == [
            tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
        talk = [{"role": "user", "content": "Hi"}]
        assert theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == \
            tokenizer.apply_chat(talk)


def test_a_tiny_tokenizer_travels_with_the_weights(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name, text in tiny_tokenizer().files().items():
        (source / name).write_text(text, "utf-8")
    folder = jaxmodels.save(random_model(TINY), tmp_path / "model", tokenizer=source)
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json",
                                                  "tokenizer_config.json"}
    check_round_trip(tiny_tokenizer(), folder)


def test_a_tokenizer_without_template_and_special_tokens():
    inner = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    config = json.loads(Tokenizer(inner).files()["tokenizer_config.json"])
    assert not {"bos_token", "eos_token", "pad_token", "chat_template"} & set(config)


@pytest.mark.long
def test_the_real_tokenizer_travels_with_the_weights(tmp_path):
    """Out of the GGUF file, into a folder that transformers reads."""
    try:
        path = resolve("smollm2-135m-instruct")
    except UserError as error:
        pytest.skip(str(error))
    folder = jaxmodels.save(random_model(TINY), tmp_path / "model", tokenizer="smollm2-135m-instruct")
    check_round_trip(load_tokenizer(path), folder)
