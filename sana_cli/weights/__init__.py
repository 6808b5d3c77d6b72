"""Weights: which there are, how they come here, and how they become networks."""
