"""`check_core` passes our cores and names the fault of deliberately broken ones."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from srwm_rl import Core, UserError, check_core, core_names, import_core, make_core
from srwm_rl.nn.cores import _CORES

Result = tuple[Tensor, Tensor]


class Good(Core):
    """A leaky sum of the projected inputs, a small core with a memory; the broken ones differ from it in one point."""

    def __init__(self, input_size: int = 4, size: int = 3) -> None:
        super().__init__(input_size, size, 1, size)
        self.project = nn.Linear(input_size, size)
        self.leak = nn.Parameter(torch.full((size,), 0.9))

    def forward(self, x: Tensor, state: Tensor, episode_starts: Tensor) -> Result:
        ys = []
        for now, starts in zip(self.project(x), episode_starts != 0, strict=True):
            state = self.step(now, self.reset(state, starts))
            ys.append(state[0])
        return torch.stack(ys), state

    def reset(self, state: Tensor, starts: Tensor) -> Tensor:
        return state.masked_fill(starts[:, None], 0)

    def step(self, now: Tensor, state: Tensor) -> Tensor:
        return self.leak * state + now


class WrongInitialShape(Good):
    def initial_state(self, batch: int) -> Tensor:
        return torch.zeros(1, batch, self.state_size + 1)


class InitialOnes(Good):
    def initial_state(self, batch: int) -> Tensor:
        return torch.ones(1, batch, self.state_size)


class WrongOutputSize(Good):
    def forward(self, *args: Tensor) -> Result:
        y, state = super().forward(*args)
        return y[..., :2], state


class BatchFirst(Good):
    def forward(self, *args: Tensor) -> Result:
        y, state = super().forward(*args)
        return y.transpose(0, 1), state


class ListReturned(Good):
    def forward(self, *args: Tensor) -> Any:
        return list(super().forward(*args))


class StateOfOtherShape(Good):
    def forward(self, *args: Tensor) -> Result:
        y, state = super().forward(*args)
        return y, state[0]


class HalfOutput(Good):
    def forward(self, *args: Tensor) -> Result:
        y, state = super().forward(*args)
        return y.half(), state


class ElsewhereState(Good):
    def forward(self, *args: Tensor) -> Result:
        y, state = super().forward(*args)
        return y, state.to("meta")


class Infinite(Good):
    def step(self, now: Tensor, state: Tensor) -> Tensor:
        return super().step(now, state) / 0


class Dropout(Good):
    def step(self, now: Tensor, state: Tensor) -> Tensor:
        return nn.functional.dropout(super().step(now, state), 0.5, self.training)


class Counting(Good):
    calls = 0

    def step(self, now: Tensor, state: Tensor) -> Tensor:
        self.calls += 1
        return super().step(now, state) + self.calls


class WritesState(Good):
    def reset(self, state: Tensor, starts: Tensor) -> Tensor:
        return state.masked_fill_(starts[:, None], 0)


class WritesInput(Good):
    def forward(self, x: Tensor, state: Tensor, episode_starts: Tensor) -> Result:
        with torch.no_grad():
            x.clamp_(-0.5, 0.5)
        return super().forward(x, state, episode_starts)


class NumbersOnly(Good):
    def forward(self, x: Tensor, state: Tensor, episode_starts: Tensor) -> Result:
        return super().forward(
            x, state, episode_starts if episode_starts.is_floating_point() else episode_starts & False
        )


class NoSingleStep(Good):
    def forward(self, x: Tensor, state: Tensor, episode_starts: Tensor) -> Result:
        y, state = super().forward(x, state, episode_starts)
        return y.squeeze(), state.squeeze(1)


class SingleIsOther(Good):
    def step(self, now: Tensor, state: Tensor) -> Tensor:
        return super().step(now, state) * len(now)


class BatchMean(Good):
    def step(self, now: Tensor, state: Tensor) -> Tensor:
        return super().step(now - now.mean(0).clamp(-0.1, 0.1) * (len(now) > 1), state)


class BatchMeanOfUnrolls(Good):
    def forward(self, x: Tensor, state: Tensor, episode_starts: Tensor) -> Result:
        return super().forward(x - 0.1 * x.mean(1, keepdim=True) * (len(x) > 1), state, episode_starts)


class ForgetsBetweenCalls(Good):
    def forward(self, x: Tensor, state: Tensor, episode_starts: Tensor) -> Result:
        return super().forward(x, 0 * state, episode_starts)


class LooksAhead(Good):
    def forward(self, x: Tensor, state: Tensor, episode_starts: Tensor) -> Result:
        return super().forward(x + x.flip(0), state, episode_starts)


class CarriesAfterAll(Good):
    carries_over = False


class NeverResets(Good):
    def reset(self, state: Tensor, starts: Tensor) -> Tensor:
        return state


class ResetsAfterwards(Good):
    def step(self, now: Tensor, state: Tensor) -> Tensor:
        return super().step(now, state)

    def forward(self, x: Tensor, state: Tensor, episode_starts: Tensor) -> Result:
        late = torch.cat((torch.zeros_like(episode_starts[:1]), episode_starts[:-1]))
        return super().forward(x, state, late)


class ResetsAll(Good):
    def reset(self, state: Tensor, starts: Tensor) -> Tensor:
        return 0 * state if starts.any() else state


class RemembersOnTheTensor(Good):
    def forward(self, x: Tensor, state: Tensor, episode_starts: Tensor) -> Result:
        y, new = super().forward(x + getattr(state, "extra", 0), state, episode_starts)
        if len(x) > 1:
            new.extra = 1  # type: ignore[attr-defined]
        return y, new


class LooseTensor(Good):
    def __init__(self) -> None:
        super().__init__()
        self._scale = torch.ones(3)


class LooseModules(Good):
    def __init__(self) -> None:
        super().__init__()
        self.more = [nn.Linear(3, 3)]


class LosesWeights(Good):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {name: 2 * value for name, value in super().state_dict(*args, **kwargs).items()}


class UnusedParameter(Good):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(2))


class NoGradientToInput(Good):
    def forward(self, x: Tensor, state: Tensor, episode_starts: Tensor) -> Result:
        return super().forward(x.detach(), state, episode_starts)


class Detaches(Good):
    def reset(self, state: Tensor, starts: Tensor) -> Tensor:
        return super().reset(state.detach(), starts)


class AlwaysSingle(Good):
    def step(self, now: Tensor, state: Tensor) -> Tensor:
        return super().step(now, state).float().double() if now.dtype == torch.float64 else super().step(now, state)

    def initial_state(self, batch: int) -> Tensor:
        return super().initial_state(batch).float()


class NoParameters(Core):
    def __init__(self) -> None:
        super().__init__(4, 4, 1, 0)

    def forward(self, x: Tensor, state: Tensor, episode_starts: Tensor) -> Result:
        return x, state


class Raises(Good):
    def forward(self, x: Tensor, state: Tensor, episode_starts: Tensor) -> Result:
        if len(x) == 1:
            raise IndexError("no such step")
        return super().forward(x, state, episode_starts)


BROKEN: list[tuple[Callable[[], Core], str, str]] = [
    (NoParameters, "shapes", "no parameters"),
    (WrongInitialShape, "shapes", r"initial_state\(3\) must be .* = \[1, 3, 3\], not \[1, 3, 4\]"),
    (InitialOnes, "shapes", "must be zeros"),
    (WrongOutputSize, "shapes", r"y must be \[T, B, output_size\] = \[6, 3, 3\], not \[6, 3, 2\]"),
    (BatchFirst, "shapes", r"y must be .* not \[3, 6, 3\]"),
    (ListReturned, "shapes", "tuple of two tensors, y and the new state, not list"),
    (StateOfOtherShape, "shapes", r"the new state must be .* not \[3, 3\]"),
    (HalfOutput, "shapes", "y is torch.float16"),
    (ElsewhereState, "shapes", "the new state is on meta"),
    (Infinite, "shapes", "y is not finite"),
    (Dropout, "deterministic", "y differs by up to .* step .* environment"),
    (Counting, "deterministic", "keep something outside the state"),
    (WritesState, "inputs", "writes into its argument state"),
    (WritesInput, "inputs", "writes into its argument x"),
    (NumbersOnly, "inputs", "bool episode_starts act otherwise: y differs by up to .* environment"),
    (NoSingleStep, "small", "it raised"),
    (SingleIsOther, "small", "y differs by up to .* at step 0, environment 0"),
    (Raises, "small", "it raised IndexError: no such step"),
    (BatchMean, "small", "y differs"),
    (BatchMeanOfUnrolls, "batch", "environment 0 changes with the inputs of the other environments"),
    (ForgetsBetweenCalls, "stepwise", "one step at a time is not the whole unroll"),
    (LooksAhead, "stepwise", "one step at a time is not the whole unroll"),
    (CarriesAfterAll, "stepwise", "carries_over is False"),
    (NeverResets, "reset", "at step 0 of environment 1 is not a new episode: y differs by up to .* environment 0"),
    (ResetsAfterwards, "reset", "at step 0 of environment 1 is not a new episode"),
    (ResetsAll, "reset", "changes another environment"),
    (RemembersOnTheTensor, "state", "remembered beside its numbers"),
    (LooseTensor, "saving", "^core LooseTensor .* _scale holds a tensor"),
    (LooseModules, "saving", "more holds a tensor or module"),
    (LosesWeights, "saving", "do not restore it: y differs"),
    (UnusedParameter, "gradients", "no gradient of y reaches the parameter unused"),
    (NoGradientToInput, "gradients", "no gradient of y reaches the input x"),
    (Detaches, "gradients", "no gradient flows back through time"),
    (AlwaysSingle, "float64", "initial_state is torch.float32"),
]


@pytest.mark.parametrize(("make", "check", "message"), BROKEN, ids=lambda case: getattr(case, "__name__", None))
def test_a_broken_core_fails_the_check_of_its_fault(make: Callable[[], Core], check: str, message: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(UserError, match=message) as caught:
        check_core(make())
    assert f"fails the check '{check}'" in str(caught.value)


@pytest.mark.parametrize("name", core_names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_registered_core_passes(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check_core(make_core(name, 5, hidden_size=16, n_layers=2).to(dtype))


BOUNDED = {"shift_bound": 0.05, "query_init": 1.0}  # the shifts of a few steps reach it


@pytest.mark.parametrize("name", ["srwm", "srwm_no_carry", "sr_delta"])
@pytest.mark.parametrize("settings", [{"frozen": "query,key,beta"}, {"retention": True}, {"variant": "paper"}, BOUNDED])
def test_srwm_passes_with_every_option(name: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    check_core(make_core(name, 5, hidden_size=16, n_layers=1, **settings))


def test_checking_does_not_change_the_core() -> None:
    torch.manual_seed(0)
    core = Good().eval()
    before = {name: value.clone() for name, value in core.state_dict().items()}
    check_core(core)
    check_core(Dropout().eval())  # in evaluation mode it is deterministic
    assert not core.training
    assert all(torch.equal(value, before[name]) for name, value in core.state_dict().items())
    assert all(parameter.grad is None for parameter in core.parameters())


def test_anything_but_a_core_is_refused() -> None:
    with pytest.raises(UserError, match=r"instance of srwm_rl\.Core"):
        check_core(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"instance of srwm_rl\.Core"):
        check_core(Good)  # type: ignore[arg-type]


MODULE = """
from srwm_rl import Core
from torch import nn
import torch

class Sum(Core):
    def __init__(self, input_size, gain=1.0):
        super().__init__(input_size, 2, 1, 2)
        self.project, self.gain = nn.Linear(input_size, 2), gain

    def forward(self, x, state, episode_starts):
        ys = []
        for now, starts in zip(self.project(x), episode_starts != 0):
            state = state.masked_fill(starts[:, None], 0) + self.gain * now
            ys.append(state[0])
        return torch.stack(ys), state

class NoCore:
    pass
"""


@pytest.fixture
def my_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "my_memory.py").write_text(MODULE)
    (tmp_path / "needs_more.py").write_text("import srwm_rl_no_such_module")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    for name in list(_CORES):
        if ":" in name:
            del _CORES[name]
    sys.modules.pop("my_memory", None)


def test_a_core_is_imported_by_its_path(my_memory: Path) -> None:
    with pytest.raises(UserError, match=r"srwm_rl.import_core\('my_memory:Sum'\) first, or give --core my_memory:Sum"):
        make_core("my_memory:Sum", 3)
    assert "my_memory" not in sys.modules  # naming a core runs no code
    assert import_core("my_memory:Sum") == "my_memory:Sum"
    assert "my_memory:Sum" in core_names()
    check_core(make_core("my_memory:Sum", 3, gain=0.5))
    with pytest.raises(UserError, match="did you mean 'gain'"):
        make_core("my_memory:Sum", 3, gian=0.5)
    for no_name in (Good, None):
        with pytest.raises(UserError, match=r"a core is given by its name, not as .*register_core"):
            make_core(no_name, 3)  # type: ignore[arg-type]
    assert import_core("my_memory:Sum") == "my_memory:Sum"  # again: no error


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("my_memory", "written my_module:MyCore"),
        (":Sum", "written my_module:MyCore"),
        ("my_memory:", "written my_module:MyCore"),
        ("my_memori:Sum", "there is no module 'my_memori'"),
        ("my_memory.deeper:Sum", "there is no module 'my_memory.deeper'"),
        ("my_memory:Sun", "has no class 'Sun'; did you mean 'Sum'"),
        ("my_memory:nn", "has no class 'nn'"),
        ("my_memory:NoCore", "must be a subclass of srwm_rl.Core"),
    ],
)
def test_an_import_that_fails_is_a_user_error(my_memory: Path, target: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        import_core(target)
    assert target not in core_names()


def test_an_import_error_inside_a_users_module_is_named_with_its_line(my_memory: Path) -> None:
    with pytest.raises(UserError, match=r"'srwm_rl_no_such_module' \(.*needs_more.py, line 1\)") as error:
        import_core("needs_more:Sum")
    assert isinstance(error.value.__cause__, ModuleNotFoundError)
