"""split, prune, generate and report of the command, on tiny saved models: what is written, and what is refused."""

import json
import shutil
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from analysis.atlas.text import pack
from analysis.prune_language import as_dense, by_contribution
from analysis.statistics import ffn_inputs, neuron_importance, read_rows, split_name
from jaxmodels import DecoderConfig, Taps, UserError, cli
from jaxmodels.decoder.generate import generate_text
from jaxmodels.experts.models import ffn_layers
from jaxmodels.hub import load_tokenizer
from jaxmodels.hub.tokenizer import has_tokenizer
from tests.test_hub_models import tiny_tokenizer
from tests.tiny_models import EXPERT, close, random_model

L, F, E = 2, 24, 4
CONFIG = DecoderConfig.tiny(vocab_size=300, ffn_widths=(F,) * L, mlp_bias=True)
TEXTS = {
    "de": "Der schnelle braune Fuchs springt über den faulen Hund, und niemand weiß warum.",
    "fr": "Le renard brun saute par-dessus le chien paresseux, et personne ne sait pourquoi.",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with ``model`` (and its tokenizer), ``bare`` (without one) and ``texts``: de.txt, fr.txt, short.txt."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "tokenizer").mkdir()
    for name, text in tiny_tokenizer().files().items():
        (folder / "tokenizer" / name).write_text(text, "utf-8")
    jaxmodels.save(random_model(CONFIG), folder / "model", tokenizer=folder / "tokenizer")
    jaxmodels.save(random_model(CONFIG), folder / "bare")
    (folder / "texts").mkdir()
    for code, text in TEXTS.items():
        (folder / "texts" / f"{code}.txt").write_text("\n".join(f"{text} {i}" for i in range(12)), "utf-8")
    (folder / "texts" / "nl.txt").write_text("kort", "utf-8")
    return folder


@pytest.fixture
def source(places):
    return f"path:{places / 'texts'}"


@pytest.fixture
def model(places):
    return jaxmodels.load(places / "model")


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 300, (2, 9)).astype(np.int32)


def run(capsys, *arguments):
    """Standard output's last line; the command must succeed."""
    code = cli.main([str(word) for word in arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out.splitlines()[-1]


def refused(capsys, words, *arguments, out=None):
    assert cli.main([str(word) for word in arguments]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1, err
    assert out is None or not any(path.name.startswith((out.name, f".{out.name}")) for path in out.parent.iterdir())


# split


@pytest.mark.parametrize("options", [
    ("--expert-size", 6), ("--num-experts", 4, "--method", "random", "--seed", 3), ("--expert-size", 7, "--pad"),
    ("--expert-size", 6, "--vector", "concat"), ("--expert-size", 6, "--method", "coactivation", "--text", "{text}"),
    ("--expert-size", 6, "--method", "markers", "--shared", 1, "--text", "{text}:de"),
    ("--expert-size", 6, "--method", "importance", "--text", "{text}:de,fr"),
])  # fmt: skip
def test_split(places, source, tokens, model, capsys, tmp_path, options):
    """All experts on: the dense model; and the tokenizer goes along."""
    options = [str(word).replace("{text}", source) for word in options]
    out = run(capsys, "split", places / "model", "--out", tmp_path / "m", *options)
    split = jaxmodels.load(out)
    assert out == str(tmp_path / "m") and split.cfg.experts.router == "all"
    close(split(tokens)[0], model(tokens)[0], 1e-5)
    assert load_tokenizer(out).encode("hello") == load_tokenizer(places / "model").encode("hello")


@pytest.mark.long
def test_split_with_a_router(places, source, capsys, tmp_path):
    out = run(capsys, "split", places / "model", "--out", tmp_path / "m", "--expert-size", 6, "--router", "linear",
              "--top-k", 2, "--block", 4, "--dtype", "bfloat16")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert config["jaxmodels"]["experts"] == {"num_experts": 4, "top_k": 2, "router": "linear", "renormalise": False,
                                              "shared": 0, "block": 4}
    assert run(capsys, "generate", out, "--prompt", "hello", "--max-new-tokens", 2, "--no-chat") is not None


def test_split_is_repeatable_and_seeded(places, capsys, tmp_path):
    found = []
    for i, seed in enumerate((1, 1, 2)):
        run(capsys, "split", places / "model", "--out", tmp_path / f"{i}", "--expert-size", 6, "--seed", seed)
        found.append((tmp_path / f"{i}" / "model.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


def test_a_model_without_tokenizer_is_split_without_one(places, capsys, tmp_path):
    assert has_tokenizer(places / "model") and not has_tokenizer(places / "bare")
    assert cli.main(["split", str(places / "bare"), "--out", str(tmp_path / "m"), "--expert-size", "6"]) == 0
    assert "has no tokenizer, so" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    refused(capsys, "no tokenizer.json", "split", places / "bare", "--out", tmp_path / "o", "--method", "markers",
            "--expert-size", 6, out=tmp_path / "o")


@pytest.mark.parametrize("options, words", [
    (("--method", "kmean"), "--method 'kmean' is unknown; did you mean 'kmeans'?"),
    (("--router", "softmax"), "--router 'softmax' is unknown"),
    (("--vector", "gates"), "did you mean 'gate'?"),
    (("--expert-size", 7), "choose from 1, 2, 3, 4, 6, 8, 12, 24"),
    (("--expert-size", 0), "expert_size = 0 must lie in 1..24"),
    (("--num-experts", 0), "num_experts = 0 must lie in 1..24"),
    (("--expert-size", 6, "--num-experts", 4), "not allowed with"),
    (("--top-k", 2), "--top-k needs a --router that chooses"),
    (("--expert-size", 6, "--router", "linear", "--top-k", 5), "top_k 5 must lie in 1..4"),
    (("--expert-size", 6, "--router", "markers"), "router markers needs method markers"),
    (("--text", "gettext"), "reads no text"),
    (("--method", "importance"), "--text gettext:en,fr,ru"),
    (("--method", "importance", "--text", "{text}"), "names no languages"),
    (("--expert-size", 8, "--method", "importance", "--text", "{text}:de,fr"), "clusters (2) that divides"),
    (("--method", "markers", "--text", "{text}:it"), "has no language 'it'"),
    (("--method", "markers", "--text", "{text}:nl"), "'nl' of"),
    (("--method", "markers", "--text", "getext"), "unknown text source 'getext'; did you mean 'gettext'?"),
    (("--dtype", "int8"), "dtype 'int8' is not one of float32"),
])  # fmt: skip
def test_bad_splits(places, source, capsys, tmp_path, options, words):
    options = [str(word).replace("{text}", source) for word in options]
    refused(capsys, words, "split", places / "model", "--out", tmp_path / "m", *options, out=tmp_path / "m")


@pytest.mark.parametrize("command", [("split",), ("prune", "--language", "de"), ("generate", "--prompt", "x")])
def test_models_that_are_not_here(capsys, tmp_path, command):
    out = () if command[0] == "generate" else ("--out", tmp_path / "m")
    refused(capsys, "--allow-download", command[0], "no-such-org/no-such-model", *command[1:], *out, out=tmp_path / "m")
    refused(capsys, "did you mean smollm2-135m-instruct?", command[0], "smollm2", *command[1:], *out)


def test_damaged_tokenizers_are_reported_before_any_work(places, capsys, tmp_path, monkeypatch):
    shutil.copytree(places / "model", tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    monkeypatch.setattr(jaxmodels, "load", None, raising=False)
    refused(capsys, "is not a tokenizer", "split", tmp_path / "broken", "--out", tmp_path / "m", out=tmp_path / "m")


# prune


def keep_file(path, keep):
    np.save(path, keep)
    return path


def test_damaged_keep_files(places, capsys, tmp_path):
    np.savez(tmp_path / "cut.npz", keep=np.ones((L, F), bool))
    np.savez(tmp_path / "flipped.npz", keep=np.ones((L, F), bool))
    np.savez(tmp_path / "objects.npz", keep=np.array([object()], object))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:100])
    raw = (tmp_path / "flipped.npz").read_bytes()
    (tmp_path / "flipped.npz").write_bytes(raw.replace(b"\1" * L * F, b"\0" * L * F))
    with open(tmp_path / "huge.npy", "wb") as file:  # 1 PB announced, nothing there
        np.lib.format.write_array_header_1_0(file, {"descr": "|b1", "fortran_order": False, "shape": (10**6, 10**9)})
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as file:
        file.writestr("keep.txt", "1 0 1")
    for name in ("cut.npz", "flipped.npz", "objects.npz", "huge.npy", "text.npz"):
        refused(capsys, f"{name} as .npy or .npz", "prune", places / "model", "--keep", tmp_path / name, "--out",
                tmp_path / "m", out=tmp_path / "m")


@pytest.mark.long
def test_prune_neurons_and_experts_of_a_file(places, capsys, tmp_path, tokens, model):
    neurons = np.random.default_rng(1).random((L, F)) < 0.5
    out = run(capsys, "prune", places / "model", "--keep", keep_file(tmp_path / "n.npy", neurons), "--out",
              tmp_path / "n")
    masked = model(tokens, taps=Taps(mask={"ffn.hidden": neurons[:, None, None]}))[0]
    close(jaxmodels.load(out)(tokens)[0], masked, 1e-5)
    run(capsys, "split", places / "model", "--out", tmp_path / "split", "--expert-size", 6)
    experts = np.array([[True, False, True, False], [False, False, True, False]])
    np.savez(tmp_path / "e.npz", keep=experts)
    out = run(capsys, "prune", tmp_path / "split", "--keep", tmp_path / "e.npz", "--out", tmp_path / "e")
    assert jaxmodels.load(out).cfg.ffn_widths == (12, 6)
    assert run(capsys, "generate", out, "--prompt", "hello", "--max-new-tokens", 2) is not None


@pytest.mark.long
def test_prune_for_a_language(places, source, capsys, tmp_path, tokens, model):
    """The neurons of the highest mean contribution, counted by hand; whole experts of a split model."""
    rows = read_rows(f"{source}:de", load_tokenizer(places / "model"), 16_384)["de"]
    live = rows.mask & (np.arange(rows.tokens.shape[1]) >= 4)
    _, aux = model(rows.tokens, mask=rows.mask, taps=Taps(record=("ffn.hidden",)))
    mean = np.abs(np.asarray(aux["ffn.hidden"]))[:, live].mean(1)
    mean *= np.stack([np.linalg.norm(ffn["down"], axis=1) for ffn in ffn_layers(model)])
    best = np.argsort(np.argsort(-mean, 1), 1) < F // 4
    assert np.array_equal(by_contribution(model, rows, 0.25), best)
    out = run(capsys, "prune", places / "model", "--language", "de", "--share", 0.25, "--text", source, "--out",
              tmp_path / "m")
    small = jaxmodels.load(out)
    close(small(tokens)[0], jaxmodels.prune(model, best)(tokens)[0])
    assert small.cfg.ffn_widths == (6, 6) and has_tokenizer(out)

    split, parts = jaxmodels.split(model, expert_size=6)
    dense, experts = as_dense(split)
    assert experts == E and dense.cfg.groups == ((0, L),)
    close(dense(tokens)[0], model(tokens)[0], 1e-5)
    by_expert = np.take_along_axis(mean, parts.perm, 1).reshape(L, E, -1).sum(-1)
    assert np.array_equal(by_contribution(split, rows, 0.5), np.argsort(np.argsort(-by_expert, 1), 1) < 2)
    jaxmodels.save(split, tmp_path / "split", tokenizer=places / "model")
    out = run(capsys, "prune", tmp_path / "split", "--language", "de", "--text", source, "--out", tmp_path / "s")
    close(jaxmodels.load(out)(tokens)[0], jaxmodels.prune(split, by_contribution(split, rows, 0.5))(tokens)[0])


def strayed(pruned, model, rows):
    """Mean squared distance of the last residual stream from the dense model's, on the text itself."""
    streams = [np.asarray(m(rows.tokens, mask=rows.mask, taps=Taps(record=("residual",)))[1]["residual"][-1])
               for m in (pruned, model)]
    return ((streams[0] - streams[1])[rows.mask] ** 2).mean()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["dense", "split", "file"])
def test_repair(places, source, capsys, tmp_path, model, kind):
    """A repaired model is as small, keeps its output bias in the file, and strays less from the whole one."""
    rows = read_rows(f"{source}:fr", load_tokenizer(places / "model"), 16_384)["fr"]
    start, options = places / "model", ("--share", 0.5)
    if kind == "split":
        start = jaxmodels.save(jaxmodels.split(model, expert_size=6)[0], tmp_path / "split", tokenizer=start)
    if kind == "file":
        keep = np.random.default_rng(2).permuted(np.arange(F)[None].repeat(L, 0), axis=1) < 12
        options = ("--keep", keep_file(tmp_path / "keep.npy", keep))
    common = (*options, "--text", source, "--language", "fr", "--repair")
    out = run(capsys, "prune", start, *common, "--out", tmp_path / "repaired")
    repaired = jaxmodels.load(out)
    widths = repaired.cfg.ffn_widths  # of a dense model the repair chooses them, half of all neurons together
    assert widths == (12, 12) if kind != "dense" else abs(sum(widths) - 24) <= L
    assert all("down_bias" in ffn for ffn in ffn_layers(repaired))
    if kind == "file":
        plain = jaxmodels.prune(model, keep)
    else:
        whole = jaxmodels.load(start)
        plain = jaxmodels.prune(whole, by_contribution(whole, rows, 0.5))
    assert strayed(repaired, model, rows) < 0.9 * strayed(plain, model, rows)
    assert run(capsys, "generate", out, "--prompt", "hello", "--max-new-tokens", 2) is not None


def test_repair_adds_a_bias_to_a_family_without_one(places, source, capsys, tmp_path):
    plain = random_model(DecoderConfig.tiny(vocab_size=300, ffn_widths=(F,) * L))
    start = jaxmodels.save(plain, tmp_path / "plain", tokenizer=places / "tokenizer")
    out = run(capsys, "prune", start, "--language", "de", "--text", source, "--repair", "--out", tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["jaxmodels"]["down_bias"] is True
    assert all(np.abs(ffn["down_bias"]).max() > 0 for ffn in ffn_layers(jaxmodels.load(out)))


@pytest.mark.parametrize("options, words", [
    ((), "nothing says what to keep"),
    (("--keep", "{ones}", "--share", 0.5), "leave --share out"),
    (("--keep", "{ones}", "--repair"), "--language and --repair go together"),
    (("--keep", "{ones}", "--language", "de"), "--language and --repair go together"),
    (("--keep", "{wrong}"), "bool[2, 24] is needed"),
    (("--keep", "{wrong}", "--language", "de", "--repair", "--text", "{text}"), "bool[2, 24] is needed"),
    (("--keep", "{none}"), "at least one"),
    (("--keep", "{none}", "--language", "de", "--repair", "--text", "{text}"), "at least one"),
    (("--language", "de", "--share", 0), "--share 0: it must be above 0"),
    (("--language", "de", "--share", 1.5), "at most 1"),
    (("--language", "it", "--text", "{text}"), "has no language 'it'"),
    (("--language", "nl", "--text", "{text}"), "256 are needed"),
    (("--language", "de,fr", "--text", "{text}"), "names 2 languages"),
])  # fmt: skip
def test_bad_prunes(places, source, capsys, tmp_path, options, words):
    files = {"ones": np.ones((L, F), bool), "wrong": np.ones((L, F + 1), bool), "none": np.zeros((L, F), bool)}
    made = {f"{{{name}}}": keep_file(tmp_path / f"keep_{name}.npy", keep) for name, keep in files.items()}
    options = [str(made.get(word, word)).replace("{text}", source) for word in options]
    refused(capsys, words, "prune", places / "model", "--out", tmp_path / "m", *options, out=tmp_path / "m")


def test_models_that_cannot_be_pruned_for_a_language(places, source, capsys, tmp_path, model):
    uneven = jaxmodels.prune(model, np.arange(F)[None] < np.array([[24], [12]]))
    jaxmodels.save(uneven, tmp_path / "uneven", tokenizer=places / "tokenizer")
    trained = random_model(type(EXPERT)(**(vars(EXPERT) | {"vocab_size": 300, "family": "mixtral", "clip_qkv": None,
                                                           "qk_norm": None, "norm_placement": "pre"})))
    jaxmodels.save(trained, tmp_path / "trained", tokenizer=places / "tokenizer")
    for name, words in (("uneven", "unequal widths"), ("trained", "trained router")):
        refused(capsys, words, "prune", tmp_path / name, "--language", "de", "--text", source, "--out", tmp_path / "m",
                out=tmp_path / "m")


# The statistics behind them


def test_ffn_inputs_are_what_the_layer_reads(places, source):
    """Through the layer's own weights they give the hidden activations that the tap records."""
    rows = list(read_rows(source, load_tokenizer(places / "model"), 600).values())
    for placement in ("pre", "post"):
        model = random_model(DecoderConfig.tiny(vocab_size=300, ffn_widths=(F,) * L, norm_placement=placement))
        inputs = ffn_inputs(model, rows, limit=10**6)
        counted = [r.mask & (np.arange(r.tokens.shape[1]) >= 4) for r in rows]
        hidden = [np.asarray(model(r.tokens, mask=r.mask, taps=Taps(record=("ffn.hidden",)))[1]["ffn.hidden"])[:, c]
                  for r, c in zip(rows, counted, strict=True)]
        for x, h, ffn in zip(inputs, np.concatenate(hidden, axis=1), ffn_layers(model), strict=True):
            assert x.shape == (sum(int(c.sum()) for c in counted), 32)
            close(jax.nn.silu(x @ ffn["gate"]) * (x @ ffn["up"]), h, 1e-4)
        few = ffn_inputs(model, rows, limit=7)
        assert all(x.shape == (7, 32) and np.allclose(x[0], y[0], atol=1e-5) for x, y in zip(few, inputs, strict=True))


@pytest.mark.long
def test_importance_is_what_removing_a_neuron_costs_to_first_order(model):
    """h_j · dloss/dh_j against finite differences of the loss, for one token's neuron through the taps."""
    rows = pack(["ein Text, der kurz ist"], tiny_tokenizer(), 16, 16)
    tokens = jnp.asarray(rows.tokens[:1])

    def loss(scale):
        logits, _, _ = model.forward(tokens, taps=Taps(scale={"ffn.hidden": scale}))
        log_p = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).sum()

    ones = jnp.ones((L, 1, 16, F))
    by_scale = jnp.abs(jax.grad(loss)(ones))[:, 0, 4:].mean(1)  # d loss / d scale = h · d loss / d h
    found = neuron_importance(model, [rows, rows])
    for layer, expected in zip(found, by_scale, strict=True):
        assert layer.shape == (2, F) and np.array_equal(layer[0], layer[1])
        np.testing.assert_allclose(layer[0], expected, rtol=1e-3, atol=1e-6)
    with pytest.raises(UserError, match="experts already"):
        neuron_importance(jaxmodels.split(model, expert_size=6, method="random")[0], [rows])


def test_names_of_texts_with_languages(source, places, monkeypatch):
    monkeypatch.chdir(places)
    assert split_name("gettext:de,fr,de") == ("gettext", ("de", "fr"))
    assert split_name("gettext") == ("gettext", ()) and split_name("path:texts") == ("path:texts", ())
    assert split_name("path:texts:pt-BR") == ("path:texts", ("pt-BR",)) and split_name(source) == (source, ())
    assert split_name("tfds:wiki40b/de") == ("tfds:wiki40b/de", ())
    (places / "fr").mkdir()
    assert split_name("gettext:fr") == ("gettext", ("fr",)) and split_name("gettext:./fr") == ("gettext:./fr", ())


def test_texts_share_the_tokens(source, places):
    rows = read_rows(source, load_tokenizer(places / "model"), 400)
    assert set(rows) == {"de", "fr"}  # nl has too little
    assert all(200 <= row.count < 400 for row in rows.values())


# generate


def test_generate_reads_prompts_from_anywhere(places, capsys, monkeypatch, tmp_path):
    expected = generate_text(places / "model", ["hello", "a b"], 4, chat=False)
    chat = generate_text(places / "model", ["hello", "a b"], 4, chat=True)
    assert expected != chat

    def lines(*options):
        assert cli.main(["generate", str(places / "model"), "--max-new-tokens", "4", *options]) == 0
        return capsys.readouterr().out

    assert lines("--prompt", "hello", "--prompt", "a b", "--no-chat") == "".join(f"{text}\n" for text in expected)
    assert lines("--prompt", "hello", "--prompt", "a b") == "".join(f"{text}\n" for text in chat)  # it has a template
    import io

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello\n\na b\n")))
    assert lines("--no-chat", "--dtype", "float32") == "".join(f"{text}\n" for text in expected)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello \xff\n")))
    assert cli.main(["generate", str(places / "model"), "--max-new-tokens", "1", "--no-chat"]) == 0
    assert "1 invalid UTF-8" in capsys.readouterr().err
    refused(capsys, "dtype 'float8' is not one of", "generate", places / "model", "--prompt", "x", "--dtype", "float8")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    refused(capsys, "empty prompt", "generate", places / "model")
    refused(capsys, "no tokenizer.json", "generate", places / "bare", "--prompt", "x")


def test_a_chat_needs_a_template(places, capsys, tmp_path):
    shutil.copytree(places / "model", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    config.pop("chat_template")
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(config))
    refused(capsys, "no chat template", "generate", tmp_path / "m", "--prompt", "x", "--chat")
    assert run(capsys, "generate", tmp_path / "m", "--prompt", "hello", "--max-new-tokens", 2) is not None


# report


def test_several_runs_are_compared(capsys, tmp_path):
    for units in (1, 2):
        run(capsys, "run", "tests.tiny_experiment", f"units={units}", "--out", tmp_path / f"r{units}")
    runs = (tmp_path / "r1", tmp_path / "r2")
    assert run(capsys, "report", *runs) == str(tmp_path / "comparison.html")
    page = (tmp_path / "comparison.html").read_text()
    assert "2 runs compared" in page and "r1" in page and "units" in page
    assert run(capsys, "report", *runs, "--out", tmp_path / "other.html") == str(tmp_path / "other.html")
    one = run(capsys, "report", runs[0], "--experiment", "tests.tiny_experiment")
    assert one == str(runs[0] / "report.html")
    refused(capsys, "given twice", "report", runs[0], runs[0])
    refused(capsys, "--out is for comparing", "report", runs[0], "--out", tmp_path / "x.html")
    refused(capsys, "is not a run folder", "report", runs[0], tmp_path / "nowhere", "--out", tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


# A qwen3_moe model whose layers are all dense


def test_qwen3_moe_without_experts(tmp_path, tokens):
    """Loads as the dense model it is, splits, and is written back so that transformers builds no experts."""
    from tests import make_golden
    from tests.test_decoder_golden import golden_config

    config = golden_config("qwen3_moe") | {"mlp_only_layers": [0, 1, 2]}
    model = jaxmodels.load(make_golden.write_folder(tmp_path / "made", config))
    assert model.cfg.experts is None and model.cfg.ffn_widths == (48, 48, 48)
    tokens = tokens % 41
    split, _ = jaxmodels.split(model, expert_size=12)
    for name, one in (("dense", model), ("split", split)):
        folder = jaxmodels.save(one, tmp_path / name)
        written = json.loads((folder / "config.json").read_text())
        assert written["mlp_only_layers"] == [0, 1, 2] and "num_experts" not in written
        close(jaxmodels.load(folder)(tokens)[0], model(tokens)[0], 1e-5)
    odd = type(EXPERT)(**(vars(EXPERT) | {"family": "qwen3_moe", "expert_layers": (False,) * 3}))
    with pytest.raises(UserError, match="set experts and expert_layers to None"):
        jaxmodels.save(random_model(odd), tmp_path / "odd")
    assert not (tmp_path / "odd").exists()
