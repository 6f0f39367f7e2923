"""One packed weight: its settings, its bytes, and the functions of them."""
