"""Sizes of the tagger, and their named sets."""

import dataclasses
from typing import Any, Literal, get_args

from jaxmodels.errors import UserError

Head = Literal["lstm", "crf"]
Residual = Literal["auto", "project", "none"]
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class CnnCnnLstmConfig:
    """words, chars: rows of the tables, special symbols included. tags: V. widths are odd: they see as far both ways.

    Defaults: the library's choice of ner_active_learning.md section 3.4 (paper and ports differ in nearly all sizes).
    """

    words: int
    chars: int
    tags: int
    d_char: int = 25
    char_filters: int = 50
    char_width: int = 3
    char_layers: int = 1
    d_word: int = 100
    word_filters: int = 800
    word_width: int = 5
    word_layers: int = 2
    head: Head = "lstm"
    d_hidden: int = 256  # of the LSTM
    d_tag: int = 25  # embedding of the previous tag; 0: one-hot
    dropout: float = 0.5
    word_drop: float = 0.5  # chance that training replaces a word by [UNK]; its characters stay
    residual: Residual = "auto"  # around layers of characters: where widths agree, by a projection too, or never
    dtype: str = "float32"  # of the computation; parameters, the state and the softmax are float32

    def __post_init__(self):
        for name in ("words", "chars", "tags", "d_char", "char_filters", "char_layers", "d_word", "word_filters",
                     "word_layers", "d_hidden"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("char_width", "word_width"):
            if getattr(self, name) < 1 or getattr(self, name) % 2 == 0:
                raise UserError(f"{name}={getattr(self, name)} must be odd, so that a window has a middle")
        for name in ("dropout", "word_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        for name, known in (("head", get_args(Head)), ("residual", get_args(Residual)), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise UserError(f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}")
        if self.d_tag < 0:
            raise UserError(f"d_tag={self.d_tag} must be at least 0 (one-hot)")

    @property
    def d_full(self) -> int:
        """Width of what is known of a word by itself: its characters and its embedding."""
        return self.char_filters + self.d_word

    @property
    def d_enc(self) -> int:
        """Width of what the decoder reads of a word."""
        return self.word_filters + self.d_full

    @property
    def reach(self) -> int:
        """Empty positions that keep neighbours in a row apart: every layer masks, so one window's half is enough."""
        return self.word_width // 2

    def flops_per_word(self, chars: int = 20) -> float:
        """Of a training step: products of the forward pass and twice that for the gradient; chars: of a word."""
        c, w, H = self.char_filters, self.word_filters, self.d_hidden
        char = chars * self.char_width * (self.d_char * c + (self.char_layers - 1) * c * c)
        word = self.word_width * (self.d_full * w + (self.word_layers - 1) * w * w)
        head = self.d_enc * self.tags if self.head == "crf" else 4 * H * (self.d_enc + H) + H * self.tags
        return 6.0 * (char + word + head)

    @classmethod
    def tiny(cls, words: int = 40, chars: int = 30, tags: int = 9, **changes: Any) -> "CnnCnnLstmConfig":
        """For tests."""
        sizes = {"d_char": 6, "char_filters": 10, "d_word": 12, "word_filters": 16, "word_width": 3, "d_hidden": 12,
                 "d_tag": 5}
        return cls(words, chars, tags, **(sizes | changes))

    @classmethod
    def small(cls, words: int, chars: int, tags: int, **changes: Any) -> "CnnCnnLstmConfig":
        """For CPUs: 1.5 M parameters with a table of 10,000 words (section 9's own measurements)."""
        return cls(words, chars, tags, **({"word_filters": 200, "d_hidden": 128, "word_drop": 0.3} | changes))

    @classmethod
    def paper(cls, words: int, chars: int, tags: int, **changes: Any) -> "CnnCnnLstmConfig":
        """Shen et al. 2018 as the submission has it: words' width 3, characters' 5; what it does not give: defaults."""
        return cls(words, chars, tags, **({"word_width": 3, "char_width": 5} | changes))
