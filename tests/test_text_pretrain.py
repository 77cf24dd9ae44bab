"""A fresh encoder: pre-trained by masked pieces on a task's own texts, once a sweep, resumed, and then used."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.errors import Interrupted, UserError
from jaxmodels.text2tree.encoders import TransformerEncoder
from tests.interrupted import signal_at
from tests.tiny_texts import write
from train import predict, sweep, text2tree, text_pretrain
from train.data.coded_texts import Columns, coded_texts
from train.objectives.masked_lm import MaskedLanguageModel
from train.runtime import loop
from train.runtime.config import resolve, to_dict
from train.runtime.mesh import make_mesh
from train.runtime.run_folder import RunFolder
from train.text2tree_config import TextEncoderConfig
from train.text_pretrain import MaskedPieces, PieceMasking, cut
from train.text_reader import SPECIAL, fingerprint, learned

TINY = ("preset=tiny", "data.split=split", "data.limit=none", "encoder.name=fresh", "encoder.words=300",
        "encoder.fresh.layers=1", "encoder.fresh.d_model=16", "encoder.fresh.heads=2", "encoder.fresh.length=32",
        "encoder.fresh.batch=8", "encoder.fresh.epochs=6", "encoder.fresh.learning_rate=1e-2", "epochs=1",
        "method.name=plain")
STEPS = {}


def compiled_once(patch):
    """Steps of runs that are alike, of which seeds have the same: one compilation serves all of them here."""
    whole = loop.Loop.compile

    def memo(self):
        kind = self.run.name == "text_pretrain"
        if kind not in STEPS:
            STEPS[kind] = whole(self)
        return STEPS[kind]

    patch.setattr(loop.Loop, "compile", memo)


def pretrained(out, path, stop_at=None):
    """Pre-trains alone, as a run would; stop_at: the step after which a signal comes."""
    cfg = resolve("text2tree", [*TINY, f"data.path={path}"])
    with RunFolder.open("text2tree", to_dict(cfg), out, operational=cfg.operational) as folder, \
            signal_at(stop_at) as patch:
        compiled_once(patch)
        return text_pretrain.pretrain(cfg, folder, text2tree.read(cfg), make_mesh(cfg.mesh)), folder.results()


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """(folder of a sweep of two seeds, how often it pre-trained)."""
    root = tmp_path_factory.mktemp("fresh")
    words = [*TINY, f"data.path={write(root / 'notes.csv')}", "grid=method.name=plain", "seeds=2"]
    planned, calls = sweep.plan("text2tree", words), []
    whole = text_pretrain._pretrain
    with RunFolder.open(planned.name, planned.config, root / "out") as folder, pytest.MonkeyPatch.context() as patch:
        compiled_once(patch)
        patch.setattr(text_pretrain, "_pretrain", lambda *args: calls.append(whole(*args)))
        assert sweep.run(planned, folder, lambda *_: None) is None
    return root / "out", len(calls)


@pytest.mark.long
def test_two_trials_share_one_pre_training(swept):
    out, calls = swept
    first, second = (json.loads((out / f"method.name=plain/seed-{seed}/results.json").read_text()) for seed in (0, 1))
    assert calls == 1 and len(list(out.glob("stages/pretrain/*"))) == 1 and len(list(out.glob("data-*"))) == 1
    told = {key: value for key, value in first.items() if key.startswith("pretraining.")}
    assert told == {key: value for key, value in second.items() if key.startswith("pretraining.")}
    assert told["pretraining.perplexity"] < 0.5 * told["pretraining.perplexity_before"]
    assert told["pretraining.perplexity_before"] == pytest.approx(told["pretraining.vocabulary"], rel=0.5)
    assert 1 < told["pretraining.unigram_perplexity"] < told["pretraining.vocabulary"]
    assert 0 <= first["test.model.tuned_macro_f1"] <= 1


@pytest.mark.long
def test_two_workers_share_one_pre_training(swept, tmp_path):
    """Both ask for it at once: one waits for the other."""
    words = [*TINY, f"data.path={swept[0].parent / 'notes.csv'}", "grid=method.name=plain", "seeds=2", "workers=2"]
    planned = sweep.plan("text2tree", words)
    with RunFolder.open(planned.name, planned.config, tmp_path / "out") as folder:
        assert sweep.run(planned, folder, lambda *_: None) is None
    for seed in (0, 1):
        one, two = (json.loads((out / f"method.name=plain/seed-{seed}/results.json").read_text())
                    for out in (swept[0], tmp_path / "out"))
        for key in ("pretraining.perplexity", "test.model.tuned_macro_f1"):
            assert two[key] == pytest.approx(one[key], rel=1e-3)
    assert len(list((tmp_path / "out").glob("stages/pretrain/*"))) == 1
    logs = "".join(path.read_text() for path in (tmp_path / "out" / "logs").iterdir())
    assert logs.count("reading texts to pre-train on: 2/2") == 1


@pytest.mark.long
def test_a_run_predicts_with_its_own_files_alone(swept, tmp_path):
    run = shutil.copytree(swept[0] / "method.name=plain" / "seed-1", tmp_path / "run")
    texts = coded_texts(f"path:{swept[0].parent / 'notes.csv'}", columns=Columns(split="split")).parts["test"].texts
    saved, codes = np.load(run / "predictions.npz"), np.load(run / "classes.npz")["codes"].tolist()
    scores = np.zeros((len(texts), len(codes)))
    for text, (score, _, code, *_) in predict.predict(run, texts, top=len(codes)).rows:
        scores[text, codes.index(code)] = score
    np.testing.assert_allclose(scores, saved["model_scores"].astype(np.float32), atol=5e-4)


@pytest.mark.long
def test_interrupted_pre_training_goes_on_to_the_same_weights(swept, tmp_path):
    path = swept[0].parent / "notes.csv"
    with pytest.raises(Interrupted):
        pretrained(tmp_path / "out", path, stop_at=5)
    model, results = pretrained(tmp_path / "out", path)
    whole = next(swept[0].glob("stages/pretrain/*")) / "model"
    assert (model / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (model / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()
    assert results["pretraining.perplexity"] < results["pretraining.perplexity_before"]


@pytest.mark.long
def test_the_folder_is_a_model_like_any_other(swept):
    folder = next(swept[0].glob("stages/pretrain/*")) / "model"
    model = jaxmodels.load(folder)
    assert model.cfg.mask_id == SPECIAL.index("[MASK]") and model.cfg.position == "rotary" and model.lm_head is not None
    with pytest.raises(UserError, match="only encoders of BERT's and RoBERTa's kind can be cut"):
        TransformerEncoder(model, "mean").split(1)


# Parts


def test_long_texts_are_cut_and_nothing_is_left_out():
    rows = [[2, *range(10, 10 + n), 3] for n in (0, 1, 6, 7, 13)]
    pieces = cut(rows, 8)
    assert all(piece[0] == 2 and piece[-1] == 3 and 2 < len(piece) <= 8 for piece in pieces)
    assert [len(piece) - 2 for piece in pieces] == [1, 6, 6, 1, 6, 6, 1]
    assert [i for piece in pieces for i in piece[1:-1]] == [i for row in rows for i in row[1:-1]]


def test_pieces_are_masked_and_special_tokens_are_not():
    r = np.random.default_rng(0)
    tokens = r.integers(0, 300, 4000).astype(np.int32)
    record = {"tokens": tokens, "segments": np.repeat([1, 2, 3, 0], 1000).astype(np.int32)}
    found = PieceMasking(4, 300)(record, r)
    asked, mask = found["targets"] >= 0, found["tokens"] == 4
    there = (tokens >= len(SPECIAL)) & (record["segments"] > 0)
    assert asked.sum() == pytest.approx(0.15 * there.sum(), abs=3) and not asked[~there].any()
    assert (mask & asked).sum() == pytest.approx(0.8 * asked.sum(), abs=4)
    assert np.array_equal(found["targets"][asked], tokens[asked])
    assert np.array_equal(found["tokens"][~asked], tokens[~asked])
    replaced = found["tokens"][asked & ~mask]
    assert replaced.min() >= len(SPECIAL) and len(set(replaced.tolist())) > 20 and found["tokens"].dtype == np.int32


@dataclasses.dataclass
class Fixed:
    """A model that gives states it was told."""

    states: jax.Array
    embed: jax.Array

    def forward(self, tokens, mask, segments, output="logits"):
        return (self.states if output == "hidden" else self.unembed(self.states)), {}

    def unembed(self, states):
        return states @ self.embed


def test_the_loss_is_that_of_the_whole_head():
    r = np.random.default_rng(0)
    model = Fixed(jnp.asarray(r.normal(size=(3, 16, 6)).astype(np.float32)), jnp.asarray(r.normal(size=(6, 50))))
    tokens = r.integers(5, 50, (3, 16)).astype(np.int32)
    targets = np.where(np.arange(16) % 5 == 1, tokens, -1)  # 3 of 16
    batch = {"tokens": jnp.asarray(np.where(targets >= 0, r.permutation([4, 4, 9] * 16).reshape(3, 16), tokens)),
             "targets": jnp.asarray(targets), "segments": jnp.asarray(np.repeat([[1] * 7 + [2] * 7 + [0] * 2], 3, 0))}
    (few, sums), (whole, every) = (jax.jit(lambda batch, kind=kind: kind(4).loss(model, batch, None))(batch)
                                   for kind in (MaskedPieces, MaskedLanguageModel))
    assert float(few) == pytest.approx(float(whole), rel=1e-5) and 0 < int(sums["hidden_weight"]) < 9
    assert all(float(sums[name]) == pytest.approx(float(every[name]), rel=1e-5) for name in every)


def test_pieces_are_learned_the_same_every_time():
    texts = [f"fever and shock after {i} days of sepsis" for i in range(50)]
    assert learned(texts, 320).files() == learned(texts, 320).files()


@pytest.mark.parametrize("override, message", [
    ("encoder.frozen=2", "encoder.frozen=2: a fresh encoder is trained whole"),
    ("encoder.fresh.heads=3", r"encoder.fresh.d_model=256 must be a multiple of 2 \* encoder.fresh.heads = 6"),
    ("encoder.fresh.layers=0", "encoder.fresh.layers=0 must be at least 1"),
    ("encoder.fresh.epochs=0", "encoder.fresh.epochs=0 must be at least 1"),
    ("encoder.fresh.learning_rate=0", "encoder.fresh.learning_rate=0.0 must be a number above 0"),
    ("encoder.words=100", "encoder.words=100 must be at least 300"),
])
def test_bad_values(override, message):
    with pytest.raises(UserError, match=message):
        resolve("text2tree", ["encoder.name=fresh", override])


def test_a_batch_that_the_devices_do_not_divide(tmp_path):
    cfg = resolve("text2tree", [*TINY, f"data.path={write(tmp_path / 'notes.csv')}"])
    cfg = dataclasses.replace(cfg, encoder=dataclasses.replace(
        cfg.encoder, fresh=dataclasses.replace(cfg.encoder.fresh, batch=2 * jax.device_count() - 1)))
    with pytest.raises(UserError, match=f"encoder.fresh.batch=.* set it to {2 * jax.device_count()}$"):
        text_pretrain.pretrain(cfg, None, None, make_mesh(cfg.mesh))


def test_a_changed_encoder_is_noticed(tmp_path):
    bert = tmp_path / "bert"
    bert.mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (bert / name).write_text("as it was")
    runs = {frozen: resolve("text2tree", [f"encoder.name={bert}", f"encoder.frozen={frozen}"]) for frozen in (0, 1)}
    for frozen, cfg in runs.items():
        (tmp_path / str(frozen)).mkdir()
        (tmp_path / str(frozen) / "results.json").write_text(json.dumps({text2tree.ENCODER: fingerprint(cfg.encoder)}))
        text2tree.check_encoder(cfg, tmp_path / str(frozen))
    (bert / "model.safetensors").write_text("another")
    text2tree.check_encoder(runs[0], tmp_path / "0")  # which holds all weights itself
    with pytest.raises(UserError, match=r"the files of encoder.name=.*bert have changed since .*/1 was") as error:
        text2tree.predict(to_dict(runs[1]), tmp_path / "1", ["fever"], None)
    assert "\n" not in str(error.value)
    (bert / "tokenizer.json").write_text("another")
    with pytest.raises(UserError, match="have changed since"):
        text2tree.check_encoder(runs[0], tmp_path / "0")
    assert fingerprint(TextEncoderConfig("fresh")) is fingerprint(TextEncoderConfig("cnn")) is None
