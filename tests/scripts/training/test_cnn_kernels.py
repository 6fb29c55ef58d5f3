"""The choice of a CNN's kernels: measured on a GPU when a run begins, in C on a CPU; kept by a resumed run."""

import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from gymnasium import spaces

from srwm_rl.errors import UserError
from srwm_rl.nn.cnns import IN_C, KERNELS, ImpalaCNN
from srwm_rl.ops import cnn, cpu, cpu_cnn
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.main import main
from srwm_rl.scripts.training.cnn_kernels import _candidates, _fastest, choose_kernels, cnns_of, use_kernels
from tests.agents.probe import small_model

FRAMES = spaces.Box(0, 255, (16, 20, 3), np.uint8)


def model_of_frames(
    device: str,
    space: spaces.Space[Any] = FRAMES,
    channels: tuple[int, ...] = (8, 16),
    precision: str = "bfloat16",
) -> Any:
    encoder_kwargs = {"precision": precision, "cnn": {"channels": [*channels]}}
    policy_kwargs = {"encoder_kwargs": encoder_kwargs if space is FRAMES else {}}
    return small_model("ppo", observation_space=space, device=device, policy_kwargs=policy_kwargs)


def test_the_setting_has_the_names_of_the_kernels() -> None:
    assert get_args(get_type_hints(TrainConfig)["cnn_kernels"]) == ("auto", *KERNELS, *IN_C.values())


def test_on_a_cpu_without_a_choice_the_cnn_is_plain() -> None:
    model = model_of_frames("cpu")
    assert choose_kernels(TrainConfig(env="recall"), model) == "auto"
    use_kernels("auto", model)
    assert [network.kernels for network in cnns_of(model)] == ["plain"]
    with pytest.raises(UserError, match="--cnn-kernels fused4 is for an IMPALA or Nature CNN on a GPU: leave it out"):
        choose_kernels(TrainConfig(env="recall", cnn_kernels="fused4"), model)
    assert choose_kernels(TrainConfig(env="recall", cnn_kernels="plain"), model) == "plain"
    use_kernels("fused4", model)  # of a run that a GPU began
    assert [network.kernels for network in cnns_of(model)] == ["fused4"]


@pytest.mark.parametrize("level", range(len(cpu.LEVELS)))
def test_on_avx2_the_vectors_are_chosen(
    level: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = cpu.load_kernel()
    if isinstance(kernel, str):
        pytest.skip(kernel)
    monkeypatch.setattr(cpu_cnn, "load_kernel", lambda: kernel._replace(level=level))
    model = model_of_frames("cpu", channels=(16, 32), precision="float32")
    assert choose_kernels(TrainConfig(env="recall"), model) == ("vectors" if cpu.LEVELS[level] == "AVX2" else "auto")
    assert choose_kernels(TrainConfig(env="recall", cnn_kernels="plain"), model) == "plain"
    assert choose_kernels(TrainConfig(env="recall", cnn_kernels="vectors"), model) == "vectors"
    use_kernels("vectors", model)
    assert [network.kernels for network in cnns_of(model)] == ["vectors"]
    assert not capsys.readouterr().err
    for wrong in (model_of_frames("cpu"), model_of_frames("cpu", channels=(6, 16), precision="float32")):
        with pytest.raises(UserError, match="--cnn-kernels vectors is for an IMPALA or patch CNN in float32 on a CPU"):
            choose_kernels(TrainConfig(env="recall", cnn_kernels="vectors"), wrong)
        use_kernels("vectors", wrong)
        assert [network.kernels for network in cnns_of(wrong)] == ["plain"]
        assert "ran in C, on a CPU, which it cannot here: it is not exactly the same run" in capsys.readouterr().err


@pytest.mark.parametrize("has_tiles", [True, False])
def test_on_a_cpu_tiles_are_chosen_where_they_can_be(
    has_tiles: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu_cnn, "has_tiles", lambda: has_tiles)
    model = model_of_frames("cpu", channels=(16, 32))
    assert choose_kernels(TrainConfig(env="recall"), model) == (IN_C["bfloat16"] if has_tiles else "auto")
    assert choose_kernels(TrainConfig(env="recall", cnn_kernels="plain"), model) == "plain"
    use_kernels(IN_C["bfloat16"], model)
    assert [network.kernels for network in cnns_of(model)] == [IN_C["bfloat16"] if has_tiles else "plain"]
    assert capsys.readouterr().err.count("not exactly the same run from here on") == (not has_tiles)
    for wrong in [model_of_frames("cpu"), *[model] * (not has_tiles)]:
        with pytest.raises(UserError, match="--cnn-kernels tiles is for an IMPALA or patch CNN in bfloat16"):
            choose_kernels(TrainConfig(env="recall", cnn_kernels=IN_C["bfloat16"]), wrong)


def test_a_run_on_a_cpu_begins_with_tiles_and_says_so(call: Any, tmp_path: Path) -> None:
    small = ["--n-envs", 2, "--n-steps", 4, "--batch-size", 8, "--n-epochs", 1, "--precision", "bfloat16"]
    result = call("train", "--env", "coinrun", *small, "-n", 8, "--no-progress", "-f", tmp_path)
    assert result.code == 0, result
    (config,) = tmp_path.glob("*/*/config.json")
    kernels = IN_C["bfloat16"] if cpu_cnn.has_tiles() else "auto"
    assert json.loads(config.read_text())["train"]["cnn_kernels"] == kernels
    assert (", CNN tiles\n" in result.out) == cpu_cnn.has_tiles()


def test_a_resumed_run_is_refused_kernels_that_it_cannot_have(
    call: Any, recall_argv: list[str], tmp_path: Path
) -> None:
    assert call("train", *recall_argv, "-n", 64, "-f", tmp_path).code == 0
    run = tmp_path / "ppo_srwm" / "recall_1"
    result = call("train", "--resume", run, "--override", "--cnn-kernels", "tiles", "-n", 128)
    assert result.code == 2
    assert "--cnn-kernels tiles is for an IMPALA or patch CNN in bfloat16" in result.err
    assert json.loads((run / "config.json").read_text())["train"]["cnn_kernels"] == "auto"


@pytest.mark.parametrize(
    ("depth", "kernels"),
    [(3, ["plain", "fused", "fused4", "fused8"]), (4, ["plain", "fused", "fused8"]), (16, ["plain", "fused"])],
)
def test_paddings_that_are_the_same_are_measured_once(depth: int, kernels: list[str]) -> None:
    assert _candidates([ImpalaCNN((16, 16, depth), False)]) == kernels


def test_noise_does_not_decide() -> None:
    assert _fastest({"plain": 10.2, "fused": 10.0, "fused4": 9.9}) == "plain"
    assert _fastest({"plain": 20.0, "fused": 10.5, "fused4": 10.4, "fused8": 10.0}) == "fused"
    assert _fastest({"plain": 20.0, "fused": 15.0, "fused4": 15.0, "fused8": 10.0}) == "fused8"
    assert _fastest({}) == "plain"


@pytest.mark.gpu
def test_the_choice_draws_no_numbers_and_leaves_the_weights(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of_frames("cuda")
    before = [weight.detach().clone() for weight in model.policy.parameters()]
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    choice = choose_kernels(TrainConfig(env="recall", batch_size=64), model)
    assert choice in KERNELS
    assert not caplog.text
    assert all(map(torch.equal, states, (torch.get_rng_state(), torch.cuda.get_rng_state())))
    assert all(map(torch.equal, before, model.policy.parameters()))
    assert all(weight.grad is None for weight in model.policy.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("fault", ["raises", "is wrong"])
def test_kernels_with_a_fault_are_not_chosen(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def faulty(x: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
        if fault == "raises":
            raise RuntimeError("no compiler")
        total, relu = epilogue(x, *arguments, **settings)
        return total, relu * 2

    epilogue = cnn.epilogue
    monkeypatch.setattr(cnn, "epilogue", faulty)
    assert choose_kernels(TrainConfig(env="recall", batch_size=64), model_of_frames("cuda")) == "plain"
    assert caplog.text.count("kernels are not used") == 3
    assert ("no compiler" if fault == "raises" else "its results differ by") in caplog.text


@pytest.mark.gpu
def test_vectors_have_no_choice() -> None:
    model = model_of_frames("cuda", spaces.Box(-1, 1, (4,)))
    assert choose_kernels(TrainConfig(env="recall"), model) == "auto"


@pytest.mark.gpu
def test_a_run_keeps_its_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--n-envs", "2", "--n-steps", "8", "--batch-size", "16", "--n-epochs", "1", "--device", "cuda"]
    small += ["--encoder-kwargs", 'cnn:{"channels":[4]}']  # processors without bfloat16 simulate it slowly
    start = ["train", "--env", "coinrun", *small, "--no-progress", "-f", str(tmp_path)]
    assert main([*start, "-n", "16"]) == 0
    run = next(tmp_path.glob("*/coinrun_1"))
    config = json.loads((run / "config.json").read_text())
    assert config["train"]["cnn_kernels"] in KERNELS
    config["train"]["cnn_kernels"] = "fused4"
    (run / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(["train", "--resume", str(run), "--no-progress", "-n", "32"]) == 0
    assert ", CNN fused4\n" in capsys.readouterr().out
