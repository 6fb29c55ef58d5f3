"""Few-shot episodes: the protocol, splits, states, and answers without learning."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from srwm_rl.envs.fewshot.episodes import draw_distinct
from srwm_rl.envs.images.data import load_images
from srwm_rl.envs.make import make_vec_env
from srwm_rl.envs.tasks import TASKS
from srwm_rl.errors import UserError
from tests.envs.fewshot.fewshot_twin import steps_of

FewShotBatch = TASKS["fewshot"]
LEVELS = np.arange(200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of images with 8 classes of 12 images in each split; each image is one colour of its own."""
    root, number = tmp_path_factory.mktemp("data"), 0
    for split in ("train", "val", "test"):
        for i in range(8):
            (root / split / f"{split}{i}").mkdir(parents=True)
            for j in range(12):
                number += 1
                pixels = np.full((28, 28), number // 2, np.uint8)
                pixels[0, 0] = number % 2
                Image.fromarray(pixels).save(root / split / f"{split}{i}" / f"{j}.png")
    return root


def played(env, level):
    """Play a level with right answers; return what `steps_of` returns, of the observations."""
    obs = env.reset(levels=[level])
    steps = []
    while True:
        (answer,), about = env.answers(), env.asked_about()
        told = int(obs["label"][0].argmax()) if obs["label"][0].any() else None
        index = env.episodes(np.array([level])).image[0, len(steps)]
        assert np.array_equal(env.images[index], obs["image"][0])
        place = (int(about["seen"][0]), int(about["part"][0]), bool(about["query"][0]))
        steps.append((int(index), told, None if answer < 0 else int(answer), *place))
        step = env.step(np.maximum(env.answers(), 0))
        assert (step.rewards[0] > 0) == (answer >= 0)
        if step.terminated[0]:
            return steps
        obs = step.obs


@pytest.mark.parametrize("labels", ["ask", "sync", "delayed"])
@pytest.mark.parametrize("data", ["glyphs", "two"])
def test_episodes_follow_the_protocol_of_a_literal_twin(labels, data, folder):
    kwargs = {"data": f"glyphs,{folder}", "cut": 3} if data == "two" else {}
    env = FewShotBatch(1, ways=4, shots="2:3", queries=2, labels=labels, **kwargs)
    for level in range(12):
        steps = played(env, level)
        episode = env.episodes(np.array([level]))
        n_parts = 1 + (data == "two")
        parts, queries = ([[] for _ in range(n_parts)] for _ in range(2))
        image_before = None
        for t in range(int((episode.image[0] >= 0).sum())):
            entry = int(episode.image[0, t]), int(episode.label[0, t])
            if episode.query[0, t]:
                queries[episode.part[0, t]].append(entry)
            elif entry[0] != image_before:
                parts[episode.part[0, t]].append(entry)
            image_before = entry[0]
        assert steps == steps_of(parts, queries, labels)
        assert [len(part) for part in queries] == [2] * n_parts
        for part, asked in zip(parts, queries, strict=True):
            assert len({image for image, _ in part + asked}) == len(part) + len(asked), "an image is shown once"
            assert 8 - kwargs.get("cut", 0) <= len(part) <= 12
            if data != "two":
                counts = np.bincount([label for _, label in part], minlength=4)
                assert len(set(counts)) == 1
                assert counts[0] in (2, 3)


def test_the_official_sequential_setting_cuts_up_to_60_of_75_examples(folder):
    pytest.importorskip("sklearn")
    env = FewShotBatch(1, data="glyphs,digits", shots=15, queries=0, labels="delayed", cut=60)
    episodes = env.episodes(np.arange(3000))
    shown = episodes.image >= 0
    lengths = np.stack([(shown & (episodes.part == part)).sum(axis=1) for part in (0, 1)])
    assert (lengths.min(), lengths.max()) == (15, 75)
    assert abs(lengths.mean() - 45) < 1
    first = episodes.data_set[:, 0]
    assert abs(first.mean() - 0.5) < 0.05
    assert (episodes.asked == shown).all()
    assert (episodes.told[:, 0] == 0).all()
    assert (episodes.told[:, 1:] == episodes.label[:, :-1])[shown[:, 1:]].all()


@pytest.mark.parametrize("data", ["glyphs", "folder"])
def test_splits_share_no_class_and_levels_choose_them(data, folder):
    env = FewShotBatch(1, shots=2, data=str(folder) if data == "folder" else data)
    (splits,) = env._data_sets
    for number, classes in enumerate(splits):
        images = env.episodes(LEVELS + 1_000_000 * number).image
        shown = images[images >= 0]
        assert shown.min() >= classes.starts[0]
        assert shown.max() < classes.starts[-1] + classes.counts[-1]
    assert all(a.starts[-1] + a.counts[-1] == b.starts[0] for a, b in itertools.pairwise(splits))


def test_episodes_drawn_ahead_are_those_of_their_levels():
    env, calls = FewShotBatch(3, "0:1000", seed=5, ways=2, shots=1), []
    draw = env.episodes
    env.episodes = lambda levels: calls.append(len(levels)) or draw(levels)
    n_begun = 0
    for _ in range(200):
        step = env.step(np.zeros(3, np.int64))
        n_begun += step.terminated.sum()
        for i in np.flatnonzero(step.terminated):
            own = draw(env.level_seed()[i : i + 1])
            assert all(np.array_equal(now[i, :-1], array[0]) for now, array in zip(env._episodes, own, strict=True))
    assert 3 * len(calls) < n_begun
    env.reset(levels=np.array([7, 8, 9]))  # none follows
    assert calls[-1] == 3
    assert env.level_seed().tolist() == [7, 8, 9]


def test_classes_labels_and_queries_are_uniform():
    env = FewShotBatch(1, ways=3, shots=1, queries=1, labels="sync", outputs=5)
    episodes = env.episodes(np.arange(6000))
    assert np.abs(np.bincount(episodes.label[:, -1], minlength=5) / 6000 - 0.2).max() < 0.025
    classes = episodes.image[:, 0] // 20
    assert len(set(classes)) > 3700  # in 6000 draws of 6256: 1564 in four turns
    assert abs((episodes.label[:, -1] == episodes.label[:, 0]).mean() - 1 / 3) < 0.03


def test_draw_distinct_draws_permutations_evenly():
    keys = np.random.default_rng(0).integers(0, 2**63, (60_000, 3)).astype(np.uint64)
    drawn = draw_distinct(keys, np.full(60_000, 3))
    codes = drawn @ [9, 3, 1]
    assert (np.sort(drawn, axis=1) == [0, 1, 2]).all()
    assert np.abs(np.unique(codes, return_counts=True)[1] / 10_000 - 1).max() < 0.05


def steps_of_env(env, n_steps):
    rng, seen = np.random.default_rng(0), []
    for _ in range(n_steps):
        step = env.step(rng.integers(0, env.action_space.n, env.n_envs))
        seen.append([*step.obs.values(), step.rewards, step.terminated, *step.info.values(), env.answers()])
    return seen


def equal(first, second):
    return all(np.array_equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


def test_a_restored_state_continues_exactly():
    env = FewShotBatch(8, "0:1000", 1)
    env.reset()
    steps_of_env(env, 25)
    env.reset(np.arange(8) < 2, np.full(8, 2_000_500))
    steps_of_env(env, 5)
    state = env.get_state()
    steps = steps_of_env(env, 60)
    restored = FewShotBatch(8, "0:1000", 99)
    restored.set_state(state)
    assert equal(steps, steps_of_env(restored, 60))
    for settings in ({"shots": 3}, {"labels": "sync"}, {"queries": 2}, {"ways": 6}):
        with pytest.raises(UserError):
            FewShotBatch(8, "0:1000", 1, **settings).set_state(state)


def test_a_batch_plays_what_single_environments_play():
    levels = np.array([3, 1_000_003, 2_000_003, 77])
    batch = FewShotBatch(4)
    obs = batch.reset(levels=levels)
    for i, level in enumerate(levels):
        single = FewShotBatch(1)
        alone = single.reset(levels=[level])
        assert all(np.array_equal(obs[key][i], alone[key][0]) for key in obs)
        joint, own = batch.episodes(levels), single.episodes(levels[i : i + 1])
        assert all(np.array_equal(a[i], b[0]) for a, b in zip(joint, own, strict=True))


def test_episodes_are_the_same_in_another_process():
    code = (
        "import hashlib, numpy as np; from srwm_rl.envs.tasks import TASKS\n"
        "env = TASKS['fewshot'](4, '0:100', 3); obs = env.reset(); parts = [obs['image'].tobytes()]\n"
        "for _ in range(30): parts.append(env.step(np.zeros(4, int)).obs['image'].tobytes())\n"
        "print(hashlib.sha256(b''.join(parts)).hexdigest())"
    )
    run = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert run[0].stdout == run[1].stdout
    assert len(run[0].stdout.strip()) == 64


def test_an_observation_after_the_end_is_empty_and_returns_are_accuracies():
    env = FewShotBatch(3, ways=3, shots=1)
    env.reset()
    total = 0.0
    while True:
        step = env.step(np.maximum(env.answers(), 0))
        total += step.rewards[0]
        if step.terminated[0]:
            break
    assert total == pytest.approx(1.0)
    assert not step.final_obs["image"][0].any()
    assert not step.final_obs["label"][0].any()


def test_answers_reach_stable_baselines3_and_do_not_depend_on_actions():
    env = make_vec_env("fewshot", 4, "0:100", 0, inputs=())
    obs = env.reset()
    assert obs["image"].shape == (4, 28, 28, 1)
    assert env.answers().shape == (4,)
    assert FewShotBatch.score_range(ways=4) == (0.25, 1.0)


def test_references_without_learning():
    settings = {"shots": 4, "queries": 1}
    returns = FewShotBatch.reference_returns(range(2_000_000, 2_000_200), **settings)
    means = {name: float(values.mean()) for name, values in returns.items()}
    assert means["chance"] == pytest.approx(0.2)
    assert 0.2 < means["labels alone"] < means["nearest pixels"] < means["blurred cosine"] < 0.95


def test_labels_alone_know_what_can_be_known_of_new_classes():
    from srwm_rl.envs.fewshot.baselines import reference_answers

    env = FewShotBatch(1, ways=5, shots=1, queries=1)
    episodes = env.episodes(np.arange(300))
    right = reference_answers(episodes, env.images, env.protocol)["labels alone"]
    new = episodes.asked & (episodes.seen == 0)
    assert right[new].mean() == pytest.approx((1 / 5 + 1 / 4 + 1 / 3 + 1 / 2 + 1) / 5)
    assert right[episodes.query & episodes.asked].mean() == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"ways": 1}, "2 or more"),
        ({"ways": 2000}, "1 to 1000"),
        ({"ways": 140}, "val classes"),
        ({"shots": "5:1"}, "not below"),
        ({"shots": 0}, "above 0"),
        ({"shots": "1:x"}, "range"),
        ({"shots": 20}, "fewer than shots"),
        ({"labels": "synch"}, "sync"),
        ({"labels": "sync", "queries": 0}, "queries"),
        ({"cut": 5, "shots": 1}, "cut"),
        ({"outputs": 3}, "outputs"),
        ({"size": 4}, "size"),
        ({"data": "glyphs,digits,glyphs"}, "comma"),
        ({"data": "no_such_folder"}, "no data"),
        ({"data": 5}, "data"),
        *(({name: None}, f"{name} must be a whole number") for name in ("queries", "cut", "outputs", "size")),
    ],
)
def test_invalid_settings_are_refused_in_one_line(settings, text):
    with pytest.raises(UserError, match=text) as error:
        FewShotBatch(2, **settings)
    assert "\n" not in str(error.value)


def test_sets_are_loaded_once():
    assert load_images("glyphs") is load_images("glyphs")
