"""`srwm-rl export`: an agent for other programs, as an ONNX graph or as a zip of Stable-Baselines3."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import check_writable, parse, warn
from srwm_rl.scripts.config.settings import Wrappers, check_wrappers


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained agent for other programs: as an ONNX graph, or as a zip that Stable-Baselines3 loads.

    onnx: one acting step, for any number of environments at once. Inputs: the observation's parts by name (frames as
    uint8), state [L, B, S] (zeros at first, then the last step's new_state) and episode_start [B], true at the first
    step of an episode. Outputs: action_probabilities [B, n] (MultiDiscrete: those of each choice, one after the other;
    MultiBinary: P(bit = 1)), or for continuous actions action_mean and action_std (clip samples to the action space's
    bounds); value [B] and new_state. Its metadata describes the run and its actions. The graph is compared with PyTorch
    in the run's environment, and written only if both agree within 1e-4.

    sb3: the run's trainer, as its save() writes it; load of srwm_rl.agents.PPO, IMPALA or Supervised reads it. It holds
    weights and settings, not the optimizer's state: to continue training use srwm-rl train --resume.
    """

    run: tyro.conf.Positional[str]
    """A run folder, or a model file; RUN/best is the best model of a run, RUN its newest; zoo:NAME one that comes with
    the package."""
    format: Literal["onnx", "sb3"] = "onnx"
    """What to write."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """The file. Default: agent.onnx or model.zip in this folder."""
    force: bool = False
    """Replace the file if it exists."""
    core: str | None = None
    """The agent's core, if it is a class of your own: my_module:MyCore."""
    env: str | None = None
    """The run's environment, if it comes from a module of your own: my_module:MyEnv-v0."""
    wrapper: tyro.conf.UseAppendAction[Wrappers] = ()
    """The wrappers that the run was trained with, as in srwm-rl train."""
    verbose: int = 1
    """0: errors only, 1: what was written, 2: tracebacks too."""

    def __post_init__(self) -> None:
        check_wrappers(self.wrapper)


def main(argv: list[str]) -> int:
    """Run the command; return the exit code: 1 if the graph differs from the policy."""
    config = parse(ExportConfig, argv, "srwm-rl export")
    path = Path(config.output or {"onnx": "agent.onnx", "sb3": "model.zip"}[config.format])
    check_writable(path, "-o")
    if path.exists() and not config.force:
        raise UserError(f"{path} exists already; give another name with -o, or --force to replace it")
    from srwm_rl.scripts.evaluation.load_agent import open_model
    from srwm_rl.scripts.export import onnx_file, sb3_zip

    if config.format == "onnx":
        onnx_file.check_packages()
    agent, trained = open_model(config.run, config.core, config.env, "cpu", config.wrapper)
    write = onnx_file.write_onnx if config.format == "onnx" else sb3_zip.write_zip
    try:
        lines = write(path, agent, trained)
    except onnx_file.DifferenceError as error:
        warn(f"{path} was not written: {error}")
        return 1
    if config.verbose:
        summary = (
            f"{trained.core} on {trained.env}, {agent.num_timesteps:,} steps; {path.stat().st_size / 1000:,.0f} kB"
        )
        print("\n".join([f"{path}: {summary}", *lines]))
    return 0
