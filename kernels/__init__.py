"""Tensor operations that know nothing of Sana, each defined by a few lines of torch."""
