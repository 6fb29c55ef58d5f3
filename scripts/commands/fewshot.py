"""`srwm-rl fewshot`: `train` with few-shot episodes and right answers."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import tyro

from srwm_rl.scripts.cli import peek
from srwm_rl.scripts.commands import train

# The published setting for Omniglot: IDSIA/modern-srwm, supervised_learning/README.md. Batch normalisation, pooling and
# the output layer are the encoder's and the policy's; the label beside a query is the dummy label 0 of "sync".
PAPER = {
    "--n-envs": ("128",),
    "--learning-rate": ("1e-3",),
    "--lr-decay": ("none",),
    "--aux-coef": ("0",),
    "--beta2": ("0.995",),
    "--adam-eps": ("1e-9",),
    "--core-kwargs": ("hidden_size:256", "n_layers:2", "n_heads:16", "ff_size:1024"),
    "--encoder-kwargs": ("mlp:[]", "vector_scale:1", 'cnn:{"kind":"conv4","channels":[64,64,64,64]}'),
}
PAPER_UPDATES = 300_000
QUICK_UPDATES = 1_200


@dataclass(frozen=True)
class FewShotConfig:
    """Train an agent on few-shot episodes; all options of srwm-rl train are understood, too."""

    data: str = "glyphs"
    """glyphs, digits, a folder of images, or two of these with a comma, one after the other in every episode."""
    ways: str = "5"
    """Classes per episode, or a range, 5:20."""
    shots: str = "1:5"
    """Examples per class, or a range that each episode draws from."""
    queries: int = 1
    """Images asked for after the examples."""
    labels: Literal["ask", "sync", "delayed"] = "ask"
    """ask: each example is asked for, then told; sync: told, queries asked for; delayed: told a step later."""
    preset: Literal["quick", "paper"] = "quick"
    """quick: minutes on two cores. paper: the published setting for Omniglot, one query, no auxiliary loss."""


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    if peek(argv, "--resume") is not None:
        return train.main(argv)
    if {"-h", "--help"} & set(argv):
        tyro.cli(FewShotConfig, prog="srwm-rl fewshot", args=["--help"])
    config, others = tyro.cli(FewShotConfig, prog="srwm-rl fewshot", args=argv, return_unknown_args=True)
    return train.main([*options(config, others), *others])


def options(config: FewShotConfig, others: list[str]) -> list[str]:
    """Return the options of `srwm-rl train` that a command stands for, without those in `others`."""
    settings = [f"{field.name}:{getattr(config, field.name)}" for field in fields(config) if field.name != "preset"]
    chosen: dict[str, tuple[str, ...]] = dict(PAPER) if config.preset == "paper" else {}
    n_steps = longest_episode(config)
    n_envs = int(peek(others, "--n-envs") or (128 if config.preset == "paper" else 16))
    updates = PAPER_UPDATES if config.preset == "paper" else QUICK_UPDATES * 52 // n_steps
    chosen |= {"--n-steps": (str(n_steps),), "--n-timesteps": (str(updates * n_steps * n_envs),)}
    given = {word.partition("=")[0].replace("_", "-") for word in others}
    if "-n" in given:
        given.add("--n-timesteps")
    result = ["--algo", "supervised", "--env", "fewshot", "--env-kwargs", *settings]
    for name, values in chosen.items():
        if name not in given:
            result += [name, *values]
    return result


def longest_episode(config: FewShotConfig) -> int:
    """Return the steps of the longest episode, which a rollout holds as a whole."""
    ways, shots = (int(text.rpartition(":")[2]) for text in (config.ways, config.shots))
    examples = ways * shots * (2 if config.labels == "ask" else 1)
    return (examples + config.queries) * len(config.data.split(","))
