"""ESM against numbers computed once: small random models (tests/golden), a reference model with its inner values, the
real weights of Sapiens, and the public 8M model."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxmodels
from jaxmodels import Taps, UserError
from jaxmodels.esm.alphabet import PAD
from jaxmodels.esm.convert import config_from_hf, config_to_hf
from jaxmodels.esm.convert_pt import convert
from jaxmodels.hub import resolve
from tests import make_golden_esm
from tests.make_golden_esm import CASES, GOLDEN
from tests.tiny_esm import padded


def golden_config(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_logits_and_files(tmp_path, name):
    """Three proteins with odd letters, masked tokens and padding in one batch; then every tensor is written back."""
    golden, tokens = np.load(GOLDEN / f"{name}.npz"), padded()
    assert np.array_equal(golden["tokens"], tokens)
    made = make_golden_esm.write_folder(tmp_path / "made", golden_config(name))
    model = jaxmodels.load(made)
    real = tokens != PAD
    logits, aux = model(tokens)
    assert logits.shape == (3, 19, 33) and logits.dtype == np.float32 and aux == {}
    assert np.abs(np.asarray(logits)[real] - golden["logits"]).max() < 1e-4
    saved = jaxmodels.save(model, tmp_path / "saved")
    before, after = load_file(made / "model.safetensors"), load_file(saved / "model.safetensors")
    assert before.keys() == after.keys()
    folded = "roberta.embeddings.token_type_embeddings.weight"  # into the table of positions
    if folded in before:
        positions = "roberta.embeddings.position_embeddings.weight"
        before[positions] = before[positions] + before[folded]
        before[folded] = np.zeros_like(before[folded])
    for tensor in before:
        assert before[tensor].dtype == after[tensor].dtype and before[tensor].tobytes() == after[tensor].tobytes()
    written = json.loads((saved / "config.json").read_text())
    assert config_from_hf(written) == config_from_hf(golden_config(name)) and "jaxmodels" not in written
    assert config_to_hf(jaxmodels.load(saved).cfg) == written


def test_the_tanh_form_of_gelu_is_told_apart(tmp_path):
    """The two differ by 4.7e-4 at most in one activation; that must stand far above the error of the right one."""
    model = jaxmodels.load(make_golden_esm.write_folder(tmp_path, golden_config("esm2")))
    golden, real = np.load(GOLDEN / "esm2.npz")["logits"], padded() != PAD
    right = np.abs(np.asarray(model(padded())[0])[real] - golden).max()
    model.groups[0].ffn.activation = "gelu_tanh"
    wrong = np.abs(np.asarray(model(padded())[0])[real] - golden).max()
    assert wrong > 3e-4 and wrong > 10 * right


def test_the_frequencies_of_the_file_are_used(tmp_path):
    """They are rounded, and exact ones give other logits."""
    folder = make_golden_esm.write_folder(tmp_path, golden_config("esm2"))
    logits = np.asarray(jaxmodels.load(folder)(padded())[0])
    exact = np.asarray(jaxmodels.load(folder, rope_inv_freq="exact")(padded())[0])
    assert np.abs(logits - exact).max() > 1e-3


@pytest.fixture(scope="module")
def data():
    folder = Path(os.environ.get("JAXMODELS_DATA") or "/nowhere")
    if not folder.is_dir():
        pytest.skip("JAXMODELS_DATA is not set and ../shared/data does not exist")
    return folder


@pytest.fixture(scope="module")
def reference(data):
    """(golden_esm_tiny's model, its arrays)."""
    folder = data / "golden_esm_tiny"
    if not (folder / "forward.npz").exists():
        pytest.skip("golden_esm_tiny is not in $JAXMODELS_DATA")
    return jaxmodels.load(folder), np.load(folder / "forward.npz")


@pytest.mark.parametrize("masked", ["", "_masked"])
def test_reference_model(reference, masked):
    """Logits, hidden states, attention maps, contacts and classes, padded, without and with <mask>: 1e-4."""
    model, golden = reference
    tokens = golden[f"input_ids{masked}"].astype(np.int32)
    real = tokens != PAD
    logits, aux = model(tokens, taps=Taps(record=("residual", "attention.probability")))
    hidden, _ = model(tokens, output="hidden")
    classes, _ = model(tokens, output="class")

    def error(ours, theirs):
        return np.abs(np.asarray(ours) - theirs).max()

    assert error(np.asarray(logits)[real], golden[f"logits{masked}"][real]) < 1e-4
    theirs = golden[f"hidden{masked}"]  # the last of which is normed
    assert error(np.asarray(aux["residual"])[:3, real], theirs[:3, real]) < 1e-4
    assert error(np.asarray(hidden)[real], theirs[3, real]) < 1e-4
    queries = np.broadcast_to(real[None, :, None, :, None], golden[f"attn{masked}"].shape)
    assert error(np.asarray(aux["attention.probability"])[queries], golden[f"attn{masked}"][queries]) < 1e-5
    assert error(model.contacts(tokens), golden[f"contacts{masked}"]) < 1e-5
    assert error(classes, golden[f"cls_logits{masked}"]) < 1e-4


@pytest.fixture(scope="module")
def sapiens(data, tmp_path_factory):
    folder = data / "weights" / "sapiens"
    if not (folder / "golden.npz").exists():
        pytest.skip("weights/sapiens is not in $JAXMODELS_DATA")
    out = tmp_path_factory.mktemp("sapiens")
    for chain in ("vh", "vl"):
        convert(folder / f"sapiens_{chain}.safetensors", out / chain, heads=8)
    return {chain: jaxmodels.load(out / chain) for chain in ("vh", "vl")}, np.load(folder / "golden.npz")


@pytest.mark.parametrize("domain", ["human_vh", "human_vl"])
def test_real_weights_of_sapiens(sapiens, domain):
    """Post-norm, learned positions: logits, hidden states and masked log-probabilities, one position at a time."""
    models, golden = sapiens
    model = models[domain[-2:]]
    assert model.cfg.mask_id == 24 and model.cfg.norm_placement == "post" and model.cfg.position == "learned"
    tokens = golden[f"{domain}/ids"].astype(np.int32)
    logits, aux = model(tokens, taps=Taps(record=("residual",)))
    assert np.abs(np.asarray(logits) - golden[f"{domain}/logits"]).max() < 1e-4
    assert np.abs(np.asarray(aux["residual"])[-1] - golden[f"{domain}/hidden_last"]).max() < 1e-4
    sites = np.arange(1, tokens.shape[1] - 1)
    rows = np.repeat(tokens, len(sites), 0)
    rows[np.arange(len(sites)), sites] = model.cfg.mask_id
    log_p = np.asarray(jax.nn.log_softmax(model(rows)[0], axis=-1))[np.arange(len(sites)), sites]
    assert np.abs(log_p - golden[f"{domain}/masked_logp"]).max() < 1e-4
    assert np.mean(log_p.argmax(-1) == tokens[0, sites]) > 0.95


def test_public_8m_weights():
    """Values of transformers' integration test; the first takes <pad> for a token, so it needs a mask of ones."""
    try:
        path = resolve("facebook/esm2_t6_8M_UR50D")
    except UserError as error:
        pytest.skip(str(error))
    model = jaxmodels.load(path)
    tokens = np.array([[0, 1, 2, 3, 4, 5]], np.int32)
    logits = np.asarray(model(tokens, mask=np.ones((1, 6), bool))[0])[0, :3, :3]
    assert np.allclose(logits, [[8.9215, -10.5898, -6.4671], [-6.3967, -13.9114, -1.1212],
                                [-7.7812, -13.9516, -3.7406]], atol=1e-4, rtol=1e-4)
    tokens = np.array([[0, 6, 4, 13, 5, 4, 16, 12, 11, 7, 2]], np.int32)
    hidden = np.asarray(model(tokens, output="hidden")[0])[0, :3, :3]
    assert np.allclose(hidden, [[0.1444, 0.5413, 0.3248], [0.3034, 0.0053, 0.3108], [0.3228, -0.2499, 0.3415]],
                       atol=1e-4, rtol=1e-4)
