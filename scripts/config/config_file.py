"""Settings of `srwm-rl train` in a YAML file: `--config` reads it, `--print-config` writes it."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from srwm_rl.errors import UserError, did_you_mean, named
from srwm_rl.regular_file import read_small
from srwm_rl.scripts.config.settings import ALGO_SETTINGS, KWARGS, TrainConfig, pairs

MAX_BYTES = 2**20
Content = TypeVar("Content")
# Settings of one call of the command, which a file of settings does not hold.
OF_ONE_CALL = {"config", "print_config", "resume", "override", "verify", "dry_run", "env_list", "seeds", "jobs"}
NAMES = tuple(field.name for field in fields(TrainConfig) if field.name not in OF_ONE_CALL)


class _Loader(yaml.BaseLoader):
    """Reads scalars but null as text, as a command line does: 1e-3 and 10:20 are not what YAML 1.1 makes of them."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*), which is not read")
        return super().compose_node(parent, index)

    def construct_scalar(self, node: Any) -> Any:
        text = super().construct_scalar(node)
        return None if node.style is None and text in ("null", "~", "") else text

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) != len(node.value):
            raise yaml.YAMLError("it has a name twice")
        return mapping


def read_config_file(path: str) -> dict[str, Any]:
    """Return the settings of a YAML file: those that it names, by their names in `TrainConfig`.

    Names may be spelled as options are, `n-envs`; `core_kwargs` and its like are mappings.

    Raises:
        UserError: the file cannot be read, is no mapping, names an unknown setting or has a value of another type.
    """
    with named(path):
        content = parse_yaml(read_small(Path(path), MAX_BYTES))
        if not isinstance(content, dict):
            raise UserError("it has no settings; write one per line, such as `n_envs: 32`")
        return from_mapping(content)


def from_mapping(content: dict[Any, Any]) -> dict[str, Any]:
    """Return the settings that a file's content, of texts or of other scalars, stands for.

    Raises:
        UserError: as `read_config_file`.
    """
    names = {name: str(name).strip("-").replace("-", "_") for name in content}
    for name, setting in names.items():
        if setting not in NAMES:
            raise UserError(f"unknown setting {name!r}{did_you_mean(setting, NAMES)}")
    if len(set(names.values())) < len(names):
        raise UserError("it has a setting in two spellings")
    settings = {setting: _of_kwargs(setting, content[name]) for name, setting in names.items()}
    config = convert_texts(settings, TrainConfig)
    return {name: getattr(config, name) for name in settings}


def convert_texts(content: Any, kind: type[Content]) -> Content:
    """Return content of a file, whose scalars are texts, as an object of a type.

    Raises:
        UserError: it cannot be; the message names the entry.
    """
    try:
        return msgspec.convert(content, kind, strict=False)
    except (msgspec.ValidationError, ValueError) as error:
        reason, _, entry = str(error).partition(" - at `$")
        raise UserError(f"{entry.strip('.`')}{': ' if entry else ''}{reason}") from error


def parse_yaml(text: bytes) -> Any:
    """Return the content of a YAML text, whose scalars but null are texts.

    Raises:
        UserError: it is no YAML, has an alias, or a name twice in one mapping.
    """
    try:
        return yaml.load(text, _Loader)  # a BaseLoader: texts, lists and dicts only
    except (yaml.YAMLError, UnicodeError, RecursionError, ValueError) as error:
        raise UserError(f"it is no YAML that can be read: {' '.join(str(error).split())}") from error


def _of_kwargs(name: str, value: Any) -> Any:
    """Return the `name:value` texts of a mapping, or another setting as it is."""
    if name not in KWARGS or not isinstance(value, dict):
        return value
    dump = json.JSONEncoder(separators=(",", ":")).encode
    return [f"{key}:{part if isinstance(part, str) else dump(_parsed(part))}" for key, part in value.items()]


def _parsed(value: Any) -> Any:
    """Return nested values, whose texts are JSON where they can be read as such."""
    if isinstance(value, dict):
        return {key: _parsed(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_parsed(part) for part in value]
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def to_mapping(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings as the content of a file: `name:value` texts as mappings, tuples as lists."""
    content = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return content | {name: pairs(settings[name], name) for name in KWARGS if name in settings}


def to_yaml(config: TrainConfig) -> str:
    """Return the settings as the text of a file that `read_config_file` reads, without those of other trainers."""
    return dump_yaml(to_mapping(settings_of_trainer(config)))


def settings_of_trainer(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that a file may hold, without those of other trainers and those that are None."""
    others = {name for algo, names in ALGO_SETTINGS.items() if algo != config.algo for name in names}
    names = [name for name in NAMES if name not in others and getattr(config, name) is not None]
    return {name: getattr(config, name) for name in names}


def dump_yaml(content: dict[str, Any]) -> str:
    """Return a mapping as YAML, in its order."""
    text: str = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=100)
    return text
