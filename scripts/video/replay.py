"""Play a trace again and compare every step."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from srwm_rl.errors import UserError
from srwm_rl.scripts.config.foreign_settings import allow_env, check_environment
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.video.panel import Arrays
from srwm_rl.scripts.video.record import play_scene
from srwm_rl.scripts.video.scene import Album
from srwm_rl.scripts.video.trace import Trace


def check_origin(trace: Trace, path: str, env: str | None, any_version: bool) -> None:
    """Check that a trace's environment exists and is the recorded one; `env` may be imported from a user's module.

    Raises:
        UserError: the environment is missing, must not be imported, or differs from the recorded one.
    """
    scene = trace.scene
    allow_env(scene.env, env, path)
    settings = TrainConfig(
        env=scene.env,
        mode=scene.mode,
        env_kwargs=scene.env_kwargs,
        inputs=scene.inputs,  # type: ignore[arg-type]
        reward_clip=scene.reward_clip,
    )
    check_environment(settings, trace.observation_space, trace.action_space, path)
    installed = scene.versions()
    # ProcGen's distributions differ in their names only.
    if sorted(trace.versions.values()) != sorted(installed.values()) and not any_version:
        raise UserError(
            f"{path} was recorded with {_format(trace.versions)}, and here is {_format(installed)}: install that "
            "version, or try with --any-version"
        )


def _format(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "an environment of unknown version"


def replay(trace: Trace, render: bool) -> tuple[str | None, Album]:
    """Play a trace's actions in a new environment.

    Returns:
        The first difference as text, or None; and the album, which is empty unless `render`.
    """
    scene, actions = trace.scene, iter(trace.arrays["actions"])
    env, album = scene.make_with_album() if render else (scene.make(), Album())

    def choose(obs: Any, start: bool) -> tuple[npt.NDArray[Any], None]:
        return next(actions)[None], None

    arrays, digest = play_scene(env, choose, scene, len(trace.arrays["actions"]), album if render else None)
    return first_difference(trace, arrays, digest), album


def first_difference(trace: Trace, arrays: Arrays, digest: str) -> str | None:
    """Describe the first difference of a replay's arrays and digest from a trace; None: they are equal."""
    n_steps = min(len(arrays["rewards"]), len(trace.arrays["rewards"]))
    differences = []
    for name, array in arrays.items():  # `links`, the observations, come first
        differ = (trace.arrays[name][:n_steps] != array[:n_steps]).reshape(n_steps, -1).any(1)
        if differ.any():
            differences.append((int(np.argmax(differ)), "observations" if name == "links" else name))
    if differences:
        step, name = min(differences, key=lambda difference: difference[0])
        return f"{name} differ from step {step} on"
    if n_steps < len(trace.arrays["rewards"]):
        return f"the episodes end after step {n_steps - 1}"
    return None if digest == trace.digest else "the observations' sha256 differs"
