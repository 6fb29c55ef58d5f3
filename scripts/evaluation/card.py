"""Cards of shared agents: made from an evaluation, printed as text, and the command that trained an agent."""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import srwm_rl
from srwm_rl.errors import UserError
from srwm_rl.regular_file import read_small
from srwm_rl.scripts.config.defaults import default_algo, defaults
from srwm_rl.scripts.config.foreign_settings import read_settings
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.config.tuned import NONE, OF_ENVIRONMENT, default_preset
from srwm_rl.scripts.evaluation.protocol import BEST_CONSTANT
from srwm_rl.scripts.evaluation.results import Evaluation, held_out_splits
from srwm_rl.scripts.evaluation.table import aligned, text
from srwm_rl.scripts.training.resume import FREE, changes_of
from srwm_rl.storage.card import Card, Interval, Score
from srwm_rl.storage.model_file import Agent
from srwm_rl.storage.run_folder import CHECKPOINTS, CONFIG, Run
from srwm_rl.storage.safe_file import MAX_BYTES

# Settings of the machine, of one's folders and of how a run was watched: they do not change what is learned.
NOT_SHARED = (
    *("resume", "override", "verify", "supervise", "hang_seconds", "dry_run", "env_list", "profile", "progress"),
    *("verbose", "log_folder", "device", "n_threads", "n_groups", "video_freq", "track", "cnn_kernels"),
)
MAX_ATTEMPTS = 6
MAX_CHANGES = 2_000  # characters in a card


def shareable(trained: TrainConfig) -> TrainConfig:
    """Return a run's settings without those of its machine."""
    return replace(trained, **{name: getattr(TrainConfig, name) for name in NOT_SHARED})


def training_command(trained: TrainConfig) -> str:
    """Return the shortest command that trains with these settings; the precision is that of the machine."""
    default = defaults(trained.env, trained.preset, trained.core, trained.algo, trained.atari)
    others = [name for name in OF_ENVIRONMENT if getattr(trained, name) != getattr(TrainConfig, name)]
    if trained.preset is None and default_preset(trained.env, trained.core, trained.algo, others):
        trained = replace(trained, preset=NONE)
    words = ["srwm-rl", "train"]
    for field in fields(TrainConfig):
        value, always = getattr(trained, field.name), field.name in ("env", "n_timesteps", "seed")
        of = TrainConfig if field.name in ("core", "preset") else default
        same = value == (default_algo(trained.env) if field.name == "algo" else getattr(of, field.name))
        if field.name not in (*NOT_SHARED, "precision") and (always or not same):
            words += _option(field.name.replace("_", "-"), value)
    return shlex.join(words)


def training_commands(trained: TrainConfig, path: Path, steps: int) -> str:
    """Return the command that began the run of a model file, and those that changed its settings before `steps`.

    A file that is in no run's folder has none of the latter: it does not say what was changed.

    Raises:
        UserError: the run's config.json is damaged.
    """
    folder = path.parent.parent
    is_run = path.parent.name == CHECKPOINTS and (folder / CONFIG).exists()
    changes = changes_of(Run.open(folder)) if is_run else []
    commands: list[str] = []
    for change in reversed([change for change in changes if change.at < steps]):
        changed = {name: of for name, of in change.changed.items() if name not in NOT_SHARED}
        if not changed:
            continue
        options = [word for name, (_, now) in changed.items() for word in _option(name.replace("_", "-"), now)]
        override = ["--override"] * bool(changed.keys() - FREE)
        resumed = shlex.join(["srwm-rl", "train", "--resume", "RUN", *options, *override])
        commands.insert(0, f"at {change.at:,} steps {resumed}")
        before = {name: before for name, (before, _) in changed.items()}
        trained = read_settings(trained.to_json() | before, str(folder / CONFIG))
    more = len("; ".join(commands)) > MAX_CHANGES
    return "; ".join([training_command(trained), *([f"changed {len(commands)} times since"] if more else commands)])


def _option(name: str, value: Any) -> list[str]:
    if name == "wrapper":
        return [word for words in value for word in ("--wrapper", *words)]
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]


def make_card(report: Evaluation, agent: Agent, trained: TrainConfig, command: str, note: str = "") -> Card:
    """Return the card of an agent with the scores of its evaluation `report`; `command` is that of the evaluation."""
    parts = [("agent", report, "{split}"), ("random play", report, "random, {split}")]
    compared = [*report.get("baselines", ()), *report.get("interventions", ())]
    parts += [(part["name"], part, f"{part['name']}, {{split}}") for part in compared]
    scores = [
        _score(player, part, row, report["levels"][split])
        for player, part, name in parts
        for split in held_out_splits(report)
        for row in part["rows"]
        if row["split"] == name.format(split=split)
    ]
    return Card(
        task=trained.env,
        command=training_commands(trained, agent.path, agent.num_timesteps),
        evaluation=command,
        actions=report["actions"],
        seed=trained.seed,
        srwm_rl=srwm_rl.__version__,
        scores=scores,
        note=note,
    )


def _score(player: str, part: dict[str, Any], row: dict[str, Any], levels: str) -> Score:
    attempts = [
        of["return"]
        for of in part.get("return_by_attempt", ())
        if (of["split"], of["game"]) == (row["split"], row["game"])
    ]
    action = part["action"].get(row["game"], "") if player == BEST_CONSTANT else ""
    return Score(
        player,
        row["game"],
        levels,
        row["levels"],
        Interval(**row["return"]),
        None if row["solved"] is None else Interval(**row["solved"]),
        [Interval(**interval) for interval in (attempts[0] if attempts else ())],
        f"action {action}" if action else "",
    )


def render_card(name: str, agent: Agent) -> str:
    """Return the card of a shared agent as text.

    Raises:
        UserError: the file has no card.
    """
    card = card_of(agent)
    head = ["player", "game", "levels", "return [95% interval]", "solved", "return by attempt", "note"]
    rows = [head, *map(_cells, card.scores)]
    columns = [column for column in zip(*rows, strict=True) if any(column[1:]) and not _is_constant(column)]
    first = card.headline()
    return "\n".join(
        [
            _title(name, agent, card),
            *([card.note] if card.note else []),
            "",
            f"on {first.n_levels:,} held-out levels {first.levels}, {card.actions} actions:",
            "",
            *aligned([[*row] for row in zip(*columns, strict=True)]),
            "",
            f"trained by    {card.command}",
            f"evaluated by  {card.evaluation.replace(' FILE', f' {shlex.quote(name)}', 1)}",
            f"both of       srwm-rl {card.srwm_rl}; {_sha256(agent)}",
        ]
    )


def card_of(agent: Agent) -> Card:
    """Return an agent's card.

    Raises:
        UserError: its file has none.
    """
    if agent.card is None:
        raise UserError(f"{agent.path} has no card; srwm-rl share RUN -o FILE writes a file with one")
    return agent.card


def render_list(agents: dict[str, Agent]) -> str:
    """Return a table of shared agents by name."""
    rows = [["name", "task", "core", "return on held-out levels", "random play", "kB"]]
    for name, agent in agents.items():
        card = card_of(agent)
        chance = next((text(score.returns.mean) for score in card.scores if score.player == "random play"), "-")
        size = f"{agent.path.stat().st_size / 1000:,.0f}"
        core = agent.policy.core_name
        rows.append([name, card.task, core, _interval(card.headline().returns), chance, size])
    return "\n".join(aligned(rows))


def _title(name: str, agent: Agent, card: Card) -> str:
    size = f"{agent.path.stat().st_size / 1000:,.0f} kB"
    return (
        f"{name}: {card.task}, core {agent.policy.core_name}, {agent.num_timesteps:,} steps, seed {card.seed}, {size}"
    )


def _sha256(agent: Agent) -> str:
    return f"sha256={hashlib.sha256(read_small(agent.path, MAX_BYTES)).hexdigest()}"


def _cells(score: Score) -> list[str]:
    solved = "" if score.solved is None else _interval(score.solved, ".1%")
    attempts = " ".join(f"{interval.mean:.2f}" for interval in score.by_attempt[:MAX_ATTEMPTS])
    more = " ..." if len(score.by_attempt) > MAX_ATTEMPTS else ""
    return [score.player, score.game, score.levels, _interval(score.returns), solved, attempts + more, score.note]


def _is_constant(column: tuple[str, ...]) -> bool:
    """Whether a column of names is the same in every row, and says nothing."""
    return column[0] in ("game", "levels") and len(set(column[1:])) == 1


def _interval(interval: Interval, form: str = ".2f") -> str:
    return text({"mean": interval.mean, "low": interval.low, "high": interval.high}, form)
