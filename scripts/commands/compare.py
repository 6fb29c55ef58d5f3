"""`srwm-rl compare`: two agents on the same held-out levels, level by level."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Annotated

import tyro

from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import check_writable, parse, write_json, write_output
from srwm_rl.scripts.evaluation.protocol import PlayOptions
from srwm_rl.scripts.evaluation.table import render_comparison
from srwm_rl.storage.run_group import expand_groups


@dataclass(frozen=True, kw_only=True)
class CompareConfig(PlayOptions):
    """Play the same held-out levels with two agents, A and B, and report how much better A is, level by level."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Two run folders, groups of runs or model files: A, then B. RUN/best is the best model of a run, RUN its newest;
    zoo:NAME is one that comes with the package."""
    a: tuple[str, ...] = ()
    """Several runs of A, trained with different seeds."""
    b: tuple[str, ...] = ()
    """Several runs of B."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """Write an HTML page to this file."""
    json: str | None = None
    """Write everything, returns per level included, to this file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if tuple(map(bool, (self.runs, self.a, self.b))) not in ((True, False, False), (False, True, True)):
            raise UserError("name two runs, RUN_A RUN_B, or several a side, --a RUN... --b RUN..., not both")
        if self.runs and len(self.runs) != 2:
            raise UserError(f"a comparison needs two runs, not {len(self.runs)}; for several a side use --a and --b")


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(CompareConfig, argv, "srwm-rl compare")
    names = [expand_groups(runs) for runs in (config.a or config.runs[:1], config.b or config.runs[1:])]
    expand_groups([*names[0], *names[1]])  # no run is on both sides
    check_writable(config.output, "-o")
    check_writable(config.json, "--json")
    from srwm_rl.scripts.evaluation.paired import compare, evaluate_sides
    from srwm_rl.scripts.reports.pages import comparison_page

    sides = evaluate_sides(config, names)
    report = compare(sides, config.seed)
    print(render_comparison(report))
    write_json(config.json, report)
    if config.output is not None:
        page = comparison_page(sides, report, shlex.join(["srwm-rl", "compare", *argv]))
        write_output(config.output, page.encode())
    return 0
