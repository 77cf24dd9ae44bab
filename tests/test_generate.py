"""Generation: batches, sampling, stopping, compilations, and text through a saved model's own tokenizer."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import jaxmodels
from jaxmodels import DecoderConfig, UserError
from jaxmodels.decoder.generate import Sampling, generate, generate_text, stream
from jaxmodels.experts.models import unroll
from jaxmodels.hub.models import build, leaves
from jaxmodels.hub.tokenizer import Tokenizer, load_tokenizer
from tests.tiny_models import CONFIGS, DENSE, random_model

NEW = 6


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 97, n).tolist() for n in (1, 5, 64)]


@pytest.fixture(scope="module")
def dense():
    return random_model(DENSE)


@pytest.mark.long
@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_equals_single_prompts_and_the_full_forward_pass(name, prompts):
    model = random_model(CONFIGS[name])
    rows = generate(model, prompts, NEW)
    assert [len(row) for row in rows] == [NEW] * 3
    assert rows == [generate(model, [prompt], NEW)[0] for prompt in prompts]
    # Every token is the likeliest one given all before it, by one pass without a cache.
    tokens, mask = np.zeros((3, 64 + NEW), np.int32), np.zeros((3, 64 + NEW), bool)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        tokens[i, :len(prompt) + NEW] = prompt + row
        mask[i, :len(prompt) + NEW] = True
    logits = np.asarray(model(tokens, mask=mask)[0])
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        assert logits[i, len(prompt) - 1:len(prompt) - 1 + NEW].argmax(-1).tolist() == row
    if name == "dense":
        assert generate(unroll(model), prompts, NEW) == rows


def test_sampling_is_repeatable(dense, prompts):
    sampling = Sampling(temperature=1.0)
    a, b, c = (generate(dense, prompts, NEW, sampling=sampling, seed=seed) for seed in (0, 0, 1))
    assert a == b != c


def test_top_k_of_one_is_greedy(dense, prompts):
    assert generate(dense, prompts, NEW, sampling=Sampling(5.0, top_k=1), seed=3) == generate(dense, prompts, NEW)


LOGITS = np.log([0.4, 0.3, 0.15, 0.1, 0.05])


@pytest.mark.parametrize("sampling, kept", [
    (Sampling(1.0), 5),
    (Sampling(0.5), 5),
    (Sampling(2.0), 5),
    (Sampling(1.0, top_k=2), 2),
    (Sampling(1.0, top_k=99), 5),
    (Sampling(1.0, top_p=0.75), 3),  # 0.4 + 0.3 < 0.75: the token that crosses the line stays
    (Sampling(1.0, top_p=0.35), 1),
    (Sampling(2.0, top_k=4, top_p=0.6), 2),  # 0.627 of what top_k left, 0.56 of the whole
    (Sampling(0.5, top_k=3, top_p=0.99), 3),
])  # fmt: skip
def test_frequencies_against_exact_probabilities(sampling, kept):
    """60,000 draws from a vocabulary of five; within five standard deviations of each probability."""
    draws = 60_000
    order = np.array([3, 0, 4, 1, 2])  # the likeliest is not token 0
    logits = jnp.asarray(LOGITS[order], jnp.float32)
    drawn = np.asarray(sampling.draw(jnp.tile(logits, (draws, 1)), jax.random.key(0)))
    assert drawn.dtype == np.int32
    p = np.exp(LOGITS / sampling.temperature)
    p[kept:] = 0
    p = (p / p.sum())[order]
    frequency = np.bincount(drawn, minlength=5) / draws
    assert (frequency[p == 0] == 0).all()
    assert (np.abs(frequency - p) <= 5 * np.sqrt(p * (1 - p) / draws) + 1e-9).all()


def test_rows_of_a_batch_are_drawn_independently():
    rows = np.asarray(Sampling(1.0).draw(jnp.zeros((1000, 7)), jax.random.key(1)))
    assert len(set(rows.tolist())) == 7


def test_stop_ids(dense, prompts):
    free = generate(dense, prompts, NEW)
    stop = free[0][2]
    cut = [row[:row.index(stop) + 1] if stop in row else row for row in free]
    assert cut != free and generate(dense, prompts, NEW, stop_ids=[stop]) == cut
    steps = list(stream(dense, prompts[:1] * 3, NEW, stop_ids=[stop]))
    assert len(steps) == free[0].index(stop) + 1  # nothing runs on when all rows have ended
    columns = list(stream(dense, prompts, NEW, stop_ids=[stop]))
    assert [[token for token in row if token is not None] for row in zip(*columns, strict=True)] == cut
    # The default is the model's own end of text.
    ending = build(dataclasses.replace(dense.cfg, eos_ids=(stop,)), leaves(dense))
    assert generate(ending, prompts, NEW) == cut
    assert generate(ending, prompts, NEW, stop_ids=()) == free


def test_one_compilation_for_each_shape(prompts, caplog):
    """Other prompts of any length in the same bucket, other seeds and more tokens compile nothing anew."""
    model = random_model(DENSE, seed=7)

    def compilations(*args, **kwargs):
        caplog.clear()
        with caplog.at_level(logging.WARNING), jax.log_compiles():
            generate(model, *args, **kwargs)
        lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling jit(_")]
        return sorted(line.split("(")[1].split(")")[0] for line in lines)

    sampling = Sampling(0.7, top_k=3)
    assert compilations(prompts[:2], 9, sampling=sampling) == ["_decode", "_prefill"]
    assert compilations([[5] * 40, [1, 2]], 9, sampling=sampling, seed=4) == []
    assert compilations([[5] * 64, [1, 2]], 64, sampling=sampling, stop_ids=[3]) == []
    assert compilations([[5] * 65, [1, 2]], 2, sampling=sampling) == ["_decode", "_prefill"]


@pytest.mark.parametrize("prompts, new, kwargs, words", [
    ([], 3, {}, "no tokens"),
    ([[1], []], 3, {}, "no tokens"),
    ([[97]], 3, {}, "97 is outside the vocabulary"),
    ([[-1]], 3, {}, "-1 is outside the vocabulary"),
    ([[1]], 0, {}, "max_new_tokens 0"),
    ([[1]], 1, {"seed": 2**63}, "seed 9223372036854775808 does not fit 64 bits"),
    ([[1] * 2000], 49, {}, "2000 tokens \\+ 49"),
])  # fmt: skip
def test_bad_prompts(dense, prompts, new, kwargs, words):
    with pytest.raises(UserError, match=words) as caught:
        generate(dense, prompts, new, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kwargs", [
    {"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.01},
    {"top_p": float("nan")},
])  # fmt: skip
def test_bad_sampling(kwargs):
    with pytest.raises(UserError, match=next(iter(kwargs))):
        Sampling(**kwargs)


def test_the_last_position_can_be_used():
    model = random_model(DecoderConfig.tiny(ffn_widths=(48,), max_positions=70))
    assert len(generate(model, [[1] * 64], 6)[0]) == 6
    with pytest.raises(UserError, match="70 positions"):
        generate(model, [[1] * 64], 7)


# Text


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """A saved model with a byte-level tokenizer and a chat template: (folder, model)."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *letters, "he", "ll"])}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e"), ("l", "l")]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>"])
    template = "{% for m in messages %}{{ bos_token }}{{ m.content }}\n{% endfor %}"
    folder = tmp_path_factory.mktemp("text")
    for name, text in Tokenizer(inner, 0, 1, None, template).files().items():
        (folder / name).write_text(text)
    model = random_model(DecoderConfig.tiny(vocab_size=300, ffn_widths=(48, 48), eos_ids=(1,)))
    saved = jaxmodels.save(model, folder / "model", tokenizer=folder)
    return saved, unroll(model)  # as generate_text loads it, so that both share one compilation


def test_generated_text(text_model):
    folder, model = text_model
    tokenizer = load_tokenizer(folder)
    prompts = ["hello", "a ü"]
    ids = [tokenizer.encode(p) for p in prompts]
    assert [tokenizer.token(i) for i in ids[0]] == ["he", "ll", "o"]
    expected = [tokenizer.decode(row, skip_special=True) for row in generate(model, ids, 8)]
    assert generate_text(folder, prompts, 8, chat=False) == expected
    chat = generate(model, [[0, *tokenizer.encode(p + "\n")] for p in prompts], 8)
    assert generate_text(str(folder), prompts, 8) == [tokenizer.decode(row, skip_special=True) for row in chat]
    sampled = [generate_text(folder, prompts, 8, 1.0, 50, 0.9, seed, chat=False) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_split_and_pruned_models_generate_text_through_the_same_function(text_model, tmp_path):
    folder, model = text_model
    prompts = ["hello", "a ü"]
    experts, _ = jaxmodels.split(model, expert_size=12, method="random")
    jaxmodels.save(experts, tmp_path / "split", tokenizer=folder)
    assert generate_text(tmp_path / "split", prompts, 8) == generate_text(folder, prompts, 8)
    small = jaxmodels.prune(experts, np.array([[True, False, True, True], [False, True, False, False]]))
    jaxmodels.save(small, tmp_path / "small", tokenizer=tmp_path / "split")
    ids = load_tokenizer(tmp_path / "small").encode_batch(prompts)
    expected = [load_tokenizer(folder).decode(row, skip_special=True) for row in generate(small, ids, 8)]
    assert generate_text(tmp_path / "small", prompts, 8, chat=False) == expected
