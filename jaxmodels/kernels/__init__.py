"""Kernels: the reference is the truth, faster implementations are chosen by name or by measurement."""

from jaxmodels.kernels.expert_ffn import expert_ffn
from jaxmodels.kernels.grouped_matmul import grouped_glu, grouped_matmul, grouped_outer

__all__ = ["expert_ffn", "grouped_glu", "grouped_matmul", "grouped_outer"]
