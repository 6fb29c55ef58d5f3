"""Run an evaluation: load the agent, play the levels, summarise."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from srwm_rl.agents.evaluation.interventions import (
    FrozenStateAgent,
    head_part,
    memory_part,
    parse_groups,
    undo_edits,
)
from srwm_rl.agents.evaluation.play_levels import Episodes, Predictor, RandomAgent, play_levels
from srwm_rl.envs.levels import LevelRange
from srwm_rl.envs.make import make_levels_env, resolve
from srwm_rl.envs.procgen.games import OPTIONS
from srwm_rl.envs.procgen.leakage import same_first_frame
from srwm_rl.errors import UserError, named
from srwm_rl.nn.diagnostics import count_heads, has_fast_weights
from srwm_rl.scripts.cli import check_device
from srwm_rl.scripts.config.settings import TrainConfig, pairs
from srwm_rl.scripts.evaluation.baselines import MAX_ENVS, play_baselines
from srwm_rl.scripts.evaluation.comparable import check_comparable
from srwm_rl.scripts.evaluation.few_shot import few_shot_rows, grid, is_few_shot, with_outputs
from srwm_rl.scripts.evaluation.load_agent import OF_ZIPS, is_zip, open_agent
from srwm_rl.scripts.evaluation.protocol import (
    EvalConfig,
    Split,
    TrainedOn,
    choose_splits,
    count,
    levels_trained_on,
    play_options,
)
from srwm_rl.scripts.evaluation.results import Evaluation, Splits, summarise, trials_of

MAX_COMPARED = 2_000  # training levels of which the first frames are compared


def evaluate(config: EvalConfig, freeze: bool = False) -> Evaluation:
    """Play what `srwm-rl eval` would and return what it would write.

    `freeze`: play with frozen edits too, if the agent's core carries anything from step to step.
    """
    agent, trained = open_agent(config, check_device(config.device))
    config, trained = play_options(config, trained), _with_env_kwargs(trained, config)
    few_shot = _few_shot_settings(config, trained)
    if config.attempts is not None:
        trained = _with_attempts(trained, config.attempts)
    if freeze and _has_state(agent.policy.core):
        config = replace(config, freeze_edits=config.freeze_edits or 0)
    seen = getattr(agent, "levels_played", None)  # an SB3 model has none
    splits = choose_splits(config, trained, seen)
    held_out = [split for split in splits if split.name != "train"]

    def play(player: Predictor, chosen: list[Split] = splits) -> Splits:
        return {split.name: _play(player, split, config, trained) for split in chosen}

    interventions, others = choose_interventions(config, agent), _open_others(config, trained, held_out)
    episodes = play(agent)
    if config.random or config.baselines:
        by_chance = play(RandomAgent(agent.policy.action_space, config.seed), held_out)
        episodes |= {f"random, {name}": of for name, of in by_chance.items()}
    evaluation = {
        "run": config.run,
        "env": trained.env,
        "mode": trained.mode if resolve(trained.env).kind == "procgen" else None,
        "core": trained.core,
        "num_timesteps": agent.num_timesteps,
        "actions": "deterministic" if config.deterministic else "stochastic",
        "repeats": config.repeats,
        "levels": {split.name: split.label for split in splits},
        "trained_on": levels_trained_on(trained, seen, {split.name: split.levels for split in held_out}),
        "same_first_frame": _same_first_frames(trained, held_out),
        "episode_fields": ["game", "level", "return", "length", "solved"],
        "episodes": episodes,
        **trials_of(episodes),
    }
    played = {name: play(player) for name, player in interventions.items()}
    if played:
        evaluation["interventions"] = [{"name": name, "episodes": of, **trials_of(of)} for name, of in played.items()]
    if config.baselines:
        space = agent.policy.action_space
        evaluation["baselines"] = play_baselines(_play, config, trained, space, held_out)
    by_others = {
        name: {split.name: _play(other, split, config, settings) for split in held_out}
        for name, (other, settings) in others.items()
    }
    for name, of_other in by_others.items():
        evaluation.setdefault("baselines", []).append(
            {"name": name, "agent": name, "episodes": of_other, **trials_of(of_other)}
        )
    if is_few_shot(trained):
        names = _short_names(trained, others)
        of_agents = {trained.core: {split.name: episodes[split.name] for split in splits}, **played}
        rows = few_shot_rows(trained, of_agents | {names[name]: of for name, of in by_others.items()})
        sides = {name: (player, trained) for name, player in {trained.core: agent, **interventions}.items()}
        sides |= {names[name]: side for name, side in others.items()}
        for changed in few_shot:
            rows += few_shot_rows(changed, _play_as(changed, sides, held_out, config))
        evaluation["few_shot"] = rows
    if (chosen := getattr(agent, "chosen", None)) is not None:
        evaluation["chosen"] = chosen
    return summarise(evaluation, trained, config.seed)


def _with_env_kwargs(trained: TrainConfig, config: EvalConfig) -> TrainConfig:
    """Return the settings of a run with those of the environment that the options change."""
    if is_few_shot(trained) and config.env_kwargs:
        return with_outputs(trained, config.env_kwargs)
    return replace(trained, env_kwargs=(*trained.env_kwargs, *config.env_kwargs))  # of two, the later one counts


def _few_shot_settings(config: EvalConfig, trained: TrainConfig) -> list[TrainConfig]:
    """Return the settings for each of --ways and --shots."""
    if is_few_shot(trained):
        return grid(trained, config.ways, config.shots)
    for name in ("ways", "shots", "chart"):
        if getattr(config, name):
            raise UserError(f"--{name} is for few-shot runs, and {config.run} is one of {trained.env}; leave it out")
    return []


def _short_names(trained: TrainConfig, others: dict[str, tuple[Predictor, TrainConfig]]) -> dict[str, str]:
    """Return for each agent of --beside the name of its core, or where two have the same its own name."""
    cores = [trained.core, *(settings.core for _, settings in others.values())]
    return {name: settings.core if cores.count(settings.core) == 1 else name for name, (_, settings) in others.items()}


def _play_as(
    changed: TrainConfig, sides: dict[str, tuple[Predictor, TrainConfig]], held_out: list[Split], config: EvalConfig
) -> dict[str, Splits]:
    """Play the held-out levels with every agent in an environment with changed settings."""
    return {
        name: {
            split.name: _play(player, split, config, replace(settings, env_kwargs=changed.env_kwargs))
            for split in held_out
        }
        for name, (player, settings) in sides.items()
    }


def _open_others(
    config: EvalConfig, trained: TrainConfig, held_out: list[Split]
) -> dict[str, tuple[Predictor, TrainConfig]]:
    """Return the agents of --beside by name, each with its settings in the environment that is played.

    Raises:
        UserError: an agent of another environment, or that was trained on levels to be played.
    """
    others: dict[str, tuple[Predictor, TrainConfig]] = {}
    for name in config.beside:
        own = replace(config, run=name)
        if not is_zip(Path(name)):  # whose options these are
            own = replace(own, trust=False, **{option: getattr(EvalConfig, option) for option in OF_ZIPS})
        elif not is_zip(Path(config.run)):
            of_run = {option: getattr(trained, option) for option in ("env", "wrapper", *OF_ZIPS)}
            own = replace(own, **of_run)
        agent, settings = open_agent(own, check_device(config.device))
        settings = _with_env_kwargs(settings, config)
        settings = replace(settings, attempts=config.attempts or settings.attempts)
        check_comparable({config.run: trained, name: settings}, named_levels=True)
        levels = {split.name: split.levels for split in held_out}
        trained_on = levels_trained_on(settings, getattr(agent, "levels_played", None), levels)
        if trained_on and not config.allow_overlap:
            raise UserError(
                f"--beside {name} was trained on {count(trained_on)} of the held-out levels; choose others with "
                "--eval-levels"
            )
        others[name] = agent, settings
    return others


def _with_attempts(trained: TrainConfig, attempts: int) -> TrainConfig:
    if trained.attempts == 1:
        raise UserError(
            "--attempts changes the attempts per trial of a run that was trained with several, and this one was not: "
            "leave it out, or train with --attempts"
        )
    return replace(trained, attempts=attempts)


def _has_state(core: Any) -> bool:
    return bool(core.carries_over and count_heads(core))


def _play(player: Predictor, split: Split, config: EvalConfig, trained: TrainConfig) -> Episodes:
    torch.manual_seed(config.seed)  # the same random numbers for the sampled actions of every player
    n_games = len(resolve(trained.env).names)
    n_envs = config.n_envs or MAX_ENVS // n_games * n_games
    env = make_levels_env(trained.env, n_envs, split.levels, config.repeats, config.seed, **trained.env_settings())
    with closing(env):
        total = env.remaining  # type: ignore[attr-defined]
        disable = None if config.progress else True  # None: where stderr is no terminal
        with tqdm(total=total, desc=split.name, unit="episode", disable=disable, leave=False) as bar:
            return play_levels(player, env, config.deterministic, bar.update).in_order()


def choose_interventions(config: EvalConfig, agent: Any) -> dict[str, Predictor]:
    """Return, by a name for the table, the `Agent` or SB3 model with each intervention that the options ask for.

    Raises:
        UserError: the agent carries nothing from step to step, or has no such head or columns.
    """
    policy, interventions = agent.policy, dict[str, Predictor]()
    what = "edits" if has_fast_weights(policy.core) else "memory"
    if config.freeze_edits is not None:
        if not _has_state(policy.core):
            raise UserError(
                f"--freeze-edits: core {policy.core_name!r} carries nothing from step to step, so there is nothing to "
                "freeze"
            )
        name = f"{what} frozen from step {config.freeze_edits} on" if config.freeze_edits else f"{what} frozen"
        interventions[name] = FrozenStateAgent(agent, config.freeze_edits, memory_part(policy))
    for lesion in config.lesion:
        layer, head = map(int, lesion.split("."))
        part = head_part(policy, layer, head)
        interventions[f"no {what} in head {layer}.{head}"] = FrozenStateAgent(agent, part=part)
    for groups in config.undo:
        with named("--undo"):
            name = f"edits of {', '.join(parse_groups(groups))} undone"
            interventions[name] = undo_edits(agent, policy, groups)
    return interventions


def _same_first_frames(trained: TrainConfig, held_out: list[Split]) -> TrainedOn:
    """Return the held-out levels whose first frame is also a training level's (in easy mode 10 of 200 mazes).

    ProcGen only; nothing is returned for a run with more training levels than can be compared in reasonable time.
    """
    spec, training = resolve(trained.env), LevelRange.parse(trained.levels)
    if spec.kind != "procgen" or len(training) > MAX_COMPARED:
        return {}
    env_kwargs = pairs(trained.env_kwargs, "env_kwargs")
    options = {name: value for name, value in env_kwargs.items() if name in OPTIONS}
    same: TrainedOn = {}
    for split in held_out:
        games = {
            game: same_first_frame(game, trained.mode, list(training), split.levels, **options) for game in spec.names
        }
        same[split.name] = {game: levels for game, levels in games.items() if levels}
    return same
