"""LoRA adapters on a model: adding, saving and loading them."""
