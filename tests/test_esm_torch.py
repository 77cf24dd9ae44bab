"""ESM beside transformers: random models of every family, forward and backward, and files that either writes."""

import json

import numpy as np
import pytest

import jaxmodels
from jaxmodels.esm.alphabet import MASK, PAD, encode, pad_batch
from jaxmodels.esm.convert import entries
from tests import make_golden_esm
from tests.make_golden_esm import CASES, GOLDEN
from tests.test_esm_golden import golden_config
from tests.tiny_esm import padded

pytestmark = pytest.mark.torch

# Others than the golden ones: one head, an FFN narrower than the model, many layers; odd letters and masks throughout.
RANDOM = {
    "rotary": ("esm", {"position_embedding_type": "rotary", "hidden_size": 48, "num_attention_heads": 4,
                       "num_hidden_layers": 4, "intermediate_size": 100}),
    "learned": ("esm", {"position_embedding_type": "absolute", "emb_layer_norm_before": True, "hidden_size": 24,
                        "num_attention_heads": 1, "num_hidden_layers": 2, "intermediate_size": 20}),
    "post": ("roberta", {"hidden_size": 40, "num_attention_heads": 4, "num_hidden_layers": 2,
                         "intermediate_size": 64}),
}  # fmt: skip


def batch(seed: int = 0) -> np.ndarray:
    """Random proteins of every letter, padded, a fifth of the residues <mask>."""
    rng = np.random.default_rng(seed)
    rows = [encode("".join(rng.choice(list("LAGVSERTIDPKQNFYMHWCXBUZO.-"), n)))[0] for n in (30, 12, 3)]
    for row in rows[:2]:
        row[1:-1][rng.random(len(row) - 2) < 0.2] = MASK
    return pad_batch(rows)


def made(folder, name, kind="ForMaskedLM", **more):
    """A model of transformers with weights large enough to matter, saved; returns it."""
    import torch
    import transformers

    model_type, changes = RANDOM[name]
    extra = {"token_dropout": True} if model_type == "esm" else {"type_vocab_size": 1}
    config = transformers.AutoConfig.for_model(model_type, **(make_golden_esm.SMALL | extra | changes | more))
    model = getattr(transformers, {"esm": "Esm", "roberta": "Roberta"}[model_type] + kind)._from_config(
        config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise + 1 if parameter.ndim == 1 else noise)
    model.save_pretrained(folder)
    return model


def run(model, tokens):
    """transformers' output; rows of padding left to the caller."""
    import torch

    ids = torch.tensor(tokens, dtype=torch.long)
    return model(input_ids=ids, attention_mask=(ids != PAD).long())


@pytest.mark.parametrize("name", CASES)
def test_golden_files_are_current(tmp_path, name):
    folder = make_golden_esm.write_folder(tmp_path, golden_config(name))
    logits = make_golden_esm.logits_of(folder, padded())[padded() != PAD]
    stored = np.load(GOLDEN / f"{name}.npz")["logits"]
    assert np.abs(logits - stored).max() <= 2e-5 * stored.std()
    written = make_golden_esm.config_of(name)
    assert written == golden_config(name), "run python -m tests.make_golden_esm"


@pytest.mark.parametrize("name", RANDOM)
def test_forward_and_gradients(tmp_path, name):
    """Logits to 1e-4, d loss / d parameter to 1e-3 of each tensor's largest, tied embedding and all."""
    import jax
    import torch
    from flax import nnx

    theirs, tokens = made(tmp_path, name), batch()
    real = tokens != PAD
    out = run(theirs, tokens).logits
    (torch.logsumexp(out, -1) * torch.tensor(real)).sum().backward()
    expected = {key: p.grad.numpy() for key, p in theirs.named_parameters() if p.grad is not None}
    model = jaxmodels.load(tmp_path)
    logits = np.asarray(model(tokens)[0])
    assert np.abs(logits - out.detach().numpy())[real].max() < 1e-4
    graphdef, state = nnx.split(model)

    @jax.jit
    @jax.grad
    def gradient(state):
        return (jax.nn.logsumexp(nnx.merge(graphdef, state).forward(tokens)[0], axis=-1) * real).sum()

    ours = {path: v[...] for path, v in nnx.to_flat_state(gradient(state))}
    compared = set()
    for entry in entries(model.cfg):
        parts = np.asarray(ours[entry.path]).reshape(len(entry.sources), *entry.part_shape)
        for part, source in zip(parts, entry.sources, strict=True):
            if source.name in expected:  # the contact head has none
                grown, theirs_grown = source.to_hf(part), expected[source.name]
                if source.name.endswith("position_embeddings.weight"):
                    grown, theirs_grown = grown[2:], theirs_grown[2:]  # PyTorch keeps the row of padding as it is
                scale = max(np.abs(theirs_grown).max(), 1e-3)  # a bias of keys has none, if nothing turns: round-off
                assert np.allclose(grown, theirs_grown, rtol=1e-3, atol=1e-3 * scale), source.name
                compared.add(source.name)
    assert len(compared) >= 16 * model.cfg.num_layers + 6


@pytest.mark.parametrize("name", RANDOM)
def test_a_mask_of_ones_is_no_mask(tmp_path, name):
    """Where transformers gets no attention mask, <pad> is a token like any other."""
    import torch

    theirs, tokens = made(tmp_path, name), batch()
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    logits = np.asarray(jaxmodels.load(tmp_path)(tokens, mask=np.ones(tokens.shape, bool))[0])
    assert np.abs(logits - expected).max() < 1e-4


@pytest.mark.parametrize("name, kind", [("rotary", "ForSequenceClassification"), ("learned", "Model"),
                                        ("post", "ForSequenceClassification"), ("rotary", "ForMaskedLM")])
def test_files_both_ways(tmp_path, name, kind):
    """What transformers writes we read, what we write it reads, and all three compute the same."""
    import torch
    import transformers

    more = {"num_labels": 7} if "Class" in kind else {}
    theirs, tokens = made(tmp_path / "a", name, kind, **more), batch(1)
    real = tokens != PAD

    def values(model):
        with torch.no_grad():
            out = run(model, tokens)
        return out[0].numpy() if "Class" in kind else out[0].numpy()[real]

    expected = values(theirs)
    model = jaxmodels.load(tmp_path / "a")
    ours = np.asarray(model(tokens, output={"Model": "hidden", "ForMaskedLM": "logits"}.get(kind, "class"))[0])
    assert np.abs((ours if more else ours[real]) - expected).max() < 1e-4
    saved = jaxmodels.save(model, tmp_path / "b")
    assert json.loads((saved / "config.json").read_text())["architectures"] == [type(theirs).__name__]
    back, info = type(theirs).from_pretrained(saved, attn_implementation="eager", output_loading_info=True)
    assert not info["unexpected_keys"] and all("pooler" in key or kind != "Model" and "contact_head" in key
                                               for key in info["missing_keys"])
    assert np.abs(values(back.eval()) - expected).max() < 1e-5
    if model.cfg.family == "esm":
        tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
        assert tokenizer("MKXBUZO.-L")["input_ids"] == encode("MKXBUZO.-L")[0].tolist()


def test_contacts_of_a_random_model(tmp_path):
    import torch

    theirs, tokens = made(tmp_path, "rotary"), batch(2)
    ids = torch.tensor(tokens, dtype=torch.long)
    with torch.no_grad():
        expected = theirs.predict_contacts(ids, (ids != PAD).long()).numpy()
    assert np.abs(np.asarray(jaxmodels.load(tmp_path).contacts(tokens)) - expected).max() < 1e-4
