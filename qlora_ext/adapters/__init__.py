"""LoRA adapters on a model: added, saved and loaded."""
