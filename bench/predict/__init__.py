"""Predicts how long the CUDA kernels take, from their SASS and a table of assumptions. See
bench/kernel_model.py."""
