"""ESM checkpoints as they are found: names of several versions and programs, missing heads, what is refused."""

import json
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxmodels
from jaxmodels import UserError
from jaxmodels.esm import convert_pt
from jaxmodels.esm.convert import config_from_hf
from jaxmodels.hub.models import leaves
from tests import make_golden_esm
from tests.test_esm_golden import golden_config
from tests.tiny_esm import padded, random_esm, tiny

INV_FREQ = "esm.rotary_embeddings.inv_freq"


@pytest.fixture(scope="module")
def weights():
    return make_golden_esm.weights(golden_config("esm2"))


@pytest.fixture
def load(tmp_path):
    """Writes tensors beside a config and loads them, every warning an error."""
    def write(tensors, changes=None, **options):
        tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(golden_config("esm2") | (changes or {})))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return jaxmodels.load(tmp_path, **options)
    return write


def same(a, b):
    first, second = leaves(a), leaves(b)
    assert first.keys() == second.keys() and all(np.array_equal(first[path], second[path]) for path in first)


def test_names_of_every_version(load, weights):
    expected = load(weights)
    pooler = {"esm.pooler.dense.weight": np.ones((32, 32), np.float32),
              "esm.pooler.dense.bias": np.ones(32, np.float32)}
    unused = pooler | {"esm.embeddings.position_ids": np.arange(40)[None],
                       "esm.embeddings.position_embeddings.weight": np.ones((40, 32), np.float32)}
    same(load(weights | unused), expected)
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
           .replace("layer_norm.weight", "layer_norm.gamma"): value for name, value in weights.items()}
    assert len(old.keys() - weights.keys()) == 13
    same(load(old), expected)
    same(load(weights | {"lm_head.decoder.weight": weights["esm.embeddings.word_embeddings.weight"],
                         "lm_head.decoder.bias": weights["lm_head.bias"]}), expected)
    bare = {name.removeprefix("esm."): value for name, value in (weights | pooler).items() if name.startswith("esm.")}
    body = load(bare, {"architectures": ["EsmModel"]})
    same(body, load(weights, lm_head=False))
    assert body.lm_head is None and body.cfg.inv_freq == expected.cfg.inv_freq
    none = {key: value for key, value in golden_config("esm2").items() if key not in ("model_type", "architectures")}
    assert config_from_hf(none) == config_from_hf(golden_config("esm2"))
    same(load(weights, {"jaxmodels": None}), expected)


def test_rotary_frequencies_wherever_they_are(load, weights):
    value = weights.pop(INV_FREQ) if INV_FREQ in weights else make_golden_esm.INV_FREQ
    name = "esm.encoder.layer.{}.attention.self.rotary_embeddings.inv_freq"
    each = {name.format(i): value.astype(np.float16) for i in range(3)}
    stored = tuple(value.astype(np.float16).astype(float).tolist())
    assert load(weights | each).cfg.inv_freq == stored
    assert load(weights | {name.format("*"): value.astype(np.float16)}).cfg.inv_freq == stored
    assert load(weights).cfg.inv_freq is None
    exact = load(weights | each, rope_inv_freq="exact")
    assert exact.cfg.inv_freq is None and exact.cfg.frequencies[1] == 10.0 ** -1
    each[name.format(2)] = each[name.format(2)] + np.float16(0.01)
    with pytest.raises(UserError, match=r"layer.0.*and .*layer.2.*differ by up to 0.01.*rope_inv_freq='exact'"):
        load(weights | each)
    assert load(weights | each, rope_inv_freq="exact").cfg.inv_freq is None
    with pytest.raises(UserError, match="is not 4 frequencies"):
        load(weights | {INV_FREQ: value[:2]})
    weights[INV_FREQ] = value


@pytest.mark.long
def test_heads_that_are_missing_or_asked_for(load, weights):
    headless = {name: value for name, value in weights.items() if not name.startswith("lm_head")}
    with pytest.raises(UserError, match="promises a masked-LM head, its tensors hold none; load it with lm_head=False"):
        load(headless)
    assert load(headless, lm_head=False).lm_head is None
    fresh = load(headless, lm_head=True, classes=7, seed=3)
    assert fresh(padded())[0].shape == (3, 19, 33) and fresh(padded(), output="class")[0].shape == (3, 7)
    assert fresh.cfg.pool == "mean" and fresh.contact_head is not None
    assert np.array_equal(fresh.embed[...], weights["esm.embeddings.word_embeddings.weight"])
    same(fresh, load(headless, lm_head=True, classes=7, seed=3))
    other = load(headless, lm_head=True, classes=7, seed=4)
    assert not np.array_equal(fresh.classifier.out[...], other.classifier.out[...])
    mapless = {name: value for name, value in weights.items() if "contact_head" not in name}
    assert load(mapless).contact_head is None
    assert load(mapless, contact_head=True).contacts(padded()).shape == (3, 17, 17)
    classes = {f"classifier.{name}": np.ones(shape, np.float32) for name, shape in (
        ("dense.weight", (32, 32)), ("dense.bias", 32), ("out_proj.weight", (5, 32)), ("out_proj.bias", 5))}
    model = load(headless | classes, {"architectures": ["EsmForSequenceClassification"]})
    assert model.cfg.classes == 5 and model.cfg.pool == "cls" and model.lm_head is None
    assert load(weights | classes).cfg.pool == "cls" and load(weights | classes, pool="mean").cfg.pool == "mean"
    assert load(weights | classes, classes=0).classifier is None
    with pytest.raises(UserError, match="a classifier of 5 classes, 7 are asked for"):
        load(weights | classes, classes=7)
    with pytest.raises(UserError, match="promises a sequence classifier, its tensors hold none"):
        load(headless, {"architectures": ["EsmForSequenceClassification"]})


def test_a_classifier_over_the_mean_survives_saving(tmp_path):
    """But not as an EsmForSequenceClassification, which would read <cls>."""
    model = random_esm(tiny(ffn_widths=(48, 24, 48)))
    saved = jaxmodels.save(model, tmp_path / "m")
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["EsmForMaskedLM"] and config["jaxmodels"]["pool"] == "mean"
    back = jaxmodels.load(saved)
    same(back, model)
    assert back.cfg == model.cfg
    assert (saved / "vocab.txt").read_text().split("\n")[4] == "L"


@pytest.mark.parametrize("change, config, words", [
    ({"lm_head.decoder.weight": np.ones((33, 32), np.float32)}, {}, "decoder.weight differs from esm.embeddings"),
    ({"esm.encoder.emb_layer_norm_after.gamma": np.ones(32, np.float32)}, {}, "twice, as"),
    ({}, {"model_type": "gpt2"}, "'gpt2' is not one that this library reads; supported: bert, esm"),
    ({}, {"position_embedding_type": "relative_key"}, "'relative_key' is not supported"),
    ({}, {"is_folding_model": True}, "is_folding_model is set"),
    ({}, {"hidden_size": None}, "hidden_size is None; a positive integer is needed"),
    ({}, {"num_hidden_layers": 10**9}, "over the limit of 10000"),
    ({}, {"num_hidden_layers": 4}, "lacks tensor esm.encoder.layer.3"),
    ({}, {"num_attention_heads": 3}, "d_model 32 is not a multiple of num_heads 3"),
    ({}, {"vocab_size": 40, "mask_token_id": None}, "no mask_token_id"),
    ({}, {"layer_norm_eps": "x"}, "layer_norm_eps is 'x'; a positive number is needed"),
    ({}, {"max_position_embeddings": "many"}, "max_position_embeddings is 'many'; a positive integer is needed"),
    ({}, {"rope_parameters": [1]}, "rope_parameters is .1.; an object is needed"),
    ({}, {"rope_theta": {}}, "rope_theta is .*; a positive number is needed"),
    ({}, {"architectures": 5}, "architectures is 5; a list is needed"),
    ({}, {"id2label": None, "architectures": ["EsmForSequenceClassification"], "num_labels": "x"}, "num_labels is 'x'"),
    ({}, {"token_dropout": "no"}, "token_dropout is 'no'; true or false is needed"),
    ({}, {"pad_token_id": [1]}, "pad_token_id is .1.; an integer is needed"),
    ({}, {"mask_token_id": 33}, "mask_token_id is 33, vocab_size 33; it must be one of its tokens"),
    ({}, {"model_type": "roberta", "pad_token_id": 10**9}, "pad_token_id is 1000000000, vocab_size 33"),
    ({}, {"model_type": ["esm"]}, "model_type .* is not one that this library reads"),
    ({}, {"jaxmodels": {"pool": "max"}}, "save the model again"),
    ({}, {"jaxmodels": 3}, "save the model again"),
])  # fmt: skip
def test_files_that_are_refused(load, weights, change, config, words):
    with pytest.raises(UserError, match=words) as caught:
        load(weights | change, config)
    assert "\n" not in str(caught.value)


def test_options_of_another_kind_of_model(load, weights):
    with pytest.raises(UserError, match="'heads' is not an option of a model of the kind esm; it has lm_head"):
        load(weights, heads=3)
    with pytest.raises(UserError, match="classes -1"):
        load(weights, classes=-1)


def fair(name):
    """transformers' name of a tensor as fair-esm has it."""
    table = {"word_embeddings.weight": "embed_tokens.weight", "emb_layer_norm_after": "emb_layer_norm_after"}
    name = name.removeprefix("esm.embeddings.").removeprefix("esm.encoder.").removeprefix("esm.")
    name = table.get(name, name).replace("layer.", "layers.", 1) if name.startswith(("layer.", "word")) else name
    for theirs, ours in (("attention.LayerNorm", "self_attn_layer_norm"), ("attention.self.query", "self_attn.q_proj"),
                         ("attention.self.key", "self_attn.k_proj"), ("attention.self.value", "self_attn.v_proj"),
                         ("attention.output.dense", "self_attn.out_proj"), ("intermediate.dense", "fc1"),
                         ("output.dense", "fc2"), (".LayerNorm", ".final_layer_norm")):
        name = name.replace(theirs, ours)
    return name


def test_the_type_that_is_written(tmp_path, weights, capsys):
    """Fair-esm's names in a safetensors file, which needs no PyTorch."""
    save_file({fair(name): value for name, value in weights.items() if name != INV_FREQ}, tmp_path / "in.safetensors")
    options = [str(tmp_path / "in.safetensors"), str(tmp_path / "out"), "--heads", "4", "--dtype"]
    assert convert_pt.main([*options, "int8"]) == 2 and not (tmp_path / "out").exists()
    assert "dtype 'int8' is not one of float32, bfloat16, float16" in capsys.readouterr().err
    assert convert_pt.main([*options, "float16"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float16"
    assert {value.dtype.name for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {"float16"}


@pytest.mark.torch
def test_pt_files_of_fair_esm(tmp_path, weights, load, capsys):
    """ESM-2's layout: prefixed names, options in a Namespace, frequencies in every layer, contacts in a file beside."""
    import argparse

    import torch

    expected = load(weights)
    state = {fair(name): torch.tensor(value) for name, value in weights.items() if name != INV_FREQ}
    contact = {name: state.pop(name) for name in list(state) if name.startswith("contact_head")}
    state = {f"encoder.{name}" if name.startswith("lm_head") else f"encoder.sentence_encoder.{name}": value
             for name, value in state.items()}
    for i in range(3):
        name = f"encoder.sentence_encoder.layers.{i}.self_attn.rot_emb.inv_freq"
        state[name] = torch.tensor(make_golden_esm.INV_FREQ)
    state["encoder.lm_head.weight"] = state["encoder.sentence_encoder.embed_tokens.weight"]
    options = argparse.Namespace(encoder_attention_heads=4, token_dropout=True)
    torch.save({"model": state, "cfg": {"model": options}}, tmp_path / "esm2_x.pt")
    torch.save({"model": contact}, tmp_path / "esm2_x-contact-regression.pt")
    assert convert_pt.main([str(tmp_path / "esm2_x.pt"), str(tmp_path / "out")]) == 0
    model = jaxmodels.load(tmp_path / "out")
    same(model, expected)
    assert model.cfg.inv_freq == expected.cfg.inv_freq and model.cfg.token_dropout
    # What is refused: options elsewhere, another model, code in the pickle.
    torch.save({"model": state}, tmp_path / "x.pt")
    torch.save({"model": {"weight": torch.ones(2)}}, tmp_path / "y.pt")
    torch.save({"model": state, "hook": jaxmodels.load}, tmp_path / "z.pt")
    capsys.readouterr()
    for name, words in (("x", "give --heads N"), ("y", "not an ESM or RoBERTa encoder"), ("z", "weights_only=True"),
                        ("none", "no weights at")):
        assert convert_pt.main([str(tmp_path / f"{name}.pt"), str(tmp_path / "no")]) == 2
        told = capsys.readouterr().err
        assert words in told and told.count("\n") == 1
    assert not (tmp_path / "no").exists()
    assert load_file(tmp_path / "out" / "model.safetensors")[INV_FREQ].shape == (4,)
