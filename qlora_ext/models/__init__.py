"""Whole models: packing them layer by layer, and what they weigh afterwards."""

# ruff: noqa: F401  (these names are imported from here, wherever they are defined)

from .names import matches
from .plan import Plan
from .quantize import quantize_model
from .report import (
    LayerReport,
    MemoryReport,
    QuantizationReport,
    memory_report,
    num_parameters,
)
from .walk import (
    Places,
    _numel,
    check_model,
    check_whole,
    is_packed,
    linear_names,
    move_hooks,
    output_embeddings,
    places_of,
    progress,
    replace_module,
    use_dense_panels,
)

__all__ = [
    "LayerReport",
    "MemoryReport",
    "QuantizationReport",
    "memory_report",
    "num_parameters",
    "quantize_model",
]
