"""Merging adapters into the weights: dense, or packed again."""
