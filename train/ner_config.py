"""What a tagger can be told. ``jaxmodels run ner --help`` lists it; configs/ holds the presets."""

import dataclasses
from typing import Literal

from jaxmodels.errors import UserError
from train.protein_config import operational
from train.settings import LoopConfig, MeshConfig, OptimizerConfig


@dataclasses.dataclass(frozen=True)
class NerDataConfig:
    """What is read."""

    path: str | None = None  # your own: a folder of train, dev and test files, or one file
    source: str | None = None  # without one: bc5cdr, ncbi_disease, craft or wnut17
    illformed: Literal["repair", "refuse"] = "repair"  # I- after O opens an entity, or is an error
    length: int = 128  # positions of a row; several sentences share one, longer ones are cut in parts
    batch: int = 8  # rows of a step, over all devices; about 36 sentences of 26 words with the length above
    limit: int | None = None  # sentences of each part that are read at most, for trying things out

    def __post_init__(self):
        for name, low in (("length", 8), ("batch", 1)):
            if getattr(self, name) < low:
                raise UserError(f"data.{name}={getattr(self, name)} must be at least {low}")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"data.limit={self.limit} must be at least 1, or none for all")

    @property
    def name(self) -> str:
        """As `train.data.tagged` takes it."""
        if bool(self.path) == bool(self.source):
            raise UserError(f"data.path={self.path} and data.source={self.source}: give one of them, a folder of "
                            "train, dev and test files or one of bc5cdr, ncbi_disease, craft, wnut17")
        return f"path:{self.path}" if self.path else str(self.source)


@dataclasses.dataclass(frozen=True)
class VectorsConfig:
    """Where word vectors come from. They are updated in training."""

    # skipgram: trained here, on the pool's own text; wordllama: of the package's table of pieces of words
    name: Literal["random", "file", "skipgram", "wordllama"] = "random"
    path: str | None = None  # file: word2vec's text format or GloVe's, plain or gzip
    limit: int = 20_000  # words of a file or table that no training sentence has and that are kept too, the first
    texts: tuple[str, ...] = ()  # skipgram: more text, the training parts of bc5cdr, craft, mesh_pubmed ...
    epochs: int = 10  # skipgram
    window: int = 5  # skipgram: words to each side

    def __post_init__(self):
        if (self.name == "file") != bool(self.path):
            raise UserError(f"vectors.name={self.name} and vectors.path={self.path} do not fit; vectors.path belongs "
                            "to vectors.name=file")
        for name, low in (("limit", 0), ("epochs", 1), ("window", 1)):
            if getattr(self, name) < low:
                raise UserError(f"vectors.{name}={getattr(self, name)} must be at least {low}")


@dataclasses.dataclass(frozen=True)
class TaggerConfig:
    """Sizes; see `jaxmodels.cnn_cnn_lstm.config`."""

    head: Literal["lstm", "crf"] = "lstm"
    d_char: int = 25
    char_filters: int = 50
    char_width: int = 3
    char_layers: int = 1
    d_word: int = 100
    word_filters: int = 200  # 800 in the paper
    word_width: int = 5
    word_layers: int = 2
    d_hidden: int = 128  # of the LSTM
    d_tag: int = 25  # of the previous tag; 0: one-hot
    dropout: float = 0.5
    word_drop: float | None = None  # chance of [UNK] in training; none: 0.3, and 0.5 with vectors
    residual: Literal["auto", "project", "none"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    floor: int = 1  # times that a word of the training text has to occur to have an embedding
    chars: int = 20  # characters of a word that are read, with those for its beginning and end

    def __post_init__(self):
        for name, low in (("floor", 1), ("chars", 4)):
            if getattr(self, name) < low:
                raise UserError(f"model.{name}={getattr(self, name)} must be at least {low}")


@dataclasses.dataclass(frozen=True)
class NerRun:
    """Everything about one tagger."""

    data: NerDataConfig = NerDataConfig()
    model: TaggerConfig = TaggerConfig()
    vectors: VectorsConfig = VectorsConfig()
    # section 4: AdamW 1e-3, decay 1e-4, clip 5, constant
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup=0.0, beta2=0.999,
                                                 weight_decay=1e-4, clip=5.0)
    epochs: int = 50  # at most
    least_steps: int = 500  # of small data, whatever epochs says
    patience: int = 8  # evaluations without a better F1 on the development part that end the training
    beam: int = 1  # above 1: the test part is decoded with such a beam too, beside greedily
    votes: int = 10  # passes with dropout whose agreement on an entity is measured beside its probability; 0: none
    confidence: Literal["probability", "votes"] = "probability"  # of entities, in `predict`; may be changed later
    bootstrap: int = 1000  # draws behind every interval
    peers: tuple[Literal["crf", "spacy"], ...] = ()  # also trained on the same sentences; need the extra `peers`
    mesh: MeshConfig = MeshConfig()
    loop: LoopConfig = LoopConfig(steps=1, evaluate_every=1, save_every=200)  # steps: made of the epochs
    seed: int = 0
    entry: str = "train.ner:run"
    report: str = "analysis.ner_report:build"
    predict: str = "train.ner:predict"

    def __post_init__(self):
        for name in ("epochs", "least_steps", "patience", "beam", "bootstrap"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.votes < (self.confidence == "votes"):
            raise UserError(f"votes={self.votes} must be at least 0, and 1 for confidence=votes")
        if self.loop.style == "pmap":
            raise UserError("loop.style=pmap is for old scripts; ner runs with auto or per_device")

    @property
    def operational(self) -> tuple[str, ...]:
        """Keys with which a run may be continued in its folder: they change how it runs, not what it computes."""
        return (*operational(self.loop), "confidence")
