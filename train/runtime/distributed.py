"""Several processes: JAX's own runtime, found in the environment (training_runtime.md section 6).

Slurm, Open MPI and the TPU pods of GKE are recognised by what they set, and jax finds the rest; anything else sets
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or JAXMODELS_DISTRIBUTED=auto to let jax look by itself
(plain TPU VMs, whose neighbours only a metadata server knows, and Kubernetes jobs). See docs/launch.md.
"""

import os
from collections.abc import Mapping
from typing import Any

from jaxmodels.errors import UserError

HEARTBEAT = "JAXMODELS_HEARTBEAT"  # seconds until a silent peer counts as dead
OURS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def plan(environment: Mapping[str, str] = os.environ) -> dict[str, Any] | None:
    """Arguments for jax.distributed.initialize; None for a single process.

    Raises UserError if the environment says a part of what is needed.
    """
    given = [name for name in OURS if environment.get(name)]
    if given:
        if len(given) < len(OURS):
            missing = next(name for name in OURS if name not in given)
            raise UserError(f"{given[0]} is set but {missing} is not; set all of {', '.join(OURS)}")
        try:
            count, index = int(environment[OURS[1]]), int(environment[OURS[2]])
        except ValueError:
            raise UserError(f"{OURS[1]}={environment[OURS[1]]} and {OURS[2]}={environment[OURS[2]]} must be "
                            "whole numbers") from None
        if not 0 <= index < count:
            raise UserError(f"JAX_PROCESS_ID={index} must lie in 0..{count - 1} (JAX_NUM_PROCESSES={count})")
        if count == 1:
            return None
        return {"coordinator_address": environment[OURS[0]], "num_processes": count, "process_id": index}
    if environment.get("JAXMODELS_DISTRIBUTED") == "auto":
        return {}
    tasks = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    if "SLURM_PROCID" in environment and int(environment.get(tasks[0], 1)) > 1:
        return {}
    if int(environment.get(tasks[1], 1)) > 1:
        return {}
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or environment.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return {}
    return None


def heartbeat(environment: Mapping[str, str] = os.environ) -> int:
    """Seconds until a silent peer counts as dead. Raises UserError for what is no such number."""
    text = environment.get(HEARTBEAT) or "30"
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{HEARTBEAT}={text} must be a whole number of seconds, at least 1")
    return int(text)


def initialize() -> bool:
    """Joins the other processes, before anything touches a device. Returns whether there are any.

    From then on jax catches SIGTERM itself, and all processes agree on the step at which they stop: no Python handler
    may be installed for it.
    """
    arguments = plan()
    if arguments is None:
        return False
    seconds = heartbeat()
    import jax

    if "cpu" in (jax.config.jax_platforms or ""):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=seconds)
    return True


def process_index() -> int:
    """This process's number, 0 first."""
    import jax

    return jax.process_index()
