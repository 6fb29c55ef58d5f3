"""Recording: the steps in order, and a digest that detects every change."""

from hashlib import sha256
from itertools import islice

import numpy as np
import torch

from srwm_rl import SRWMPolicy
from srwm_rl.agents.evaluation.interventions import FrozenStateAgent, column_part, head_part
from srwm_rl.agents.evaluation.play_levels import play_levels
from srwm_rl.agents.evaluation.recording import Introspector, collect, play, update
from srwm_rl.envs import make_levels_env
from srwm_rl.nn.diagnostics import head_norms


def policy() -> SRWMPolicy:
    env = make_levels_env("recall", 1, "0:1", 1, 0)
    torch.manual_seed(0)
    return SRWMPolicy(env.observation_space, env.action_space, lambda _: 0.0, core_kwargs={"hidden_size": 16})


def test_a_recording_has_the_same_episodes_as_an_evaluation() -> None:
    agent = policy()
    torch.manual_seed(3)
    episodes = play_levels(agent, make_levels_env("recall", 1, "5:9", 1, 0))
    torch.manual_seed(3)
    env = make_levels_env("recall", 1, "5:9", 1, 0)
    arrays = collect(play(env, Introspector(agent), range(5, 9), sha256()))
    ends = np.flatnonzero(arrays["dones"])
    assert len(ends) == len(episodes) == 4
    np.testing.assert_array_equal(np.flatnonzero(arrays["starts"]), [0, *(ends[:-1] + 1)])
    np.testing.assert_array_equal(np.diff([-1, *ends]), [episode.length for episode in episodes])
    assert arrays["levels"][ends].tolist() == [episode.level for episode in episodes]
    assert arrays["rewards"][ends].tolist() == [episode.episode_return for episode in episodes]
    assert arrays["solved"][ends].tolist() == [int(bool(episode.solved)) for episode in episodes]
    assert (np.delete(arrays["solved"], ends) == -1).all()
    assert not arrays["drift"][arrays["starts"]].any()
    assert arrays["drift"][~arrays["starts"]].all()
    assert arrays["edit"].shape == (len(arrays["rewards"]), 2, 8)
    assert arrays["rates"].shape == (len(arrays["rewards"]), 2, 8, 4)
    assert "std" not in arrays


def test_a_recording_can_be_truncated() -> None:
    env = make_levels_env("recall", 1, "5:9", 1, 0)
    arrays = collect(islice(play(env, Introspector(policy()), range(5, 9), sha256()), 3))
    assert {len(array) for array in arrays.values()} == {3}
    assert not arrays["dones"].any()


def test_the_digest_depends_on_values_types_shapes_and_names() -> None:
    base = {"a": np.zeros((1, 2), np.float32), "b": np.ones((1, 2), np.float32)}
    variants = (
        base | {"a": np.array([[0, 1e-30]], np.float32)},
        base | {"a": np.zeros((1, 2), np.int32)},
        base | {"a": np.zeros((2, 1), np.float32)},
        {"a": base["a"], "c": base["b"]},
        {"b": base["a"], "a": base["b"]},
    )
    digests = set()
    for obs in (base, *variants):
        update(digest := sha256(), obs)
        digests.add(digest.hexdigest())
    assert len(digests) == 1 + len(variants)
    update(again := sha256(), {"b": base["b"], "a": base["a"]})
    assert again.hexdigest() in digests


def test_each_steps_link_is_the_digest_so_far() -> None:
    digest, seen = sha256(), []
    env = make_levels_env("recall", 1, "5:9", 1, 0)
    links = collect(islice(play(env, Introspector(policy()), range(5, 9), digest, seen.append), 3))["links"]
    expected = sha256()
    for obs, link in zip(seen, links, strict=True):
        update(expected, obs)
        assert int(link) == int.from_bytes(expected.digest()[:8], "little")
    assert expected.hexdigest() == digest.hexdigest()


def test_suppressed_edits_are_recorded_as_they_act() -> None:
    """The recording of an intervention is what the intervened agent does, and shows the edits that are kept."""
    model = policy()
    part = column_part(model, "query,beta") | head_part(model, 0, 1)
    twin, state = FrozenStateAgent(model, part=part), None
    watched = Introspector(model, deterministic=True, frozen=part)
    env = make_levels_env("recall", 1, range(5, 9), 1, 0)
    obs, start = env.reset(), True
    for _ in range(20):
        before = np.zeros((1, 1)) if state is None or start else state[0]
        actions, state = twin.predict(obs, state, np.array([start]), deterministic=True)
        action, arrays = watched(obs, start)
        np.testing.assert_array_equal(action, actions)
        np.testing.assert_array_equal(watched._state.numpy(), state[0])
        norms = head_norms(model.core, torch.from_numpy(state[0] - before))[:, 0]
        np.testing.assert_allclose(arrays["edit"], norms, rtol=1e-5, atol=1e-7)
        assert not arrays["edit"][0, 1].any()
        obs, _, (start,), _ = env.step(action)
