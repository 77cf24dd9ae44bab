"""The atlas as a whole, on a tiny model: what it writes, that it can be interrupted anywhere, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import jaxmodels
from analysis.atlas.rules import RULES
from jaxmodels import DecoderConfig, UserError
from tests.test_hub_models import tiny_tokenizer
from tests.tiny_models import random_model
from train.runtime.config import resolve, to_dict
from train.runtime.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
WORDS = {"en": "the of and file open user name error value list",
         "de": "der und Datei Benutzer Wert Fehler Liste öffnen",
         "fr": "le et fichier valeur erreur liste utilisateur nom", "es": "el archivo valor lista usuario nombre y de"}
SPEED = ("speed", "seconds")  # times differ from run to run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny model with a tokenizer, and texts in four languages made of their own words."""
    folder = tmp_path_factory.mktemp("atlas")
    model = random_model(DecoderConfig.tiny(vocab_size=300, ffn_widths=(64, 64), max_positions=256))
    jaxmodels.save(model, folder / "model", extra_files=tiny_tokenizer().files())
    (folder / "texts").mkdir()
    for code, words in WORDS.items():
        rng = np.random.default_rng(len(words))
        lines = [" ".join(rng.choice(words.split(), rng.integers(4, 9))) for _ in range(400)]
        (folder / "texts" / f"{code}.txt").write_text("\n".join(lines), "utf-8")
    return folder


def overrides(inputs, **more):
    values = {
        "preset": "tiny", "model": str(inputs / "model"), "text.source": f"path:{inputs / 'texts'}",
        "text.languages": "en,de,fr,es", "text.window": "32", "text.test_tokens": "1024", "text.batch": "8",
        "split.method": "kmeans", "split.expert_size": "8", "prune.panel": "en,de,fr", "prune.shares": "0.5,0.25",
        "prune.transfer": "tico19:/not/here", "prune.interventions": "zero,mean,p10,p90", "profile.neurons": "true",
        "prune.own_tokens": "64", "prune.distill": "en", "prune.distill_steps": "3",
        "prune.distill_tokens": "64", "prune.rules": ",".join(RULES), "speed.prefill": "32"}
    return [f"{k}={v}" for k, v in (values | {k.replace("__", "."): v for k, v in more.items()}).items()]


def run_here(inputs, out, **more):
    config = resolve("atlas", overrides(inputs, **more))
    from analysis.atlas.report import build
    from analysis.atlas.run import run

    with RunFolder.open("atlas", to_dict(config), out) as folder:
        run(config, folder)
    build(out)
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, run_here(inputs, out)


def test_what_a_run_leaves_behind(undisturbed):
    out, results = undisturbed
    assert results["status"] == "complete" and results["languages"] == 4 and results["experts_per_layer"] == 8
    assert results["lape_neurons"] == round(0.01 * 2 * 64)
    page = (out / "report.html").read_text("utf-8")
    for heading in ("Which experts each language uses", "Which languages group together", "Neurons of one language",
                    "Keeping only a language", "Repairing a pruned model", "Speed", "Honest limits"):
        assert heading in page
    rows = np.load(out / "pruning.npz")
    assert set(rows["scheme"]) >= {"frequency adaptive", "contribution uniform", "neuron frequency uniform",
                                   "random", "lowest frequency", "weight norm", "union of the panel"}
    assert np.load(out / "recovery.npz")["step"].tolist() == ["masked", "repaired", "distilled"]
    kept = rows["kept"][rows["scheme"] == "contribution uniform"]
    assert set(np.round(kept, 6)) == {0.5, 0.25}


def test_half_profiles_add_up_to_whole_ones(undisturbed):
    out, _ = undisturbed
    found = np.load(out / "profiles.npz")
    frequency = found["frequency_0.2"]
    np.testing.assert_allclose(frequency.sum(-1), frequency.shape[-1], rtol=1e-5)  # 1 is chance
    assert (found["tokens"].sum(1) == 8 * (32 - 4)).all()  # eight windows, their first four positions not counted


def test_the_same_command_reuses_everything(inputs, undisturbed):
    out, results = undisturbed
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.npz")}
    again = run_here(inputs, out)
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*.npz")}
    assert comparable(again) == comparable(results)


@pytest.mark.long
def test_killed_and_interrupted_runs_end_with_the_same_numbers(inputs, undisturbed, tmp_path):
    """kill -9 and Ctrl-C at several points of a real process; the last call finishes."""
    whole, results = undisturbed
    out = tmp_path / "interrupted"
    command = [sys.executable, "-m", "jaxmodels", "run", "atlas", "--out", str(out), *overrides(inputs)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    for marker, stop in (("cache/activity/analysis/*.npz", signal.SIGKILL), ("cache/pruning/*.npz", signal.SIGINT)):
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 240
        while not list(out.glob(marker)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.poll() is None, process.stderr.read()
        process.send_signal(stop)
        process.communicate(timeout=120)
        assert process.returncode == (-signal.SIGKILL if stop == signal.SIGKILL else 75)
        assert not (out / "speed.npz").exists()
    finished = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == str(out / "report.html")
    assert comparable(json.loads((out / "results.json").read_text())) == comparable(results)
    for name in ("profiles", "lape", "pruning", "recovery"):
        a, b = np.load(whole / f"{name}.npz"), np.load(out / f"{name}.npz")
        assert a.files == b.files
        for key in a.files:
            np.testing.assert_array_equal(a[key], b[key], err_msg=f"{name}/{key}")


def comparable(results):
    return {k: v for k, v in results.items() if not k.startswith(SPEED)}


@pytest.mark.parametrize(("more", "words"), [
    ({"text__languages": "en,xx"}, "no language 'xx'"),
    ({"prune__panel": "en,ru"}, "panel language 'ru'"),
    ({"text__analysis_tokens": "999999", "text__least_tokens": "999999"}, "analysis tokens"),
    ({"split__expert_size": "7"}, "does not divide 64"),
    ({"prune__shares": "0"}, "above 0"),
    ({"profile__main_share": "0.7"}, "main_share"),
    ({"prune__interventions": "mean"}, "begin with zero"),
    ({"prune__transfer": "uhdr"}, "udhr"),
    ({"prune__repair_shares": "1.5"}, "prune.repair_shares"),
    ({"prune__panel": "en"}, "at least 2 languages"),
    ({"text__batch": "0"}, "text.batch 0"),
    ({"split__method": "markers"}, "kmeans or random"),
    ({"prune__distill": "en,fr"}, "'fr', which is not repaired"),
    ({"model": "smollm3"}, "smollm"),
])
def test_bad_input_is_one_line_and_leaves_nothing(inputs, tmp_path, more, words):
    with pytest.raises(UserError) as error:
        run_here(inputs, tmp_path / "run", **more)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run" / "report.html").exists()
    assert not list(tmp_path.glob("run/cache/**/*.npz"))
