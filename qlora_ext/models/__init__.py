"""Whole models: decides which layers are packed, packs them, and reports what the model weighs."""

from .quantize import quantize_model
from .report import LayerReport, MemoryReport, QuantizationReport, memory_report, num_parameters

__all__ = [
    "LayerReport",
    "MemoryReport",
    "QuantizationReport",
    "memory_report",
    "num_parameters",
    "quantize_model",
]
