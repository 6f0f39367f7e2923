"""Whole models: what is packed and why, packing them layer by layer, what they weigh afterwards."""

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
