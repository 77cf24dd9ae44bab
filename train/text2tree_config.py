"""What text classification can be told. ``jaxmodels run text2tree --help`` lists it; configs/ holds the presets."""

import dataclasses
import math
from typing import Literal, get_args

from jaxmodels.errors import UserError
from train.protein_config import operational
from train.settings import LoopConfig, MeshConfig, OptimizerConfig

Method = Literal["text2tree", "ssl", "dml", "gdml", "plain", "reweight", "reweight_official", "class_balanced",
                 "oversampling", "focal", "db", "ldam_drw", "logit_adjustment", "mixup", "supcon", "selfcon",
                 "recursive", "htc", "hiagm"]
METHODS: tuple[str, ...] = get_args(Method)
OURS = {"text2tree": "full", "ssl": "ssl", "dml": "dml", "gdml": "gdml"}  # names of `jaxmodels.text2tree.losses`


@dataclasses.dataclass(frozen=True)
class TextDataConfig:
    """What is read."""

    path: str | None = None  # a CSV of your own
    source: str | None = None  # without one: mesh_pubmed, codiesp, codiesp:es or icd_phrases
    text: str = "text"  # its column of texts
    labels: str = "labels"  # of codes; several in one cell are separated by ; , | or spaces
    split: str | None = None  # of train, dev and test; none: by a hash of the text, 64, 16 and 20 %
    tree: str = "codes"  # above the codes of a CSV: codes (their spelling), icd10cm, icd9cm, or a table
    floor: int = 1  # training texts that a class needs
    length: int = 128  # tokens that the encoder reads at once
    chunks: int = 1  # pieces of that length that are read of a text; 1: its beginning, else each code looks among them
    batch: int = 64  # texts of a step, over all devices
    limit: int | None = None  # texts of each part that are read at most, for trying things out

    def __post_init__(self):
        for name, low in (("floor", 1), ("length", 8), ("chunks", 1), ("batch", 2)):
            if getattr(self, name) < low:
                raise UserError(f"data.{name}={getattr(self, name)} must be at least {low}")
        if self.limit is not None and self.limit < self.batch:
            raise UserError(f"data.limit={self.limit} must be at least data.batch={self.batch}, or none for all")
        for name, default in (("text", "text"), ("labels", "labels"), ("split", None), ("tree", "codes")):
            if self.source and not self.path and getattr(self, name) != default:
                raise UserError(f"data.{name}={getattr(self, name)} is about a CSV (data.path), and "
                                f"data.source={self.source} has its own; leave it out")

    @property
    def name(self) -> str:
        """As `train.data.coded_texts` takes it."""
        if bool(self.path) == bool(self.source):
            raise UserError(f"data.path={self.path} and data.source={self.source}: give one of them, a CSV file or "
                            "mesh_pubmed, codiesp, icd_phrases")
        return f"path:{self.path}" if self.path else str(self.source)


FROZEN = 4  # of MiniLM's six layers
OWN = ("cnn", "fresh")  # encoders that are trained from random weights


@dataclasses.dataclass(frozen=True)
class FreshConfig:
    """A small transformer from random weights (text2tree.md section 12), and how it is pre-trained by masked pieces."""

    layers: int = 4
    d_model: int = 256
    heads: int = 4
    epochs: int = 10  # of the pre-training
    length: int = 128  # pieces of a row; several texts share one
    batch: int = 32  # rows of a step, over all devices
    learning_rate: float = 1e-3
    seed: int = 0  # of the pre-training, which the seeds of a sweep share

    def __post_init__(self):
        for name, low in (("layers", 1), ("d_model", 1), ("heads", 1), ("epochs", 1), ("length", 8), ("batch", 1),
                          ("seed", 0)):
            if getattr(self, name) < low:
                raise UserError(f"encoder.fresh.{name}={getattr(self, name)} must be at least {low}")
        if self.d_model % (2 * self.heads):
            raise UserError(f"encoder.fresh.d_model={self.d_model} must be a multiple of 2 * encoder.fresh.heads = "
                            f"{2 * self.heads}")
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"encoder.fresh.learning_rate={self.learning_rate} must be a number above 0")


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """What reads the texts."""

    name: str = "all-minilm-l6-v2"  # a BERT-like model (folder, name); from random weights: fresh, cnn
    pool: Literal["cls", "mean"] = "mean"  # what stands for a text; MiniLM was trained to mean over tokens
    pooler: bool | None = None  # a dense layer with tanh below the head, as in BERT; none: with pool=cls alone
    frozen: int = FROZEN  # lower layers of such a model that do not move; their states are stored on disk. 0: none
    trunk: float | None = None  # rate of the encoder, as a share of the head's; none: 0.02, if from random weights 0.2
    filters: int = 100  # of each width of the cnn
    words: int = 8000  # pieces of fresh and cnn, learned from the training texts (fresh: and names of codes)
    fresh: FreshConfig = FreshConfig()

    def __post_init__(self):
        for name, low in (("frozen", 0), ("filters", 1), ("words", 300)):
            if getattr(self, name) < low:
                raise UserError(f"encoder.{name}={getattr(self, name)} must be at least {low}")
        if self.trunk is not None and not self.trunk >= 0:
            raise UserError(f"encoder.trunk={self.trunk} must be at least 0")
        if self.name in OWN and self.frozen not in (0, FROZEN):
            raise UserError(f"encoder.frozen={self.frozen}: a {self.name} encoder is trained whole; set it to 0")

    @property
    def has_pooler(self) -> bool:
        """`pooler`, or what it is by default: a pooler was trained above [CLS]; above a mean it costs accuracy."""
        return self.pool == "cls" if self.pooler is None else self.pooler

    @property
    def share(self) -> float:
        """`trunk`, or what it is by default: a pretrained model's features are small, MiniLM's of norm 2, and ask for a
        fast head."""
        return (0.2 if self.name in OWN else 0.02) if self.trunk is None else self.trunk


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    """How the classes are learned; see text2tree.md sections 5 to 7 and 10."""

    name: Method = "text2tree"
    gamma: float = 0.001  # weight of the contrastive loss: text2tree, ssl, gdml, supcon, selfcon
    tau: float = 1.0  # its temperature
    sim_temperature: float = 1.0  # of the softmax over label similarities
    include_self: bool = False  # a text among its own positives, as in the released code
    diag_weight: float = 1.0  # of un-mixed pairs
    start: Literal["random", "label", "fixed"] = "random"  # of the node table
    label_encoder: Literal["cascade", "gcn"] = "cascade"  # of text2tree; gcn: a graph convolution, an ablation
    labels_rate: float = 0.1  # rate of the label states, as a share of the encoder's
    beta: float = 0.999  # class_balanced
    focal_gamma: float = 2.0
    focal_alpha: float = 0.25
    mixup_alpha: float = 0.5
    strength: float = 1e-6  # recursive, hiagm

    def __post_init__(self):
        if not 0 <= self.beta < 1:
            raise UserError(f"method.beta={self.beta} must be at least 0 and below 1")
        for name in ("mixup_alpha", "tau", "sim_temperature", "diag_weight"):
            if not getattr(self, name) > 0:
                raise UserError(f"method.{name}={getattr(self, name)} must be above 0")
        if not 0 <= self.gamma <= 1:
            raise UserError(f"method.gamma={self.gamma} must lie between 0 and 1")
        for name in ("labels_rate", "focal_gamma", "strength"):
            if not getattr(self, name) >= 0:
                raise UserError(f"method.{name}={getattr(self, name)} must be at least 0")
        if not 0 <= self.focal_alpha <= 1:
            raise UserError(f"method.focal_alpha={self.focal_alpha} must lie between 0 and 1")
        if (self.label_encoder, self.start) == ("gcn", "fixed"):
            raise UserError("method.start=fixed is the node table alone, without a method.label_encoder; leave out gcn")


@dataclasses.dataclass(frozen=True)
class Text2TreeRun:
    """Everything about one classifier of texts."""

    data: TextDataConfig = TextDataConfig()
    encoder: TextEncoderConfig = TextEncoderConfig()
    method: MethodConfig = MethodConfig()
    # not clipped: the straight-through links have large gradients, and would hold back everything else with them
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-3, schedule="constant", beta2=0.999, weight_decay=0.0,
                                                 clip=0.0)
    epochs: int = 30  # at most
    patience: int = 5  # epochs without a better macro-F1 on the development part that end the training
    bootstrap: int = 2000  # draws behind every interval
    mesh: MeshConfig = MeshConfig()
    loop: LoopConfig = LoopConfig(steps=1, evaluate_every=1, save_every=100)  # steps: made of the epochs
    seed: int = 0
    entry: str = "train.text2tree:run"
    together: str = "train.text2tree:run_together"
    report: str = "analysis.text2tree_report:build"
    sweep_report: str = "analysis.text2tree_compare:build"
    predict: str = "train.text2tree:predict"
    share_grids = True  # see `train.sweep`: a method is the same in all of them

    def __post_init__(self):
        for name in ("epochs", "patience", "bootstrap"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.loop.style == "pmap":
            raise UserError("loop.style=pmap is for old scripts; text2tree runs with auto or per_device")
        if self.loop.style == "per_device" and self.method.name not in (each := ("plain", "focal", "reweight")):
            raise UserError(f"loop.style=per_device is for method.name={', '.join(each)}, whose losses need no other "
                            f"text, not for {self.method.name}; take loop.style=auto")

    @property
    def operational(self) -> tuple[str, ...]:
        """Keys with which a run may be continued in its folder: they change how it runs, not what it computes."""
        return operational(self.loop)
