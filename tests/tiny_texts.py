"""Texts with codes that train in seconds, and one trained run of them for all test files of a process."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from flax import nnx

import jaxmodels
from tests.interrupted import signal_at
from train import text2tree
from train.runtime.config import resolve, to_dict
from train.runtime.run_folder import RunFolder
from train.text_reader import learned

CODES = ("A41.0", "A41.9", "B20.1", "B20.2", "C11.5")
LEARNS = ("epochs=12", "patience=12", "optimizer.learning_rate=1e-2", "encoder.filters=24")
WORDS = {"A41.0": "fever sepsis", "A41.9": "fever shock", "B20.1": "virus lungs", "B20.2": "virus liver",
         "C11.5": "tumour neck"}


def write(path, multi=True, count=160):
    """Texts whose words tell their codes; one with both words of a code more often has a second."""
    r, rows = np.random.default_rng(0), []
    for i in range(count):
        codes = list(r.choice(CODES, 1 + (multi and r.random() < 0.5), replace=False, p=[0.4, 0.2, 0.2, 0.1, 0.1]))
        noise = " ".join(r.choice(["the", "patient", "had", "some", "and", "was"], 6))
        split = ("train", "train", "train", "dev", "test")[i % 5]
        rows.append(f"{i} {noise} {' '.join(WORDS[code] for code in codes)},{';'.join(codes)},{split}")
    path.write_text("\n".join(["text,labels,split", *rows]) + "\n")
    return str(path)


def config(path, *overrides):
    return resolve("text2tree", ["preset=tiny", f"data.path={path}", "data.split=split", "data.limit=none",
                                 "encoder.words=300", *overrides])


def prepared(out, path, *overrides):
    """The trial before training."""
    cfg = config(path, *overrides)
    with RunFolder.open("text2tree", to_dict(cfg), out, operational=cfg.operational) as folder:
        return text2tree.prepare(cfg, folder)


def run(out, path, *overrides, stop_at=None):
    cfg = config(path, *overrides)
    with RunFolder.open("text2tree", to_dict(cfg), out, operational=cfg.operational) as folder, signal_at(stop_at):
        text2tree.run(cfg, folder)
    return json.loads((out / "results.json").read_text())


@functools.cache
def trained():
    """(results, run folder, CSV), trained once a process."""
    folder = Path(tempfile.mkdtemp(prefix="text2tree-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = write(folder / "notes.csv")
    return run(folder / "out", path, *LEARNS), folder / "out", path


def bert_folder(path, seed=0):
    """A BERT of two layers with random weights and pieces of its own."""
    tokenizer = learned([" ".join(WORDS.values())], 300)
    cfg = jaxmodels.BertConfig.tiny(vocab_size=tokenizer.vocab_size)
    return jaxmodels.save(jaxmodels.Bert(cfg, rngs=nnx.Rngs(seed)), path, extra_files=tokenizer.files(), overwrite=True)
