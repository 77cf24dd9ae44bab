"""The stages of the study. Each writes what it has found when it is done, so that any interruption costs at most one.

    pretrain/ enzyme/     run folders of their own
    scores/*.npz          moments of activations; sums of contributions, after every batch
    curves/*.npz          answers on the test part, one file for each way of keeping or dropping
    specificity.npz  tables.json
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxmodels
from analysis import enzyme_report, training_report
from analysis.knowledge_neurons import claims, scores, selection
from analysis.knowledge_neurons.config import StudyConfig
from analysis.knowledge_neurons.keep import DIRECTIONS, Keeper
from analysis.knowledge_neurons.methods import DRAWN
from analysis.knowledge_neurons.neurons import Layout, chosen
from analysis.knowledge_neurons.ranking import GROUPS, Found, groups_of, rankings
from jaxmodels.errors import UserError
from jaxmodels.esm.model import Esm
from train import enzyme, protein_pretrain
from train.enzyme import CLASSES, TRAINED, Labelled
from train.runtime.config import to_dict
from train.runtime.files import write_json
from train.runtime.run_folder import RunFolder


@dataclasses.dataclass
class Study:
    """What the stages share."""

    cfg: StudyConfig
    run: RunFolder
    model: Esm
    layout: Layout
    train: Labelled
    test: Labelled

    def keeper(self, part: Labelled) -> Keeper:
        batches = scores.batches_of(part.sequences, self.cfg.score.length, self.cfg.score.tokens)
        return Keeper(self.model, self.layout, batches)

    @functools.cached_property
    def everything(self) -> np.ndarray:
        return np.ones(self.layout.size, bool)


def run(cfg: StudyConfig, folder: RunFolder) -> None:
    """Runs or finishes the study in a run folder; see the package's docstring."""
    if folder.results().get("finished"):  # nothing to do: the report is rebuilt from what is there
        return
    parts, _ = enzyme.read_parts(cfg.enzyme)  # before the training: a missing source is told at once
    model = classifier(cfg, folder)
    joined = [parts[name] for name in TRAINED[cfg.enzyme.settings[0]]]
    train = Labelled(sum((part.sequences for part in joined), ()), np.concatenate([part.labels for part in joined]),
                     sum((part.names for part in joined), ()))
    test = parts["test"]
    test = test.where(np.isin(np.arange(len(test)), chosen(test.labels, cfg.keep.proteins)))
    study = Study(cfg, folder, model, Layout.of(model.cfg), train, test)
    folder.write_results({"layers": study.layout.layers, "neurons": study.layout.size, "train_proteins": len(train),
                          "test_proteins": len(test), "device": jax.devices()[0].device_kind})
    found = score(study)
    curves(study, found)
    specificity(study, found)
    test_answers = folder.load_npz("curves/test")
    tables = claims.tables(cfg, study.layout, found, test_answers, load_curves(study), folder.load_npz("specificity"))
    write_json(folder.path("tables.json"), tables)
    folder.write_results(claims.numbers(tables) | {"finished": True})


# Training


def classifier(cfg: StudyConfig, folder: RunFolder) -> Esm:
    """The fine-tuned encoder, from a stage or from elsewhere. Raises UserError for one without seven classes."""
    if cfg.tuned != "here":
        inside = Path(cfg.tuned).expanduser() / "model"
        model: Any = jaxmodels.load(inside if inside.is_dir() else cfg.tuned, dtype="float32")
        if not isinstance(model, Esm) or model.cfg.classes != CLASSES:
            raise UserError(f"tuned={cfg.tuned} is not an ESM encoder with {CLASSES} classes; give a run of esm_enzyme")
        return model
    start = cfg.pretrained
    if start == "here":
        with stage(folder, "pretrain", cfg.pretrain) as inner:
            protein_pretrain.run(cfg.pretrain, inner)
        training_report.build(inner.dir)
        start = str(inner.dir)
    tune = dataclasses.replace(cfg.enzyme, pretrained=start)
    with stage(folder, "enzyme", tune) as inner:
        enzyme.run(tune, inner)
    enzyme_report.build(inner.dir)
    return jaxmodels.load(inner.dir / "model", dtype="float32")


def stage(folder: RunFolder, name: str, cfg: Any) -> RunFolder:
    # `pretrained` is a path that moves with the study's folder, so another one is no other run
    return folder.stage(name, to_dict(cfg), operational=(*cfg.operational, "pretrained"))


# Scores


def score(study: Study) -> Found:
    """Scores every neuron on training proteins: activations on all, contributions on those that are told right."""
    moments, predicted = activations(study)
    right = np.flatnonzero(predicted == study.train.labels)
    mean, paths = moments.join(range(GROUPS)).mean, {}
    cfg = study.cfg.score
    todo: list[tuple[str, dict[str, Any]]] = [
        (f"{mode}-{baseline}", {"mode": mode, "mean": None if baseline == "zero" else mean, "steps": cfg.steps,
                                "max_steps": cfg.max_steps}) for mode in cfg.modes for baseline in cfg.baselines]
    todo.append(("grad_x_act", {"mode": "gate", "rule": "end", "steps": 1}))
    for name, options in todo:
        limit = cfg.site_examples if options["mode"] == "site" else cfg.gate_examples
        paths[name] = contributions(study, name, right[chosen(study.train.labels[right], limit)], options)
    count = paths["gate-zero"].count.reshape(2, CLASSES)
    if (count == 0).all(1).any():
        raise UserError(f"of the training proteins {len(right)} are classified correctly, too few for two halves; "
                        "train for longer (enzyme.loop.steps)")
    study.run.write_results({"train_right": len(right), "scored_classes": int((count.sum(0) > 0).sum()),
                             **{f"seconds_a_protein.{name}": float(one.seconds / one.count.sum())
                                for name, one in paths.items()},
                             **{f"completeness_error_mean.{name}": float(one.error[1] / one.count.sum())
                                for name, one in paths.items()}})
    return Found(moments, paths)


def activations(study: Study) -> tuple[scores.Moments, np.ndarray]:
    """(moments by class and half, the model's answers) on all training proteins."""
    kept = study.run.load_npz("scores/moments")
    if kept is None:
        batches = scores.batches_of(study.train.sequences, study.cfg.score.length, study.cfg.score.tokens)
        moments = scores.activation_moments(study.model, study.layout, batches, groups_of(study.train.labels), GROUPS,
                                            study.run.check_stop)
        predicted = study.keeper(study.train).classes(study.everything, check=study.run.check_stop)
        study.run.save_npz("scores/moments", **moments._asdict(), predicted=predicted)
        kept = study.run.load_npz("scores/moments")
    predicted = kept.pop("predicted")
    return scores.Moments(**kept), predicted


def contributions(study: Study, name: str, which: np.ndarray, options: dict[str, Any]) -> scores.Attributed:
    """Sums of one path over some training proteins; saved after every batch."""
    part = study.train.where(np.isin(np.arange(len(study.train)), which))
    batches = scores.batches_of(part.sequences, study.cfg.score.length, study.cfg.score.tokens)
    kept = study.run.load_npz(f"scores/{name}")
    before = None if kept is None else scores.Attributed(**kept)
    with study.run.progress(len(batches), f"scoring neurons, {name}", 0 if before is None else int(before.done)
                            ) as advance:
        def after(found: scores.Attributed) -> None:
            study.run.save_npz(f"scores/{name}", **found._asdict())
            advance()
            study.run.check_stop()

        return scores.attribute(study.model, study.layout, batches, part.labels, groups_of(part.labels), GROUPS,
                                before=before, after=after, **options)


# Curves


def curves(study: Study, found: Found) -> None:
    """Answers on the test part for every ablation, direction, method, seed and share but the whole."""
    cfg, run = study.cfg.keep, study.run
    keeper, mean = study.keeper(study.test), found.moments.join(range(GROUPS)).mean
    fill = {"zero": None, "mean": mean}
    if run.load_npz("curves/test") is None:
        none = {f"none_{one}": keeper.classes(~study.everything, fill[one], run.check_stop) for one in cfg.ablations}
        run.save_npz("curves/test", labels=study.test.labels, full=keeper.classes(study.everything), **none)
    ranked = rankings(found, study.layout)
    todo = [(ablation, direction, method) for ablation in cfg.ablations for direction in DIRECTIONS
            for method in cfg.methods]
    with run.progress(len(todo), "keeping and dropping neurons") as advance:
        for ablation, direction, method in todo:
            name = f"curves/{ablation}-{direction}-{method}"
            if run.load_npz(name) is None:
                seeds = range(cfg.seeds if method in DRAWN else 1)
                masks = [[selection.select(method, share, ranked, study.layout, study.cfg.seed + seed)
                          for share in cfg.shares[:-1]] for seed in seeds]
                answers = [[keeper.classes(mask if direction == "keep" else ~mask, fill[ablation], run.check_stop)
                            for mask in row] for row in masks]
                run.save_npz(name, answers=np.array(answers, np.int8))
            advance()
            run.check_stop()


def specificity(study: Study, found: Found) -> None:
    """Answers without the neurons that speak most for one class, for each class; -1 for a class without scores."""
    if study.run.load_npz("specificity") is not None:
        return
    keeper, mean = study.keeper(study.test), found.moments.join(range(GROUPS)).mean
    by_class, answers = found.paths["gate-zero"].of_classes(CLASSES), {}
    for ablation in study.cfg.keep.ablations:
        answers[ablation] = np.full((CLASSES, len(study.test)), -1, np.int8)
        for c in np.flatnonzero(~np.isnan(by_class).any(1)):
            lost = selection.top(by_class[c], study.cfg.keep.specific)
            answers[ablation][c] = keeper.classes(~lost, None if ablation == "zero" else mean, study.run.check_stop)
    study.run.save_npz("specificity", **answers)


def load_curves(study: Study) -> dict[tuple[str, str, str], np.ndarray]:
    """{(ablation, direction, method): answers int8[seeds, shares, N]}, the whole model or nothing at share 1."""
    test, out = study.run.load_npz("curves/test"), {}
    for ablation in study.cfg.keep.ablations:
        for direction in DIRECTIONS:
            last = test["full"] if direction == "keep" else test[f"none_{ablation}"]
            for method in study.cfg.keep.methods:
                rest = study.run.load_npz(f"curves/{ablation}-{direction}-{method}")["answers"]
                end = np.broadcast_to(last, (len(rest), 1, len(last)))
                out[ablation, direction, method] = np.concatenate([rest, end], 1)
    return out
