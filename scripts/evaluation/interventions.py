"""`srwm-rl eval --freeze-edits` and `--lesion`: what an agent's edits of itself are worth, level by level."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from srwm_rl.errors import UserError
from srwm_rl.scripts.commands.eval import EvalConfig, by_game, episodes_json, interval_json, split_rows
from srwm_rl.scripts.config.settings import TrainConfig

if TYPE_CHECKING:
    from srwm_rl.agents.evaluation.play_levels import Episode, Episodes, Predictor


def choose_interventions(config: EvalConfig, agent: Any) -> dict[str, Predictor]:
    """Return, by a name for the table, the agent with each intervention that the options ask for.

    Args:
        config: the options.
        agent: an `Agent`, or an SB3 model, whose policy is an `SRWMPolicy`.

    Raises:
        UserError: the agent carries nothing from step to step, or has no such head.
    """
    from srwm_rl.agents.evaluation.interventions import FrozenStateAgent, head_part

    policy, chosen = agent.policy, dict[str, Any]()
    if config.freeze_edits is not None:
        if not (policy.core.state_layers * policy.core.state_size and policy.core.carries_over):
            raise UserError(
                f"--freeze-edits: core {policy.core_name!r} carries nothing from step to step, so there is nothing to "
                "freeze"
            )
        name = f"edits frozen from step {config.freeze_edits} on" if config.freeze_edits else "edits frozen"
        chosen[name] = FrozenStateAgent(agent, config.freeze_edits)
    for lesion in config.lesion:
        layer, head = map(int, lesion.split("."))
        chosen[f"no edits in head {layer}.{head}"] = FrozenStateAgent(agent, part=head_part(policy, layer, head))
    return chosen


def compare(
    name: str, config: EvalConfig, trained: TrainConfig, live: dict[str, Episodes], held: dict[str, Episodes]
) -> dict[str, Any]:
    """Return what the table and the JSON file say of one intervention.

    Args:
        name: of the intervention.
        config: of the evaluation.
        trained: the run's settings.
        live: split -> episodes of the agent as it is; others than those of `held` are left alone.
        held: split -> episodes with the intervention, on the same levels.
    """
    rows = [row for split, each in held.items() for row in split_rows(f"{name}, {split}", each, config, trained)]
    differences = [row for split, each in held.items() for row in _differences(split, live[split], each, config.seed)]
    return {
        "name": name,
        "rows": rows,
        "differences": differences,
        "episodes": {split: episodes_json(each) for split, each in held.items()},
    }


def _differences(split: str, live: Episodes, held: Episodes, seed: int) -> list[dict[str, Any]]:
    """Return, for all games and for each, how much more the agent as it is gets on the same levels."""
    games = by_game(live)
    return [
        {
            "split": split,
            "game": game,
            "several": len(games) > 1,
            "levels": len(before.level_means()),
            "return": _difference(before, held, lambda each: each.episode_return, seed),
            "solved": None
            if before.solved() is None
            else _difference(before, held, lambda each: float(bool(each.solved)), seed),
        }
        for game, before in games.items()
    ]


def _difference(
    live: Episodes, held: Episodes, value: Callable[[Episode], float], seed: int
) -> dict[str, float | None]:
    from srwm_rl.agents.evaluation.comparison import paired_difference

    games = live.games()
    first, second = ([episodes.of(game).level_means(value) for game in games] for episodes in (live, held))
    return interval_json(paired_difference(first, second, seed))
