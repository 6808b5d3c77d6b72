"""Batches: rows to jobs, and jobs to a folder of images."""
