"""Seeds of a classifier trained together: the sweep's results are those of one trial after another."""

import json

import numpy as np
import pytest

from jaxmodels.errors import Interrupted
from tests.tiny_texts import write
from train import sweep, text2tree
from train.runtime.run_folder import RunFolder
from train.runtime.signals import stop

pytestmark = pytest.mark.long
METHODS = ("text2tree", "plain")
TINY = ("preset=tiny", "data.split=split", "data.limit=none", "encoder.words=300", "encoder.filters=24", "epochs=8",
        "patience=1", "optimizer.learning_rate=1e-2", f"grid=method.name={','.join(METHODS)}", "seeds=2")
CLOCK = ("seconds", "goodput", "tokens_per_second", "mfu", "together")


def swept(out, path, *words, stop_at=None):
    planned = sweep.plan("text2tree", [*TINY, f"data.path={path}", *words])
    log = RunFolder.log

    def signal(self, step, **metrics):
        log(self, step, **metrics)
        if step == stop_at:
            stop.requested = "SIGTERM"

    with RunFolder.open(planned.name, planned.config, out, operational=planned.operational) as folder, \
            pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "log", signal)
        patch.setattr(stop, "requested", None)
        assert sweep.run(planned, folder, lambda *_: None) is None


def trials(out):
    """name -> (results, lines of metrics.jsonl, predictions), without what a clock tells."""
    found = {}
    for folder in sorted(out.glob("*/seed-*")):
        timeless = [{key: value for key, value in one.items() if not key.startswith(("step_seconds", *CLOCK))}
                    for one in (json.loads((folder / "results.json").read_text()),
                                *map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))]
        found[str(folder.relative_to(out))] = timeless[0], timeless[1:], dict(np.load(folder / "predictions.npz"))
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    path = write(root / "notes.csv")
    swept(root / "alone", path)
    return trials(root / "alone"), path


def same(found, alone):
    assert found.keys() == alone.keys() and len(found) == 4
    for name, (results, metrics, predictions) in found.items():
        for one, other in zip((results, *metrics), (alone[name][0], *alone[name][1]), strict=True):
            assert one.keys() == other.keys()
            for key, value in one.items():
                near = pytest.approx(other[key], rel=2e-3, abs=1e-4) if isinstance(value, float) else other[key]
                assert value == near, (name, key)
        np.testing.assert_allclose(predictions["model_scores"], alone[name][2]["model_scores"], atol=2e-3)


def test_as_one_after_another(alone, tmp_path, monkeypatch):
    calls, real = [], text2tree.run_together

    def counted(cfgs, folders):
        calls.append([cfg.seed for cfg in cfgs])
        return real(cfgs, folders)

    monkeypatch.setattr(text2tree, "run_together", counted)
    swept(tmp_path / "out", alone[1], "together=2")
    assert calls == [[0, 1]] * len(METHODS)
    same(trials(tmp_path / "out"), alone[0])
    steps = {name: results["steps"] for name, (results, *_) in alone[0].items()}
    assert steps["method.name=plain/seed-0"] != steps["method.name=plain/seed-1"]  # patience: one has left before
    assert len(list((tmp_path / "out").glob("tfidf-*.npz"))) == 1


def test_in_two_processes(alone, tmp_path):
    swept(tmp_path / "out", alone[1], "workers=2")
    same(trials(tmp_path / "out"), alone[0])
    assert [len(list((tmp_path / "out").glob(f"{name}-*"))) for name in ("tfidf", "data")] == [1, 2]


def test_interrupted_together_and_continued_one_after_another(alone, tmp_path):
    with pytest.raises(Interrupted):
        swept(tmp_path / "out", alone[1], "together=2", stop_at=8)
    folders = [tmp_path / "out" / "method.name=text2tree" / f"seed-{seed}" for seed in (0, 1)]
    assert [json.loads((folder / "results.json").read_text())["status"] for folder in folders] == ["interrupted"] * 2
    assert {len((folder / "metrics.jsonl").read_text().splitlines()) for folder in folders} <= {8, 9, 10}
    swept(tmp_path / "out", alone[1])
    same(trials(tmp_path / "out"), alone[0])
