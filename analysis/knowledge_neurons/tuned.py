"""What is found of one fine-tuned encoder: scores, curves, specificity. `study.py` does it for each of them.

Each step writes what it has found when it is done, so that any interruption costs at most one.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from analysis.attribution import SITES
from analysis.knowledge_neurons import scores, selection
from analysis.knowledge_neurons.config import StudyConfig
from analysis.knowledge_neurons.keep import DIRECTIONS, Keeper
from analysis.knowledge_neurons.methods import DRAWN, SITE_METHODS, of
from analysis.knowledge_neurons.neurons import Layout, chosen
from analysis.knowledge_neurons.ranking import GROUPS, Found, groups_of, rankings
from jaxmodels.errors import UserError
from jaxmodels.esm.model import Esm
from train.data.buckets import Bucketed
from train.enzyme import CLASSES, Labelled
from train.runtime.run_folder import RunFolder


@dataclasses.dataclass
class Tuned:
    """What the steps share. number: which fine-tuning it is; its files lie in ``seedNUMBER/`` of the run."""

    cfg: StudyConfig
    run: RunFolder
    number: int
    model: Esm
    layout: Layout
    train: Labelled
    test: Labelled

    def name(self, name: str) -> str:
        return f"seed{self.number}/{name}"

    def key(self, key: str) -> str:
        """Of a number of this fine-tuning in results.json."""
        return f"seed{self.number}.{key}"

    def save(self, name: str, **arrays: Any) -> None:
        self.run.save_npz(self.name(name), **arrays)

    def load(self, name: str) -> dict[str, np.ndarray] | None:
        return self.run.load_npz(self.name(name))

    def batches(self, part: Labelled) -> list[Bucketed]:
        return scores.batches_of(part.sequences, self.cfg.score.length, self.cfg.score.tokens)

    @functools.cached_property
    def keeper(self) -> Keeper:
        """Of the test part."""
        return Keeper(self.model, self.layout, self.batches(self.test))

    @functools.cached_property
    def everything(self) -> np.ndarray:
        return np.ones(self.layout.size, bool)

    def answers(self, kept: np.ndarray, ablation: str, mean: np.ndarray) -> np.ndarray:
        """Classes int8[N] of the test part, the other neurons at 0 or at their mean over the training part."""
        return self.keeper.classes(kept, None if ablation == "zero" else mean, self.run.check_stop)

    def draw(self, mask: int) -> int:
        """Seed of a random mask: no two fine-tunings share one."""
        return self.cfg.seed + self.number * self.cfg.keep.seeds + mask


# Scores


def score(one: Tuned) -> Found:
    """Scores every neuron on training proteins: activations on all, contributions on those that are told right."""
    moments, predicted = activations(one)
    right = np.flatnonzero(predicted == one.train.labels)
    mean, paths = moments.join(range(GROUPS)).mean, {}
    cfg = one.cfg.score
    todo: list[tuple[str, dict[str, Any]]] = [
        (f"{mode}-{baseline}", {"mode": mode, "mean": None if baseline == "zero" else mean, "steps": cfg.steps,
                                "max_steps": cfg.max_steps})
        for mode in cfg.modes for baseline in (cfg.baselines if mode != "conductance" else ("zero",))]
    todo.append(("grad_x_act", {"mode": "gate", "rule": "end", "steps": 1}))
    for name, options in todo:
        limit = cfg.site_examples if options["mode"] == "site" else cfg.gate_examples
        paths[name] = contributions(one, name, right[chosen(one.train.labels[right], limit)], options)
    count = paths["gate-zero"].count.reshape(2, CLASSES)
    if not (count > 0).all(0).any():
        raise UserError(f"of the training proteins {len(right)} are classified correctly, no two of one class; train "
                        "for longer (enzyme.loop.steps)")
    told = {"train_right": len(right), "scored_classes": int((count.sum(0) > 0).sum())}
    for name, path in paths.items():
        told[f"seconds_a_protein.{name}"] = float(path.seconds / path.count.sum())
        if not name.startswith("conductance"):
            told |= {f"completeness_error_mean.{name}": float(path.error[1] / path.count.sum()),
                     f"completeness_error_worst.{name}": float(path.error[0])}
    one.run.write_results({one.key(key): value for key, value in told.items()})
    return Found(moments, paths)


def activations(one: Tuned) -> tuple[scores.Moments, np.ndarray]:
    """(moments by class and half, the model's answers) on all training proteins."""
    kept = one.load("scores/moments")
    if kept is None:
        batches = one.batches(one.train)
        moments = scores.activation_moments(one.model, one.layout, batches, groups_of(one.train.labels), GROUPS,
                                            one.run.check_stop)
        predicted = Keeper(one.model, one.layout, batches).classes(one.everything, check=one.run.check_stop)
        one.save("scores/moments", **moments._asdict(), predicted=predicted)
        kept = one.load("scores/moments")
    predicted = kept.pop("predicted")
    return scores.Moments(**kept), predicted


def contributions(one: Tuned, name: str, which: np.ndarray, options: dict[str, Any]) -> scores.Attributed:
    """Sums of one path over some training proteins; saved after every batch."""
    part = one.train.where(np.isin(np.arange(len(one.train)), which))
    batches = one.batches(part)
    kept = one.load(f"scores/{name}")
    before = None if kept is None else scores.Attributed(**kept)
    with one.run.progress(len(batches), f"scoring neurons, {name}, seed {one.number}",
                          0 if before is None else int(before.done)) as advance:
        def after(found: scores.Attributed) -> None:
            one.save(f"scores/{name}", **found._asdict())
            if peak := high_water():
                one.run.write_results({one.key(f"peak_mib.{name}"): peak})
            advance()
            one.run.check_stop()

        return scores.attribute(one.model, one.layout, batches, part.labels, groups_of(part.labels), GROUPS,
                                counted=one.cfg.score.counted, before=before, after=after, **options)


def high_water() -> float | None:
    """MiB of memory that this process has held at most; None where the system does not tell."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
    return None


# Curves


def curves(one: Tuned, found: Found) -> None:
    """Answers on the test part for every ablation, direction, method, random mask and share but the whole."""
    cfg, mean = one.cfg.keep, found.moments.join(range(GROUPS)).mean
    if one.load("curves/test") is None:
        none = {f"none_{ablation}": one.answers(~one.everything, ablation, mean) for ablation in cfg.ablations}
        one.save("curves/test", labels=one.test.labels, full=one.answers(one.everything, "zero", mean), **none)
    ranked = rankings(found, one.layout)
    todo = [(ablation, direction, method) for ablation in cfg.ablations for direction in DIRECTIONS
            for method in of(cfg.methods, direction)]
    with one.run.progress(len(todo), f"keeping and dropping neurons, seed {one.number}") as advance:
        for ablation, direction, method in todo:
            name = f"curves/{ablation}-{direction}-{method}"
            if one.load(name) is None:
                draws = range(cfg.seeds if method in DRAWN else 1)
                masks = [[selection.select(method, share, ranked, one.layout, one.draw(draw))
                          for share in cfg.shares[:-1]] for draw in draws]
                answers = [[one.answers(mask if direction == "keep" else ~mask, ablation, mean) for mask in row]
                           for row in masks]
                one.save(name, answers=np.array(answers, np.int8))
            advance()
            one.run.check_stop()


def site_curves(one: Tuned, found: Found) -> dict[tuple[str, str], np.ndarray]:
    """{(ablation, method): answers int8[sites, shares, N]}: a share of one site is kept, every other site is whole."""
    cfg, mean, out = one.cfg.keep, found.moments.join(range(GROUPS)).mean, {}
    ranked = rankings(found, one.layout)
    todo = [(ablation, method) for ablation in cfg.ablations for method in SITE_METHODS] if cfg.site_shares else []
    with one.run.progress(len(todo), f"keeping neurons of one site, seed {one.number}") as advance:
        for ablation, method in todo:
            name = f"sites/{ablation}-{method}"
            if one.load(name) is None:
                masks = [[selection.within(method, share, site, ranked, one.layout, one.draw(0))
                          for share in cfg.site_shares] for site in range(len(SITES))]
                answers = [[one.answers(mask, ablation, mean) for mask in row] for row in masks]
                one.save(name, answers=np.array(answers, np.int8))
            out[ablation, method] = one.load(name)["answers"]
            advance()
            one.run.check_stop()
    return out


def load_curves(one: Tuned) -> dict[tuple[str, str, str], np.ndarray]:
    """{(ablation, direction, method): answers int8[masks, shares, N]}, the whole model or nothing at share 1."""
    test, out = one.load("curves/test"), {}
    for ablation in one.cfg.keep.ablations:
        for direction in DIRECTIONS:
            last = test["full"] if direction == "keep" else test[f"none_{ablation}"]
            for method in of(one.cfg.keep.methods, direction):
                rest = one.load(f"curves/{ablation}-{direction}-{method}")["answers"]
                end = np.broadcast_to(last, (len(rest), 1, len(last)))
                out[ablation, direction, method] = np.concatenate([rest, end], 1)
    return out


def specificity(one: Tuned, found: Found) -> Mapping[str, np.ndarray]:
    """Of each ablation answers int8[C, N] without the neurons that speak most for one class; -1 for a class without
    scores."""
    if one.load("specificity") is None:
        mean = found.moments.join(range(GROUPS)).mean
        by_class, answers = found.paths["gate-zero"].of_classes(CLASSES), {}
        for ablation in one.cfg.keep.ablations:
            answers[ablation] = np.full((CLASSES, len(one.test)), -1, np.int8)
            for c in np.flatnonzero(~np.isnan(by_class).any(1)):
                lost = selection.top(by_class[c], one.cfg.keep.specific)
                answers[ablation][c] = one.answers(~lost, ablation, mean)
        one.save("specificity", **answers)
    return one.load("specificity")
