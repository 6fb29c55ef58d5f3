"""RepeatPrevious: rewards equal popgym's for the same cards and answers."""

import gymnasium
import numpy as np
import pytest

from srwm_rl.envs import make_batch_env
from srwm_rl.envs.tasks import RepeatPreviousBatch
from srwm_rl.errors import UserError

# One episode of popgym 1.0.7's popgym-RepeatPreviousEasy-v0: suits observed, answers, rewards (- 0 +, times 1/48).
SUITS = "3130201221210132022300300131130022131033012301323221"
ANSWERS = "200122230202021012102122011012112012001003302230102"
REWARDS = "000-----+--+-++++--++---+--++-++-+-+----++++-++++-+"


def digits(text: str) -> np.ndarray:
    return np.array([int(digit) for digit in text])


def with_cards(suits: np.ndarray, **settings: int) -> RepeatPreviousBatch:
    """Return an environment with these cards in its present episode."""
    env = RepeatPreviousBatch(1, **settings)
    env.reset()
    env._suits = suits[None]
    return env


def test_rewards_equal_those_of_an_episode_recorded_in_popgym() -> None:
    env, suits = with_cards(digits(SUITS)), digits(SUITS)
    for t, (answer, sign) in enumerate(zip(digits(ANSWERS), REWARDS, strict=True)):
        assert env.observe()[0].tolist() == np.eye(4)[suits[t]].tolist()
        step = env.step(np.array([answer]))
        assert step.rewards[0] == pytest.approx({"-": -1 / 48, "0": 0.0, "+": 1 / 48}[sign])
        assert step.terminated[0] == (t == 50)
    assert step.final_obs is not None
    assert step.final_obs[0].argmax() == suits[51]


@pytest.mark.parametrize(("name", "settings"), [("Easy", {}), ("Medium", {"n_decks": 2, "k": 32})])
def test_rewards_equal_those_of_popgym(name: str, settings: dict[str, int]) -> None:
    pytest.importorskip("popgym")
    popgym_env = gymnasium.make(f"popgym-RepeatPrevious{name}-v0")
    for seed in range(3):
        obs, _ = popgym_env.reset(seed=seed)
        rng = np.random.default_rng(seed)
        cards, answers, rewards, terminated = [obs], [], [], False
        while not terminated:
            right = cards[-settings.get("k", 4)] if len(cards) >= settings.get("k", 4) else 0
            answers.append(int(right if rng.random() < 0.5 else rng.integers(4)))
            obs, reward, terminated, _, _ = popgym_env.step(answers[-1])
            cards.append(obs)
            rewards.append(reward)
        env = with_cards(np.array(cards), **settings)
        steps = [env.step(np.array([answer])) for answer in answers]
        assert [float(step.rewards[0]) for step in steps] == pytest.approx(rewards)
        assert [bool(step.terminated[0]) for step in steps] == [False] * (len(answers) - 1) + [True]


def test_popgyms_environment_works_by_its_id() -> None:
    pytest.importorskip("popgym")
    env = make_batch_env("popgym:popgym-RepeatPreviousEasy-v0", 3, "0:10", 0)
    env.reset()
    total, cards = np.zeros(3), [env.observe()]
    for t in range(51):
        step = env.step(np.asarray(cards[-4] if t >= 3 else cards[0]))
        total += step.rewards
        cards.append(step.obs)
    assert total == pytest.approx(np.ones(3))
    assert step.terminated.all()


@pytest.mark.parametrize(("k", "n_decks"), [(1, 1), (4, 1), (32, 2)])
def test_perfect_play_returns_one_and_wrong_answers_minus_one(k: int, n_decks: int) -> None:
    env = RepeatPreviousBatch(40, seed=1, k=k, n_decks=n_decks)
    cards, total = [env.reset().argmax(1)], np.zeros(40)
    right = np.arange(40) < 20
    for _ in range(52 * n_decks - 1):
        card = cards[-k] if len(cards) >= k else cards[0]
        step = env.step(np.where(right, card, (card + 1) % 4))
        total += step.rewards
        cards.append(step.obs.argmax(1))
    assert step.terminated.all()
    assert total == pytest.approx(np.where(right, 1.0, -1.0), abs=1e-5)


def test_random_play_returns_minus_a_half() -> None:
    env, rng = RepeatPreviousBatch(500), np.random.default_rng(0)
    env.reset()
    total = sum(env.step(rng.integers(0, 4, 500)).rewards.sum() for _ in range(51)) / 500
    assert total == pytest.approx(RepeatPreviousBatch.score_range()[0], abs=0.03)  # standard error 0.006


def test_every_deck_is_complete_and_shuffled() -> None:
    env = RepeatPreviousBatch(2000, n_decks=2)
    cards = env._suits
    assert all((np.bincount(deck, minlength=4) == 26).all() for deck in cards)
    assert np.abs(np.bincount(cards[:, 0], minlength=4) / 2000 - 0.25).max() < 0.04
    same_next = (cards[:, :-1] == cards[:, 1:]).mean()
    assert same_next == pytest.approx(25 / 103, abs=0.005)  # drawn without replacement


def test_previous_actions_could_serve_as_memory_and_are_not_inputs_by_default() -> None:
    assert RepeatPreviousBatch.memory_inputs == ("step",)


@pytest.mark.parametrize("settings", [{"k": 0}, {"k": 52}, {"n_decks": 0}, {"k": True}])
def test_invalid_arguments_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(UserError):
        RepeatPreviousBatch(2, **settings)
