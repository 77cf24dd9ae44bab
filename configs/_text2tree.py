"""Presets and grids that the experiments on texts with codes share."""

from collections.abc import Mapping

from train.text2tree_config import METHODS

MAIN = ("plain", "text2tree", "ssl", "dml", "focal", "db")
PRESETS: dict[str, dict[str, object]] = {
    "tiny": {
        "encoder.name": "cnn", "encoder.words": 400, "encoder.filters": 8, "data.length": 32, "data.batch": 16,
        "data.limit": 64, "epochs": 2, "bootstrap": 100,
    },
    # All layers of the encoder, at the rate that is usual for BERT, 2e-5: for a GPU.
    "whole": {"encoder.frozen": 0, "encoder.trunk": 0.004},
}


def grids(without: tuple[str, ...] = ()) -> dict[str, Mapping[str, Mapping[str, object]]]:
    """methods: each with its defaults, but for those that the kind of labels does not allow. main: those of which a
    claim needs several seeds. paper: Text2Tree with every weight and temperature of the authors' search (text2tree.md
    section 8), and plain; not their learning rates, which are for encoders that are trained whole. labels: what their
    states begin with and what they are made by."""
    paper = {f"gamma={gamma:g},tau={tau:g}": {"method.gamma": gamma, "method.tau": tau}
             for gamma in (0.001, 0.005, 0.01, 0.05) for tau in (0.5, 1.0, 2.0, 3.0)}

    def some(names: tuple[str, ...]) -> dict[str, Mapping[str, object]]:
        return {name: {"method.name": name} for name in names if name not in without}

    return {
        "methods": some(("plain", *METHODS)),
        "main": some(MAIN),
        "paper": {"plain": {"method.name": "plain"}, **paper},
        "labels": {"plain": {"method.name": "plain"}, "gcn": {"method.label_encoder": "gcn"},
                   **{f"start={start}": {"method.start": start} for start in ("random", "label", "fixed")}},
    }
