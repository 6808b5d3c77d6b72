"""Tensor operations independent of Sana, each defined by a few lines of torch."""
