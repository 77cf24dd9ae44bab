"""Sizes and switches of a BERT encoder."""

import dataclasses

from jaxmodels.esm.config import EsmConfig


@dataclasses.dataclass(frozen=True)
class BertConfig(EsmConfig):
    """BERT as a case of `EsmConfig`: norms after each residual add, learned positions, a norm on the embeddings.

    max_positions: rows of the table, ``pad_id + 1`` more than the longest text (512 + 1): the first token reads row
    pad_id + 1, as in RoBERTa, so that one code serves both. The ids of the special tokens are bert-base's; where a
    vocabulary has others, its tokenizer tells them and nothing here reads them but pad_id.
    """

    vocab_size: int = 30_522
    norm_placement: str = "post"
    position: str = "learned"
    embed_norm: bool = True
    token_dropout: bool = False
    norm_eps: float = 1e-12
    max_positions: int = 513
    contact_head: bool = False
    pool: str = "cls"
    family: str = "roberta"
    cls_id: int = 101
    pad_id: int = 0
    eos_id: int = 102
    mask_id: int = 103

    @property
    def max_length(self) -> int:
        """The longest text in tokens, [CLS] and [SEP] counted."""
        return self.max_positions - self.pad_id - 1

    @classmethod
    def tiny(cls, **overrides) -> "BertConfig":
        """Two layers that run in milliseconds."""
        tiny = cls(d_model=32, num_heads=4, ffn_widths=(48,) * 2, vocab_size=120, max_positions=41)
        return dataclasses.replace(tiny, **overrides)

    @classmethod
    def base(cls, **overrides) -> "BertConfig":
        """bert-base-uncased: Devlin et al. 2019, arXiv 1810.04805, section 3."""
        return dataclasses.replace(cls(d_model=768, num_heads=12, ffn_widths=(3072,) * 12), **overrides)

    @classmethod
    def minilm_l6(cls, **overrides) -> "BertConfig":
        """all-MiniLM-L6-v2: Wang et al. 2020, arXiv 2002.10957, with every second layer; config.json of the release."""
        return dataclasses.replace(cls(d_model=384, num_heads=12, ffn_widths=(1536,) * 6), **overrides)
