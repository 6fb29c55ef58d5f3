"""Agents that come with the package: `zoo:NAME` is accepted wherever a model file is."""

from __future__ import annotations

from pathlib import Path

from srwm_rl.errors import UserError, did_you_mean

PREFIX = "zoo:"
DEMO = "hidden_controls"
FOLDER = Path(__file__).parent


def zoo_names() -> list[str]:
    """Return the names of the bundled agents."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def zoo_file(name: str) -> Path:
    """Return the model file of the bundled agent `name`, with or without `zoo:`.

    Raises:
        UserError: there is none of that name; the message names the nearest one.
    """
    name, names = name.removeprefix(PREFIX), zoo_names()
    if name not in names:
        raise UserError(f"no agent of the zoo is called {name!r:.80}{did_you_mean(name, names)}")
    return FOLDER / f"{name}.safetensors"
