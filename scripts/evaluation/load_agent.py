"""Load an agent and its training settings from a run, a model file or, if it is trusted, a zip of SB3."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from sb3_contrib import RecurrentPPO

from srwm_rl.agents import IMPALA, PPO, Supervised
from srwm_rl.envs.wrappers.attempts import ATTEMPT_BEGINS
from srwm_rl.envs.wrappers.memory_inputs import KEYS
from srwm_rl.errors import UserError
from srwm_rl.nn.policy import SRWMPolicy
from srwm_rl.regular_file import read_start
from srwm_rl.scripts.cli import allow_core
from srwm_rl.scripts.config.foreign_settings import allow_env, allow_wrappers, check_environment, read_settings
from srwm_rl.scripts.config.settings import TrainConfig, Wrappers
from srwm_rl.scripts.evaluation.protocol import EvalConfig
from srwm_rl.storage.model_file import Agent, load

OF_ZIPS = ("mode", "atari", "frame_stack", "shuffle_actions")  # what a run stores and a zip does not
ZIP = b"PK\x03\x04"


def open_agent(config: EvalConfig, device: str) -> tuple[Any, TrainConfig]:
    """Return the agent that the command line names, an `Agent` or a model of SB3, and its training settings.

    Raises:
        UserError: there is no agent, it is not trusted, or it does not fit its environment.
    """
    if config.core is not None:
        allow_core(config.core, config.core)
    if is_zip(Path(config.run)):
        return _open_zip(config, device)
    if config.trust and not any(is_zip(Path(name)) for name in config.beside):
        raise UserError(f"--trust is for zips that model.save() wrote; {config.run} needs none, leave it out")
    agent = load(config.run, device)
    source = str(agent.path)
    trained = read_settings(agent.config, source)
    allow_env(trained.env, config.env, source)
    allow_wrappers(trained.wrapper, config.wrapper, source)
    if config.wrapper and not trained.wrapper:
        raise UserError(f"--wrapper: {config.run} was trained without; leave it out")
    for name in OF_ZIPS:
        if getattr(config, name) != getattr(EvalConfig, name):
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} is for zips that model.save() wrote; {config.run} knows its own, leave it out")
    if config.env not in (None, trained.env):
        raise UserError(f"--env {config.env}: {config.run} was trained on {trained.env}; leave it out")
    check_environment(trained, agent.policy.observation_space, agent.policy.action_space, source)
    return agent, trained


def open_model(
    run: str, core: str | None, env: str | None, device: str, wrapper: Wrappers = ()
) -> tuple[Agent, TrainConfig]:
    """Return the agent of a run folder or a model file, and its training settings."""
    if is_zip(Path(run)):
        raise UserError(f"{run} is a zip; give a run folder, or a model file from its checkpoints folder")
    return open_agent(EvalConfig(run=run, core=core, env=env, wrapper=wrapper), device)


def is_zip(path: Path) -> bool:
    """Return whether a file is a zip, such as `model.save()` of SB3 writes."""
    try:
        return read_start(path, len(ZIP)) == ZIP
    except UserError:  # `load` reports it
        return False


def _open_zip(config: EvalConfig, device: str) -> tuple[Any, TrainConfig]:
    path = config.run
    if not config.trust:
        raise UserError(
            f"{path} is a zip such as model.save() writes, and reading it runs whatever code is in it; "
            "if you trust its author, add --trust"
        )
    if config.env is None or config.train_levels in (None, "none") or not config.eval_levels:
        raise UserError(f"{path} does not hold what it was trained on: give --env, --train-levels and --eval-levels")
    try:
        model = _algorithm(path).load(path, device=device)
    except Exception as error:  # unpickling can raise anything
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be loaded: {type(error).__name__}: {reason:.200}") from error
    if not isinstance(model.policy, SRWMPolicy):
        raise UserError(f"{path} holds a {type(model.policy).__name__}; only an SRWMPolicy can be evaluated here")
    spaces = dict(getattr(model.observation_space, "spaces", {}))
    if ATTEMPT_BEGINS in spaces and config.attempts is None:
        raise UserError(f"{path} was trained on trials of several attempts: give their number with --attempts")
    clip = float(spaces["previous_reward"].high.max()) if "previous_reward" in spaces else 0.0
    trained = TrainConfig(
        env=config.env,
        core=model.policy.core_name,
        algo="supervised" if isinstance(model, Supervised) else "ppo",
        env_kwargs=config.env_kwargs,
        levels=str(config.train_levels),
        eval_levels=config.eval_levels[0],
        inputs=tuple(name for name, key in KEYS.items() if key in spaces),  # type: ignore[misc]
        reward_clip=clip if clip < float("inf") else 0.0,
        attempts=config.attempts or 1,
        wrapper=config.wrapper,
        mode=config.mode,
        atari=config.atari,
        frame_stack=config.frame_stack,
        shuffle_actions=config.shuffle_actions,
    )
    check_environment(trained, model.observation_space, model.action_space, path)
    return model, trained


def _algorithm(path: str) -> Any:
    """Return the class that wrote a zip, by the names of its settings; only their JSON is read."""
    with zipfile.ZipFile(path) as archive:
        names = json.loads(archive.read("data")).keys()
    if "vtrace_lambda" in names:
        return IMPALA
    if "warmup_updates" in names:
        return Supervised
    return PPO if "sequence_length" in names else RecurrentPPO
