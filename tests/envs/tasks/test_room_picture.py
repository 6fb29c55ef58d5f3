"""The picture of the hidden-controls room: agent and goal stand where the state says, keys show what actions do."""

import gymnasium
import numpy as np
import pytest

from srwm_rl.envs.tasks import HiddenControlsBatch
from srwm_rl.envs.tasks.room_picture import _AGENT, _GOAL, ROOM, SIZE
from srwm_rl.errors import UserError


def centre(picture: np.ndarray, colour: tuple[int, int, int]) -> tuple[float, float]:
    """Return the mean row and column of a colour's pixels."""
    rows, columns = np.nonzero((picture == colour).all(-1))
    return float(rows.mean()), float(columns.mean())


def cell_of(picture: np.ndarray, colour: tuple[int, int, int], size: int) -> tuple[int, int]:
    row, column = centre(picture, colour)
    return int((row - 6) * size / ROOM), int((column - (SIZE - ROOM) / 2) * size / ROOM)


@pytest.mark.parametrize("size", [3, 5])
def test_agent_and_goal_are_where_the_state_says(size: int) -> None:
    env = HiddenControlsBatch(2, "0:50", size=size, render_mode="rgb_array")
    env.reset()
    rng = np.random.default_rng(0)
    for _ in range(30):
        state, pictures = env.get_state(), env.render()
        assert pictures.shape == (2, SIZE, SIZE, 3)
        for i, picture in enumerate(pictures):
            assert cell_of(picture, _GOAL, size) == tuple(state["goal"][i])
            if state["attempt_clock"][i] == 0:  # later, the line from the last cell has the agent's colour
                assert cell_of(picture, _AGENT, size) == tuple(state["agent"][i])
        env.step(rng.integers(0, 4, 2))


def test_the_line_comes_from_the_cell_before() -> None:
    env = HiddenControlsBatch(1, "0:50", render_mode="rgb_array")
    env.reset()
    before = env.get_state()["agent"][0]
    for action in range(4):
        env.reset(levels=[7])
        before = env.get_state()["agent"][0]
        env.step(np.array([action]))
        state = env.get_state()
        if state["attempt_clock"][0] == 1 and (state["agent"][0] != before).any():
            row, column = centre(env.render()[0], _AGENT)
            cell = ROOM / env.size
            shift = (row - 6) / cell - 0.5 - state["agent"][0][0], (column - 56) / cell - 0.5 - state["agent"][0][1]
            assert np.dot(shift, before - state["agent"][0]) > 0.05
            return
    pytest.fail("no move changed the cell")


def test_keys_follow_the_levels_controls_and_the_flash_turns_them() -> None:
    def keys(env: HiddenControlsBatch, level: int) -> np.ndarray:
        env.reset(levels=[level])
        return env.render()[0, 430:]

    env = HiddenControlsBatch(1, "all", render_mode="rgb_array")
    controls = {tuple(env._controls[0]): keys(env, level) for level in range(40) if [env.reset(levels=[level])]}
    assert len(controls) == len({picture.tobytes() for picture in controls.values()}) > 10
    flashing = HiddenControlsBatch(1, "all", flash=2, render_mode="rgb_array")
    flashing.reset(levels=[3])
    pictures = []
    for _ in range(6):
        pictures.append((flashing._flashes()[0][0], flashing.render()[0]))
        flashing.step(np.array([0]))
    shown = {bool(flash): picture for flash, picture in pictures}
    assert (shown[True][3, 100:400] != shown[False][3, 100:400]).any()
    assert len({picture[430:].tobytes() for _, picture in pictures}) == 2


def test_a_render_mode_is_needed_and_checked() -> None:
    with pytest.raises(UserError, match="render_mode='rgb_array'"):
        HiddenControlsBatch(1).render()
    with pytest.raises(UserError, match="no render_mode 'human'"):
        HiddenControlsBatch(1, render_mode="human")


def test_the_pictures_change_nothing_else_and_gymnasium_has_them() -> None:
    plain, drawn = HiddenControlsBatch(3, "0:9"), HiddenControlsBatch(3, "0:9", render_mode="rgb_array")
    drawn.set_state(plain.get_state())
    env = gymnasium.make("srwm_rl/HiddenControls-v0", render_mode="rgb_array", n_moves=8)
    env.reset(seed=0)
    assert env.render().shape == (SIZE, SIZE, 3)
    vector = gymnasium.make_vec("srwm_rl/HiddenControls-v0", 2, vectorization_mode="vector_entry_point")
    assert vector.render() is None
    assert gymnasium.make("srwm_rl/HiddenControls-v0").render_mode is None
    with pytest.raises(UserError, match="recall has no pictures"):
        gymnasium.make("srwm_rl/Recall-v0", render_mode="rgb_array")
