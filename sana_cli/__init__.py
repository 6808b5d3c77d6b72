"""Sana text-to-image from the shell."""

__version__ = "0.1.0"
