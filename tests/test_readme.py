"""The README's code and commands work."""

import re
from pathlib import Path
from typing import Any

import pytest
from stable_baselines3.common.env_util import make_vec_env

from srwm_rl.nn.cores import _CORES
from srwm_rl.scripts.cli import parse
from srwm_rl.scripts.commands.eval import read
from srwm_rl.scripts.config.settings import TrainConfig

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_custom_core_trains() -> None:
    from srwm_rl.agents import PPO

    (code,) = (block for block in blocks("python") if "register_core" in block)
    names: dict[str, Any] = {"env": make_vec_env("CartPole-v1", 2), "PPO": PPO}
    try:
        exec(code, names)
        model = names["model"]
        model.learn(model.n_steps * 2)
        assert type(model.policy.core).__name__ == "Mean"
    finally:
        _CORES.pop("mean", None)


def test_the_environment_and_model_are_built() -> None:
    code = next(block for block in blocks("python") if "ProcgenVecEnv(" in block)
    names: dict[str, Any] = {}
    exec(code[: code.index("model.learn")], names)
    names["env"].close()
    assert names["model"].n_envs == 64


COMMANDS = [line.split("#")[0].split() for block in blocks("sh") for line in block.splitlines() if "srwm-rl " in line]


@pytest.mark.parametrize("argv", [argv for argv in COMMANDS if argv[1] in ("train", "eval")], ids=" ".join)
def test_the_commands_can_be_read(argv: list[str]) -> None:
    if argv[1] == "eval":
        read(argv[2:])
    else:
        parse(TrainConfig, argv[2:], "srwm-rl")
