"""Compiling for a TPU slice that is not here: the parser on a module by hand, and the real thing where libtpu is."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmodels import UserError
from train.runtime.aot import Collective, check_topology, collectives, compile_in_child, whole_gathers
from train.runtime.mesh import make_mesh
from train.settings import MeshConfig

ROOT = Path(__file__).resolve().parents[1]
MODULE = """\
HloModule jit_step

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %all-gather.1 = f32[8,4]{1,0} all-gather(%x), dimensions={0}
  %ar = (f32[2,2], bf16[3]{0}) all-reduce(%a, %b), to_apply=%add
}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[], f32[8,4]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %ag = (f32[2]{0}, f32[16]{0}) all-gather-start(%p), dimensions={0}
  %done = f32[16]{0} all-gather-done(%ag)
}
"""


def test_collectives_count_the_turns_of_loops():
    found, gathers = collectives(MODULE)
    assert found == [Collective("all-gather", 3 + 1, 3 * 128 + 64), Collective("all-reduce", 3, 3 * (16 + 6))]
    assert sorted(gathers) == [("f32[16]", 16, 64), ("f32[8,4]", 32, 128)]


def test_collectives_of_a_program_compiled_here():
    mesh = make_mesh(MeshConfig(8))
    x = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    text = jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, P())).lower(x).compile().as_text()
    assert collectives(text)[0] == [Collective("all-reduce", 1, 16)]


def test_gathers_of_whole_parameters_are_named():
    mesh = make_mesh(MeshConfig(1, 4, 1, 2))

    def leaf(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

    parameters = {"groups/0/ffn/up": leaf((6, 256, 512), None, "fsdp", "tensor"), "norm": leaf((64,)),
                  "embed": leaf((1024, 512), None, "fsdp"), "head": leaf((512, 2048), None, "tensor")}
    size = 6 * 256 * 512
    assert whole_gathers([("f32[256,512]", size // 6, 4 * size // 6)], parameters) == []
    assert whole_gathers([("f32[1024,512]", 1024 * 512, 2**21)], parameters) == []  # fsdp has to
    told = whole_gathers([("f32[6,256,512]", size, 4 * size), ("bf16[512,2048]", 2**20, 2**21)], parameters)
    assert [text.split()[0] for text in told] == ["groups/0/ffn/up", "head"]


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:8", "v5e:2x4x", "h100:1x8"])
def test_bad_topologies(name):
    with pytest.raises(UserError, match="write it as v5e:2x4"):
        check_topology(name)


def compile_command(*arguments):
    return subprocess.run([sys.executable, "-m", "jaxmodels", "compile", *arguments], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "XLA_FLAGS": ""}, timeout=300)


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                  reason="libtpu is not installed; pip install 'jaxmodels[tpu]'")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is here")
def test_without_libtpu_it_says_so():
    done = compile_command("lm_dense_pretrain", "--topology", "v5e:2x4")
    assert done.returncode == 2 and "pip install 'jaxmodels[tpu]'" in done.stderr


def test_what_lies_in_the_current_folder_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text("raise SystemExit(1)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match="unknown experiment 'atlass'"):  # said by the child
        compile_in_child("atlass", [], "v5e:2x4")


@pytest.mark.long
@needs_libtpu
@pytest.mark.parametrize("arguments, kinds", [
    (("lm_dense_pretrain", "mesh.fsdp=8", "data.batch=32", "model.dtype=bfloat16"), {"all-gather"}),
    (("lm_moe_pretrain", "mesh.expert=8", "data.batch=32", "model.dtype=bfloat16"), {"all-to-all", "all-reduce"}),
    (("lm_moe_pretrain", "mesh.expert=8", "mesh.ragged=true", "data.batch=32", "model.dtype=bfloat16"),
     {"ragged-all-to-all", "all-reduce"}),
])
def test_compiles_for_eight_chips(arguments, kinds):
    done = compile_command(*arguments, "--topology", "v5e:2x4")
    assert done.returncode == 0, done.stderr
    assert kinds <= {line.split()[0] for line in done.stdout.splitlines() if line.strip()}
    assert "in all" in done.stdout and "of 15.5" in done.stdout
    assert "warning" not in done.stderr and len(done.stderr) < 2000  # libtpu's own noise stays in the child


@pytest.mark.long
@needs_libtpu
def test_what_does_not_fit_fails():
    done = compile_command("lm_dense_pretrain", "model.d_model=8192", "model.layers=12", "model.active_width=32768",
                           "model.heads=64", "model.kv_heads=8", "data.batch=8", "--topology", "v5e:2x4")
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "GiB" in done.stderr or "does not fit" in done.stderr


@pytest.mark.long
@needs_libtpu
def test_studies_have_no_step():
    done = compile_command("atlas", "--topology", "v5e:2x4")
    assert done.returncode == 2 and "no training experiment" in done.stderr
    assert json.dumps(done.stdout) == '""'
