"""`srwm-rl compare`: two agents on the same held-out levels, level by level."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import allow_core, check_device, check_writable, parse
from srwm_rl.scripts.commands.eval import EvalConfig, choose_splits
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.evaluation.held_out import count, explain
from srwm_rl.scripts.evaluation.load_agent import open_agent

if TYPE_CHECKING:
    from srwm_rl.scripts.evaluation.paired import ComparedRuns

Arg = tyro.conf.arg
PROG = "srwm-rl compare"


@dataclass(frozen=True)
class CompareConfig:
    """Play the same held-out levels with two agents, A and B, and say how much better A is, level by level."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Two run folders or model files: A, then B. RUN/best is the best model of a run, RUN its newest."""
    a: tuple[str, ...] = ()
    """Several runs of A, trained with different seeds."""
    b: tuple[str, ...] = ()
    """Several runs of B."""
    eval_levels: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Held-out levels, start:stop; repeat the option for several ranges. Default: those all runs were started with."""
    repeats: Annotated[int, Arg(aliases=["-k"])] = 1
    """Episodes per level and run."""
    allow_overlap: bool = False
    """Accept held-out levels that a run was trained on; the result is marked invalid."""
    deterministic: bool = False
    """Take the most probable action instead of sampling one."""
    output: Annotated[str | None, Arg(aliases=["-o"])] = None
    """Write an HTML page to this file."""
    json: str | None = None
    """Write everything, returns per level included, to this file."""
    n_envs: int | None = None
    """Environments that step together, as in srwm-rl eval."""
    seed: int = 0
    """Of sampled actions and of the bootstrap."""
    core: str | None = None
    """The agents' core, if it is a class of your own: my_module:MyCore."""
    env: str | None = None
    """The environment, if it is of a module of your own: my_module:MyEnv-v0."""
    device: str = "cpu"
    """auto, cpu, cuda, cuda:1."""
    progress: Annotated[bool, Arg(aliases=["-P"])] = True
    """Show progress bars."""
    verbose: int = 1
    """2: tracebacks on errors."""

    def __post_init__(self) -> None:
        if self.runs and (self.a or self.b):
            raise UserError("name two runs, RUN_A RUN_B, or several a side, --a RUN... --b RUN..., not both")
        if not self.runs and not (self.a and self.b):
            raise UserError("name two runs, RUN_A RUN_B, or several a side, --a RUN... --b RUN...")
        if self.runs and len(self.runs) != 2:
            raise UserError(f"a comparison needs two runs, not {len(self.runs)}; for several a side use --a and --b")
        names = [name for side in self.sides() for name in side]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{name} is given twice; give each run once")
        self.eval_config(names[0])

    def sides(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the runs of A and those of B."""
        return ((self.runs[0],), (self.runs[1],)) if self.runs else (self.a, self.b)

    def eval_config(self, run: str) -> EvalConfig:
        """Return the settings with which a run is evaluated."""
        shared = {each.name for each in fields(self)} & {each.name for each in fields(EvalConfig)} - {"json"}
        return EvalConfig(run=run, train_levels="none", **{name: getattr(self, name) for name in shared})


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(CompareConfig, argv, PROG)
    from srwm_rl.scripts.evaluation.paired import compare
    from srwm_rl.scripts.reports.charts import require_matplotlib

    for option, path in (("-o", config.output), ("--json", config.json)):
        if path is not None:
            check_writable(Path(path), option)
    if config.output is not None:
        require_matplotlib()
    sides = play(config)
    report = compare(sides, config.seed)
    print(render(report))
    if config.json is not None:
        Path(config.json).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    if config.output is not None:
        Path(config.output).write_text(make_page(sides, report, shlex.join([*PROG.split(), *argv])), encoding="utf-8")
    return 0


def play(config: CompareConfig) -> tuple[ComparedRuns, ComparedRuns]:
    """Check that all runs can be compared, then play them.

    Raises:
        UserError: other environments, other held-out levels, or levels that one of them was trained on.
    """
    from srwm_rl.scripts.evaluation.paired import ComparedRuns
    from srwm_rl.scripts.evaluation.runner import evaluate

    device = check_device(config.device)
    if config.core is not None:
        allow_core(config.core, config.core)
    names = [name for side in config.sides() for name in side]
    agents = {name: open_agent(config.eval_config(name), device) for name in names}
    trained = {name: settings for name, (_, settings, _) in agents.items()}
    check_comparable(trained, named_levels=bool(config.eval_levels))
    for name, (agent, settings, _) in agents.items():
        choose_splits(config.eval_config(name), settings, getattr(agent, "levels_played", None))
    first, second = (
        ComparedRuns(
            letter, list(of), [trained[each] for each in of], [evaluate(config.eval_config(each)) for each in of]
        )
        for letter, of in zip("AB", config.sides(), strict=True)
    )
    return first, second


def check_comparable(trained: dict[str, TrainConfig], named_levels: bool) -> None:
    """Refuse runs of different environments or, unless levels are named, different held-out levels.

    Raises:
        UserError: they differ.
    """
    (first, one), *others = trained.items()
    for name, other in others:
        for what, mine, its in (
            ("environment", _environment(one), _environment(other)),
            ("mode", one.mode, other.mode),
            ("settings of the environment", sorted(one.env_kwargs), sorted(other.env_kwargs)),
        ):
            if mine != its:
                raise UserError(
                    f"only agents of one environment can be compared, but {first} and {name} differ in {what}: "
                    f"{mine or 'none'} and {its or 'none'}"
                )
        if not named_levels and one.eval_levels != other.eval_levels:
            raise UserError(
                f"{first} holds out levels {one.eval_levels}, {name} {other.eval_levels}; "
                "name levels that neither was trained on with --eval-levels"
            )


def _environment(trained: TrainConfig) -> str:
    from srwm_rl.envs.make import resolve

    return ",".join(sorted(resolve(trained.env).names))


def render(report: dict[str, Any]) -> str:
    """Return the comparison as text."""
    env = report["env"] + (f" ({report['mode']})" if report["mode"] else "")
    title = (
        f"{env}, held-out levels {', '.join(report['levels'])}, {report['actions']} actions, "
        f"{report['repeats']} episode(s) per level and run"
    )
    sides = [f"{letter}: {report[letter]['label']}" for letter in "AB"]
    head = ("game", "levels", "A", "B", "A - B [95% interval]", "A better, ties half", "won / tied / lost")
    rows: list[tuple[str, ...]] = [head]
    for row in report["rows"]:
        counts = " / ".join(str(row[each]) for each in ("wins", "ties", "losses"))
        means = ["-" if row[letter] is None else f"{row[letter]:.2f}" for letter in "AB"]
        difference = "-" if row["difference"] is None else _text(row["difference"])
        game = f"{row['game']} (normalised)" if row["normalized"] else row["game"]
        rows.append((game, str(row["levels"]), *means, difference, _text(row["improvement"]), counts))
    lines = [title, *sides, "", *_aligned(rows), "", *_seed_lines(report["seeds"])]
    return "\n".join([*lines, *(line for each in warnings_of(report) for line in each)]).rstrip()


def warnings_of(report: dict[str, Any]) -> list[list[str]]:
    """Return, for each side whose held-out score is none, a line that says so and lines that say why."""
    return [
        [f"INVALID as a held-out score of {letter}: {count(found)} of the levels were trained on", *explain(found)]
        for letter in "AB"
        if (found := report[letter]["trained_on"])
    ]


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _seed_lines(seeds: dict[str, Any] | None) -> list[str]:
    if seeds is None:
        return ["The intervals are over levels, for these very agents: of other training seeds they say nothing."]
    means = ", ".join(f"{letter} {_text(seeds[letter]['interquartile_mean'])}" for letter in "AB")
    return [
        f"over training seeds ({seeds['unit']}, computed by {seeds['computed_by']}):",
        f"  interquartile mean: {means}",
        f"  P(a run of A > a run of B): {_text(seeds['improvement'])}",
    ]


def _text(interval: dict[str, float | None]) -> str:
    low, high = ("?" if each is None else f"{each:.2f}" for each in (interval["low"], interval["high"]))
    return f"{interval['mean']:.2f} [{low}, {high}]"


def make_page(sides: tuple[ComparedRuns, ComparedRuns], report: dict[str, Any], command: str) -> str:
    """Return the comparison as a page."""
    from srwm_rl.scripts.reports.comparison import pictures, setting_differences
    from srwm_rl.scripts.reports.render import render_page

    first, second = sides
    return render_page(
        "compare.html",
        title=f"{first.title} against {second.title}",
        subtitle=f"on {report['env']}",
        written=time.strftime("%Y-%m-%d", time.gmtime()),
        report=report,
        command=command,
        pictures=pictures(report),
        differences=setting_differences(first, second),
        warnings=warnings_of(report),
    )
