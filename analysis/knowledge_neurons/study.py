"""The stages of the study. Each writes what it has found when it is done, so that any interruption costs at most one.

    pretrain/                   a run folder of its own; every fine-tuning begins with its encoder
    seedN/enzyme/               one of each fine-tuning
    seedN/scores/*.npz          moments of activations; sums of contributions, after every batch
    seedN/curves/*.npz          answers on the test part, one file for each way of keeping or dropping
    seedN/specificity.npz
    seedN/sites/*.npz           answers where a share of one site is kept
    seedN/motifs.npz            attribution inside motifs and elsewhere
    seed0/sequences.npz         attribution of every residue of a few proteins
    seed0/retrained/*.npz       answers before and after an epoch with a mask in place
    tables.json                 of all fine-tunings together
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxmodels
from analysis import enzyme_report, training_report
from analysis.knowledge_neurons import claims, motifs, retrain, sequences, tables, tuned
from analysis.knowledge_neurons.config import StudyConfig
from analysis.knowledge_neurons.neurons import Layout, chosen
from analysis.knowledge_neurons.tuned import Tuned
from jaxmodels.errors import UserError
from jaxmodels.esm.model import Esm
from train import enzyme, protein_pretrain
from train.enzyme import CLASSES, TRAINED, Labelled
from train.runtime.config import to_dict
from train.runtime.files import read_json, write_json
from train.runtime.run_folder import RunFolder


def run(cfg: StudyConfig, folder: RunFolder) -> None:
    """Runs or finishes the study in a run folder; see the package's docstring."""
    if folder.results().get("finished"):  # nothing to do: the report is rebuilt from what is there
        return
    parts, _ = enzyme.read_parts(cfg.enzyme)  # before the training: a missing source is told at once
    train = Labelled.joined([parts[name] for name in TRAINED[cfg.enzyme.settings[0]]])
    test = parts["test"]
    test = test.where(np.isin(np.arange(len(test)), chosen(test.labels, cfg.keep.proteins)))
    start, seen, layout = start_of(cfg, folder), [], None
    for number in range(cfg.fine_tunings):
        model = classifier(cfg, folder, number, start)
        if layout not in (None, Layout.of(model.cfg)):
            raise UserError(f"tuned={cfg.tuned}: the encoders have unlike shapes; give runs from one pre-training")
        layout = Layout.of(model.cfg)
        folder.write_results({"layers": layout.layers, "neurons": layout.size, "train_proteins": len(train),
                              "test_proteins": len(test), "fine_tunings": cfg.fine_tunings,
                              "device": jax.devices()[0].device_kind})
        seen.append(examine(Tuned(cfg, folder, number, model, layout, train, test)))
    found = tables.tables(cfg, layout, seen)
    found["claims"] = claims.statements(cfg, found)
    found["both"] = claims.both(found["claims"])
    write_json(folder.path("tables.json"), found)
    folder.write_results(tables.numbers(found) | {"finished": True})


def examine(one: Tuned) -> tables.Seen:
    """Everything that is asked of one fine-tuned encoder."""
    found = tuned.score(one)
    tuned.curves(one, found)
    special = tuned.specificity(one, found)
    sites = tuned.site_curves(one, found)
    first = one.number == 0
    return tables.Seen(found, one.load("curves/test"), tuned.load_curves(one), special, sites, motifs.check(one, found),
                       retrain.retrained(one, found) if first else {},
                       sequences.rows_of(one, sequences.shown(one, found)) if first else [])


# Training


def start_of(cfg: StudyConfig, folder: RunFolder) -> str:
    """What the fine-tunings begin with: a stage's folder, or what the config names."""
    if cfg.given or cfg.pretrained != "here":
        return cfg.pretrained
    with stage(folder, "pretrain", cfg.pretrain) as inner:
        protein_pretrain.run(cfg.pretrain, inner)
    training_report.build(inner.dir)
    return str(inner.dir)


def classifier(cfg: StudyConfig, folder: RunFolder, number: int, start: str) -> Esm:
    """A fine-tuned encoder, from a stage or from elsewhere. Raises UserError for one without seven classes."""
    if cfg.given:
        name, ours = cfg.given[number], cfg.enzyme.settings[0]
        if (theirs := (read_json(Path(name).expanduser() / "results.json") or {}).get("setting", ours)) != ours:
            raise UserError(f"tuned={name} was trained in the {theirs} setting, and its neurons would be scored and "
                            f"tested in the {ours} one; give a run of settings={ours}, or set enzyme.settings={theirs}")
        inside = Path(name).expanduser() / "model"
        model: Any = jaxmodels.load(inside if inside.is_dir() else name, dtype="float32")
        if not isinstance(model, Esm) or model.cfg.classes != CLASSES:
            raise UserError(f"tuned={name} is not an ESM encoder with {CLASSES} classes; give a run of esm_enzyme")
        enzyme.check_reads(model, f"tuned={name}", cfg.score.length)
        return model
    tune = dataclasses.replace(
        cfg.enzyme, pretrained=start, seed=cfg.enzyme.seed + number,
        # the sets from outside are large, and one fine-tuning says how far from them it is
        data=dataclasses.replace(cfg.enzyme.data, external=cfg.enzyme.data.external and number == 0))
    with stage(folder, f"seed{number}/enzyme", tune) as inner:
        enzyme.run(tune, inner)
    enzyme_report.build(inner.dir)
    return jaxmodels.load(inner.dir / "model", dtype="float32")


def stage(folder: RunFolder, name: str, cfg: Any) -> RunFolder:
    # `pretrained` is a path that moves with the study's folder, so another one is no other run
    return folder.stage(name, to_dict(cfg), operational=(*cfg.operational, "pretrained"))
