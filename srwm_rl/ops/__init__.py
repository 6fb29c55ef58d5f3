"""The recurrences of networks that write their own weights: `srwm_scan` and `delta_scan`."""

from srwm_rl.ops.delta import delta_scan
from srwm_rl.ops.scan import srwm_scan

__all__ = ["delta_scan", "srwm_scan"]
