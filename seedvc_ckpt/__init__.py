"""Checkpoints for PyTorch training: atomic, verified, resumable, exportable."""
