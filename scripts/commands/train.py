"""`srwm-rl train`."""

from __future__ import annotations

from pathlib import Path

from srwm_rl.envs.levels import LevelRange
from srwm_rl.envs.make import list_envs
from srwm_rl.envs.procgen.constant_play import CONSTANT_PLAY
from srwm_rl.envs.procgen.games import ACTIONS
from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import allow_core, parse, peek
from srwm_rl.scripts.config.defaults import defaults, with_defaults
from srwm_rl.scripts.config.foreign_settings import allow_env
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.training.launch import is_distributed, run_rank, supervise
from srwm_rl.scripts.training.resume import check_changes, stored_config
from srwm_rl.storage.run_folder import CONFIG, Run


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    if is_distributed():
        run_rank(lambda: _main(argv), ["train", *argv])
    return _main(argv)


def _main(argv: list[str]) -> int:
    path = peek(argv, "--resume")
    run, changes = None, {}
    if path is not None and not {"-h", "--help"} & set(argv):
        run = Run.open(Path(path))
        stored = stored_config(run, path)
        allow_core(stored.core, peek(argv, "--core"))
        allow_env(stored.env, peek(argv, "--env"), str(run.path / CONFIG))
        config = with_defaults(parse(TrainConfig, argv, "srwm-rl train", stored), stored)
        changes = check_changes(stored, config)
    else:
        default = defaults(peek(argv, "--env"), peek(argv, "--preset"), peek(argv, "--core"), peek(argv, "--algo"))
        config = with_defaults(parse(TrainConfig, argv, "srwm-rl train", default), default)
        allow_core(config.core, config.core)
    if config.env_list:
        print("\n".join([*(f"{kind}: {', '.join(names)}" for kind, names in list_envs().items()), "", constant_play()]))
        return 0
    _check_levels(config)
    for name in ("supervise", "verify"):
        if is_distributed() and getattr(config, name):
            raise UserError(f"--{name} is for one process: leave it out under torchrun, or start without torchrun")
    if config.supervise:
        return supervise(argv, config.hang_seconds)
    from srwm_rl.scripts.training.train import train

    return train(config, run, changes)


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
