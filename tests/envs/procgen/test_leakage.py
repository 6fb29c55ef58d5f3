"""Held-out levels whose first frame is that of a training level, counted on ProcGen itself."""

from srwm_rl.envs.procgen.leakage import first_frames, same_first_frame


def test_ten_of_200_held_out_mazes_and_one_leaper_have_the_first_frame_of_a_training_level() -> None:
    # Counted independently by comparing the raw frames of procgen-mirror 0.10.7.
    assert len(same_first_frame("maze", "easy", range(200), range(1000, 1200))) == 10
    assert same_first_frame("leaper", "easy", range(200), range(1000, 1200)) == [1122]
    assert same_first_frame("bigfish", "easy", range(40), range(1000, 1040)) == []


def test_a_levels_first_frame_does_not_depend_on_the_other_levels_asked_for() -> None:
    frames = first_frames("coinrun", "easy", list(range(70)))  # more than one batch of environments
    assert len(set(frames)) == 70
    assert first_frames("coinrun", "easy", [69, 3]) == [frames[69], frames[3]]
    assert same_first_frame("coinrun", "easy", [5, 6], [6, 7]) == [6]
