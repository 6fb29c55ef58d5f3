"""Held-out levels that look like training levels, counted on ProcGen itself."""

from srwm_rl.envs.procgen.leakage import first_frames, same_first_frame


def test_ten_of_two_hundred_easy_mazes_and_one_leaper_begin_like_training_levels() -> None:
    # Counted independently by comparing the raw frames of procgen-mirror 0.10.7.
    assert len(same_first_frame("maze", "easy", range(200), range(1000, 1200))) == 10
    assert same_first_frame("leaper", "easy", range(200), range(1000, 1200)) == [1122]
    assert same_first_frame("bigfish", "easy", range(40), range(1000, 1040)) == []


def test_a_level_begins_like_itself_whatever_is_asked_with_it() -> None:
    together = first_frames("coinrun", "easy", list(range(70)))  # more than step together
    assert len(set(together)) == 70
    assert first_frames("coinrun", "easy", [69, 3]) == [together[69], together[3]]
    assert same_first_frame("coinrun", "easy", [5, 6], [6, 7]) == [6]
