"""One packed weight: its settings, its bytes, and the functions that work on them."""
