"""A folder of sentences whose words and endings tell their tags, and runs of `ner` on it."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

from tests.interrupted import signal_at
from train import ner
from train.data.conll import Sentence, write_conll
from train.runtime.config import resolve, to_dict
from train.runtime.run_folder import RunFolder

NAMES = ("Aspirin", "Naloxone", "Ibuprofen", "Clonidine", "Heparin", "Morphine")
ILLS = ("fever", "pain", "headache", "nausea", "shock", "asthma")
FAST = ("data.length=16", "model.char_filters=8", "model.d_char=6", "model.d_word=10", "model.word_filters=12",
        "model.word_width=3", "model.d_hidden=12", "model.d_tag=5", "model.chars=10", "model.dropout=0.1",
        "model.word_drop=0.1", "optimizer.learning_rate=2e-2", "loop.save_every=10", "bootstrap=50")


def sentences(count, seed=0):
    r = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        drug, ill = r.choice(NAMES), r.choice(ILLS)
        forms = [[(drug, "B-Drug"), ("eases", "O"), (ill, "B-Ill"), (".", "O")],
                 [("Severe", "B-Ill"), (ill, "I-Ill"), ("came", "O"), ("after", "O"), (drug, "B-Drug"), (".", "O")],
                 [("Nothing", "O"), ("was", "O"), ("seen", "O"), (".", "O")]]
        words, tags = zip(*forms[r.choice(3, p=[0.45, 0.45, 0.1])], strict=True)
        found.append(Sentence(words, tags))
    return found


def write(folder, count=24):
    """The same sentences in all three parts: what is learned here is by heart."""
    for part in ("train", "dev", "test"):
        write_conll(folder / f"{part}.conll", sentences(count))
    return str(folder)


def run(out, data, *overrides, stop_at=None):
    cfg = resolve("ner", [f"data.path={data}", *FAST, *overrides])
    with RunFolder.open("ner", to_dict(cfg), out, operational=cfg.operational) as folder, signal_at(stop_at):
        ner.run(cfg, folder)
    return json.loads((out / "results.json").read_text())


@functools.cache
def trained():
    """(results, run folder, data), trained once a process."""
    folder = Path(tempfile.mkdtemp(prefix="ner-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "data").mkdir()
    data = write(folder / "data")
    return run(folder / "out", data, "epochs=1", "least_steps=75"), folder / "out", data
