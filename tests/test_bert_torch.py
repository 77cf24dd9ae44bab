"""BERT beside transformers: hidden states, pooler and classes, gradients, the real weights of MiniLM."""

import numpy as np
import pytest

import jaxmodels
from jaxmodels import UserError
from jaxmodels.bert.convert import config_from_hf, entries
from jaxmodels.hub import load_tokenizer, resolve
from tests import make_golden_bert
from tests.make_golden_bert import GOLDEN, SMALL, TOKENS

pytestmark = pytest.mark.torch


def test_golden_files_are_current(tmp_path):
    import json

    config = json.loads((GOLDEN / "bert.json").read_text())
    assert make_golden_bert.config() == config, "run python -m tests.make_golden_bert"
    logits = make_golden_bert.logits_of(make_golden_bert.write_folder(tmp_path, config))[TOKENS != 0]
    assert np.abs(logits - np.load(GOLDEN / "bert.npz")["logits"]).max() <= 2e-5 * logits.std()


def test_classes_and_gradients(tmp_path):
    """BertForSequenceClassification, which transformers wrote: classes to 1e-4, gradients to 1e-3 of the largest."""
    import jax
    import torch
    import transformers
    from flax import nnx

    torch.manual_seed(0)
    theirs = transformers.BertForSequenceClassification._from_config(
        transformers.BertConfig(**SMALL, num_labels=5, initializer_range=0.3), attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path)
    ids = torch.tensor(TOKENS, dtype=torch.long)
    out = theirs(input_ids=ids, attention_mask=(ids != 0).long()).logits
    torch.logsumexp(out, -1).sum().backward()
    model = jaxmodels.load(tmp_path)
    assert np.abs(np.asarray(model(TOKENS, output="class")[0]) - out.detach().numpy()).max() < 1e-4
    graphdef, state = nnx.split(model)
    gradient = jax.jit(jax.grad(lambda state: jax.nn.logsumexp(
        nnx.merge(graphdef, state).forward(TOKENS, output="class")[0], axis=-1).sum()))(state)
    ours = {path: v[...] for path, v in nnx.to_flat_state(gradient)}
    expected = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    for entry in entries(model.cfg):
        parts = np.asarray(ours[entry.path]).reshape(len(entry.sources), *entry.part_shape)
        for part, source in zip(parts, entry.sources, strict=True):
            a, b = source.to_hf(part), expected[source.name]
            assert np.allclose(a, b, rtol=1e-3, atol=1e-3 * max(np.abs(b).max(), 1e-3)), source.name


def test_the_real_weights_of_minilm():
    import torch
    import transformers

    try:
        path = resolve("all-minilm-l6-v2")
    except UserError as error:
        pytest.skip(str(error))
    rows = load_tokenizer(path).encode_batch(["Acute pulmonary edema at high altitude.", "Cholera"])
    tokens = np.zeros((2, max(map(len, rows)) + 2), np.int32)
    for i, row in enumerate(rows):
        tokens[i, :len(row)] = row
    model, real = jaxmodels.load(path, classes=2), tokens != 0
    theirs = transformers.AutoModel.from_pretrained(path.parent, attn_implementation="eager")
    with torch.no_grad():
        out = theirs(torch.tensor(tokens).long(), attention_mask=torch.tensor(real).long())
    hidden = np.asarray(model(tokens, output="hidden")[0])
    assert np.abs(hidden - out.last_hidden_state.numpy())[real].max() < 1e-5
    dense = model.classifier.dense[...], model.classifier.dense_bias[...]
    assert np.abs(np.tanh(hidden[:, 0] @ dense[0] + dense[1]) - out.pooler_output.numpy()).max() < 1e-5
    assert config_from_hf(theirs.config.to_dict()).max_length == 512
