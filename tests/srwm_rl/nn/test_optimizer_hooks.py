"""`edit_lr_multiplier`: steps as of a parameter group with that multiple of the learning rate, under any optimizer."""

import pickle
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from gymnasium import spaces
from sb3_contrib import RecurrentPPO

from srwm_rl import SRWMPolicy, core_names, load, make_core
from srwm_rl.agents import IMPALA, PPO
from srwm_rl.nn.layers import SRWMLayer
from srwm_rl.nn.optimizer_hooks import scale_edit_columns
from srwm_rl.storage.model_file import save_model
from tests.agents.probe import probe_env

RATE, FACTOR = 0.01, 3.0
CORES = ("srwm", "srwm_no_carry", "sr_delta")
SIZES = {"hidden_size": 8, "n_layers": 2, "n_heads": 2}
OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.Adam, {"eps": 1e-5}),
    (torch.optim.Adam, {"eps": 1e-5, "fused": True}),
    (torch.optim.Adam, {"eps": 1e-5, "foreach": True, "amsgrad": True}),
    (torch.optim.AdamW, {"weight_decay": 0.1}),
    (torch.optim.RMSprop, {"eps": 0.01, "momentum": 0.5}),
    (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
]


def policy(core: str = "srwm", factor: float = FACTOR, frozen: str = "", **settings: Any) -> SRWMPolicy:
    torch.manual_seed(0)
    kwargs = {**SIZES, "edit_lr_multiplier": factor, "frozen": frozen}
    space = spaces.Box(-1, 1, (3,))
    return SRWMPolicy(space, spaces.Discrete(2), lambda _: RATE, core=core, core_kwargs=kwargs, **settings)


def n_read(core: str) -> int:
    """Return the number of y columns of a head of size 4."""
    return 13 if core == "sr_delta" else 4


def set_gradients(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.dtype)


def moved(module: torch.nn.Module, step: Any) -> dict[str, torch.Tensor]:
    """Return how far each weight moves while `step` is called."""
    before = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    step()
    return {name: weight.detach() - before[name] for name, weight in module.named_parameters()}


@pytest.mark.parametrize("core_name", CORES)
@pytest.mark.parametrize("frozen", ["", "key", "query,key,beta"])
@pytest.mark.parametrize(("optimizer_class", "settings"), OPTIMIZERS)
def test_steps_are_those_of_a_parameter_group(
    core_name: str, frozen: str, optimizer_class: Any, settings: dict[str, Any]
) -> None:
    """The twin is an optimizer without hooks, of y columns and other columns as parameters apart."""
    core = make_core(core_name, 3, edit_lr_multiplier=FACTOR, frozen=frozen, **SIZES).double()
    n = n_read(core_name)
    optimizer = optimizer_class(core.parameters(), lr=RATE, **settings)
    scale_edit_columns(optimizer, core)
    scale_edit_columns(optimizer, core)  # a second call does nothing
    slow = {f"layers.{i}.weight" for i in range(2)}
    twins: dict[str, list[torch.nn.Parameter]] = {}
    for name, weight in core.named_parameters():
        parts = (weight[..., :n], weight[..., n:]) if name in slow else (weight,)
        twins[name] = [torch.nn.Parameter(part.detach().clone()) for part in parts]
    groups: list[Any] = [
        {"params": [parts[0] for parts in twins.values()]},
        {"params": [parts[1] for parts in twins.values() if parts[1:]], "lr": FACTOR * RATE},
    ]
    twin = optimizer_class(groups, lr=RATE, **settings)
    for step in range(4):
        set_gradients(core, step)
        for name, weight in core.named_parameters():
            grads = (weight.grad[..., :n], weight.grad[..., n:]) if name in slow else (weight.grad,)
            for part, grad in zip(twins[name], grads, strict=True):
                part.grad = grad.clone()
        optimizer.step()
        twin.step()
        for name, weight in core.named_parameters():
            torch.testing.assert_close(weight, torch.cat(twins[name], -1), rtol=1e-12, atol=1e-13, msg=name)


@pytest.mark.parametrize("factor", [0.0, 0.25, 1.25, 10.0])
def test_plain_gradient_descent_moves_by_factor_rate_and_gradient(factor: float) -> None:
    core = make_core("srwm", 3, edit_lr_multiplier=factor, **SIZES).double()
    optimizer = torch.optim.SGD(core.parameters(), lr=RATE)
    scale_edit_columns(optimizer, core)
    set_gradients(core, 0)
    changes = moved(core, optimizer.step)
    for i, layer in enumerate(core.layers):  # type: ignore[arg-type]
        factors = torch.tensor([1.0] * 4 + [factor] * 12)
        torch.testing.assert_close(changes[f"layers.{i}.weight"], -RATE * factors * layer.weight.grad)
    torch.testing.assert_close(changes["project.weight"], -RATE * core.project.weight.grad)  # type: ignore[union-attr]


@pytest.mark.parametrize("core", core_names())
def test_without_it_the_optimizer_has_no_hooks(core: str) -> None:
    kwargs = {"core_kwargs": {"edit_lr_multiplier": 1.0}} if core in CORES else {}
    agent = SRWMPolicy(spaces.Box(-1, 1, (3,)), spaces.Discrete(2), lambda _: RATE, core=core, **kwargs)
    for subject in (agent, deepcopy(agent)):
        assert not subject.optimizer._optimizer_step_pre_hooks  # type: ignore[attr-defined]
        assert not subject.optimizer._optimizer_step_post_hooks  # type: ignore[attr-defined]


def test_copies_of_a_policy_move_their_own_weights_and_only_once_as_far() -> None:
    agent = policy(optimizer_class=torch.optim.SGD)
    copied = deepcopy(agent)
    agents = [agent, copied, deepcopy(copied), pickle.loads(pickle.dumps(copied))]
    for subject in agents:
        set_gradients(subject, 0)
    for subject in agents:
        others = [other for other in agents if other is not subject]
        before = [deepcopy(other.state_dict()) for other in others]
        changes = moved(subject, subject.optimizer.step)
        for i, layer in enumerate(subject.core.layers):  # type: ignore[arg-type]
            assert isinstance(layer, SRWMLayer)
            assert layer.weight.grad is not None
            factors = torch.tensor([1.0] * 4 + [FACTOR] * 12)
            wanted = -RATE * factors * layer.weight.grad
            torch.testing.assert_close(changes[f"core.layers.{i}.weight"], wanted, atol=1e-6, rtol=1e-4)
        for other, state in zip(others, before, strict=True):
            assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    for first, second in pairwise(agents):
        assert all(map(torch.equal, first.parameters(), second.parameters()))


def test_a_policy_without_its_optimizer_can_be_copied() -> None:
    agent = policy()
    del agent.optimizer
    assert deepcopy(agent).core_kwargs["edit_lr_multiplier"] == FACTOR


def test_a_step_that_is_skipped_on_the_device_changes_no_bit() -> None:
    agent = policy()
    optimizer: Any = agent.optimizer  # Adam, fused
    set_gradients(agent, 0)
    optimizer.step()
    before = deepcopy(agent.state_dict())
    optimizer.grad_scale, optimizer.found_inf = None, torch.ones(())
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in agent.state_dict().items())


@pytest.mark.parametrize("trainer", [PPO, IMPALA, RecurrentPPO])
@pytest.mark.parametrize("core", CORES)
def test_an_update_of_every_trainer_honours_it(trainer: Any, core: str) -> None:
    def first_update(factor: float) -> dict[str, torch.Tensor]:
        kwargs = {"core": core, "core_kwargs": {**SIZES, "edit_lr_multiplier": factor}}
        settings = {"synchronous": True} if trainer is IMPALA else {"batch_size": 32, "n_epochs": 1}
        model = trainer(SRWMPolicy, probe_env(), n_steps=8, seed=0, device="cpu", policy_kwargs=kwargs, **settings)
        return moved(model.policy, lambda: model.learn(32))

    plain, scaled = first_update(1.0), first_update(FACTOR)
    for name, change in plain.items():
        factors = torch.ones(change.shape[-1:])
        if name in ("core.layers.0.weight", "core.layers.1.weight"):
            assert change[..., n_read(core) :].any() == (core != "srwm_no_carry")  # which never reads its edits
            factors[n_read(core) :] = FACTOR
        torch.testing.assert_close(scaled[name], factors * change, rtol=1e-3, atol=1e-6, msg=name)


def test_it_is_saved_with_the_model(tmp_path: Path) -> None:
    agent = policy()
    save_model(tmp_path / "model.safetensors", agent, {}, 0)
    layer: Any = load(tmp_path / "model.safetensors").policy.core.layers[1]  # type: ignore[index,union-attr]
    assert layer.edit_lr_multiplier == FACTOR
    kwargs = {"core_kwargs": {**SIZES, "edit_lr_multiplier": FACTOR}}
    model = PPO(SRWMPolicy, probe_env(), n_steps=8, seed=0, device="cpu", policy_kwargs=kwargs)
    model.learn(32)
    model.save(tmp_path / "model.zip")
    loaded = PPO.load(tmp_path / "model.zip", env=probe_env(), device="cpu")
    for subject in (model, loaded):
        set_gradients(subject.policy, 0)
        subject.policy.optimizer.step()
    assert all(map(torch.equal, model.policy.parameters(), loaded.policy.parameters()))
