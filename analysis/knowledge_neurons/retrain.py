"""How much of what a mask takes away comes back when the neurons that are left are trained (spec section 5).

One epoch over the training part with the mask in place: parameters move, the mask does not.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool

from analysis.knowledge_neurons import selection
from analysis.knowledge_neurons.keep import Keeper
from analysis.knowledge_neurons.methods import RETRAINED
from analysis.knowledge_neurons.ranking import GROUPS, Found, rankings
from analysis.knowledge_neurons.tuned import Tuned
from jaxmodels.esm.model import Esm
from jaxmodels.taps import Taps
from train import enzyme, experiment
from train.data import records
from train.enzyme import CLASSES
from train.objectives.classify import Classify, class_weights
from train.runtime.state import merge, split


class Masked:
    """A model whose forward pass always has the mask in place, as an objective calls it."""

    def __init__(self, model: Esm, mask: Mapping[str, Any]):
        self.model, self.taps = model, Taps(mask=mask)

    def forward(self, tokens: Any, **options: Any) -> tuple[Any, Any]:
        return self.model.forward(tokens, taps=self.taps, **options)


def retrained(one: Tuned, found: Found) -> dict[tuple[str, float], dict[str, np.ndarray]]:
    """{(method, share): ``before`` and ``after`` the epoch, classes int8[N] of the test part}; zero ablation."""
    shares = one.cfg.keep.retrain_shares
    todo, out = list(itertools.product(RETRAINED, shares)), {}
    mean, ranked, epoch = found.moments.join(range(GROUPS)).mean, rankings(found, one.layout), None
    with one.run.progress(len(todo), "retraining with masks") as advance:
        for method, share in todo:
            name = f"retrained/{method}-{share:g}"
            if one.load(name) is None:
                mask = selection.select(method, share, ranked, one.layout, one.draw(0))
                epoch = epoch or Epoch(one)
                after = Keeper(epoch(mask), one.layout, one.batches(one.test))
                one.save(name, before=one.answers(mask, "zero", mean),
                         after=after.classes(mask, check=one.run.check_stop))
            out[method, share] = one.load(name)
            advance()
            one.run.check_stop()
    return out


class Epoch:
    """One epoch of a fine-tuning's batches, rates and loss, over a schedule as long as the epoch: mask -> model.

    Made once for all masks: another optimizer would compile the step again.
    """

    def __init__(self, one: Tuned):
        # Whatever the encoder came from, it is trained by now: its trunk moves at the lower rate.
        cfg = dataclasses.replace(one.cfg.enzyme, seed=one.cfg.enzyme.seed + one.number, pretrained="here")
        self.one, self.data = one, enzyme.prepare_data(cfg, one.run, one.train, cfg.settings[0])
        self.steps = math.ceil(len(records.open_records(self.data, "train")) / cfg.data.batch)
        self.cfg = dataclasses.replace(cfg, loop=dataclasses.replace(cfg.loop, steps=self.steps))
        self.tuner = enzyme.make_tuner(self.cfg, one.model)[0]
        self.objective = Classify(class_weights(one.train.labels, CLASSES) if cfg.tune.weighted else None)

    def __call__(self, mask: Bool[np.ndarray, "n"]) -> Esm:
        graphdef, params, rest = split(self.one.model)
        masks, state = self.one.layout.arrays(mask), self.tuner.init(params)
        with contextlib.closing(experiment.open_batches(self.cfg, self.data, "train", "retraining")) as batches:
            for _, batch in zip(range(self.steps), batches, strict=False):
                fields = {name: batch[name] for name in ("tokens", "segments", "targets")}
                params, state = _step(graphdef, self.objective, self.tuner, params, rest, state, masks, fields)
                self.one.run.check_stop()
        return merge(graphdef, params, rest)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _step(graphdef, objective, tuner, params, rest, state, masks, batch):
    def loss_of(params):
        loss, sums = objective.loss(Masked(merge(graphdef, params, rest), masks), batch, None)
        return loss / jnp.maximum(sums["weight"], 1)

    updates, state = tuner.update(jax.grad(loss_of)(params), state, params)
    return optax.apply_updates(params, updates), state
