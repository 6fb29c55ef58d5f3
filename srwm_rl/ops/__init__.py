"""The recurrence of the self-referential weight matrix: one public function, `srwm_scan`."""

from srwm_rl.ops.scan import srwm_scan

__all__ = ["srwm_scan"]
