"""`srwm-rl tune`: search for settings of the trainer and the core."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from srwm_rl.envs.levels import LevelRange
from srwm_rl.envs.make import resolve
from srwm_rl.errors import UserError
from srwm_rl.lazy import import_optional
from srwm_rl.scripts.cli import INTERRUPTED, allow_core, parse, peek, quoted_path, warn
from srwm_rl.scripts.config.config_file import dump_yaml, from_mapping, read_config_file, to_mapping
from srwm_rl.scripts.config.defaults import default_algo, defaults, with_defaults
from srwm_rl.scripts.config.foreign_settings import allow_env
from srwm_rl.scripts.config.settings import Count, TrainConfig, check_bounds, parse_seeds
from srwm_rl.scripts.tuning.record import BEST_SETTINGS, RECORD, STUDY, SearchRecord, SearchSettings
from srwm_rl.scripts.tuning.space import default_space, parse_space, read_space, space_to_mapping
from srwm_rl.storage.run_folder import numbered_folder

# Levels that score trials: neither trained on nor reported by default.
LEVELS = {"procgen": "2000:2200", "task": "2000000:2000500", "gymnasium": "2000000:2000100"}
FEW_SHOT_LEVELS = "1500000:1500500"  # of validation classes
OF_A_CALL = ("resume", "trials", "jobs", "storage", "verbose", "env", "core")  # what --resume may be given with
NAMED_HERE = ("env", "core", "algo", "n_timesteps")


@dataclass(frozen=True)
class TuneConfig:
    """Search for settings: trials with several seeds each, scored on levels that the final report does not use."""

    env: str | None = None
    """The environment, as in srwm-rl train."""
    core: str = "srwm"
    """The core, as in srwm-rl train; each has settings of its own to vary."""
    algo: Literal["ppo", "impala", "supervised"] | None = None
    """The trainer. Default: as in srwm-rl train."""
    n_timesteps: Annotated[Count | None, tyro.conf.arg(aliases=["-n"])] = None
    """Environment steps of each run. Default: as in srwm-rl train."""
    trials: Count = 50
    """Trials in all, those of other processes that take part included."""
    seeds: str = "1000:1002"
    """Seeds of each trial's runs, start:stop or 1000,1007. Report the best settings with others."""
    jobs: Count | None = None
    """Runs of a trial that train at the same time. None: one per core."""
    levels: str | None = None
    """Levels that score a trial, by its runs' mean return on them. Default: levels that srwm-rl eval does not use."""
    space: str | None = None
    """A YAML file of what to vary, such as `n_steps: [32, 64]`, `learning_rate: {low: 1e-4, high: 1e-2, log: true}`,
    `core_kwargs.hidden_size: [32, 64]`. Default: a table, by trainer and core; --print-space shows it."""
    print_space: bool = False
    """Print what would be varied, as such a file, and stop."""
    config: str | None = None
    """A YAML file of settings that all trials have in common, as in srwm-rl train."""
    prune: bool = True
    """Stop a trial early where it does worse than half of the others did."""
    storage: str | None = None
    """A database that remembers the trials, any URL of optuna, such as postgresql://user:password@host/name: processes
    on several machines then share one search. Default: a file in the folder."""
    study_name: str | None = None
    """The search's name in such a database. Default: made of environment, core and trainer."""
    folder: Annotated[str, tyro.conf.arg(aliases=["-f"])] = "tune"
    """Folder for the search's folder, in which the trials' runs lie."""
    resume: str | None = None
    """Continue the search in this folder; a second process that does so takes part in it. --trials may be new."""
    verbose: int = 1
    """2: tracebacks on errors."""

    def __post_init__(self) -> None:
        check_bounds(self)
        parse_seeds(self.seeds)
        if self.env is None and self.resume is None:
            raise UserError("name an --env to start a search, or a folder with --resume to continue one")


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(TuneConfig, argv, "srwm-rl tune")
    record = _new(config, argv) if config.resume is None else _stored(config, argv)
    settings = record.settings
    if config.print_space:
        print(dump_yaml(settings.space), end="")
        return 0
    default = _default(settings)
    import_optional("optuna", "srwm-rl tune", "'srwm-rl[tune]'")
    from srwm_rl.scripts.tuning.results import write_results
    from srwm_rl.scripts.tuning.search import Search, Stopped, open_study

    if config.resume is not None:
        folder = Path(config.resume)
    else:
        folder = numbered_folder(Path(config.folder) / record.study_name.replace("/", "+").replace(":", "+"))
        record.write(folder)
    study = open_study(config.storage or f"sqlite:///{folder / STUDY}", record.study_name)
    search = Search(folder, study, settings, parse_space(settings.space), default, config.jobs)
    print(
        f"tuning {settings.env}: {settings.algo}, core {settings.core}, {record.trials} trials of "
        f"{settings.n_timesteps:,} steps\n"
        f"  seeds     {settings.seeds}, scored on levels {settings.levels}\n  folder    {folder}",
        flush=True,
    )
    try:
        search.run(record.trials)
    except Stopped as stop:
        warn(f"stopped by {stop}. Continue with: srwm-rl tune --resume {quoted_path(folder)}")
        return INTERRUPTED
    finally:
        write_results(folder, search, shlex.join(["srwm-rl", "tune", *record.command]))
    if not (folder / BEST_SETTINGS).exists():
        warn(f"no trial was trained to its end; what they printed is in {folder / 'trials'}")
        return 1
    best = quoted_path(folder / BEST_SETTINGS)
    print(f"best settings: {best}. Now: srwm-rl train --config {best} --seeds 0:5")
    return 0


def _new(config: TuneConfig, argv: list[str]) -> SearchRecord:
    """Return a new search's record."""
    assert config.env is not None
    allow_core(config.core, config.core)
    fixed = read_config_file(config.config) if config.config else {}
    if fixed.get("wrapper"):
        raise UserError(
            f"{config.config} names wrappers, which trials cannot have: leave them out, or register an environment "
            "that has them, and give --env my_module:MyEnv-v0"
        )
    algo = config.algo or default_algo(config.env)
    for name, value in (("env", config.env), ("core", config.core), ("algo", algo)):
        if fixed.get(name, value) != value:
            raise UserError(f"{config.config} names another {name}, {fixed[name]!r}: leave it out, or --{name} it")
    default = replace(defaults(config.env, fixed.get("preset"), config.core, algo), **fixed)
    kind = resolve(config.env).kind
    settings = SearchSettings(
        env=config.env,
        core=config.core,
        algo=algo,
        n_timesteps=config.n_timesteps or default.n_timesteps,
        seeds=config.seeds,
        levels=config.levels or (FEW_SHOT_LEVELS if config.env == "fewshot" else LEVELS[kind]),
        fixed=to_mapping({name: value for name, value in fixed.items() if name not in NAMED_HERE}),
        space=space_to_mapping(read_space(config.space) if config.space else default_space(algo, config.core)),
        prune=config.prune,
    )
    for option, levels in (("levels", default.levels), ("eval-levels", default.eval_levels)):
        if LevelRange.parse(settings.levels).overlap(LevelRange.parse(levels)):
            raise UserError(f"--levels {settings.levels} overlap the runs' --{option} {levels}; choose others")
    name = config.study_name or f"{config.env}_{config.core}_{algo}"
    return SearchRecord(settings, name, config.storage is None, config.trials, argv)


def _stored(config: TuneConfig, argv: list[str]) -> SearchRecord:
    """Return the record of the search to be continued."""
    folder = Path(config.resume or "")
    record = SearchRecord.read(folder)
    for field in fields(TuneConfig):
        if field.name not in OF_A_CALL and getattr(config, field.name) != field.default:
            option = f"--{field.name.replace('_', '-')}"
            raise UserError(f"a search keeps its settings: leave out {option}, or start a new one")
    for option, given in (("env", config.env), ("core", peek(argv, "--core"))):
        if given not in (None, getattr(record.settings, option)):
            raise UserError(f"a search keeps its settings: it has --{option} {getattr(record.settings, option)}")
    allow_env(record.settings.env, config.env, str(folder / RECORD))
    allow_core(record.settings.core, peek(argv, "--core"))
    if record.own_storage != (config.storage is None):
        hint = "leave out --storage" if record.own_storage else "name its database with --storage"
        raise UserError(f"{folder}: {hint}, as when the search was started")
    return record if peek(argv, "--trials") is None else replace(record, trials=config.trials)


def _default(settings: SearchSettings) -> TrainConfig:
    """Return the settings that a trial has unless it varies them."""
    default = defaults(settings.env, settings.fixed.get("preset"), settings.core, settings.algo)
    return with_defaults(replace(default, **from_mapping(settings.fixed), n_timesteps=settings.n_timesteps), default)
