"""BERT against numbers computed once by transformers, and its files both ways."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxmodels
from jaxmodels import UserError
from jaxmodels.bert.convert import POSITIONS, TOKEN_TYPES, config_from_hf, config_to_hf
from tests import make_golden_bert
from tests.make_golden_bert import GOLDEN, TOKENS

CONFIG = json.loads((GOLDEN / "bert.json").read_text())


def test_logits_and_files(tmp_path):
    golden = np.load(GOLDEN / "bert.npz")
    assert np.array_equal(golden["tokens"], TOKENS)
    made = make_golden_bert.write_folder(tmp_path / "made", CONFIG)
    model = jaxmodels.load(made)
    logits = np.asarray(model(TOKENS)[0])
    assert np.abs(logits[TOKENS != 0] - golden["logits"]).max() < 1e-4
    saved = jaxmodels.save(model, tmp_path / "saved")
    before, after = load_file(made / "model.safetensors"), load_file(saved / "model.safetensors")
    before[POSITIONS] = before[POSITIONS] + before[TOKEN_TYPES][:1]
    before[TOKEN_TYPES] = np.zeros_like(before[TOKEN_TYPES])
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    written = json.loads((saved / "config.json").read_text())
    assert config_from_hf(written) == model.cfg and config_to_hf(jaxmodels.load(saved).cfg) == written


def test_heads_that_a_file_lacks(tmp_path):
    """A pooler without a classifier becomes the dense layer of a fresh one; names stand with bert. in front or not."""
    tensors = make_golden_bert.weights(CONFIG)
    pooler = {"pooler.dense.weight": np.eye(32, dtype=np.float32)[::-1], "pooler.dense.bias": np.ones(32, np.float32)}
    folder = make_golden_bert.write_folder(tmp_path / "a", CONFIG)
    bare = {name.removeprefix("bert."): value for name, value in tensors.items() if name.startswith("bert.")} | pooler
    save_file({name: np.ascontiguousarray(v) for name, v in bare.items()}, folder / "model.safetensors")
    model = jaxmodels.load(folder, classes=3)
    assert model.lm_head is None and model.classifier.out[...].shape == (32, 3)
    assert np.array_equal(model.classifier.dense[...], np.eye(32)[::-1]) and model.classifier.dense_bias[...].min() == 1
    assert model(TOKENS, output="class")[0].shape == (3, 3)
    saved = jaxmodels.save(model, tmp_path / "b")
    assert json.loads((saved / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]
    assert np.array_equal(jaxmodels.load(saved)(TOKENS, output="class")[0], model(TOKENS, output="class")[0])
    with pytest.raises(UserError, match="a classifier of 3 classes, 4 are asked for"):
        jaxmodels.load(saved, classes=4)
    assert jaxmodels.load(folder).classifier is None


def test_bad_files(tmp_path):
    folder = make_golden_bert.write_folder(tmp_path, CONFIG)
    model = jaxmodels.load(folder)
    for change, words in (({"pad_token_id": -1}, "pad_token_id is -1; a number from 0"),
                          ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported")):
        (folder / "config.json").write_text(json.dumps(CONFIG | change))
        with pytest.raises(UserError, match=words):
            jaxmodels.load(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match="rows of 25 tokens are longer than the 24"):
        model(np.ones((1, 25), np.int32))
    tensors = make_golden_bert.weights(CONFIG) | {"cls.predictions.decoder.weight": np.ones((60, 32), np.float32)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="decoder.weight differs from bert.embeddings"):
        jaxmodels.load(folder)


def test_longer_padding_changes_nothing(tmp_path):
    model = jaxmodels.load(make_golden_bert.write_folder(tmp_path, CONFIG))
    short, long = TOKENS[:, :20], np.pad(TOKENS, ((0, 0), (0, 4)))
    a, b = (np.asarray(model(t, output="hidden")[0])[:, :20][TOKENS != 0] for t in (short, long))
    assert np.allclose(a, b, atol=1e-5)
