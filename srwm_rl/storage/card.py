"""The card in a shared model file: how the agent was trained and what it scores, as declared data of bounded size."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

Text = Annotated[str, Meta(pattern=r"\A[ -~]{0,4000}\Z")]
Finite = Annotated[float, Meta(ge=-1e12, le=1e12)]
Count = Annotated[int, Meta(ge=0, le=10**15)]


class Interval(Struct, forbid_unknown_fields=True):
    """A mean and the ends of its 95% bootstrap interval over levels; None: unknown, of a single level."""

    mean: Finite
    low: Finite | None
    high: Finite | None


class Score(Struct, forbid_unknown_fields=True, rename={"returns": "return", "by_attempt": "return_by_attempt"}):
    """The return on one split of one game's levels."""

    player: Text  # "agent", "random play", "best constant action", "edits frozen", ...
    game: Text
    levels: Text  # as 1000:1200
    n_levels: Count
    returns: Interval
    solved: Interval | None = None
    by_attempt: Annotated[list[Interval], Meta(max_length=1000)] = []
    note: Text = ""  # which action is the best constant one


class Card(Struct, forbid_unknown_fields=True):
    """How a shared agent was trained, and its scores beside what could explain them away."""

    task: Text
    command: Text  # that trains it with the version `srwm_rl`, and those that changed a resumed run, after "; "
    evaluation: Text  # the command of the scores
    actions: Text  # stochastic or deterministic
    seed: Count
    srwm_rl: Text
    scores: Annotated[list[Score], Meta(min_length=1, max_length=1000)]
    note: Text = ""

    def headline(self) -> Score:
        """Return the agent's score on the first held-out levels."""
        return self.scores[0]
