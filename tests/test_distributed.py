"""Which processes belong together, read from the environment."""

import pytest

from jaxmodels import UserError
from train.runtime.distributed import heartbeat, plan

OURS = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


def test_ours():
    assert plan(OURS) == {"coordinator_address": "host:1", "num_processes": 4, "process_id": 3}
    assert plan(OURS | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None


@pytest.mark.parametrize("found", [
    {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, {"OMPI_COMM_WORLD_SIZE": "2"}, {"TPU_WORKER_HOSTNAMES": "a,b"},
    {"MEGASCALE_COORDINATOR_ADDRESS": "a"}, {"JAXMODELS_DISTRIBUTED": "auto"}])
def test_clusters_are_left_to_jax(found):
    assert plan(found) == {}


@pytest.mark.parametrize("alone", [
    {}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, {"SLURM_NTASKS": "8"}, {"TPU_WORKER_HOSTNAMES": "localhost"}])
def test_one_process(alone):
    """SLURM_NTASKS without SLURM_PROCID: inside a batch script, before srun."""
    assert plan(alone) is None


@pytest.mark.parametrize("change, told", [
    ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID is not"), ({"JAX_PROCESS_ID": "4"}, r"must lie in 0..3"),
    ({"JAX_NUM_PROCESSES": "two"}, "must be whole numbers")])
def test_bad_environment(change, told):
    with pytest.raises(UserError, match=told):
        plan(OURS | change)


def test_the_heartbeat():
    assert heartbeat({}) == 30 and heartbeat({"JAXMODELS_HEARTBEAT": "5"}) == 5
    for text in ("0", "1.5", "ten"):
        with pytest.raises(UserError, match=f"JAXMODELS_HEARTBEAT={text} must be a whole number of seconds"):
            heartbeat({"JAXMODELS_HEARTBEAT": text})
