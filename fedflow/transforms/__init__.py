"""Transforms: what happens to updates and broadcasts on their way. Names and their meaning: `fedflow.algorithm.Transform`."""

from fedflow.transforms.quantise import Cast, Quantise
from fedflow.transforms.sparsify import RandomK, TopK

__all__ = ["Cast", "Quantise", "RandomK", "TopK"]
