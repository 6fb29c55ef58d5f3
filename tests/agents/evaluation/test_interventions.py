"""Interventions: the frozen part of the state stays frozen, and only that part."""

from typing import Any

import numpy as np
import pytest
import torch

from srwm_rl import SRWMPolicy, UserError
from srwm_rl.agents.evaluation.interventions import FrozenStateAgent, column_part, head_part, memory_part, undo_edits
from srwm_rl.agents.evaluation.play_levels import play_levels
from srwm_rl.envs import make_levels_env
from srwm_rl.nn.diagnostics import head_norms

B, STEPS = 3, 8
SIZES: dict[str, Any] = {"hidden_size": 16, "n_layers": 2, "n_heads": 4}


def policy(core: str, **settings: Any) -> SRWMPolicy:
    env = make_levels_env("recall", 1, "0:1", 1, 0)
    torch.manual_seed(0)
    sizes = SIZES if core not in ("lstm", "feedforward") else {"hidden_size": 16}
    model = SRWMPolicy(
        env.observation_space, env.action_space, lambda _: 0.0, core=core, core_kwargs={**sizes, **settings}
    )
    with torch.no_grad():
        model.action_net.weight.mul_(100)  # otherwise an untrained network's actions are all alike
    return model


def observations(model: SRWMPolicy) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    shapes = {key: space.shape for key, space in model.observation_space.spaces.items()}  # type: ignore[attr-defined]
    return [{key: rng.random((B, *shape), np.float32) for key, shape in shapes.items()} for _ in range(STEPS)]


STARTS = np.zeros((STEPS, B), bool)
STARTS[0], STARTS[5, 1] = True, True


def walk(agent: Any, seen: list[dict[str, np.ndarray]]) -> tuple[np.ndarray, list[np.ndarray]]:
    state, actions, states = None, [], []
    torch.manual_seed(0)
    for obs, starts in zip(seen, STARTS, strict=True):
        action, state = agent.predict(obs, state, starts)
        actions.append(action)
        assert state is not None
        states.append(state[0])
    return np.stack(actions), states


@pytest.mark.parametrize(
    "settings",
    [{}, {"variant": "paper"}, {"shift_bound": 0.5}, {"norm": "residual", "input_softmax": True}, {"short_conv": 3}],
)
def test_frozen_from_the_start_equals_fake_sr(settings: dict[str, Any]) -> None:
    live = policy("srwm", **settings)
    plain = {"norm": live.core.layers[0].norm, "input_softmax": live.core.layers[0].input_softmax}  # type: ignore[index, union-attr]
    fake = policy("fake_sr", **plain, short_conv=settings.get("short_conv", 0))
    weights = {k: v[..., :4] if k.endswith("layers.0.weight") or k.endswith("layers.1.weight") else v
               for k, v in live.state_dict().items()}  # fmt: skip
    fake.load_state_dict(weights)
    seen = observations(live)
    held: Any = FrozenStateAgent(live, part=memory_part(live))
    state: Any = None
    fake_state = fake.initial_state(B)
    for obs, starts in zip(seen, STARTS, strict=True):
        tensors = {key: torch.from_numpy(value) for key, value in obs.items()}
        with torch.no_grad():
            carried = live.initial_state(B) if state is None else torch.from_numpy(state[0])
            mine = live.act(tensors, carried, torch.from_numpy(starts), deterministic=True)
            unedited = fake.act(tensors, fake_state, torch.from_numpy(starts), deterministic=True)
        torch.testing.assert_close(mine.values, unedited.values)
        torch.testing.assert_close(mine.log_probs, unedited.log_probs)
        actions, state = held.predict(obs, state, starts, deterministic=True)
        np.testing.assert_array_equal(actions, unedited.actions.numpy())
        assert not state[0][:, :, memory_part(live)[0]].any()
        fake_state = unedited.core_state
    edited = torch.from_numpy(walk(live, seen)[1][-1])
    with torch.no_grad():  # the edits of this network do matter
        assert (live.act(tensors, edited, torch.zeros(B)).values != mine.values).all()


@pytest.mark.parametrize("core", ["srwm", "lstm", "delta", "sr_delta"])
def test_edits_are_frozen_from_the_given_step_on(core: str) -> None:
    model = policy(core)
    seen = observations(model)
    _, live = walk(model, seen)
    _, held = walk(FrozenStateAgent(model, after=2), seen)
    for t in range(STEPS):
        for env in range(B):
            clock = t - 5 if env == 1 and t >= 5 else t
            if clock < 2:
                np.testing.assert_array_equal(held[t][:, env], live[t][:, env])
            else:
                np.testing.assert_array_equal(held[t][:, env], held[t - 1][:, env])
                assert (held[t][:, env] != live[t][:, env]).any()


def test_a_frozen_memory_treats_every_observation_as_the_first() -> None:
    model = policy("lstm")
    seen = observations(model)
    torch.manual_seed(0)
    alone = np.stack([model.predict(obs, None, np.ones(B, bool))[0] for obs in seen])
    np.testing.assert_array_equal(walk(FrozenStateAgent(model), seen)[0], alone)


def test_a_lesion_freezes_one_head_only() -> None:
    model = policy("srwm")
    _, states = walk(FrozenStateAgent(model, part=head_part(model, 1, 2)), observations(model))
    for t, state in enumerate(states):
        norms = head_norms(model.core, torch.from_numpy(state))  # [L, B, H]
        assert not norms[1, :, 2].any()
        norms[1, :, 2] = 1
        assert norms.all()
        if t == 0:  # before anything can spread from the head to the others
            live = walk(model, observations(model))[1][0]
            part = head_part(model, 1, 2)[:, None]
            np.testing.assert_array_equal(np.where(part, 0, live), state)


def test_interventions_leave_the_inputs_of_a_short_convolution_alone() -> None:
    model = policy("srwm", short_conv=3)
    core, seen = model.core, observations(model)
    inputs = np.zeros((core.state_layers, core.state_size), np.bool_)
    inputs[:, core.state_size - core.short_conv.state_size :] = True  # type: ignore[union-attr,operator]
    assert (memory_part(model) == ~inputs).all()
    parts = [memory_part(model), head_part(model, 1, 2), column_part(model, "y,query,key,beta")]
    live = walk(model, seen)[1]
    for part in parts:
        assert not (part & inputs).any()
        states = walk(FrozenStateAgent(model, part=part), seen)[1]
        for state, free in zip(states, live, strict=True):
            np.testing.assert_array_equal(state[:, :, inputs[0]], free[:, :, inputs[0]])  # observations alone make them
            assert not state[np.broadcast_to(part[:, None], state.shape)].any()
    assert memory_part(policy("lstm")).all()


@pytest.mark.parametrize(("layer", "head"), [(2, 0), (0, 4), (9, 9)])
def test_a_head_that_does_not_exist_is_refused(layer: int, head: int) -> None:
    with pytest.raises(UserError, match=rf"no head {layer}.{head}: core 'srwm' has layers 0 to 1 with heads 0 to 3"):
        head_part(policy("srwm"), layer, head)


def test_a_core_without_state_has_no_head_to_leave_out() -> None:
    with pytest.raises(UserError, match="core 'feedforward' carries nothing"):
        head_part(policy("feedforward"), 0, 0)


def test_frozen_actions_do_not_depend_on_the_number_of_environments() -> None:
    """Each environment has its own step count, also when others are finished."""
    model, results = policy("srwm"), []
    for n_envs in (1, 4, 7):
        env = make_levels_env("recall", n_envs, "0:9", 2, 0)
        results.append(sorted(play_levels(FrozenStateAgent(model, after=3), env, deterministic=True)))
    assert results[0] == results[1] == results[2]


class SlowTwin:
    """Steps an SRWM core's recurrence by hand, head by head, zeroing columns of the shift after every step."""

    def __init__(self, model: SRWMPolicy, groups: tuple[str, ...]) -> None:
        self.core: Any = model.core
        self.groups = groups
        self.shifts: dict[tuple[int, int, int], np.ndarray] = {}  # by layer, environment and head

    def step(self, features: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Map features `[B, I]` to the core's output `[B, O]`."""
        outputs = []
        for env, row in enumerate(features):
            x = row @ array(self.core.project.weight).T + array(self.core.project.bias)
            for index, (layer, block) in enumerate(zip(self.core.layers, self.core.blocks, strict=True)):
                heads = np.split(norm(layer.layer_norm, x), layer.n_heads)
                read = [self.read(layer, index, env, h, heads[h], starts[env]) for h in range(layer.n_heads)]
                x = x + np.concatenate(read) @ array(layer.out.weight).T
                inner = norm(block.layer_norm, x) @ array(block.up.weight).T + array(block.up.bias)
                x = x + np.maximum(inner, 0) @ array(block.down.weight).T + array(block.down.bias)
            outputs.append(x)
        return np.stack(outputs)

    def read(self, layer: Any, index: int, env: int, head: int, x: np.ndarray, start: bool) -> np.ndarray:
        """Read one head, edit its weight, and undo a part of the edit."""
        size, slow = layer.head_size, array(layer.slow_weight())[head]
        shift = self.shifts.get((index, env, head))
        shift = np.zeros_like(slow) if shift is None or start else shift
        fast = slow + shift  # [D, 3D+4]
        y, query, key, beta = np.split(x @ fast, [size, 2 * size, 3 * size])
        query, key, rates = softmax(query), softmax(key), 1 / (1 + np.exp(-beta))
        shift = shift + np.outer(key, np.repeat(rates, [size, size, size, 4]) * ((query - key) @ fast))
        for i, group in enumerate(("y", "query", "key", "beta")):
            if group in self.groups:
                shift[:, i * size : (i + 1) * size] = 0
        self.shifts[index, env, head] = shift
        return y


def array(weight: torch.Tensor) -> np.ndarray:
    return weight.detach().numpy().astype(np.float64)


def norm(layer: Any, x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / np.sqrt(x.var() + layer.eps) * array(layer.weight) + array(layer.bias)


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


@pytest.mark.parametrize(
    "groups", [("y",), ("query",), ("key",), ("beta",), ("query", "key", "beta"), ("y", "query", "key", "beta")]
)
def test_undone_edits_equal_the_recurrence_by_hand(groups: tuple[str, ...]) -> None:
    model = policy("srwm", query_init=1.0)
    agent, twin = undo_edits(model, model, ",".join(groups)), SlowTwin(model, groups)
    features: list[torch.Tensor] = []
    model.core.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].detach()))
    outputs: list[torch.Tensor] = []
    model.core.register_forward_hook(lambda _, __, result: outputs.append(result[0].detach()))
    state: Any = None
    for obs, starts in zip(observations(model), STARTS, strict=True):
        _, state = agent.predict(obs, state, starts)
        expected = twin.step(features[-1].numpy().reshape(B, -1).astype(np.float64), starts)
        np.testing.assert_allclose(outputs[-1].numpy().reshape(B, -1), expected, rtol=1e-4, atol=1e-5)
        for (layer, env, head), shift in twin.shifts.items():
            carried = state[0][layer, env].reshape(SIZES["n_heads"], *shift.shape)[head]
            np.testing.assert_allclose(carried, shift, rtol=1e-4, atol=1e-6)
    live = walk(model, observations(model))[1][-1]
    assert np.abs(live - state[0]).max() > 1e-2, "nothing was undone"


def test_all_columns_undone_is_frozen_and_other_state_is_kept() -> None:
    model = policy("sr_delta")
    seen = observations(model)
    live, undone = walk(model, seen)[1], walk(undo_edits(model, model, ["beta", "y", "key", "query"]), seen)[1]
    part = column_part(model, "y,query,key,beta")
    shift = model.core.layers[0].shift_size  # type: ignore[index, union-attr]
    assert part[:, :shift].all()
    assert not part[:, shift:].any(), "the fast weight is no shift"
    for before, after in zip(live, undone, strict=True):
        assert before[..., :shift].any()
        assert not after[..., :shift].any()
        assert after[..., shift:].any()


def test_parts_of_the_columns_are_disjoint_and_together_the_whole_shift() -> None:
    model = policy("srwm")
    parts = [column_part(model, group) for group in ("y", "query", "key", "beta")]
    assert (np.sum(parts, 0) == 1).all()
    size, heads = 4, SIZES["n_heads"]
    assert [int(part[0].sum()) for part in parts] == [heads * size * width for width in (size, size, size, 4)]
    one = parts[1][0].reshape(heads, size, -1)
    assert one[..., size : 2 * size].all()


@pytest.mark.parametrize("core", ["lstm", "delta", "feedforward", "fake_sr", "srwm_no_carry"])
def test_cores_without_edited_columns_are_refused(core: str) -> None:
    with pytest.raises(UserError, match=f"core '{core}' carries no edits of y, query, key and beta columns"):
        column_part(policy(core), "query")


@pytest.mark.parametrize(
    ("groups", "part"),
    [("qeury", "did you mean 'query'"), ("", "no group of columns ''"), ([], "no group of columns is named")],
)
def test_unknown_column_groups_are_refused(groups: Any, part: str) -> None:
    with pytest.raises(UserError, match=part):
        column_part(policy("srwm"), groups)
