"""The acting step in ONNX: any core, space and batch size, equal to the policy under another runtime."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

import srwm_rl
from srwm_rl import Core, SRWMPolicy, UserError, make_core
from srwm_rl.nn.cores import _CORES
from srwm_rl.nn.diagnostics import introspect
from srwm_rl.onnx_export import ActingStep, float32_copy, to_onnx

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

# The plain cores are in tests/scripts/commands/test_export.py.
HEADS = {"n_heads": 2}  # of 4: heads of size 1 would never edit themselves
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("srwm", {**HEADS, "variant": "paper"}),
    ("srwm", {**HEADS, "retention": True}),
    ("srwm", {**HEADS, "shift_bound": 0.5}),
    ("sr_delta", {**HEADS, "retention": True, "shift_bound": 0.5}),
    ("srwm", {**HEADS, "frozen": "query,beta"}),
    ("srwm", {**HEADS, "norm": "residual", "n_layers": 2}),
    ("srwm", {**HEADS, "n_layers": 2, "short_conv": 4}),
    ("delta", {**HEADS, "short_conv": 2}),
    ("lstm", {"n_layers": 2}),
]
VECTOR = spaces.Box(-1, 1, (3,), np.float32)
PARTS = spaces.Dict(
    frame=spaces.Box(0, 255, (8, 8, 3), np.uint8),
    channels_first=spaces.Box(0, 255, (3, 8, 8), np.uint8),
    previous_action=spaces.Box(0, 1, (4,), np.float32),
    episode_step=spaces.Box(0, 100, (1,), np.float32),
    state=spaces.Discrete(5),  # the name of another input
    choices=spaces.MultiDiscrete([2, 3]),
    bits=spaces.MultiBinary(3),
    double=spaces.Box(-1, 1, (2,), np.float64),
    unsigned=spaces.Box(0, 9, (2,), np.uint32),
)


def make_policy(observation: Any = VECTOR, action: Any = None, core: str = "srwm", **core_kwargs: Any) -> SRWMPolicy:
    """Return a policy without a weight of zero."""
    torch.manual_seed(1)
    core_kwargs = {"n_layers": 1, "hidden_size": 8, **core_kwargs}
    encoder_kwargs = {"cnn": {"channels": [2], "features": 8, "micro_batch": 2}}
    policy = SRWMPolicy(
        observation,
        spaces.Discrete(4) if action is None else action,
        lambda _: 0.0,
        core=core,
        core_kwargs=core_kwargs,
        encoder_kwargs=encoder_kwargs,
    )
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return policy


def load_graph(policy: SRWMPolicy, **metadata: str) -> Any:
    return onnxruntime.InferenceSession(to_onnx(ActingStep(policy), metadata))


def sample(space: Any, batch: int) -> dict[str, np.ndarray]:
    parts = space.spaces if isinstance(space, spaces.Dict) else {"observation": space}
    for seed, part in enumerate(parts.values()):
        part.seed(seed)
    return {key: np.stack([part.sample() for _ in range(batch)]) for key, part in parts.items()}


def compare(policy: SRWMPolicy, run: Any, batch: int) -> None:
    """Step both three times from a random state, an episode starting in the second step."""
    obs = sample(policy.observation_space, batch)
    core = policy.core
    ours = theirs = 0.3 * torch.randn(core.state_layers, batch, core.state_size)
    for t in range(3):
        starts = torch.arange(batch) % 2 == 0 if t == 1 else torch.zeros(batch, dtype=torch.bool)
        tensors: Any = {key: torch.as_tensor(array) for key, array in obs.items()}
        step = introspect(policy, tensors if len(obs) > 1 else tensors["observation"], ours, starts)
        ours = step.core_state
        inputs = {f"observation_{key}" if key == "state" else key: array for key, array in obs.items()}
        if "unsigned" in inputs:
            inputs["unsigned"] = inputs["unsigned"].astype(np.int64)
        inputs |= {"state": theirs.numpy(), "episode_start": starts.numpy()}
        *choices, value, state = run.run(None, inputs)
        theirs = torch.from_numpy(state)
        expected = [step.choices] if step.std is None else [step.choices, step.std]
        for actual, desired in zip(choices, expected, strict=True):
            np.testing.assert_allclose(actual.reshape(batch, -1), desired.numpy(), atol=1e-5)
        np.testing.assert_allclose(value, step.values.numpy(), atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(state, ours.numpy(), atol=1e-5, rtol=1e-5)
    if core.state_size and core.carries_over:
        assert ours.abs().max() > 0.01


@pytest.mark.parametrize(("core", "settings"), VARIANTS, ids=str)
def test_every_variant_acts_as_in_pytorch_at_any_batch_size(core: str, settings: dict[str, Any]) -> None:
    policy = make_policy(core=core, **settings)
    run = load_graph(policy)
    for batch in (1, 5):
        compare(policy, run, batch)


@pytest.mark.parametrize(
    ("action", "outputs"),
    [
        (spaces.Box(-2, 2, (2, 3)), {"action_mean": [2, 3], "action_std": [2, 3]}),
        (spaces.MultiDiscrete([2, 4, 3]), {"action_probabilities": [9]}),
        (spaces.MultiBinary(3), {"action_probabilities": [3]}),
    ],
    ids=lambda case: type(case).__name__,
)
def test_every_action_space_has_its_distribution(action: Any, outputs: dict[str, list[int]]) -> None:
    policy = make_policy(action=action, **HEADS)
    run = load_graph(policy)
    shapes = {port.name: port.shape for port in run.get_outputs()}
    size = policy.core.state_size
    assert shapes == {
        **{name: ["B", *shape] for name, shape in outputs.items()},
        "value": ["B"],
        "new_state": [1, "B", size],
    }
    for batch in (1, 5):
        compare(policy, run, batch)


def test_every_kind_of_observation_is_an_input_of_its_own_type() -> None:
    policy = make_policy(PARTS, **HEADS)
    run = load_graph(policy)
    types = {port.name: port.type for port in run.get_inputs()}
    assert types["frame"] == types["channels_first"] == "tensor(uint8)"
    assert types["observation_state"] == "tensor(int64)"
    assert types["double"] == "tensor(double)"
    assert types["episode_start"] == "tensor(bool)"
    for batch in (1, 5):  # micro-batches of 2 would have been cut
        compare(policy, run, batch)


def test_a_bfloat16_cnn_is_exported_in_float32_and_the_policy_is_unchanged() -> None:
    policy = make_policy(spaces.Box(0, 255, (8, 8, 3), np.uint8), **HEADS)
    cnn = next(iter(policy.features_extractor.images.values()))
    cnn.precision = "bfloat16"
    run = load_graph(policy)
    compare(float32_copy(policy), run, 5)
    assert cnn.precision == "bfloat16"
    with pytest.raises(AssertionError):
        compare(policy, run, 5)


def test_the_file_holds_its_metadata_and_no_path_of_this_machine() -> None:
    content = to_onnx(ActingStep(make_policy(**HEADS)), {"core": "srwm", "actions": json.dumps(["up", "down"])})
    model = onnx.load_from_string(content)
    assert {entry.key: entry.value for entry in model.metadata_props} == {"core": "srwm", "actions": '["up", "down"]'}
    assert model.producer_name == "srwm-rl"
    for path in (Path(srwm_rl.__file__).parents[1], Path(torch.__file__).parent):
        assert str(path).encode() not in content


@pytest.mark.parametrize("core", ["srwm", "sr_delta", "delta", "lstm"])
@pytest.mark.parametrize("n_steps", [1, 5])
def test_a_core_used_during_an_export_gives_the_same(core: str, n_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = make_core(core, 3, hidden_size=8, n_layers=2, **({} if core == "lstm" else HEADS))
    x, state = torch.randn(n_steps, 4, 3), 0.3 * torch.randn(2, 4, memory.state_size)
    starts = torch.rand(n_steps, 4) < 0.5
    expected = memory(x, state, starts)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    torch.testing.assert_close(memory(x, state, starts), expected)


def test_a_core_that_branches_on_values_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Branching(Core):
        def __init__(self, input_size: int) -> None:
            super().__init__(input_size, 4, 1, 4)
            self.read = torch.nn.Linear(input_size, 4)

        def forward(self, x: Any, state: Any, episode_starts: Any) -> Any:
            y = self.read(x)
            return (y if y.sum() > 0 else -y), state

    monkeypatch.setitem(_CORES, "branching", Branching)
    policy = SRWMPolicy(VECTOR, spaces.Discrete(4), lambda _: 0.0, core="branching")
    with pytest.raises(UserError, match="core 'branching' cannot be written as a graph: ") as caught:
        to_onnx(ActingStep(policy), {})
    assert "\n" not in str(caught.value)
