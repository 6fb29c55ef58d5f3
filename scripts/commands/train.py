"""`srwm-rl train`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from srwm_rl.envs.levels import LevelRange
from srwm_rl.envs.make import list_envs, resolve
from srwm_rl.envs.procgen.constant_play import CONSTANT_PLAY
from srwm_rl.envs.procgen.games import ACTIONS
from srwm_rl.envs.procgen.simulator import why_missing
from srwm_rl.envs.tasks import TASKS, TaskBatch
from srwm_rl.errors import UserError, named
from srwm_rl.scripts.cli import allow_core, announce, options_of, parse, peek
from srwm_rl.scripts.config.config_file import read_config_file, to_yaml
from srwm_rl.scripts.config.defaults import defaults, with_defaults
from srwm_rl.scripts.config.foreign_settings import allow_env, allow_wrappers
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.config.tuned import default_preset
from srwm_rl.scripts.training.launch import is_distributed, run_rank
from srwm_rl.scripts.training.resume import check_algo, check_changes, stored_config
from srwm_rl.scripts.training.supervise import supervise
from srwm_rl.storage.run_folder import CONFIG, GROUP, Run
from srwm_rl.storage.run_group import RunGroup, is_group


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    if is_distributed():
        run_rank(lambda: _main(argv), ["train", *argv])
    return _main(argv)


def _main(argv: list[str]) -> int:
    path = peek(argv, "--resume")
    run, changes = None, {}
    if path is not None and is_group(path):
        return _resume_group(argv, RunGroup.open(Path(path)))
    if path is not None and not {"-h", "--help"} & set(argv):
        run = Run.open(Path(path))
        stored = stored_config(run, path)
        config = _parse_resumed(argv, stored)
        _allow_own_code(stored, argv, str(run.path / CONFIG))
        changes = check_changes(stored, config)
    else:
        config = _new_config(argv)
        allow_core(config.core, config.core)
    if config.env_list:
        print(list_of_envs())
        return 0
    with named(str(run.path / CONFIG) if run is not None else ""):
        _check_levels(config)
    if config.print_config:
        print(to_yaml(config), end="")
        return 0
    for name in ("supervise", "verify"):
        if is_distributed() and getattr(config, name):
            raise UserError(f"--{name} is for one process: leave it out under torchrun, or start without torchrun")
    if config.seeds is not None:
        _check_one_machine("--seeds")
        from srwm_rl.scripts.seeds.train import train_seeds

        return train_seeds(argv, config)
    if config.supervise:
        return supervise(argv, config.hang_seconds)
    if config.progress and config.verbose and not sys.stderr.isatty():  # which has a line already
        announce(f"loading torch and {config.env}")
    from srwm_rl.scripts.training.train import train

    return train(config, run, changes)


def _new_config(argv: list[str]) -> TrainConfig:
    """Return the settings of a new run: of its options, else of its --config, else the defaults."""
    path = peek(argv, "--config")
    stored = read_config_file(path) if path is not None else {}
    chosen = {name: peek(argv, f"--{name}") or stored.get(name) for name in ("env", "preset", "core", "algo")}
    if path is not None:
        allow_core(stored.get("core", ""), chosen["core"] if peek(argv, "--core") else None)
        allow_env(stored.get("env", ""), peek(argv, "--env"), path)
    weights = peek(argv, "--init-from", "-i") or stored.get("init_from")
    network = {} if weights is None else _network_of(weights, chosen["core"])
    chosen["core"] = network.get("core", chosen["core"])
    others = {option.strip("-").replace("-", "_") for option in options_of(argv)} | stored.keys()
    chosen["preset"] = chosen["preset"] or default_preset(chosen["env"], chosen["core"], chosen["algo"], others)
    default = defaults(**chosen, atari="--atari" in argv or stored.get("atari", False))
    with named(path or ""):
        default = replace(default, **network)
        default = with_defaults(replace(default, **stored), default)
    config = _parse(argv, default)
    if path is not None:
        allow_wrappers(default.wrapper, config.wrapper if "--wrapper" in options_of(argv) else (), path)
    return config


def _network_of(path: str, core: str | None) -> dict[str, Any]:
    from srwm_rl.scripts.training.initial_weights import network_settings

    return network_settings(path, core)


def _parse(argv: list[str], default: TrainConfig) -> TrainConfig:
    """Parse the arguments; --wrapper replaces the default's wrappers, to which it would be appended."""
    config = parse(TrainConfig, argv, "srwm-rl train", replace(default, wrapper=()))
    return with_defaults(replace(config, wrapper=config.wrapper or default.wrapper), default)


def _parse_resumed(argv: list[str], stored: TrainConfig) -> TrainConfig:
    check_algo(stored, peek(argv, "--algo"))
    return _parse(argv, stored)


def _allow_own_code(stored: TrainConfig, argv: list[str], source: str) -> None:
    """Check that the command line names the code of one's own that a file's settings name."""
    allow_core(stored.core, peek(argv, "--core"))
    allow_env(stored.env, peek(argv, "--env"), source)
    requested = _parse(argv, stored).wrapper if "--wrapper" in options_of(argv) else ()
    allow_wrappers(stored.wrapper, requested, source)


def _resume_group(argv: list[str], group: RunGroup) -> int:
    """Resume all unfinished runs of a group."""
    _check_one_machine("--resume GROUP")
    command, source = group.record.command, str(group.path / GROUP)
    if any(option.startswith("--resume") for option in options_of(command)):
        raise UserError(f"{source} is damaged: its command resumes a run")
    allow_core(peek(command, "--core") or "", peek(argv, "--core"))
    allow_env(peek(command, "--env") or "", peek(argv, "--env"), source)
    existing = group.run_paths()
    if len(existing) < len(group.record.seeds):  # the command starts the others
        stored = replace(_new_config(command), resume=str(group.path))
        _allow_own_code(stored, argv, source)
    if existing:
        run = Run.open(existing[0])
        stored = stored_config(run, str(group.path))
        _allow_own_code(stored, argv, str(run.path / CONFIG))
    stored = replace(stored, progress=TrainConfig.progress)  # that of the runs is off: the group shows it
    config = _parse_resumed(argv, stored)
    check_changes(stored, config)
    if config.verify:
        raise UserError(f"--verify is for one run: name one, such as {group.run_path(group.record.seeds[0])}")
    from srwm_rl.scripts.seeds.train import resume_group

    return resume_group(argv, group, config)


def _check_one_machine(option: str) -> None:
    if is_distributed():
        raise UserError(f"{option} starts processes of its own: start it without torchrun, or train single runs")


def list_of_envs() -> str:
    """Return the environments by kind, and what the best constant action earns on ProcGen's, as text."""
    by_kind = list_envs()
    lines = [f"{kind}: {', '.join(names)}" for kind, names in by_kind.items() if names]
    return "\n".join([*lines, "", constant_play() if by_kind["procgen"] else why_missing()])


def constant_play() -> str:
    """Return what the best constant action earns on each ProcGen game, as text."""
    games = (
        f"  {game}: {ACTIONS[of.action]} {of.constant:.2f} (s.e. {of.standard_error:.2f}), random {of.random:.2f}"
        for game, of in CONSTANT_PLAY.items()
    )
    head = "ProcGen, easy: mean return of the best constant action on levels 1000:1200 (chosen on 0:100); random play"
    return "\n".join([head, *games])


def _check_levels(config: TrainConfig) -> None:
    train, held_out = LevelRange.parse(config.levels), LevelRange.parse(config.eval_levels)
    if config.levels != "all" and train.overlap(held_out):
        raise UserError(
            f"--levels {train} and --eval-levels {held_out} overlap in {train.overlap(held_out)} levels; "
            "hold out levels that are not trained on"
        )
    spec = resolve(config.env)
    task = TASKS[spec.names[0]] if spec.kind == "task" else TaskBatch
    ends = np.array([held_out.start, held_out.stop - 1])
    if task.levels_share_content and task.trained_levels(train, ends).any():
        raise UserError(
            f"--levels {train} and --eval-levels {held_out} draw the same classes; train on 0:1000000 and hold out "
            "1000000:1001000 (validation classes) or 2000000:2001000 (test classes)"
        )
