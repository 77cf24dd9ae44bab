"""Kernels, one folder each: the reference is the truth, faster implementations are chosen by name or by measurement."""

from jaxmodels.kernels.grouped_matmul import grouped_matmul, grouped_outer

__all__ = ["grouped_matmul", "grouped_outer"]
