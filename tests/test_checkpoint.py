"""Checkpoints under every kind of damage: bits, files, disks, kills; another mesh, another model, another schema."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmodels.errors import UserError
from train.runtime import checkpoint_contents as contents
from train.runtime.checkpoint import Checkpoints, NoValidCheckpoint
from train.runtime.checkpoint_contents import abstract_of
from train.runtime.checkpoint_folder import Folder
from train.runtime.files import CannotSave
from train.runtime.fingerprint import by_path, fingerprints

# What orbax leaves behind after a failed load; one of the places where pytest finds it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ROOT = Path(__file__).resolve().parents[1]
METADATA = {"examples_seen": 640, "config": {"rate": 0.1, "pair": (1, None)}, "data": {"state": {"next_index": 20}},
            "metrics": {"loss": np.float32(0.5), "worst": float("nan")}, "mesh": {"data": 8}}


class Moments(NamedTuple):
    mu: jax.Array
    nu: jax.Array


def mesh_of(*shape):
    devices = np.asarray(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
    return Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def make_state(step=0, mesh=None, width=256):
    """A state of every kind of leaf; `bits` does not compress, so that its bytes stand in the file as they are."""
    mesh = mesh or mesh_of(8, 1)
    bits = np.random.default_rng(step).integers(0, 2**32, (16, width), np.uint32)

    def put(value, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        if jax.process_count() > 1 and isinstance(value, jax.Array):  # device_put takes no keys to other processes
            return jax.jit(lambda: value, out_shardings=sharding)()
        return jax.device_put(value, sharding)

    return {"params": {"w": put((bits % 1000 / 1000).astype(np.float32), "data", "tensor"),
                       "b": put(jnp.ones(3, jnp.bfloat16)), "a.b": put(jnp.ones(2)), "a": {"b": put(jnp.zeros(2))}},
            "bits": put(bits, "data"), "mask": put(np.array([True, False])),
            "opt": (Moments(put(np.full(8, step, np.float32), "data"), put(jnp.zeros((0, 4)))), [put(jnp.int8(3))]),
            "rng": put(jax.random.key(step)), "rngs": put(jax.random.split(jax.random.key(7), 8), "data"),
            "step": put(jnp.int32(step))}


def host(leaf):
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(by_path(one).items(), by_path(other).values(), strict=True):
        assert a.dtype == b.dtype and host(a).tobytes() == host(b).tobytes(), path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 10 and 20, to be copied."""
    folder = tmp_path_factory.mktemp("saved") / "c"
    checkpoints = Checkpoints(folder, every=10)
    for step in (10, 20):
        checkpoints.save(step, make_state(step), METADATA)
    checkpoints.wait()
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "c"))


def restore(folder, **options):
    return Checkpoints(folder, every=10).restore(abstract_of(make_state()), **options)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def files_of(step):
    return sorted(path for path in step.rglob("*") if path.is_file())


def kind(file, step):
    """``state/d/*`` for ``state/d/2be621ab...``."""
    return re.sub(r"[0-9a-f]{32}", "*", str(file.relative_to(step)))


def test_round_trip_and_metadata(saved):
    restored = restore(saved)
    assert restored.step == 20
    assert_equal(restored.state, make_state(20))
    assert all(a.sharding == b.sharding for a, b in
               zip(jax.tree.leaves(restored.state), jax.tree.leaves(make_state(20)), strict=True))
    meta = restored.metadata
    assert meta["schema"] == contents.SCHEMA and meta["versions"]["jax"] == jax.__version__ and "git" in meta
    assert meta["examples_seen"] == 640 and meta["config"] == {"rate": 0.1, "pair": [1, None]}
    assert meta["metrics"] == {"loss": 0.5, "worst": None} and meta["fingerprints"] == fingerprints(make_state(20))
    assert restore(saved, step=10).step == 10
    with pytest.raises(UserError, match=r"no checkpoint of step 15 .*there are \[10, 20\]"):
        restore(saved, step=15)


def test_a_fresh_start_and_nothing_written_before_the_first_save(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none", every=10)
    assert checkpoints.restore(abstract_of(make_state())) is None
    assert not (tmp_path / "none").exists()
    (tmp_path / "none/10.orbax-checkpoint-tmp").mkdir(parents=True)  # the first save was killed
    assert checkpoints.restore(abstract_of(make_state())) is None


def test_reading_leaves_a_save_under_way_alone(copy):
    (copy / "30.orbax-checkpoint-tmp").mkdir()
    assert restore(copy).step == 20 and (copy / "30.orbax-checkpoint-tmp").exists()
    Checkpoints(copy, every=10).save(30, make_state(30), {}, wait=True)
    assert names(copy) == ["10", "20", "30"]  # a new writer cleans up


@pytest.mark.parametrize("settings", [{"keep": 1}, {"every": 0}, {"local": "x"}, {"verify": "sometimes"}])
def test_settings_that_cannot_hold(tmp_path, settings):
    with pytest.raises(UserError) as error:
        Checkpoints(tmp_path, **{"every": 10, **settings})
    assert error.value.exit_code == 2


def test_the_state_may_be_donated_at_once(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=1)
    spoil = jax.jit(lambda bits: bits ^ jnp.uint32(0xFFFFFFFF), donate_argnums=0)
    for step in range(1, 6):
        state = make_state(step, width=4096)
        checkpoints.save(step, state, {})
        state["bits"] = spoil(state["bits"])
    assert checkpoints.restore(abstract_of(make_state(width=4096))).step == 5


def test_retention(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=10, keep=2, keep_every=40)
    assert [step for step in range(31) if checkpoints.due(step)] == [10, 20, 30]
    for step in range(10, 100, 10):
        checkpoints.save(step, make_state(step), {})
    checkpoints.wait()
    assert names(tmp_path) == ["40", "80", "90"] and checkpoints.failures == 0


def test_a_step_that_is_there_is_left_alone_and_another_branch_is_set_aside(copy, capfd):
    before = (copy / "20").stat().st_ino
    Checkpoints(copy, every=10).save(20, make_state(20), {}, wait=True)  # stopped right after resuming
    assert (copy / "20").stat().st_ino == before
    checkpoints = Checkpoints(copy, every=10)
    assert checkpoints.restore(abstract_of(make_state()), step=10).step == 10
    checkpoints.save(15, make_state(15), {}, wait=True)
    assert names(copy) == ["10", "15", "20.abandoned"] and restore(copy).step == 15
    assert "20 is of another branch: step 15 is saved now" in capfd.readouterr().err
    checkpoints.save(15, make_state(16), {}, wait=True)
    assert names(copy) == ["10", "15", "15.abandoned", "20.abandoned"]
    assert int(restore(copy).state["step"]) == 16


@pytest.mark.parametrize("shape", [(4, 2), (2, 4), (1, 1)])
def test_another_mesh(saved, shape):
    restored = Checkpoints(saved, every=10).restore(abstract_of(make_state(mesh=mesh_of(*shape))))
    assert_equal(restored.state, make_state(20))
    assert fingerprints(restored.state) == restored.metadata["fingerprints"]
    assert restored.state["params"]["w"].sharding == make_state(mesh=mesh_of(*shape))["params"]["w"].sharding


def test_40_flipped_bits_40_detected(saved, tmp_path, capfd):
    """In the stored bytes of one array, which zstd cannot compress and orbax loads without a word."""
    choose, by_fingerprint = random.Random(0), 0
    rows = host(make_state(20)["bits"])
    for attempt in range(40):
        copy = Path(shutil.copytree(saved, tmp_path / str(attempt)))
        row = rows[choose.randrange(16)].tobytes()
        file, start = next((file, at) for file in files_of(copy / "20") if (at := file.read_bytes().find(row)) >= 0)
        assert kind(file, copy / "20").endswith("d/*")
        flip(file, 8 * start + choose.randrange(8 * len(row)))
        assert restore(copy).step == 10 and names(copy) == ["10", "20.corrupt"]
        by_fingerprint += "20 is passed over: bits has fingerprint" in capfd.readouterr().err
    assert by_fingerprint == 40


def flip(file, bit):
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def check_damaged(copy):
    """Whether the damage was seen; if not, no value may differ (unused bytes, or a file nobody reads)."""
    restored = restore(copy)
    if restored.step == 10:
        assert names(copy) == ["10", "20.corrupt"]
        return True
    assert_equal(restored.state, make_state(20))
    assert restored.metadata["examples_seen"] == 640 and names(copy) == ["10", "20"]
    return False


@pytest.mark.long
def test_bits_flipped_anywhere_give_the_older_step_or_the_same_values(saved, tmp_path):
    choose = random.Random(1)
    for attempt in range(40):
        copy = Path(shutil.copytree(saved, tmp_path / str(attempt)))
        files = files_of(copy / "20")
        file = files[attempt % len(files)]  # every file in turn: by size the data would take all
        flip(file, choose.randrange(8 * file.stat().st_size))
        check_damaged(copy)


NEEDED = {"_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt", "state/d/*"}


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_one_file_of_each_kind(saved, tmp_path, damage, capfd):
    seen = {}
    for file in files_of(saved / "20"):
        copy = Path(shutil.copytree(saved, tmp_path / file.name))
        target = copy / file.relative_to(saved)
        if damage == "missing":
            target.unlink()
        else:
            target.write_bytes(target.read_bytes()[: target.stat().st_size // 2] if damage == "truncated" else b"")
        name = kind(file, saved / "20")
        seen[name] = check_damaged(copy) or seen.get(name, False)
        shutil.rmtree(copy)
    needed = NEEDED | {"commit_success.txt"} if damage == "missing" else NEEDED
    assert needed <= set(seen) and all(seen[name] for name in needed), seen
    lines = [line for line in capfd.readouterr().err.splitlines() if "20 is passed over: it" in line]
    assert len(lines) >= len(needed)


def test_the_rest_of_the_metadata_is_guarded_too(copy):
    file = copy / "20/_CHECKPOINT_METADATA"
    file.write_text(file.read_text().replace('"examples_seen": 640', '"examples_seen": 641'))
    assert restore(copy).step == 10 and names(copy) == ["10", "20.corrupt"]


def test_an_uncommitted_step_is_passed_over(copy, capfd):
    shutil.copytree(copy / "20", copy / "30")
    (copy / "30/commit_success.txt").unlink()
    assert restore(copy).step == 20 and names(copy) == ["10", "20", "30.corrupt"]
    assert "30 is passed over: it has no commit marker" in capfd.readouterr().err
    (copy / "30").mkdir()
    assert restore(copy).step == 20 and names(copy) == ["10", "20", "30.corrupt", "30.corrupt.2"]


def test_all_damaged_never_starts_from_scratch(copy):
    for step in (10, 20):
        (copy / str(step) / "_CHECKPOINT_METADATA").write_text("{}")
    for _ in range(2):
        with pytest.raises(NoValidCheckpoint, match="choose another --out") as error:
            restore(copy)
        assert error.value.exit_code == 66 and names(copy) == ["10", "20"]  # the fault may be this machine's
    (copy / "10").rename(copy / "10.corrupt")
    shutil.rmtree(copy / "20")
    with pytest.raises(NoValidCheckpoint):  # renamed ones still mean that there was a run
        restore(copy)


def test_this_machines_troubles_rename_nothing(copy, monkeypatch):
    from orbax.checkpoint import v1 as ocp

    def out_of_memory(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(ocp, "load_checkpointables", out_of_memory)
    with pytest.raises(jax.errors.JaxRuntimeError):
        restore(copy)
    monkeypatch.undo()
    uneven = {**abstract_of(make_state()), "step": jax.ShapeDtypeStruct((), jnp.int32)}
    with pytest.raises(ValueError, match="step has no sharding"):
        Checkpoints(copy, every=10).restore(uneven)
    assert names(copy) == ["10", "20"]


def test_another_model_is_an_error_of_the_user(copy):
    def attempt(change, match):
        abstract = abstract_of(make_state())
        change(abstract)
        with pytest.raises(UserError, match=match) as error:
            Checkpoints(copy, every=10).restore(abstract)
        assert error.value.exit_code == 2 and names(copy) == ["10", "20"]

    def like(leaf, shape=None, dtype=None):
        return jax.ShapeDtypeStruct(leaf.shape if shape is None else shape, dtype or leaf.dtype,
                                    sharding=NamedSharding(leaf.sharding.mesh, PartitionSpec()))

    attempt(lambda a: a.update(bits=like(a["bits"], (16, 64))),
            r"bits is uint32\[16,256\] there and uint32\[16,64\] here")
    attempt(lambda a: a.update(more=a["bits"]), r"more is nothing there and uint32\[16,256\] here")
    attempt(lambda a: a.pop("mask"), r"mask is bool\[2\] there and nothing here")
    attempt(lambda a: a.update(step=like(a["step"], dtype=jnp.float32)), r"step is int32\[\] there .* pass cast=True")
    attempt(lambda a: a.update(rng=like(a["bits"], (2,), jnp.uint32)), r"rng is key<fry>\[\] there")
    attempt(lambda a: a.update(rng=like(a["rng"], dtype=jax.random.key(0, impl="rbg").dtype)), r"rng is key<fry>\[\]")


def test_cast_is_asked_for_and_comes_after_the_check(copy):
    abstract = abstract_of(make_state())
    abstract["params"]["w"] = jax.ShapeDtypeStruct((16, 256), jnp.bfloat16, sharding=abstract["params"]["w"].sharding)
    state = Checkpoints(copy, every=10).restore(abstract, cast=True).state
    assert state["params"]["w"].dtype == jnp.bfloat16
    assert state["params"]["w"].sharding == abstract["params"]["w"].sharding
    assert np.array_equal(host(state["params"]["w"]), host(make_state(20)["params"]["w"].astype(jnp.bfloat16)))
    assert restore(copy).step == 20


def test_two_folders_the_newest_valid_wins(tmp_path):
    def open_both():
        return Checkpoints(tmp_path / "far", every=20, local=tmp_path / "near", local_every=5)

    checkpoints, abstract = open_both(), abstract_of(make_state())
    for step in range(1, 36):
        if checkpoints.due(step):
            checkpoints.save(step, make_state(step), {})
    checkpoints.wait()
    assert names(tmp_path / "far") == ["20"] and names(tmp_path / "near") == ["30", "35"]
    checkpoints = open_both()
    assert checkpoints.restore(abstract).step == 35
    (tmp_path / "near/35/commit_success.txt").unlink()
    assert open_both().restore(abstract).step == 30
    shutil.rmtree(tmp_path / "near")  # another machine
    assert open_both().restore(abstract).step == 20
    open_both().save(25, make_state(25), {}, wait=True)  # the last one of a run is durable whatever its number
    assert names(tmp_path / "far") == ["20", "25"]


def test_verify_always_reads_back_and_never_does_not_look(tmp_path, monkeypatch, capfd):
    state, abstract = make_state(10), abstract_of(make_state())
    careful = Checkpoints(tmp_path / "always", every=10, verify="always")
    careful.save(10, state, {}, wait=True)
    pack = contents.pack
    monkeypatch.setattr(contents, "pack", lambda state: pack({**state, "bits": state["bits"] + 1}))  # bad memory
    with pytest.raises(CannotSave, match="bits has fingerprint"):
        careful.save(20, make_state(20), {}, wait=True)
    assert careful.failures == 1 and names(tmp_path / "always") == ["10", "20.corrupt"]
    blind = Checkpoints(tmp_path / "never", every=10, verify="never")
    blind.save(10, state, {}, wait=True)
    monkeypatch.undo()
    restored = blind.restore(abstract)
    assert restored.step == 10 and restored.metadata["fingerprints"]["bits"] == "uint32[16,256]"
    assert not np.array_equal(host(restored.state["bits"]), host(state["bits"]))


class FullDisk:
    """A save that wrote a part and then failed in the background."""

    def __init__(self, folder, step):
        (folder.path / f"{step}.orbax-checkpoint-tmp/state").mkdir(parents=True)

    def result(self):
        raise OSError(28, "No space left on device")


def test_a_failed_save_is_counted_and_two_in_a_row_end_the_run(copy, monkeypatch, capfd):
    start = Folder.start
    checkpoints = Checkpoints(copy, every=10)
    monkeypatch.setattr(Folder, "start", lambda folder, step, *_: FullDisk(folder, step))
    checkpoints.save(30, make_state(30), {})
    checkpoints.wait()
    assert checkpoints.failures == 1 and names(copy) == ["10", "20"]
    assert "30 could not be saved" in capfd.readouterr().err and restore(copy).step == 20
    monkeypatch.setattr(Folder, "start", start)  # space came back
    checkpoints.save(40, make_state(40), {})
    checkpoints.wait()
    assert checkpoints.failures == 1 and restore(copy).step == 40
    monkeypatch.setattr(Folder, "start", lambda folder, step, *_: FullDisk(folder, step))
    checkpoints.save(50, make_state(50), {})
    checkpoints.save(60, make_state(60), {})
    with pytest.raises(CannotSave, match="2 in a row.*No space left.*free space") as error:
        checkpoints.save(70, make_state(70), {})
    assert error.value.exit_code == 74 and checkpoints.failures == 3 and restore(copy).step == 40
    with pytest.raises(CannotSave):  # the last save of a run has no next interval
        Checkpoints(copy, every=10).save(80, make_state(80), {}, wait=True)


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("room", [0, 4096, 16384, 49152])
def test_a_disk_that_is_really_full(small_disk, room):
    checkpoints, abstract = Checkpoints(small_disk / "c", every=10), abstract_of(make_state(width=1024))
    checkpoints.save(10, make_state(10, width=1024), {}, wait=True)
    disk = os.statvfs(small_disk)
    (small_disk / "ballast").write_bytes(b"x" * (disk.f_bavail * disk.f_frsize - room))
    checkpoints.save(20, make_state(20, width=1024), {})
    checkpoints.wait()
    assert checkpoints.failures == 1 and checkpoints.restore(abstract).step == 10
    (small_disk / "ballast").unlink()
    checkpoints.save(30, make_state(30, width=1024), {})
    checkpoints.wait()
    assert checkpoints.failures == 1 and checkpoints.restore(abstract).step == 30
    assert names(small_disk / "c") == ["10", "30"]


def test_damage_to_an_older_step_does_not_hinder_a_run(copy):
    checkpoints = Checkpoints(copy, every=10, keep=2)
    checkpoints.save(30, make_state(30), {}, wait=True)
    (copy / "20/_CHECKPOINT_METADATA").write_bytes(b"")
    checkpoints.save(40, make_state(40), {}, wait=True)
    assert checkpoints.failures == 0 and names(copy) == ["30", "40"]


def test_schema_1_loads_through_its_upgrade(copy):
    """The fixture is a record as schema 1 would have been; its fingerprints hold the algorithm fast as well."""
    old = json.loads((ROOT / "tests/golden/checkpoint_schema_1.json").read_text())
    file = copy / "20/_CHECKPOINT_METADATA"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({**whole, "custom_metadata": old}))
    restored = restore(copy)
    assert restored.step == 20 and restored.metadata["schema"] == 2
    assert restored.metadata["data"] == {"state": {"next_index": 20}, "fingerprint": {"seed": 0, "batch": 32}}
    assert "data_state" not in restored.metadata and restored.metadata["examples_seen"] == 640
    newer = contents.seal({**old})
    newer = {**{name: value for name, value in newer.items() if name != "digest"}, "schema": 99}
    file.write_text(json.dumps({**whole, "custom_metadata": {**newer, "digest": contents._digest(newer)}}))
    with pytest.raises(UserError, match=r"schema 99 and this version reads up to 2.*orbax-checkpoint"):
        restore(copy)
    assert names(copy) == ["10", "20"]


SAVE = """
import sys
import jax, jax.numpy as jnp
from train.runtime.checkpoint import Checkpoints
from train.runtime.checkpoint_contents import abstract_of
state = lambda step: {"w": jnp.full((64, 64), step, jnp.float32), "step": jnp.int32(step)}
checkpoints = Checkpoints(sys.argv[1], every=1)
found = checkpoints.restore(abstract_of(state(0)))
step = found.step if found else 0
print("from", step, flush=True)
while True:
    step += 1
    checkpoints.save(step, state(step), {"examples_seen": step})
    checkpoints.wait()
    print("committed", step, flush=True)
"""


def kill_while_saving(folder, moments):
    environment = {**os.environ, "XLA_FLAGS": ""}
    choose, committed = random.Random(3), 0
    abstract = abstract_of({"w": jnp.zeros((64, 64)), "step": jnp.int32(0)})
    specs = {"w": PartitionSpec("data", "tensor"), "step": PartitionSpec()}
    spread = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh_of(2, 4), specs[name]))
              for name, leaf in abstract.items()}
    for attempt in range(moments):
        process = subprocess.Popen([sys.executable, "-c", SAVE, str(folder)], cwd=ROOT, env=environment, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        first = process.stdout.readline()
        assert first.startswith("from"), process.communicate()
        assert int(first.split()[1]) >= committed
        for _ in range(1 + attempt % 3):
            process.stdout.readline()
        time.sleep(choose.uniform(0, 0.12))  # a save takes about as long
        process.send_signal(signal.SIGKILL)
        rest, errors = process.communicate()
        committed = max([committed, *(int(line.split()[1]) for line in rest.splitlines() if line.startswith("c"))])
        assert "passed over" not in errors
        restored = Checkpoints(folder, every=1).restore(spread if attempt % 2 else abstract)
        assert restored.step >= committed and restored.metadata["examples_seen"] == restored.step
        assert fingerprints(restored.state) == restored.metadata["fingerprints"]
        assert (np.asarray(restored.state["w"]) == restored.step).all()
        assert not [name for name in names(folder) if "corrupt" in name]


def test_kill_9_while_saving(tmp_path):
    kill_while_saving(tmp_path / "c", 3)


@pytest.mark.long
def test_kill_9_while_saving_at_24_moments(tmp_path):
    kill_while_saving(tmp_path / "c", 24)


TWO = """
import os, sys
sys.path.insert(0, "tests")
from train.runtime.distributed import initialize
assert initialize()
import jax
from test_checkpoint import *
from train.runtime.checkpoint_contents import Damaged
folder, part = sys.argv[1], sys.argv[2]
checkpoints = Checkpoints(folder, every=10)
if part == "save":
    for step in (10, 20, 30):
        checkpoints.save(step, make_state(step), METADATA)
    checkpoints.wait()
elif jax.process_index() == 1:  # only this process cannot read step 20
    read = Folder.read
    def refuse(self, step, *arguments, **options):
        if step == 20:
            raise Damaged("cannot be read here")
        return read(self, step, *arguments, **options)
    Folder.read = refuse
restored = checkpoints.restore(abstract_of(make_state()))
print("restored", restored.step, restored.state["step"], flush=True)
"""


def two_processes(folder, part):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for index in range(2):
        environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu",
                       "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2",
                       "JAX_PROCESS_ID": str(index)}
        started.append(subprocess.Popen([sys.executable, "-c", TWO, str(folder), part], cwd=ROOT, env=environment,
                                        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    try:
        return [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()


@pytest.mark.long
def test_two_processes_agree_and_one_reads_what_they_wrote(tmp_path):
    folder = tmp_path / "c"
    for output, errors in two_processes(folder, "save"):
        assert "restored 30 30\n" in output, errors
    assert_equal(restore(folder).state, make_state(30))  # 2 -> 1
    flip_row = host(make_state(30)["bits"])[12].tobytes()  # a row of the second process
    file, start = next((file, at) for file in files_of(folder / "30") if (at := file.read_bytes().find(flip_row)) >= 0)
    flip(file, 8 * start + 5)
    for output, errors in two_processes(folder, "restore"):
        assert "restored 10 10\n" in output, errors
    assert names(folder) == ["10", "20.corrupt", "30.corrupt"]
