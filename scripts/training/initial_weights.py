"""Start a run from the weights of a trained agent."""

from __future__ import annotations

from typing import Any

from gymnasium import spaces

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.errors import UserError
from srwm_rl.nn.encoders import MAIN_KEY, flatten_obs_space
from srwm_rl.scripts.cli import allow_core
from srwm_rl.scripts.config.foreign_settings import read_settings
from srwm_rl.storage.model_file import Agent, load, load_policy_arrays, policy_arrays

NETWORK = ("core", "core_kwargs", "encoder_kwargs", "inputs")  # settings that decide which weights there are


def network_settings(path: str, core: str | None) -> dict[str, Any]:
    """Return the settings of an agent's network, the defaults of a run that starts from its weights.

    `path` as for `load`; `core` is the command line's, of which code of one's own is imported.

    Raises:
        UserError: there is no such agent, or it has another core than `core`.
    """
    if core is not None:
        allow_core(core, core)
    trained = read_settings(load(path).config, path)
    if core not in (None, trained.core):
        raise UserError(f"--init-from {path}: its core is {trained.core}, not {core}; leave out --core")
    return {name: getattr(trained, name) for name in NETWORK}


def load_weights(model: RecurrentAlgorithm, path: str) -> Agent:
    """Load an agent's weights into a new trainer's policy; return the agent.

    Raises:
        UserError: its observations, actions or network are others than the trainer's.
    """
    agent, policy, source = load(path), model.policy, f"--init-from {path}"
    _check_spaces(agent, policy.observation_space, policy.action_space, source)
    load_policy_arrays(policy, policy_arrays(agent.policy), source)
    return agent


def _check_spaces(agent: Agent, observed: spaces.Space[Any], acted: spaces.Space[Any], source: str) -> None:
    if acted != agent.policy.action_space:
        raise UserError(
            f"{source}: its actions are {agent.policy.action_space}, not {acted}; choose an environment with the same"
        )
    theirs, ours = (flatten_obs_space(space) for space in (agent.policy.observation_space, observed))
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            what = "" if name == MAIN_KEY else f"{name} "
            raise UserError(
                f"{source}: its observation {what}is {theirs.get(name, 'missing')}, not {ours.get(name, 'missing')}; "
                "choose an environment, wrappers, --attempts and --inputs with the agent's observations"
            )
