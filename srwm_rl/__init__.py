"""Agents whose memory is a network that rewrites its own weights (SRWM), for Gymnasium and Stable-Baselines3.

Importing it registers the environments with Gymnasium; torch is imported on first use.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if Path(*sys.argv[:1]).stem == "srwm-rl" or (sys.argv[:1] == ["-m"] and "srwm_rl" in sys.orig_argv):
    # The command line: Ctrl-C ends it while it imports this package; `run_command` restores the exception.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from srwm_rl.envs.registration import register_envs
from srwm_rl.lazy import lazy_exports

if TYPE_CHECKING:
    from srwm_rl.errors import UserError as UserError
    from srwm_rl.nn.cores import Core as Core
    from srwm_rl.nn.cores import check_core as check_core
    from srwm_rl.nn.cores import core_names as core_names
    from srwm_rl.nn.cores import import_core as import_core
    from srwm_rl.nn.cores import make_core as make_core
    from srwm_rl.nn.cores import register_core as register_core
    from srwm_rl.nn.policy import SRWMPolicy as SRWMPolicy
    from srwm_rl.ops import delta_scan as delta_scan
    from srwm_rl.ops import srwm_scan as srwm_scan
    from srwm_rl.storage.model_file import Agent as Agent
    from srwm_rl.storage.model_file import load as load
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__)

__version__ = "0.1.0"


# SB3 and ProcGen import the unmaintained `gym`, which prints a notice from this module.
if "gym" not in sys.modules:
    _notices: Any = ModuleType("gym_notices.notices")
    _notices.notices = {}
    sys.modules.setdefault("gym_notices.notices", _notices)

# Here, because gymnasium.make("srwm_rl:procgen-coinrun-v0") imports this module only.
register_envs()
