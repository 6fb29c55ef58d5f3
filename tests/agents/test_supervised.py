"""Supervised: the published few-shot protocol step by step, gradients, what is refused, and that it learns."""

from contextlib import closing
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor
from torch.nn import functional

from srwm_rl.agents import Supervised
from srwm_rl.agents.evaluation.play_levels import play_levels
from srwm_rl.agents.supervised import warmup_factor
from srwm_rl.envs.make import make_levels_env, make_vec_env
from srwm_rl.errors import FaultError, UserError

WAYS, STEPS, ENVS, HEADS = 5, 6, 4, 2
CONV4 = {"kind": "conv4", "channels": [4, 4, 4, 4]}
PUBLISHED = {
    "core_kwargs": {"hidden_size": 8, "n_layers": 2, "n_heads": HEADS, "ff_size": 16, "norm": "residual"},
    "encoder_kwargs": {"mlp": (), "cnn": CONV4},
}
PUBLISHED["core_kwargs"]["query_init"] = 1.0


def few_shot_env(n_envs: int = ENVS, seed: int = 0, levels: str = "0:1000", **settings: Any) -> Any:
    kwargs = {"ways": WAYS, "shots": 1, "queries": 1, "labels": "sync", **settings}
    return make_vec_env("fewshot", n_envs, levels, seed, env_kwargs=kwargs, inputs=())


def supervised(env: Any, n_steps: int = STEPS, policy_kwargs: Any = None, **settings: Any) -> Supervised:
    return Supervised("SRWMPolicy", env, n_steps=n_steps, policy_kwargs=policy_kwargs, seed=0, device="cpu", **settings)


class Levels(BaseCallback):
    """Collect the levels with which each rollout begins."""

    def __init__(self, levels: list[Any]) -> None:
        super().__init__()
        self.levels = levels

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.levels.append(np.array(self.training_env.env_method("level_seed")[0]))


def run_updates(model: Supervised, n: int) -> tuple[list[Any], list[float]]:
    """Make `n` updates; return the levels of each rollout and the cross-entropies."""
    levels: list[Any] = []
    losses: list[float] = []
    log = model._log
    model._log = lambda means, rate: (losses.append(means[0]["cross_entropy"]), log(means, rate))[1]
    model.learn(n * model.n_envs * model.n_steps, Levels(levels))
    return levels, losses


# The twin: IDSIA/modern-srwm, supervised_learning/main_few_shot_sync.py, one step and one head at a time.


def twin_features(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """Map `[N, 28, 28, 1]` to Conv-4's features `[N, F]`, in training mode."""
    x = images.permute(0, 3, 1, 2) / 255
    for i in range(4):
        name = f"features_extractor.images.image.blocks.{i}."
        x = functional.conv2d(x, weights[name + "0.weight"], weights[name + "0.bias"], padding=1)
        x = functional.batch_norm(x, None, None, weights[name + "1.weight"], weights[name + "1.bias"], training=True)
        x = torch.relu(functional.max_pool2d(x, 2))
    return x.flatten(1)


def twin_layer(weights: dict[str, Tensor], name: str, sequence: list[Tensor]) -> list[Tensor]:
    """Run one SRWM layer on the `[hidden]` inputs of one episode."""
    slow = weights[name + "weight"]  # [H, D, 3D + 4]
    size = slow.shape[1]
    fast = [head.clone() for head in slow]
    outputs = []
    for x in sequence:
        y = []
        for h, part in enumerate(x.view(HEADS, size)):
            read = part @ fast[h]
            out, query, key, beta = read.split((size, size, size, 4))
            query, key, rate = query.softmax(0), key.softmax(0), beta.sigmoid()
            y.append(out)
            rates = torch.cat((rate[0].expand(size), rate[1].expand(size), rate[2].expand(size), rate[3].expand(4)))
            fast[h] = fast[h] + torch.outer(key, rates * (query @ fast[h] - key @ fast[h]))
        normed = functional.layer_norm(
            x, x.shape, weights[name + "layer_norm.weight"], weights[name + "layer_norm.bias"]
        )
        outputs.append(normed + weights[name + "out.weight"] @ torch.cat(y))
    return outputs


def twin_block(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    inner = functional.layer_norm(x, x.shape, weights[name + "layer_norm.weight"], weights[name + "layer_norm.bias"])
    inner = torch.relu(functional.linear(inner, weights[name + "up.weight"], weights[name + "up.bias"]))
    return x + functional.linear(inner, weights[name + "down.weight"], weights[name + "down.bias"])


def twin_loss(weights: dict[str, Tensor], batch: Any, levels: Any) -> Tensor:
    """Return the mean cross-entropy of the queries of the episodes of `levels`."""
    episodes = batch.episodes(np.asarray(levels))
    images = torch.from_numpy(batch.images[episodes.image]).float()  # [B, T, 28, 28, 1]
    features = twin_features(weights, images.flatten(0, 1)).unflatten(0, images.shape[:2])
    losses = []
    for shown, labels in zip(features, torch.from_numpy(episodes.label), strict=True):
        # Support images with their labels; beside the query, label 0.
        feedback = functional.one_hot(torch.cat((labels[:-1], torch.zeros(1, dtype=torch.int64))), WAYS)
        sequence = [
            functional.linear(torch.cat(parts), weights["core.project.weight"], weights["core.project.bias"])
            for parts in zip(shown, feedback, strict=True)
        ]
        for layer in range(2):
            sequence = twin_layer(weights, f"core.layers.{layer}.", sequence)
            sequence = [twin_block(weights, f"core.blocks.{layer}.", x) for x in sequence]
        logits = functional.linear(sequence[-1], weights["action_net.weight"], weights["action_net.bias"])
        losses.append(functional.cross_entropy(logits[None], labels[-1:]))
    return torch.stack(losses).mean()


def test_updates_are_those_of_the_published_protocol() -> None:
    settings = {"learning_rate": 1e-3, "beta2": 0.995, "adam_eps": 1e-9, "max_grad_norm": 1e9}
    env = few_shot_env()
    model = supervised(env, policy_kwargs=PUBLISHED, **settings)
    weights = {name: w.detach().clone().requires_grad_() for name, w in model.policy.named_parameters()}
    levels, losses = run_updates(model, 3)
    optimizer = torch.optim.Adam(weights.values(), 1e-3, betas=(0.9, 0.995), eps=1e-9)
    for drawn, loss in zip(levels, losses, strict=True):
        expected = twin_loss(weights, env.batch_env, drawn)
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
    for name, weight in model.policy.named_parameters():
        if "value_net" not in name and ".0.bias" not in name:  # batch normalisation removes the convolutions' biases
            torch.testing.assert_close(weight, weights[name], rtol=0.02, atol=2e-4, msg=name)


def test_the_gradient_is_the_twins() -> None:
    env = few_shot_env(levels="1000000:1001000")
    model = supervised(env, policy_kwargs=PUBLISHED)
    weights = {name: w.detach().clone().requires_grad_() for name, w in model.policy.named_parameters()}
    gradients: dict[str, Tensor] = {}
    model.policy.optimizer.step = lambda: gradients.update(
        {name: w.grad.clone() for name, w in model.policy.named_parameters()}
    )
    model.max_grad_norm = 1e9
    levels, _ = run_updates(model, 1)
    twin_loss(weights, env.batch_env, levels[0]).backward()
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        if "value_net" in name:
            assert not gradient.any()
        else:
            expected = weights[name].grad
            # A bias before a batch normalisation has a gradient of rounding errors.
            atol = 1e-5 * largest + 1e-4 * expected.abs().max().item()
            torch.testing.assert_close(gradient, expected, rtol=0, atol=atol)
    columns = gradients["core.layers.0.weight"]
    assert all(part.abs().max() > 0 for part in columns.split((4, 4, 4, 4), -1))  # y, query, key, beta


def gradient(model: Supervised) -> list[Tensor]:
    """Return the gradients of the first update, not clipped."""
    model.max_grad_norm = 1e9
    result: list[Tensor] = []
    model.policy.optimizer.step = lambda: result.extend(w.grad.clone() for w in model.policy.parameters())
    run_updates(model, 1)
    return result


def test_parts_of_the_environments_have_the_gradient_of_the_whole() -> None:
    kwargs = {"core_kwargs": {"hidden_size": 8, "n_heads": 2}, "encoder_kwargs": {"cnn": {"channels": (2, 2)}}}
    settings = {"n_steps": 12, "policy_kwargs": kwargs}
    whole, parts = (gradient(supervised(few_shot_env(labels="ask"), **settings, frames_at_once=n)) for n in (999, 12))
    for expected, actual in zip(whole, parts, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


def test_batch_normalisation_reads_the_whole_rollout() -> None:
    shapes: list[torch.Size] = []
    model = supervised(few_shot_env(100), policy_kwargs=PUBLISHED)  # 600 frames
    cnn = model.policy.features_extractor.images["image"]
    cnn.register_forward_hook(lambda *_: shapes.append(_[1][0].shape))
    run_updates(model, 1)
    assert shapes == [(600, 28, 28, 1)]


def test_a_repeated_frame_is_encoded_once() -> None:
    kwargs = {"core_kwargs": {"hidden_size": 8, "n_heads": 2}, "encoder_kwargs": {"cnn": {"channels": (2, 2)}}}
    counts: list[int] = []
    models = [supervised(few_shot_env(labels="ask"), 11, kwargs) for _ in range(2)]
    for model in models:
        cnn = model.policy.features_extractor.images["image"]
        cnn.register_forward_hook(lambda _, frames, __: counts.append(len(frames[0])))
    models[1]._distinct_frames = lambda obs: (obs, None)
    once, twice = map(gradient, models)
    assert counts == [6 * ENVS, 11 * ENVS]  # five examples, each shown twice, then a query
    for expected, actual in zip(twice, once, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


def test_a_repetition_of_any_length_has_the_last_new_frame() -> None:
    model = supervised(few_shot_env())
    number = torch.tensor([[3, 4], [3, 5], [3, 5], [4, 4]])  # [T, N]
    frames = number[..., None, None, None].expand(4, 2, 28, 28, 1).to(torch.uint8)
    obs, index = model._distinct_frames({"image": frames, "label": torch.zeros(4, 2, 5)})
    assert len(obs["image"]) == 5
    assert torch.equal(obs["image"][index].view_as(frames), frames)


def test_the_state_is_carried_from_rollout_to_rollout() -> None:
    env = make_vec_env("parity", 3, "0:100", 0, inputs=())
    model = supervised(env, 7, {"core_kwargs": {"hidden_size": 8, "n_layers": 1, "n_heads": 2}})
    model.learn(21)
    state, buffer = model._core_state, model.rollout_buffer
    assert state is not None
    batch = next(buffer.parts(state, None))
    model.learn(21, reset_num_timesteps=False)
    _, _, expected = model.loss(next(buffer.parts(batch.core_state, None)))
    torch.testing.assert_close(model._core_state, expected, atol=0.1, rtol=0.1)  # one update later
    assert (model._core_state - model.loss(next(buffer.parts(torch.zeros_like(state), None)))[2]).abs().max() > 0.1


def test_the_prototype_loss_trains_the_encoder_alone() -> None:
    grads = []
    for aux in (0.0, 1.0):
        model = supervised(few_shot_env(), policy_kwargs=PUBLISHED, aux_coef=aux)
        values = gradient(model)
        names = [name for name, _ in model.policy.named_parameters()]
        grads.append(dict(zip(names, values, strict=True)))
    for name, gradient_of in grads[0].items():
        if ".0.bias" not in name:  # batch normalisation removes the convolutions' biases
            is_equal = torch.allclose(gradient_of, grads[1][name], rtol=1e-3, atol=1e-6)
            assert is_equal != ("features_extractor" in name), name


def test_warmup_rises_to_one_and_falls_with_the_inverse_square_root() -> None:
    assert [warmup_factor(n, 4) for n in (1, 2, 4, 16)] == [0.25, 0.5, 1.0, 0.5]
    assert warmup_factor(7, 0) == 1.0
    model = supervised(few_shot_env(), policy_kwargs=PUBLISHED, warmup_updates=4, learning_rate=0.1)
    model.learn(2 * ENVS * STEPS)
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aux_coef": -1.0}, "aux_coef must be at least 0, not -1.0"),
        ({"warmup_updates": -1}, "warmup_updates must be a whole number of at least 0, not -1"),
        ({"warmup_updates": 1.5}, "warmup_updates must be a whole number of at least 0, not 1.5"),
        ({"beta2": 1.5}, r"beta2 must lie in \[0, 1\], not 1.5"),
        ({"n_steps": 0}, "n_steps must be a whole number of at least 1, not 0"),
        ({"gamma": 0.9}, "gamma"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        supervised(few_shot_env(), **settings)


def test_what_cannot_be_learned_from_answers() -> None:
    with pytest.raises(UserError, match="no right answers to learn from: use a task that has, such as recall"):
        supervised(make_vec_env("bandit", 2, "0:10", 0, inputs=()))
    with pytest.raises(UserError, match="no right answers"):
        supervised(gymnasium.make("CartPole-v1"))
    with pytest.raises(UserError, match="contains previous_action, previous_reward, which are right answers"):
        supervised(make_vec_env("recall", 2, "0:10", 0, inputs=("action", "reward")))
    with pytest.raises(UserError, match="aux_coef is for few-shot episodes"):
        supervised(make_vec_env("recall", 2, "0:10", 0, inputs=()), aux_coef=0.5)


def test_an_observation_that_is_not_finite_stops_training() -> None:
    model = supervised(make_vec_env("recall", 2, "0:10", 0, inputs=()), 8)
    with torch.no_grad():
        model.policy.action_net.bias.fill_(float("nan"))
    with pytest.raises(FaultError, match="not finite"):
        model.learn(16)


def test_a_saved_model_acts_the_same(tmp_path: Any) -> None:
    env = few_shot_env(labels="ask")
    model = supervised(env, 11, PUBLISHED, aux_coef=0.5)
    model.learn(11 * ENVS)
    model.save(tmp_path / "model.zip")
    loaded = Supervised.load(tmp_path / "model.zip", env=env)
    obs = env.reset()
    expected, state = model.predict(obs, deterministic=True)
    actual, same = loaded.predict(obs, deterministic=True)
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(same[0], state[0])
    assert loaded.aux_coef == 0.5


@pytest.mark.parametrize("core", ["srwm", "lstm"])
def test_parity_is_learned(core: str) -> None:
    env = make_vec_env("parity", 64, "0:100000", 0, inputs=())
    kwargs = {"hidden_size": 32, "n_layers": 1} | ({"n_heads": 4} if core == "srwm" else {})
    model = supervised(env, 40, {"core": core, "core_kwargs": kwargs}, learning_rate=2e-2)
    model.learn(64 * 40 * 120)
    with closing(make_levels_env("parity", 50, range(200_000, 200_050), 1, 0, inputs=())) as held_out:
        episodes = play_levels(model.policy, held_out)
    assert np.mean([episode[2] for episode in episodes]) > 0.9  # -1 .. 1


def test_classes_never_seen_are_told_apart() -> None:
    settings = {"ways": 2, "shots": 3, "queries": 0, "labels": "ask"}
    kwargs = {
        "core_kwargs": {"hidden_size": 32, "n_layers": 1, "n_heads": 1, "norm": "residual", "query_init": 1.0},
        "encoder_kwargs": {
            "mlp": (),
            "vector_scale": 3.0,
            "cnn": {"kind": "conv4", "channels": (8, 8, 16, 16), "first_stride": 2, "standardize": True},
        },
    }
    env = few_shot_env(16, **settings)
    model = supervised(env, 12, kwargs, learning_rate=1e-2, aux_coef=0.5)
    model.learn(16 * 12 * 700)
    test = range(2_000_000, 2_000_100)
    with closing(make_levels_env("fewshot", 50, test, 1, 0, env_kwargs=settings, inputs=())) as held_out:
        episodes = play_levels(model.policy, held_out)
    assert np.mean([episode[2] for episode in episodes]) > 0.7  # labels alone: about 1/2
