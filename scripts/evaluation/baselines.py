"""What explains an evaluation away: the best constant action and a task's reference policies on the same levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from gymnasium import spaces

from srwm_rl.agents.evaluation.baselines import ConstantAgent, best_constant_action, constant_actions
from srwm_rl.agents.evaluation.play_levels import Episode, Episodes, Predictor
from srwm_rl.envs.levels import LevelRange
from srwm_rl.envs.make import resolve
from srwm_rl.envs.procgen.games import ACTIONS
from srwm_rl.envs.tasks import TASKS
from srwm_rl.scripts.config.settings import TrainConfig, pairs
from srwm_rl.scripts.evaluation.protocol import BEST_CONSTANT, EvalConfig, Split
from srwm_rl.scripts.evaluation.results import trials_of

N_LEVELS = 100  # training levels that a constant action is chosen on
MAX_ENVS = 64

Play = Callable[[Predictor, Split, EvalConfig, TrainConfig], Episodes]


def play_baselines(
    play: Play, config: EvalConfig, trained: TrainConfig, space: spaces.Space[Any], held_out: Sequence[Split]
) -> list[dict[str, Any]]:
    """Return the best constant action and the task's reference policies, with their episodes by held-out split."""
    return [_best_constant(play, config, trained, space, held_out), *_references(trained, held_out)]


def _best_constant(
    play: Play, config: EvalConfig, trained: TrainConfig, space: spaces.Space[Any], held_out: Sequence[Split]
) -> dict[str, Any]:
    """Choose a constant action for each game on training levels; play it on the held-out ones."""
    tried, levels = constant_actions(space), _levels_to_choose_on(trained, held_out)
    choosing = replace(config, repeats=1, n_envs=min(MAX_ENVS, len(levels)))
    chosen, parts = dict[str, str](), []
    for game in resolve(trained.env).names:
        alone = replace(trained, env=game)

        def play_alone(player: Predictor, some: Sequence[int], alone: TrainConfig = alone) -> Episodes:
            return play(player, Split("choosing a constant action", tuple(some), ""), choosing, alone)

        best = best_constant_action(play_alone, tried.actions, levels)
        chosen[game] = _describe(best.name, game, trained)
        parts.append({split.name: play(ConstantAgent(best.action), split, config, alone) for split in held_out})
    episodes = {split.name: _together([part[split.name] for part in parts]) for split in held_out}
    return {
        "name": BEST_CONSTANT,
        "action": chosen,
        "tried": tried.which,
        "chosen_on": f"{len(levels)} of the training levels {trained.levels}",
        "episodes": episodes,
        **trials_of(episodes),
    }


def _levels_to_choose_on(trained: TrainConfig, held_out: Sequence[Split]) -> list[int]:
    """Return up to `N_LEVELS` training levels, spread evenly, that are not played as held-out ones if possible."""
    spread = LevelRange.parse(trained.levels).spread(N_LEVELS)
    played = set(chain.from_iterable(split.levels for split in held_out))
    return [level for level in spread if level not in played] or spread


def _together(games: Sequence[Episodes]) -> Episodes:
    trials = chain.from_iterable(episodes.trials for episodes in games)
    return Episodes(chain.from_iterable(games), trials).in_order()


def _describe(name: str, game: str, trained: TrainConfig) -> str:
    is_procgen = resolve(game).kind == "procgen" and not trained.shuffle_actions
    return f"{name} ({ACTIONS[int(name)]})" if is_procgen else name


def _references(trained: TrainConfig, held_out: Sequence[Split]) -> list[dict[str, Any]]:
    """Return what the task's reference policies earn; their returns are computed, so that no length is known (0)."""
    spec = resolve(trained.env)
    if spec.kind != "task" or trained.attempts > 1:  # the returns are those of single episodes
        return []
    (task,), settings = spec.names, pairs(trained.env_kwargs, "env_kwargs")
    returns = {split.name: TASKS[task].reference_returns(split.levels, **settings) for split in held_out}
    levels = {split.name: split.levels for split in held_out}
    return [
        {
            "name": name,
            "episodes": {
                split: Episodes(
                    Episode(task, level, float(value), 0, None)
                    for level, value in zip(levels[split], of[name], strict=True)
                )
                for split, of in returns.items()
            },
        }
        for name in next(iter(returns.values()))
    ]
