"""`srwm-rl fewshot`: `train` with few-shot episodes and right answers."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any, Literal

from srwm_rl.envs.tasks.fewshot import FewShotBatch
from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import options_of, parse, peek, say, split_options
from srwm_rl.scripts.commands import train
from srwm_rl.scripts.config.defaults import EDITING_CORES, PAPER_CORES, defaults, with_defaults
from srwm_rl.scripts.config.settings import TrainConfig

QUICK_STEPS = 2_000_000
# About as many steps per update at any episode length.
QUICK_BATCH = 832
# `delayed` shows a label beside the next image: memory layers see two steps at once.
DELAYED_CORE = "short_conv:2"
# The published setting for Omniglot: IDSIA/modern-srwm, supervised_learning/README.md and main_few_shot_sync.py. Batch
# normalisation, pooling and the output layer are the encoder's and the policy's.
PAPER_BATCH = 128  # episodes
PAPER_UPDATES = 300_000
PAPER_EVAL_UPDATES = 10_000
PAPER: dict[str, tuple[str, ...]] = {
    "--n-envs": (str(PAPER_BATCH),),
    "--learning-rate": ("1e-3",),
    "--lr-decay": ("none",),
    "--max-grad-norm": ("1e9",),  # the gradient is not clipped
    "--aux-coef": ("0",),
    "--beta2": ("0.995",),
    "--adam-eps": ("1e-9",),
    "--encoder-kwargs": ("mlp:[]", "vector_scale:1", 'cnn:{"kind":"conv4","channels":[64,64,64,64]}'),
    "--precision": ("float32",),
    "--eval-episodes": ("1000",),
}
# Of the core srwm; others keep what fits them.
PAPER_CORE = ("hidden_size:256", "n_layers:2", "n_heads:16", "ff_size:1024")
PAPER_HEADS = ("norm:residual", "query_init:1", "identity_init:0")


@dataclass(frozen=True)
class FewShotConfig:
    """Train an agent on few-shot episodes. All options of srwm-rl train are understood, too."""

    data: str = "glyphs"
    """glyphs, digits, a folder of images, or two of these with a comma, one after the other in every episode."""
    ways: str = "5:20"
    """Classes per episode, or a range that each episode draws from; of other data than glyphs 5 by default."""
    shots: str = "1:5"
    """Examples per class, or a range that each episode draws from."""
    queries: int = 5
    """Images asked for after the examples."""
    labels: Literal["ask", "sync", "delayed"] = "ask"
    """ask: each example is asked for, then told; sync: told, queries asked for; delayed: told a step later."""
    cut: int = 0
    """The most examples left out at the end of each part."""
    outputs: int = 0
    """Size of the label; 0: the most ways."""
    size: int = 0
    """Height and width that images are scaled to; 0: as they are."""
    preset: Literal["quick", "paper"] = "quick"
    """quick: minutes on two cores. paper: the published setting for Omniglot, 5 ways and 1 shot, no auxiliary loss."""

    def env_settings(self) -> dict[str, Any]:
        """Return the settings of `FewShotBatch`."""
        return {name: value for name, value in asdict(self).items() if name != "preset"}


PAPER_EPISODES = FewShotConfig(ways="5", shots="1", queries=1, labels="sync", preset="paper")
OWN = ("--env", "--env-kwargs")  # options of `train` that the settings above stand for


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    if peek(argv, "--resume") is not None:
        return train.main(argv)
    own, others = split_options(FewShotConfig, argv)
    default = FewShotConfig() if peek(own, "--data") in (None, "glyphs") else FewShotConfig(ways="5")
    if peek(own, "--preset") == "paper":
        default = PAPER_EPISODES
    config = parse(FewShotConfig, own, "srwm-rl fewshot", default)
    argv = train_argv(config, others)
    if config.preset == "paper":
        say(f"paper: {estimate(argv)}")
    return train.main(argv)


def train_argv(config: FewShotConfig, others: list[str]) -> list[str]:
    """Return the command line of `srwm-rl train` that a command stands for.

    Args:
        others: options of `srwm-rl train`, which go before those that the command stands for.

    Raises:
        UserError: data, ways, shots and so on that do not go together, or an option that they stand for.
    """
    given = {option.replace("_", "-") for option in options_of(others)}
    if "-n" in given:
        given.add("--n-timesteps")
    for name in OWN:
        if name in given:
            raise UserError(f"srwm-rl fewshot sets {name} itself: give --data, --ways and so on, or use srwm-rl train")
    settings = config.env_settings()
    n_steps = longest_episode(settings)
    chosen = {"--algo": ("supervised",), "--n-steps": (str(n_steps),), **_preset(config, n_steps, others)}
    core = peek(others, "--core") or "srwm"
    if config.preset == "quick" and config.labels == "delayed" and core in PAPER_CORES:
        others = _with_core_setting(others, DELAYED_CORE)
    if core == "prototype":
        outputs = FewShotBatch(1, **settings).protocol.outputs
        chosen["--core-kwargs"] = (f"n_classes:{outputs}", f"delayed:{config.labels == 'delayed'}")
    result = ["--env", "fewshot", "--env-kwargs", *(f"{name}:{value}" for name, value in settings.items())]
    for name, values in chosen.items():
        if name not in given:
            result += [name, *values]
    return [*result, *others]


def _with_core_setting(argv: list[str], setting: str) -> list[str]:
    """Return the command line with a setting of the core, unless it sets that itself."""
    name = f"{setting.partition(':')[0]}:"
    if any(word.startswith(name) for word in argv):
        return argv
    words = [word.replace("_", "-") for word in argv]
    at = words.index("--core-kwargs") + 1 if "--core-kwargs" in words else 0
    return [*argv[:at], setting, *argv[at:]] if at else ["--core-kwargs", setting, *argv]


def longest_episode(settings: dict[str, Any]) -> int:
    """Return the steps of the longest episode, which a rollout holds as a whole.

    Raises:
        UserError: settings or data that `FewShotBatch` refuses.
    """
    protocol = FewShotBatch(1, **settings).protocol
    examples = protocol.ways[1] * protocol.shots[1] * (2 if protocol.labels == "ask" else 1)
    return (examples + protocol.queries) * len(settings["data"].split(","))


def estimate(argv: list[str]) -> str:
    """Return how long a run would take on this machine, by the time of one update."""
    from srwm_rl.scripts.training import build
    from srwm_rl.scripts.training.plan import duration

    default = defaults("fewshot", None, peek(argv, "--core"), peek(argv, "--algo"))
    config = with_defaults(parse(TrainConfig, argv, "srwm-rl train", default), default)
    rollout = config.n_envs * config.n_steps
    with closing(build.make_env(config)) as env:
        build.use_threads(config.n_threads, env.observation_space, on_gpu=build.on_gpu(config))
        model = build.make_model(replace(config, precision=build.resolved_precision(config)), env)
        model.learn(rollout)  # the first one allocates memory
        start = time.perf_counter()
        model.learn(rollout, reset_num_timesteps=False)
        seconds = time.perf_counter() - start
    updates = ceil(config.n_timesteps / rollout)
    return f"an update takes {seconds:.2g} s here, {updates:,} take about {duration(seconds * updates)}"


def _preset(config: FewShotConfig, n_steps: int, others: list[str]) -> dict[str, tuple[str, ...]]:
    """Return the options of a preset; for `quick` the rest are the defaults of `--env fewshot --algo supervised`."""
    if config.preset == "quick":
        n_envs = max(4, round(QUICK_BATCH / n_steps))
        return {"--n-envs": (str(n_envs),), "--n-timesteps": (str(QUICK_STEPS),)}
    given = peek(others, "--n-envs") or str(PAPER_BATCH)
    n_envs = int(given) if given.isdecimal() else PAPER_BATCH  # `train` refuses what is no number
    name = peek(others, "--core") or "srwm"
    core = (*PAPER_CORE, *(PAPER_HEADS if name in EDITING_CORES else ())) if name in PAPER_CORES else ()
    return {
        **PAPER,
        "--n-timesteps": (str(PAPER_UPDATES * n_steps * n_envs),),
        "--eval-freq": (str(PAPER_EVAL_UPDATES * n_steps * n_envs),),
        **({"--core-kwargs": core} if core else {}),
    }
