"""The decoder beside transformers and PyTorch: random models of every family, then the real SmolLM2 weights."""

import numpy as np
import pytest

import jaxmodels
from jaxmodels.decoder.convert import config_from_hf
from jaxmodels.decoder.generate import generate
from jaxmodels.errors import UserError
from jaxmodels.hub import load_tokenizer, resolve
from tests import make_golden
from tests.make_golden import CASES, GOLDEN
from tests.test_decoder_golden import golden_config

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("name", CASES)
def test_golden_files_are_current(tmp_path, name):
    """What tests/golden holds is what the installed transformers computes and writes (to renew: make_golden.py)."""
    tokens, mask = make_golden.inputs()
    folder = make_golden.write_folder(tmp_path, golden_config(name))
    logits = make_golden.logits_of(folder, tokens, mask)[mask]
    stored = np.load(GOLDEN / f"{name}.npz")["logits"]
    assert np.abs(logits - stored).max() <= 2e-5 * stored.std()
    assert config_from_hf(make_golden.config_of(name)) == config_from_hf(golden_config(name))


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_what_we_save(tmp_path, name):
    tokens, mask = make_golden.inputs()
    made = make_golden.write_folder(tmp_path / "made", golden_config(name))
    saved = jaxmodels.save(jaxmodels.load(made), tmp_path / "saved")
    before, after = (make_golden.logits_of(folder, tokens, mask) for folder in (made, saved))
    assert np.array_equal(before[mask], after[mask])


def test_transformers_reads_a_split_and_an_evenly_pruned_model(tmp_path):
    """A split layer is stored as the dense layer in another order; equal pruned widths are a smaller dense model."""
    tokens, mask = make_golden.inputs()
    made = make_golden.write_folder(tmp_path / "made", golden_config("qwen3"))
    model = jaxmodels.load(made)
    experts, _ = jaxmodels.split(model, num_experts=6, method="random")
    split = make_golden.logits_of(jaxmodels.save(experts, tmp_path / "split"), tokens, mask)
    dense = make_golden.logits_of(made, tokens, mask)
    assert np.abs(split - dense)[mask].max() <= 2e-5 * dense[mask].std()
    keep = np.random.default_rng(0).permuted(np.arange(6)[None].repeat(3, 0), axis=1) < 4
    pruned = jaxmodels.prune(experts, keep)
    theirs = make_golden.logits_of(jaxmodels.save(pruned, tmp_path / "pruned"), tokens, mask)[mask]
    ours = np.asarray(pruned(tokens, mask=mask)[0])[mask]
    assert np.abs(ours - theirs).max() <= 2e-4 * theirs.std()
    assert np.abs(theirs - dense[mask]).max() > 0.1 * theirs.std()


def test_transformers_reads_a_qwen3_moe_model_without_experts(tmp_path):
    """Every layer dense: it must not build experts from its defaults."""
    tokens, mask = make_golden.inputs()
    made = make_golden.write_folder(tmp_path / "made", golden_config("qwen3_moe") | {"mlp_only_layers": [0, 1, 2]})
    model = jaxmodels.load(made)
    before, after = (make_golden.logits_of(folder, tokens, mask)[mask]
                     for folder in (made, jaxmodels.save(model, tmp_path / "saved")))
    assert np.array_equal(before, after)
    assert np.abs(np.asarray(model(tokens, mask=mask)[0])[mask] - after).max() <= 2e-4 * after.std()


def test_gradients_agree(tmp_path):
    """d loss / d parameter of both libraries, rtol = atol = 1e-3 (house_style.md section 18)."""
    import jax
    import torch
    import transformers
    from flax import nnx

    from jaxmodels.decoder.convert import entries

    tokens, mask = make_golden.inputs()
    folder = make_golden.write_folder(tmp_path, golden_config("mixtral"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    positions = torch.tensor(np.maximum(np.cumsum(mask, 1) - 1, 0))
    out = theirs(input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long(),
                 position_ids=positions).logits
    (torch.logsumexp(out, -1) * torch.tensor(mask)).sum().backward()
    expected = {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.grad is not None}

    model = jaxmodels.load(folder)
    graphdef, state = nnx.split(model)

    @jax.jit
    @jax.grad
    def gradient(state):
        logits, _, _ = nnx.merge(graphdef, state).forward(tokens, mask=mask)
        return (jax.nn.logsumexp(logits, axis=-1) * mask).sum()

    ours = {path: v[...] for path, v in nnx.to_flat_state(gradient(state))}
    compared = 0
    for entry in entries(model.cfg):
        parts = np.asarray(ours[entry.path]).reshape(len(entry.sources), *entry.part_shape)
        for part, source in zip(parts, entry.sources, strict=True):
            if source.name in expected:  # transformers fuses the experts' tensors
                scale = np.abs(expected[source.name]).max()
                assert np.allclose(source.to_hf(part), expected[source.name], rtol=1e-3, atol=1e-3 * scale), source.name
                compared += 1
    assert compared >= 20


LANGUAGES = {
    "English": "All human beings are born free and equal in dignity and rights.",
    "German": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "Spanish": "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
    "Russian": "Все люди рождаются свободными и равными в своём достоинстве и правах.",
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।",
}
PROMPTS = [
    "The capital of France is", "Once upon a time,", "def fibonacci(n):", "Water boils at", "My favourite book is",
    "The three primary colours are", "In 1969, the first", "Die Hauptstadt von Italien", "To make an omelette, you",
    "The moon orbits the earth because",
]  # fmt: skip


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    """(our model, transformers' model read from the folder that we saved, our tokenizer)."""
    import torch
    import transformers

    try:
        resolve("smollm2-135m-instruct")
    except UserError as error:
        pytest.skip(str(error))
    model = jaxmodels.load("smollm2-135m-instruct", scan_layers=False)
    folder = jaxmodels.save(model, tmp_path_factory.mktemp("smollm") / "model", tokenizer="smollm2-135m-instruct")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, theirs, load_tokenizer(folder)


@pytest.mark.long
def test_real_weights_on_five_languages(smollm):
    import torch

    model, theirs, tokenizer = smollm
    rows = tokenizer.encode_batch(LANGUAGES.values())
    T = max(map(len, rows))
    tokens, mask = np.zeros((len(rows), T), np.int32), np.zeros((len(rows), T), bool)
    for i, row in enumerate(rows):
        tokens[i, :len(row)], mask[i, :len(row)] = row, True
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long()).logits.numpy()
    logits = np.asarray(model(tokens, mask=mask)[0])
    for i, language in enumerate(LANGUAGES):
        error = np.abs(logits[i] - expected[i])[mask[i]].max() / expected[i][mask[i]].std()
        assert error <= 2e-4, (language, error)


@pytest.mark.long
@pytest.mark.parametrize("count, new", [(3, 16), pytest.param(10, 64, marks=pytest.mark.soak)])
def test_real_greedy_continuations(smollm, count, new):
    """`new` tokens on prompts of different lengths, ours in one left-padded batch, theirs one by one."""
    import torch

    model, theirs, tokenizer = smollm
    prompts = tokenizer.encode_batch(PROMPTS[:count])
    assert len(set(map(len, prompts))) > 1
    ours = generate(model, prompts, new, stop_ids=())
    for text, prompt, row in zip(PROMPTS, prompts, ours, strict=False):
        with torch.no_grad():
            out = theirs.generate(torch.tensor([prompt]), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                                  attention_mask=torch.ones(1, len(prompt), dtype=torch.long), eos_token_id=None)
        assert row == out[0, len(prompt):].tolist(), text
