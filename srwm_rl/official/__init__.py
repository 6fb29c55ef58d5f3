"""Checkpoints of the paper's authors' code, read without running anything in them."""

from srwm_rl.official.cores import load_core
from srwm_rl.official.importer import import_checkpoint

__all__ = ["import_checkpoint", "load_core"]
