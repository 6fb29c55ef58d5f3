"""`srwm-rl export`: an agent for other programs, as an ONNX graph or as a zip of Stable-Baselines3's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal
from zipfile import is_zipfile

import tyro

from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import allow_core, check_writable, parse, warn
from srwm_rl.scripts.evaluation.protocol import EvalConfig
from srwm_rl.scripts.config.settings import TrainConfig, pairs
from srwm_rl.scripts.evaluation.load_agent import open_agent

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

    from srwm_rl.onnx_export import ActingStep
    from srwm_rl.scripts.export.onnx_check import Checked
    from srwm_rl.storage.model_file import Agent

Arg = tyro.conf.arg
PROG = "srwm-rl export"
OUTPUTS = {"onnx": "agent.onnx", "sb3": "model.zip"}
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
CHECK_ENVS = 4
# What each action presses: get_combos in https://github.com/openai/procgen/blob/master/procgen/env.py.
PROCGEN_ACTIONS = (
    *("LEFT+DOWN", "LEFT", "LEFT+UP", "DOWN", "NOTHING", "UP", "RIGHT+DOWN", "RIGHT", "RIGHT+UP"),
    *("D", "A", "W", "S", "Q", "E"),
)


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained agent for other programs: as an ONNX graph, or as a zip that Stable-Baselines3 loads.

    onnx: one acting step, for any number of environments at once. Inputs: the observation's parts by name (frames as
    uint8), state [L, B, S] (zeros at first, then what the last step gave as new_state) and episode_start [B], true
    where an episode begins. Outputs: action_probabilities [B, n] (of several choices, those of each after one another;
    of bits, that of each 1), or for continuous actions action_mean and action_std (clip what you draw to the action
    space's bounds); value [B] and new_state. Its metadata says what it is and what its actions mean. It is played
    beside PyTorch in the run's environment first, and kept only if both agree within 1e-4.

    sb3: the run's trainer, as its save() writes it: srwm_rl.agents.PPO.load or IMPALA.load gives an agent that acts the
    same. It holds weights and settings, not the optimizer's state: srwm-rl train --resume goes on with a run.
    """

    run: tyro.conf.Positional[str]
    """A run folder, or a model file; RUN/best is the best model of a run, RUN its newest."""
    format: Literal["onnx", "sb3"] = "onnx"
    """What to write."""
    output: Annotated[str | None, Arg(aliases=["-o"])] = None
    """The file. Default: agent.onnx or model.zip in this folder."""
    force: bool = False
    """Replace the file if it exists."""
    core: str | None = None
    """The agent's core, if it is a class of your own: my_module:MyCore."""
    env: str | None = None
    """The run's environment, if it comes from a module of your own: my_module:MyEnv-v0."""
    verbose: int = 1
    """0: errors only, 1: what was written, 2: tracebacks too."""


def main(argv: list[str]) -> int:
    """Run the command; return the exit code: 1 if the graph does not do what the policy does."""
    config = parse(ExportConfig, argv, PROG)
    path = Path(config.output or OUTPUTS[config.format])
    check_writable(path, "-o")
    if path.exists() and not config.force:
        raise UserError(f"{path} exists already; give another name with -o, or --force to replace it")
    if config.format == "onnx":
        _check_packages()
    agent, trained = _open(config)
    lines = _write_onnx(path, agent, trained) if config.format == "onnx" else _write_zip(path, agent, trained)
    if lines is None:
        return 1
    if config.verbose:
        size = path.stat().st_size / 1000
        what = f"{trained.core} on {trained.env}, {agent.num_timesteps:,} steps; {size:,.0f} kB"
        print("\n".join([f"{path}: {what}", *lines]))
    return 0


def _check_packages() -> None:
    for name in PACKAGES:
        try:
            import_module(name)
        except ImportError as error:
            raise UserError(f"--format onnx needs {name}: pip install 'srwm-rl[export]'") from error


def _open(config: ExportConfig) -> tuple[Agent, TrainConfig]:
    from srwm_rl.storage.model_file import Agent

    if config.core is not None:
        allow_core(config.core, config.core)
    path = Path(config.run)
    if path.is_file() and is_zipfile(path):
        raise UserError(f"{path} is a zip; give a run folder, or a model file from its checkpoints folder")
    agent, trained, _ = open_agent(EvalConfig(run=config.run, env=config.env), "cpu")
    assert isinstance(agent, Agent)  # only a zip holds another
    return agent, trained


def _write_onnx(path: Path, agent: Agent, trained: TrainConfig) -> list[str] | None:
    """Write the graph if it passes its check, else say why not and return None."""
    from srwm_rl.onnx_export import ActingStep, to_onnx
    from srwm_rl.storage.safe_file import write_whole

    step = ActingStep(agent.policy)
    content = to_onnx(step, about(agent, trained, step))
    checked = _check(content, step, agent, trained)
    if isinstance(checked, str):
        warn(f"{path} was not written: {checked}")
        return None
    write_whole(path, content)
    precisions = {cnn.precision for cnn in agent.policy.features_extractor.images.values()}
    return [
        f"  inputs    {', '.join(map(str, step.inputs))}",
        f"  outputs   {', '.join(map(str, step.outputs))}",
        *["  note      the run computes its CNN in bfloat16, the graph in float32"] * ("bfloat16" in precisions),
        f"  checked   {checked.steps} steps of {checked.n_envs} environments with {checked.episode_starts} episode "
        "starts, beside PyTorch",
        f"            largest difference: {_differences(checked)}",
    ]


def _differences(checked: Checked) -> str:
    return ", ".join(f"{name} {value:.1e}" for name, value in checked.differences.items())


def about(agent: Agent, trained: TrainConfig, step: ActingStep) -> dict[str, str]:
    """Return what an ONNX file says of itself, texts by name; structures are JSON."""
    import srwm_rl
    from srwm_rl.envs.make import resolve
    from srwm_rl.storage.space_json import space_to_json

    is_procgen = resolve(trained.env).kind == "procgen"
    policy = agent.policy
    known = {
        "srwm_rl_version": srwm_rl.__version__,
        "core": trained.core,
        "algo": trained.algo,
        "env": trained.env,
        "num_timesteps": str(agent.num_timesteps),
        "observation_keys": json.dumps({port.name: key for port, key in zip(step.inputs, policy.obs_spaces, strict=False)}),
        "observation_space": json.dumps(space_to_json(policy.observation_space)),
        "action_space": json.dumps(space_to_json(policy.action_space)),
    }
    if is_procgen:
        known |= {"mode": trained.mode, "actions": json.dumps(PROCGEN_ACTIONS)}
    return known


def _check(content: bytes, step: ActingStep, agent: Agent, trained: TrainConfig) -> Checked | str:
    """Play with the graph beside PyTorch; a text says why it cannot be kept."""
    import torch

    from srwm_rl.scripts.export.onnx_check import TOLERANCE, check_onnx

    env = _make_env(trained)
    try:
        torch.manual_seed(0)
        checked = check_onnx(content, step, agent.policy, env)
    except Exception as error:  # onnxruntime has its own kinds
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        return f"onnxruntime cannot run it: {type(error).__name__}: {' '.join(str(error).split()):.300}"
    finally:
        env.close()
    if checked.passed:
        return checked
    return f"onnxruntime and PyTorch differ by more than {TOLERANCE:g}: {_differences(checked)}"


def _make_env(trained: TrainConfig) -> VecEnv:
    from srwm_rl.envs.make import make_vec_env, resolve

    games = len(resolve(trained.env).names)
    return make_vec_env(
        trained.env,
        games * -(-CHECK_ENVS // games),
        trained.levels,
        0,
        trained.mode,
        pairs(trained.env_kwargs, "env_kwargs"),
        trained.inputs,
        trained.reward_clip or None,
    )


def _write_zip(path: Path, agent: Agent, trained: TrainConfig) -> list[str]:
    from srwm_rl.scripts.export.sb3_zip import make_zip
    from srwm_rl.storage.safe_file import write_whole

    content, name = make_zip(agent, trained)
    write_whole(path, content)
    return [
        f"  load it   srwm_rl.agents.{name}.load({str(path)!r})",
        "  warning   such a zip runs code when it is loaded: keep it for your own use; a model file or an ONNX file is "
        "safe to share",
    ]
