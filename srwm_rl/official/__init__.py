"""Checkpoints of the paper's authors' code, read without running anything in them."""
