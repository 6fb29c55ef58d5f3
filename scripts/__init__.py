"""The command line `srwm-rl`: one module per command in `commands`, and the packages that carry the commands out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from srwm_rl.lazy import lazy_exports

if TYPE_CHECKING:
    from srwm_rl.scripts.training.defaults_for import TrainingDefaults as TrainingDefaults
    from srwm_rl.scripts.training.defaults_for import defaults_for as defaults_for
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__)
