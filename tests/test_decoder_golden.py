"""Every family against logits that transformers computed once (tests/golden), and its files read and written."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxmodels
from jaxmodels.decoder.convert import config_from_hf, config_to_hf
from tests import make_golden
from tests.make_golden import CASES, GOLDEN


def golden_config(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_logits(tmp_path, name):
    """Rows without padding, padded on the left and padded on the right, in one call."""
    golden = np.load(GOLDEN / f"{name}.npz")
    tokens, mask = make_golden.inputs()
    assert np.array_equal(golden["tokens"], tokens) and np.array_equal(golden["mask"], mask)
    model = jaxmodels.load(make_golden.write_folder(tmp_path, golden_config(name)))
    logits, aux = model(tokens, mask=mask)
    assert logits.shape == (3, 14, 41) and logits.dtype == np.float32 and aux == {}
    error = np.abs(np.asarray(logits)[mask] - golden["logits"]).max()
    assert error <= 2e-4 * golden["logits"].std()


@pytest.mark.parametrize("name", CASES)
def test_files_round_trip(tmp_path, name):
    """jaxmodels.save writes every tensor back, byte for byte, and a config.json that means the same."""
    config = golden_config(name)
    made = make_golden.write_folder(tmp_path / "made", config)
    saved = jaxmodels.save(jaxmodels.load(made), tmp_path / "saved")
    before, after = load_file(made / "model.safetensors"), load_file(saved / "model.safetensors")
    assert before.keys() == after.keys()
    for tensor in before:
        assert before[tensor].dtype == after[tensor].dtype and before[tensor].tobytes() == after[tensor].tobytes()
    written = json.loads((saved / "config.json").read_text())
    assert config_from_hf(written) == config_from_hf(config) and "jaxmodels" not in written


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files_round_trip(tmp_path, dtype):
    import ml_dtypes

    config = golden_config("qwen2")
    narrow = {name: w.astype(getattr(ml_dtypes, dtype, dtype)) for name, w in make_golden.weights(config).items()}
    save_file(narrow, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = jaxmodels.load(tmp_path, dtype)
    saved = jaxmodels.save(model, tmp_path / "saved")
    back = load_file(saved / "model.safetensors")
    assert all(back[name].dtype == w.dtype and back[name].tobytes() == w.tobytes() for name, w in narrow.items())
    assert json.loads((saved / "config.json").read_text())["torch_dtype"] == dtype
    tokens, mask = make_golden.inputs()
    logits = np.asarray(model(tokens, mask=mask)[0])[mask]
    exact = np.load(GOLDEN / "qwen2.npz")["logits"]
    assert logits.dtype == np.float32
    assert np.sqrt(np.mean((logits - exact) ** 2)) < {"bfloat16": 0.2, "float16": 0.03}[dtype] * exact.std()


OLD_ROPE = {
    "plain": {"rope_theta": 500.0},
    "none": {"rope_theta": 500.0, "rope_scaling": None},
    "linear": {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama3": {"rope_theta": 500.0, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}},
    "yarn": {"rope_theta": 500.0, "rope_scaling": {
        "type": "yarn", "factor": 4.0, "beta_fast": 16, "original_max_position_embeddings": 16}},
}  # fmt: skip


@pytest.mark.parametrize("kind", OLD_ROPE)
def test_both_spellings_of_rope(kind):
    """transformers 4.x: rope_theta and rope_scaling (type or rope_type); 5.x: rope_parameters."""
    base = {k: v for k, v in golden_config("llama").items() if k != "rope_parameters"}
    old = OLD_ROPE[kind]
    scaling = dict(old.get("rope_scaling") or {})
    scaling["rope_type"] = scaling.pop("type", scaling.get("rope_type", "default"))
    new = {"rope_parameters": {"rope_theta": old["rope_theta"], **scaling}}
    config = config_from_hf(base | old)
    assert config == config_from_hf(base | new)
    assert config.rope.theta == 500.0 and config.rope.kind == scaling["rope_type"]
    # What is written can be read in either spelling: each half alone carries everything.
    written = config_to_hf(config)
    assert config_from_hf({k: v for k, v in written.items() if k != "rope_parameters"}) == config
    assert config_from_hf({k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling")}) == config


@pytest.mark.parametrize("family, eps, theta, top_k", [
    ("llama", 1e-6, 1e4, None), ("olmo2", 1e-5, 1e4, None), ("mixtral", 1e-5, 1e6, 2), ("olmoe", 1e-5, 1e4, 8),
    ("qwen3_moe", 1e-6, 1e4, 8),
])  # fmt: skip
def test_keys_that_are_left_out(family, eps, theta, top_k):
    """Defaults of transformers 5: LlamaConfig() and its kin."""
    left_out = ("rms_norm_eps", "rope_theta", "rope_parameters", "num_experts_per_tok")
    config = config_from_hf({k: v for k, v in golden_config(family).items() if k not in left_out}
                            | {"num_local_experts": 16, "num_experts": 16})
    assert (config.norm_eps, config.rope.theta) == (eps, theta)
    assert (config.experts and config.experts.top_k) == top_k


def test_windows_that_no_layer_has(tmp_path):
    """Qwen2 configs often carry a window whose first layer lies beyond the last one."""
    config = golden_config("qwen2") | {"max_window_layers": 28, "layer_types": None}
    assert config_from_hf(config).windows is None
    assert "use_sliding_window" not in config_to_hf(config_from_hf(config))
    assert config_from_hf(golden_config("qwen2")).windows == (None, 4, 4)


def test_the_window_of_a_mistral():
    """MistralConfig has 4,096 where config.json says nothing, and none where it says null."""
    config = {key: value for key, value in golden_config("mistral").items() if key != "sliding_window"}
    assert config_from_hf(config).windows == (4096,) * config["num_hidden_layers"]
    assert config_from_hf(config | {"sliding_window": None}).windows is None
