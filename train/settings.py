"""What a training run can be told, apart from its model and data. Imports nothing heavy: `jaxmodels list` reads it."""

import dataclasses
import math
from typing import Literal

from jaxmodels.errors import UserError

AXES = ("data", "fsdp", "expert", "tensor")  # of the mesh
Style = Literal["auto", "per_device", "pmap"]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; their product is the number of devices. One may be -1: what is left."""

    data: int = -1  # copies of the model, each with its part of the batch
    fsdp: int = 1  # parameters and moments cut along their embed axis, the batch as well
    expert: int = 1  # experts spread over devices, the batch as well
    tensor: int = 1  # heads, hidden width and vocabulary
    parts: int = 1  # in which tokens travel to their experts, so that some compute while others travel
    ragged: bool = False  # only what a token's expert needs travels, not whole buffers (TPU, GPU)
    slices: int = 1  # TPU slices (or hosts) joined by a slower network; only `data` crosses them

    def __post_init__(self):
        sizes = [getattr(self, axis) for axis in AXES]
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise UserError(f"mesh {self._text()}: sizes are at least 1, and at most one of them is -1 (what is left)")
        if self.parts < 1:
            raise UserError(f"mesh.parts={self.parts} must be at least 1")
        if self.slices < 1 or (self.data != -1 and self.data % self.slices):
            raise UserError(f"mesh.slices={self.slices} must divide mesh.data={self.data}: only data crosses slices")

    def shape(self, devices: int) -> tuple[int, ...]:
        """The four sizes for this many devices. Raises UserError if they do not fit."""
        sizes = [getattr(self, axis) for axis in AXES]
        known = math.prod(size for size in sizes if size != -1)
        if -1 in sizes and devices % known == 0:
            sizes[sizes.index(-1)] = devices // known
        if -1 in sizes or math.prod(sizes) != devices:
            raise UserError(f"mesh {self._text()} needs {'a multiple of ' if -1 in sizes else ''}{known} devices, "
                            f"there are {devices}; change mesh.* so that the product is {devices}")
        return tuple(sizes)

    def _text(self) -> str:
        return " x ".join(f"{axis} {getattr(self, axis)}" for axis in AXES)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters follow their gradients."""

    name: Literal["adamw", "muon", "sgd"] = "adamw"  # muon: matrices of layers by Muon, all else by AdamW
    learning_rate: float = 3e-3  # at the top of the schedule
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"  # wsd: warm-up, stable, decay
    warmup: float = 0.05  # share of the steps
    decay: float = 0.25  # share of the steps at the end in which wsd falls linearly to `floor`
    floor: float = 0.0  # of learning_rate, at the end of wsd and cosine
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1  # of arrays with two dimensions or more; sgd has none
    clip: float = 1.0  # global norm of the gradient; 0: no clipping

    def __post_init__(self):
        for name, low, high in (("warmup", 0, 1), ("decay", 0, 1), ("floor", 0, 1), ("beta1", 0, 1), ("beta2", 0, 1),
                                ("learning_rate", 0, math.inf), ("clip", 0, math.inf), ("weight_decay", 0, math.inf)):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"optimizer.{name}={getattr(self, name)} must lie between {low} and {high}")
        if self.warmup + self.decay > 1:
            raise UserError(f"optimizer.warmup + decay = {self.warmup + self.decay:g} is more than the whole run (1)")


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
    """What keeps the experts of a mixture evenly loaded."""

    bias_rate: float = 1e-3  # step of the balancing biases (Wang et al. 2024); 0: none
    loss: float = 0.0  # weight of the load-balancing loss (Fedus et al. 2021, eq. 4)
    z_loss: float = 1e-3  # weight of the router z-loss (Zoph et al. 2022, eq. 5)

    def __post_init__(self):
        for name in ("bias_rate", "loss", "z_loss"):
            if not getattr(self, name) >= 0:
                raise UserError(f"balance.{name}={getattr(self, name)} must be at least 0")


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long a run takes, and what happens on the way."""

    steps: int = 600
    accumulate: int = 1  # micro-batches of one step
    style: Style = "auto"  # auto: jit and shardings; per_device: shard_map; pmap: for scripts that expect it
    evaluate_every: int = 100  # steps
    save_every: int = 100  # steps
    keep: int = 3  # newest checkpoints that stay
    keep_every: int | None = None  # and those of every so many steps
    local_dir: str | None = None  # a second, faster place for checkpoints; each run has a folder in it
    local_every: int | None = None  # steps between those
    verify: Literal["always", "on_restart", "never"] = "on_restart"  # compare fingerprints of what was read
    on_change: Literal["raise", "restart", "reseek"] = "raise"  # data changed since the checkpoint
    max_bad_steps: int = 10  # non-finite steps in a row that end the run (exit code 65)
    profile: tuple[int, int] | None = None  # (first step, steps): a trace for TensorBoard or Perfetto
    log_ids: bool = False  # write the ids of every step's examples into metrics.jsonl
    wandb: bool = False  # also log to Weights & Biases, if it is installed

    def __post_init__(self):
        for name in ("steps", "accumulate", "evaluate_every", "save_every", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"loop.{name}={getattr(self, name)} must be at least 1")
        if self.profile and (self.profile[0] < 0 or self.profile[1] < 1):
            raise UserError(f"loop.profile={self.profile} must be first step >= 0 and steps >= 1")
