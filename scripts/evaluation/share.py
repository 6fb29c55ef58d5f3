"""Write an agent as one file with its card, and read it back."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path

from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import check_device
from srwm_rl.scripts.evaluation.card import make_card, shareable
from srwm_rl.scripts.evaluation.load_agent import open_agent
from srwm_rl.scripts.evaluation.protocol import EvalConfig, PlayOptions
from srwm_rl.scripts.evaluation.runner import evaluate
from srwm_rl.storage.model_file import Agent, load, save_model

MACHINE = ("device", "progress", "verbose", "n_envs")  # options of an evaluation that decide no score


def share(config: EvalConfig, freeze: bool, path: Path, note: str = "") -> Agent:
    """Evaluate an agent, write it to `path` with its card, and return it as loaded from there.

    Args:
        config: which agent, and how its scores are measured.
        freeze: play with frozen edits too, if the core makes any.
        path: the file to write.
        note: a line for the card.

    Raises:
        UserError: as `evaluate`; the agent is a zip; a note that is no line of ASCII text.
    """
    agent, trained = open_agent(config, check_device(config.device))
    if not isinstance(agent, Agent):
        raise UserError(f"{config.run} is a zip; give a run folder, or a model file from its checkpoints folder")
    if not (note.isascii() and (note.isprintable() or not note)):
        raise UserError("--note takes one line of ASCII text")
    report = evaluate(config, freeze)
    if not report["valid"]:
        raise UserError("levels that the agent was trained on say nothing about it; leave out --allow-overlap")
    trained = shareable(trained)
    card = make_card(report, agent, trained, _command(config, "interventions" in report), note)
    levels = None if agent.levels_played is None else agent.levels_played.to_tree()
    save_model(path, agent.policy, trained.to_json(), agent.num_timesteps, None, levels, agent.chosen, card)
    return load(path)


def _command(config: EvalConfig, frozen: bool) -> str:
    """Return the evaluation that a card's scores are of."""
    words = ["srwm-rl", "eval", "FILE", "--train-levels", "none"]
    for field in fields(PlayOptions):
        value = getattr(config, field.name)
        if field.name in MACHINE or value == field.default:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        values = value if isinstance(value, tuple) else (value,)
        for one in values:
            words += [flag] if one is True else [flag, *(one if isinstance(one, tuple) else (str(one),))]
    return shlex.join([*words, *["--freeze-edits"] * frozen])
