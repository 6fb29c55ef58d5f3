"""IMPALA: unrolls, gradients, policy lag, and errors in its threads."""

import threading
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper

from srwm_rl import UserError, core_names
from srwm_rl.agents import IMPALA
from srwm_rl.agents.collecting.unroll_queue import UnrollQueue, Unrolls
from srwm_rl.agents.impala import copy_weights
from srwm_rl.envs import GroupedVecEnv, make_vec_env
from srwm_rl.errors import FaultError
from tests.agents.probe import (
    FailingProbe,
    LogRecorder,
    Probe,
    StopAtMeanReturn,
    collect_rollout,
    mean_return,
    probe_env,
    small_model,
    unroll_gradient,
    weight_vector,
)

SMALL = {"core_kwargs": {"hidden_size": 16, "n_layers": 1}}


def probe_model(n_groups: int = 2, core: str = "srwm", **settings: Any) -> IMPALA:
    policy_kwargs = {"core": core, **settings.pop("policy_kwargs", {})}
    model: IMPALA = small_model("impala", n_groups=n_groups, policy_kwargs=policy_kwargs, **settings)
    return model


def running_threads() -> list[str]:
    """Return the names of the learner's and the environments' threads that still run."""
    return [t.name for t in threading.enumerate() if t.name.startswith(("srwm-learner", "srwm-step"))]


@pytest.mark.parametrize("core", core_names())
def test_evaluating_unrolls_repeats_the_acting_steps_log_probs(core: str) -> None:
    model = probe_model(core=core)
    collect_rollout(model)
    unrolls: Unrolls = collect_rollout(model, continued=True)  # begins in the middle of episodes
    assert unrolls.episode_starts[1:].any()
    with torch.no_grad():
        terms = model.loss(unrolls)[1]
        log_probs = model.policy.evaluate_sequence(
            {k: v[:-1] for k, v in unrolls.observations.items()}
            if isinstance(unrolls.observations, dict)
            else unrolls.observations[:-1],
            unrolls.actions,
            unrolls.core_state,
            unrolls.episode_starts[:-1],
        ).log_probs
    torch.testing.assert_close(log_probs, unrolls.log_probs, rtol=1e-4, atol=1e-5)
    assert terms.rho.item() == pytest.approx(unrolls.rewards.numel(), rel=1e-4)


def test_the_gradient_is_that_of_the_papers_loss_written_out_step_by_step() -> None:
    model = probe_model(ent_coef=0.03, vf_coef=0.7, gamma=0.9)
    unrolls = collect_rollout(model)
    with torch.no_grad():
        unrolls.log_probs.add_(0.3 * torch.randn_like(unrolls.log_probs))  # as if another policy had acted
    model.max_grad_norm = float("inf")
    unroll_gradient(model, unrolls)
    gradients = {name: p.grad.clone() for name, p in model.policy.named_parameters() if p.grad is not None}

    actions = torch.cat((unrolls.actions, unrolls.actions[-1:]))
    new = model.policy.evaluate_sequence(unrolls.observations, actions, unrolls.core_state, unrolls.episode_starts)
    v = new.values.detach().double()
    loss = torch.zeros(())
    n_steps, batch = unrolls.rewards.shape
    for b in range(batch):
        rho = (new.log_probs[:-1, b] - unrolls.log_probs[:, b]).detach().double().exp().clamp(max=1)
        gamma = [0.0 if unrolls.episode_starts[t + 1, b] else 0.9 for t in range(n_steps)]
        vs = [*([0.0] * n_steps), v[-1, b].item()]
        for t in reversed(range(n_steps)):
            delta = rho[t] * (unrolls.rewards[t, b] + gamma[t] * v[t + 1, b] - v[t, b])
            vs[t] = (v[t, b] + delta + gamma[t] * rho[t] * (vs[t + 1] - v[t + 1, b])).item()
        for t in range(n_steps):
            advantage = (rho[t] * (unrolls.rewards[t, b] + gamma[t] * vs[t + 1] - v[t, b])).item()
            loss = loss - new.log_probs[t, b] * advantage + 0.7 * 0.5 * (vs[t] - new.values[t, b]) ** 2
            loss = loss - 0.03 * new.entropy[t, b]
    model.policy.zero_grad()
    loss.backward()
    for name, parameter in model.policy.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_the_bootstrap_step_does_not_reduce_the_sequences_per_micro_batch() -> None:
    frames = spaces.Box(0, 255, (8, 8, 3), np.uint8)
    lengths = (65, 51, 257, 1000)
    assert [probe_model(observation_space=frames).sequences_at_once(n) for n in lengths] == [4, 5, 1, 1]
    limited = probe_model(observation_space=frames, frames_at_once=256)  # a limit that is never exceeded
    assert [limited.sequences_at_once(n) for n in lengths] == [3, 5, 1, 1]


@pytest.mark.parametrize("n_groups", [1, 2])
def test_synchronous_runs_are_the_same_for_a_seed(n_groups: int) -> None:
    def weights(seed: int) -> torch.Tensor:
        env = GroupedVecEnv([make_vec_env("recall", 8 // n_groups, "0:100", seed + 50 * g) for g in range(n_groups)])
        model = IMPALA(
            "SRWMPolicy", env, n_steps=6, batch_size=30, synchronous=True, seed=seed, device="cpu", policy_kwargs=SMALL
        )
        model.learn(8 * 6 * 6)
        assert model._n_updates == 9
        assert len(model.rollout_buffer) == 3  # 48 unrolls, 9 batches of 5
        return weight_vector(model)

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize(("batch_size", "waiting_batches"), [(8, 1), (24, 1), (16, 3), (64, 1)])
def test_the_policy_lag_stays_within_the_queues_limit(
    batch_size: int, waiting_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = probe_model(synchronous=False, batch_size=batch_size, waiting_batches=waiting_batches)
    update = IMPALA._update

    def slow(self: IMPALA, batch: Unrolls) -> None:
        time.sleep(0.03)  # without a bound the actors would be far ahead
        update(self, batch)

    monkeypatch.setattr(IMPALA, "_update", slow)
    log = LogRecorder()
    model.set_logger(Logger(None, [log]))
    model.learn(4 * 8 * 10)
    # When an unroll begins, fewer than `waiting_batches` batches wait; the unrolls being played join them, and the
    # learner may be amid an update.
    batch = model.unrolls_per_batch
    most = (waiting_batches * batch - 1 + model.n_envs) // batch + 1
    assert 0 < max(log.column("impala/policy_lag_max")) <= most
    assert all(rho > 0 for rho in log.column("impala/rho_mean"))


def test_synchronous_updates_have_no_policy_lag_and_a_ratio_of_one() -> None:
    model = probe_model()
    log = LogRecorder()
    model.set_logger(Logger(None, [log]))
    model.learn(4 * 8 * 5)
    assert log.column("impala/policy_lag_max") == [0.0] * 4  # SB3 writes an update's values after the next rollout
    assert log.column("impala/rho_mean") == pytest.approx([1.0] * 4, rel=1e-3)
    for name in ("value_loss", "policy_gradient_loss", "entropy_loss", "loss", "grad_norm", "learning_rate"):
        assert len(log.column(f"train/{name}")) == 4


@pytest.mark.parametrize("synchronous", [True, False])
def test_an_error_in_an_environments_thread_ends_the_run_and_is_raised(synchronous: bool) -> None:
    env = GroupedVecEnv([DummyVecEnv([Probe, Probe]), DummyVecEnv([FailingProbe, FailingProbe])])
    model = IMPALA("SRWMPolicy", env, n_steps=8, policy_kwargs=SMALL, synchronous=synchronous, device="cpu")
    with pytest.raises(RuntimeError, match="the simulator is gone"):
        model.learn(10_000)
    assert running_threads() == []


@pytest.mark.parametrize("batch_size", [8, 32, 64])
def test_an_error_of_the_learner_ends_the_run_and_is_raised(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = probe_model(synchronous=False, batch_size=batch_size)

    def fail(*_: Any) -> Any:
        raise RuntimeError("the learner is gone")

    monkeypatch.setattr(IMPALA, "_parts", fail)
    with pytest.raises(RuntimeError, match="the learner is gone"):
        model.learn(10**7)
    assert running_threads() == []
    monkeypatch.undo()
    model.learn(128)  # the model is still usable
    assert model._n_updates >= 1


@pytest.mark.parametrize("synchronous", [True, False])
def test_an_error_in_a_callback_ends_the_run_and_is_raised(synchronous: bool) -> None:
    model = probe_model(synchronous=synchronous)

    def fail(*_: Any) -> bool:
        raise KeyError("the callback is gone")

    with pytest.raises(KeyError, match="the callback is gone"):
        model.learn(10_000, fail)
    assert running_threads() == []


def test_an_error_in_the_last_update_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    model = probe_model(synchronous=False)
    update = IMPALA._update

    def late(self: IMPALA, batch: Unrolls) -> None:
        time.sleep(0.5)  # the actors have finished by now
        update(self, batch)
        raise RuntimeError("the learner is gone")

    monkeypatch.setattr(IMPALA, "_update", late)
    with pytest.raises(RuntimeError, match="the learner is gone"):
        model.learn(4 * 8)


@pytest.mark.parametrize("batch_size", [None, 8])
def test_what_an_interrupted_rollout_left_is_learned_without_waiting_for_a_learner(batch_size: int | None) -> None:
    model = probe_model(synchronous=True, batch_size=batch_size)
    model.ent_coef = float("nan")
    with pytest.raises(FaultError):
        model.learn(4 * 8)
    left = len(model.rollout_buffer)
    model.rollout_buffer.put(collect_rollout(model))
    model.ent_coef = 0.01
    model.learn(4 * 8)
    assert model._n_updates == (left + 4 + 4) // model.unrolls_per_batch


def test_callbacks_see_the_weights_that_learn_ends_with(tmp_path: Path) -> None:
    class SavesAtTheEnd(BaseCallback):
        model: IMPALA

        def _on_step(self) -> bool:
            return True

        def _on_training_end(self) -> None:
            self.seen = self.model._n_updates
            self.model.save(tmp_path / "end.zip")

    for wrap in (lambda callback: callback, lambda callback: [callback]):
        model, callback = probe_model(synchronous=False), SavesAtTheEnd()
        model.learn(4 * 8 * 6, wrap(callback))
        assert callback.seen == model._n_updates == 6
        assert torch.equal(weight_vector(IMPALA.load(tmp_path / "end.zip")), weight_vector(model))
    assert model.learn(4 * 8, lambda *_: True)._n_updates == 7


def test_a_wrapper_around_groups_is_not_bypassed() -> None:
    class Double(VecEnvWrapper):
        def reset(self) -> Any:
            return self.venv.reset()

        def step_wait(self) -> Any:
            obs, rewards, dones, infos = self.venv.step_wait()
            return obs, 2 * rewards, dones, infos

    model = IMPALA(
        "SRWMPolicy", Double(probe_env(n_groups=2)), n_steps=4, policy_kwargs=SMALL, synchronous=True, device="cpu"
    )
    assert collect_rollout(model).rewards[:, 0].tolist() == [2, 4, 6, 8]


def test_settings_of_the_optimizer_leave_the_others_as_they_are() -> None:
    model = probe_model(rms_prop_eps=0.5, policy_kwargs={"optimizer_kwargs": {"weight_decay": 1e-4}})
    assert isinstance(model.policy.optimizer, torch.optim.RMSprop)
    settings = model.policy.optimizer.defaults
    assert (settings["alpha"], settings["eps"], settings["weight_decay"]) == (0.99, 0.5, 1e-4)


def test_settings_are_changed_where_a_zip_is_loaded_or_refused(tmp_path: Path) -> None:
    probe_model().save(tmp_path / "model.zip")
    assert IMPALA.load(tmp_path / "model.zip", vtrace_lambda=0.5).gae_lambda == 0.5
    assert IMPALA.load(tmp_path / "model.zip").gae_lambda == 1.0
    with pytest.raises(UserError, match="vtrace_lambda must lie in"):
        IMPALA.load(tmp_path / "model.zip", vtrace_lambda=2)
    with pytest.raises(UserError, match="rms_prop_eps is part of the optimizer's state"):
        IMPALA.load(tmp_path / "model.zip", rms_prop_eps=0.9)
    with pytest.raises(UserError, match="IMPALA has no setting 'gama'; did you mean 'gamma'"):
        IMPALA.load(tmp_path / "model.zip", gama=0.9)


def test_the_default_optimizer_is_the_papers_rmsprop() -> None:
    optimizer = probe_model().policy.optimizer
    assert isinstance(optimizer, torch.optim.RMSprop)
    assert {name: optimizer.defaults[name] for name in ("alpha", "eps", "momentum")} == {
        "alpha": 0.99,
        "eps": 0.01,
        "momentum": 0,
    }
    adam = probe_model(policy_kwargs={"optimizer_class": torch.optim.Adam}).policy.optimizer
    assert isinstance(adam, torch.optim.Adam)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_steps": 0}, "n_steps must be"),
        ({"batch_size": 12}, "batch_size 12 counts steps .* 12 unrolls are 96"),
        ({"waiting_batches": 0}, "waiting_batches must be"),
        ({"vtrace_lambda": 1.5}, "vtrace_lambda must lie"),
        ({"gamma": -1}, "gamma must lie"),
        ({"rho_clip": 0}, "rho_clip must be above 0"),
        ({"c_clip": -1.0}, "c_clip must be above 0"),
    ],
)
def test_invalid_settings_raise_a_one_line_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        probe_model(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("synchronous", [True, False])
def test_a_small_memory_task_is_learned(synchronous: bool) -> None:
    kwargs = {"n_symbols": 2, "delay": 2}
    env = GroupedVecEnv([make_vec_env("recall", 16, "0:100000", 16 * g, env_kwargs=kwargs) for g in range(2)])
    model = IMPALA(
        "SRWMPolicy", env, learning_rate=2e-3, n_steps=8, batch_size=128, synchronous=synchronous, seed=1,
        policy_kwargs=SMALL, stats_window_size=500, device="cpu",
    )  # fmt: skip
    model.learn(50_000, StopAtMeanReturn(0.92))
    assert mean_return(model) > 0.9


def unrolls_of(n: int, version: int = 0) -> Unrolls:
    box = spaces.Dict(a=spaces.Box(0, 255, (2,), np.uint8), b=spaces.Box(-1, 1, (1,), np.float32))
    unrolls = Unrolls.empty(3, n, box, spaces.Discrete(4), torch.randn(1, n, 5), version)
    unrolls.rewards.copy_(torch.arange(3 * n).view(3, n))
    return unrolls


def test_the_queue_is_first_in_first_out_for_blocks_of_any_size() -> None:
    queue = UnrollQueue(3)
    for version, n in enumerate((3, 1, 4)):
        queue.put(unrolls_of(n, version))
    assert len(queue) == 8
    first, second = queue.take(2), queue.take(4)
    assert first is not None
    assert second is not None
    assert first.versions.tolist() == [0, 0]
    assert second.versions.tolist() == [0, 1, 2, 2]
    assert second.rewards[1].tolist() == [5, 1, 4, 5]
    assert second.observations["a"].shape == (4, 4, 2)  # type: ignore[index,call-overload]
    assert queue.take(3) is None
    assert len(queue) == 2


def test_a_learner_is_idle_once_it_has_used_all_whole_batches() -> None:
    queue, used = UnrollQueue(3), []
    queue.put(unrolls_of(5))

    def learn() -> None:
        while (batch := queue.take(2, wait=True)) is not None:
            time.sleep(0.05)
            used.append(batch.n)

    learner = threading.Thread(target=learn)
    learner.start()
    for n_batches in (2, 3):
        queue.wait_until_idle(2)
        assert len(used) == n_batches
        queue.put(unrolls_of(1))
    queue.finish()
    learner.join()
    queue.close(RuntimeError("the learner is gone"))
    with pytest.raises(RuntimeError, match="gone"):
        queue.wait_until_idle(2)


def test_a_queue_restored_from_a_checkpoint_returns_the_same_unrolls() -> None:
    queue = UnrollQueue(3)
    queue.put(unrolls_of(4, 7))
    queue.take(1)
    restored = UnrollQueue(3)
    restored.from_tree(queue.to_tree(), torch.device("cpu"))
    unrolls = queue.take(3)
    assert unrolls is not None
    torch.testing.assert_close(restored.take(3), unrolls, rtol=0, atol=0)  # dtypes as well


def test_copy_weights_copies_parameters_and_buffers() -> None:
    model = IMPALA("SRWMPolicy", DummyVecEnv([Probe] * 2), n_steps=4, device="cpu")
    policy = model.policy
    policy.register_buffer("statistics", torch.zeros(3))
    copy = deepcopy(policy)
    with torch.no_grad():
        for number, tensor in enumerate((*policy.parameters(), policy.statistics)):
            tensor.fill_(number)
    copy_weights(copy, policy)
    copied = copy.state_dict()
    assert all(torch.equal(tensor, copied[name]) for name, tensor in policy.state_dict().items())
    assert copied["statistics"].unique().item() > 0
    copy.register_buffer("more", torch.zeros(1))
    with pytest.raises(RuntimeError, match=r'Missing key.*"more"'):
        copy_weights(copy, policy)
