"""Checkpoints in the published RL code's format, from small policies of ours with renamed weights."""

import re
from pathlib import Path
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor

from srwm_rl import SRWMPolicy
from srwm_rl.official.importer import observation_space

OPTIONS = {
    "srwm": "use_sr",
    "srwm_no_carry": "use_no_carry_sr",
    "sr_delta": "use_smfwp",
    "fake_sr": "use_psr",
    "delta": "use_delta",
    "lstm": "use_lstm",
    "feedforward": "use_deep_ff",
}
PAPER6 = {"multi_env": 6, "distribution_mode": "easy", "num_levels": 200, "start_level": 0}
RENAMED = (
    (r"features_extractor\.images\.observation\.head", "fc"),
    (r"action_net", "policy"),
    (r"value_net", "baseline"),
    (r"core\.lstm", "core"),
    (r"core\.project", "core.input_proj"),
    (r"core\.blocks\.(\d+)\.up", r"core.ff_layers.\1.ff_layers.0"),
    (r"core\.blocks\.(\d+)\.down", r"core.ff_layers.\1.ff_layers.3"),
    (r"core\.blocks\.(\d+)\.layer_norm", r"core.ff_layers.\1.layer_norm"),
    (r"core\.layers\.(\d+)\.out\.", r"core.fwm_layers.\1.out_linear."),
    (r"core\.layers\.(\d+)", r"core.fwm_layers.\1"),
)


def make_policy(core: str, seed: int = 0) -> SRWMPolicy:
    """Return a small policy of a published kind, with weights large enough to matter."""
    torch.manual_seed(seed)
    kwargs: dict[str, Any] = {"hidden_size": 8, "n_layers": 2}
    if core == "lstm":
        kwargs["n_layers"] = 1
    else:
        kwargs["ff_size"] = 12
    if core not in ("lstm", "feedforward"):
        kwargs |= {"n_heads": 2, "variant": "paper"}
    cnn = {"channels": [2, 3], "features": 6}
    policy = SRWMPolicy(
        observation_space(),
        spaces.Discrete(15),
        lambda _: 0.0,
        core=core,
        core_kwargs=kwargs,
        encoder_kwargs={"cnn": cnn},
    )
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return policy


def published_weights(policy: SRWMPolicy) -> dict[str, Tensor]:
    """Return the policy's weights under the published names."""
    weights: dict[str, Tensor] = {}
    for name, weight in policy.named_parameters():
        weights |= _split(policy.core_name, _published_name(name), weight.detach().clone())
    if policy.core_name in (
        "srwm",
        "srwm_no_carry",
        "sr_delta",
        "fake_sr",
    ):  # published layers hold a norm that they do not use
        for i in range(2):
            weights[f"core.fwm_layers.{i}.layer_norm.weight"] = torch.ones(8)
            weights[f"core.fwm_layers.{i}.layer_norm.bias"] = torch.zeros(8)
    if policy.core_name == "feedforward":
        weights = {name.replace("core.", "trafo_ff_block."): weight for name, weight in weights.items()}
    return weights


def _published_name(name: str) -> str:
    if stage := re.search(r"stages\.(\d+)\.?(first|second)?\.(weight|bias)", name):
        number, module = divmod(int(stage[1]), 4)
        layer = {"first": 1, "second": 3}.get(stage[2], 0)
        return f"{('feat_convs', '', 'resnet1', 'resnet2')[module]}.{number}.{layer}.{stage[3]}"
    for ours, theirs in RENAMED:
        if re.match(ours, name):
            return re.sub(ours, theirs, name)
    return name


def _split(core: str, name: str, weight: Tensor) -> dict[str, Tensor]:
    layer, _, last = name.rpartition(".")
    if "fwm_layers" not in name or last != "weight" or weight.dim() != 3:
        return {name: weight}
    if core == "fake_sr":
        return {f"{layer}.W_y": weight}
    size = weight.shape[1]
    parts = weight.split((weight.shape[2] - 2 * size - 4, size, size, 4), dim=-1)
    return {f"{layer}.{key}": part[None] for key, part in zip(("W_y", "W_q", "W_k", "w_b"), parts, strict=True)}


def save(path: Path, weights: dict[str, Tensor], flags: dict[str, Any] | None, step: int = 1600) -> Path:
    """Write a checkpoint with everything the published learner stores, including objects of torch and numpy."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.RMSprop([parameter], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch))
    parameter.sum().backward()
    optimizer.step()
    content: dict[str, Any] = {
        "model_state_dict": weights,
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": scheduler.state_dict(),
        "stats": {"step": step, "episode_returns": tuple(torch.ones(2).numpy()), "mean_episode_return": None},
        "best_valid_return": 0,
    }
    if flags is not None:
        content["flags"] = {"learner_device": torch.device("cpu"), "savedir": "~/somewhere", **flags}
    torch.save(content, path)
    return path


def make_checkpoint(path: Path, core: str = "srwm", **flags: Any) -> Path:
    """Write the checkpoint of a small agent of the paper's six games."""
    chosen = {option: option == OPTIONS[core] for option in OPTIONS.values()}
    return save(path, published_weights(make_policy(core)), {**chosen, **PAPER6, **flags})
