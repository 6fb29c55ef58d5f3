"""Write an agent's acting step as an ONNX file, if onnxruntime computes the same as PyTorch."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

import srwm_rl
from srwm_rl.envs.make import make_vec_env, resolve
from srwm_rl.envs.procgen.games import ACTIONS
from srwm_rl.lazy import import_optional
from srwm_rl.onnx_export import ActingStep, to_onnx
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.export.onnx_check import TOLERANCE, Comparison, check_onnx
from srwm_rl.storage.model_file import Agent
from srwm_rl.storage.safe_file import write_whole
from srwm_rl.storage.space_json import space_to_json

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MIN_CHECK_ENVS = 4
# The keys of each action: get_combos in https://github.com/openai/procgen/blob/master/procgen/env.py.
PROCGEN_ACTIONS = tuple(name.upper().replace("-", "+") for name in ACTIONS)


class DifferenceError(Exception):
    """onnxruntime cannot run a graph, or its numbers differ from PyTorch's."""


def check_packages() -> None:
    """Raise a `UserError` if a package for ONNX is missing."""
    for name in PACKAGES:
        import_optional(name, "--format onnx", "'srwm-rl[export]'")


def write_onnx(path: Path, agent: Agent, trained: TrainConfig) -> list[str]:
    """Write an agent's acting step and return lines that describe it.

    Raises:
        DifferenceError: the graph failed its check; nothing was written.
    """
    step = ActingStep(agent.policy)
    content = to_onnx(step, metadata(agent, trained, step))
    comparison = _check(content, step, agent, trained)
    write_whole(path, content)
    settings: dict[str, Any] = agent.policy.encoder_kwargs
    precisions = {settings.get("precision"), (settings.get("cnn") or {}).get("precision")}
    return [
        f"  inputs    {', '.join(map(str, step.inputs))}",
        f"  outputs   {', '.join(map(str, step.outputs))}",
        *["  note      the run computes its CNN in bfloat16, the graph in float32"]
        * ("bfloat16" in precisions and bool(agent.policy.features_extractor.images)),
        f"  checked   {comparison.steps} steps of {comparison.n_envs} environments with {comparison.episode_starts} "
        "episode starts, beside PyTorch",
        f"            largest difference: {comparison}",
    ]


def metadata(agent: Agent, trained: TrainConfig, step: ActingStep) -> dict[str, str]:
    """Return the metadata of an ONNX file; structures are JSON."""
    policy = agent.policy
    keys = {port.name: key for port, key in zip(step.inputs, step.keys, strict=False)}
    texts = {
        "srwm_rl_version": srwm_rl.__version__,
        "core": trained.core,
        "algo": trained.algo,
        "env": trained.env,
        "num_timesteps": str(agent.num_timesteps),
        "observation_keys": json.dumps(keys),
        "observation_space": json.dumps(space_to_json(policy.observation_space)),
        "action_space": json.dumps(space_to_json(policy.action_space)),
    }
    if resolve(trained.env).kind == "procgen":
        texts["mode"] = trained.mode
        if not trained.shuffle_actions:  # else they depend on the level
            texts["actions"] = json.dumps(PROCGEN_ACTIONS)
    return texts


def _check(content: bytes, step: ActingStep, agent: Agent, trained: TrainConfig) -> Comparison:
    n_games = len(resolve(trained.env).names)
    n_envs = n_games * -(-MIN_CHECK_ENVS // n_games)
    with closing(make_vec_env(trained.env, n_envs, trained.levels, 0, **trained.env_settings())) as env:
        try:
            torch.manual_seed(0)
            comparison = check_onnx(content, step, agent.policy, env)
        except Exception as error:
            if not type(error).__module__.startswith("onnxruntime"):  # its exceptions have no common base class
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
            raise DifferenceError(f"onnxruntime cannot run it: {reason}") from error
    if not comparison.passed:
        raise DifferenceError(f"onnxruntime and PyTorch differ by more than {TOLERANCE:g}: {comparison}")
    return comparison
