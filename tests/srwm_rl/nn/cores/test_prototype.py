"""The prototype core: a literal twin, the properties of a core, delayed labels, and its settings."""

import pytest
import torch

from srwm_rl import check_core, core_names, make_core
from srwm_rl.errors import UserError
from srwm_rl.nn.cores import register_core
from srwm_rl.nn.cores.feedforward import FeedForwardCore

T, B, F, C = 12, 3, 4, 3


def episodes(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return features `[T, B, F]`, labels `[T, B]` (-1: not told), the input of both, and episode starts."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(T, B, F, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, C, (T, B), generator=generator)
    starts = torch.zeros(T, B)
    starts[0], starts[5, 1], starts[8, 2] = 1, 1, 1
    one_hot = 3.0 * (labels[..., None] == torch.arange(C))  # a label may be scaled
    return features, labels, torch.cat((features, one_hot.double()), -1), starts


def twin(features: torch.Tensor, labels: torch.Tensor, starts: torch.Tensor, prior: float, bias: float) -> torch.Tensor:
    """Return minus the squared distances to the means of the earlier examples, in loops."""
    y = torch.zeros(T, B, C, dtype=torch.float64)
    for b in range(B):
        examples: dict[int, list[torch.Tensor]] = {}
        for t in range(T):
            if starts[t, b]:
                examples = {}
            for c in range(C):
                prototype = torch.stack(examples[c]).mean(0) if c in examples else torch.full((F,), prior)
                y[t, b, c] = -((features[t, b] - prototype) ** 2).sum() / F**0.5 + (0 if c in examples else bias)
            if labels[t, b] >= 0:
                examples.setdefault(int(labels[t, b]), []).append(features[t, b])
    return y


def test_it_is_the_literal_twin() -> None:
    features, labels, x, starts = episodes()
    core = make_core("prototype", F + C, n_classes=C).double()
    with torch.no_grad():
        core.prior.fill_(0.3)  # type: ignore[operator, union-attr]
        core.bias.fill_(-0.7)  # type: ignore[operator, union-attr]
    y, _ = core(x, core.initial_state(B), starts)
    torch.testing.assert_close(y, twin(features, labels, starts, 0.3, -0.7))


def test_delayed_labels_are_those_of_the_step_before() -> None:
    features, labels, _, starts = episodes(1)
    delayed = torch.zeros(T, B, C, dtype=torch.float64)
    delayed[1:] = labels[:-1, :, None] == torch.arange(C)
    for t in range(T):  # at an episode's start a label is told that belongs to no image
        delayed[t, starts[t] != 0] = torch.eye(C, dtype=torch.float64)[0]
    core = make_core("prototype", F + C, n_classes=C, delayed=True).double()
    y, _ = core(torch.cat((features, delayed), -1), core.initial_state(B), starts)
    expected = twin(
        features, labels, starts, 0.0, 0.0
    )  # an image's label is told with the next one, in time for its answer
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("delayed", [False, True])
def test_it_has_the_properties_of_a_core(delayed: bool) -> None:
    # Of so many classes some have no example, so that the gradient reaches their output.
    check_core(make_core("prototype", F + 30, n_classes=30, delayed=delayed))


def test_wrong_settings_are_refused() -> None:
    for n_classes in (0, -1, 7, 8, "5"):
        with pytest.raises(UserError, match="n_classes, the size of the label"):
            make_core("prototype", F + C, n_classes=n_classes)
    with pytest.raises(UserError, match="n_classes"):
        make_core("prototype", F + C)
    with pytest.raises(UserError, match="has no setting"):
        make_core("prototype", F + C, hidden_size=3)


def test_it_is_no_core_for_any_task_and_its_name_is_taken() -> None:
    assert "prototype" not in core_names()
    with pytest.raises(UserError, match="exists already"):
        register_core("prototype")(FeedForwardCore)
