"""Merges adapters into dense weights, or into packed ones."""
