"""Parse a command line into a dataclass, run a command, and print errors in one line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro

import srwm_rl
from srwm_rl.errors import FaultError, UserError
from srwm_rl.storage.safe_file import write_whole

Config = TypeVar("Config")
OWN_WRAPPER = "srwm_rl.envs:OneHotImage"  # of this package: a file may name it
FAULT = 3  # exit code after a failure while training
INTERRUPTED = 130  # exit code after Ctrl-C
MIN_COLUMNS = 40
OPTION = re.compile(r"--[A-Za-z]|-[A-Za-z](=|$)")


def run_command(argv: list[str], command: Callable[[], int]) -> int:
    """Run the command of a command line and return its exit code; print errors that a user can cause in one line."""
    try:
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as until the package is imported
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return command()
    except BrokenPipeError:
        raise
    except (UserError, OSError) as error:
        if peek(argv, "--verbose") == "2":
            traceback.print_exc()
        message = str(error)
        if isinstance(error, OSError):
            message = f"{os.fsdecode(error.filename or argv[0])}: {error.strerror or error}"
        warn(f"error: {message}")
        return 2
    except FaultError as error:  # an environment that fails before the first step
        if peek(argv, "--verbose") == "2":
            traceback.print_exc()
        warn(f"stopped: {error}")
        return FAULT
    except KeyboardInterrupt:
        warn("interrupted")
        return INTERRUPTED


def parse(config: type[Config], argv: list[str], prog: str, default: Config | None = None) -> Config:
    """Parse `argv` into `config`, starting from `default`.

    Raises:
        UserError: an unknown option (the nearest one is suggested), a repeated one, or a value that cannot be parsed.
        SystemExit: 0 after --help.
    """
    for word in argv:
        if not is_utf8(word):
            raise UserError(f"{word!r} is no UTF-8 text; a path can be given from a folder inside of it")
    _check_flags(config, argv, prog)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), _minimal_width():
            parsed, unknown = tyro.cli(config, args=argv, prog=prog, default=default, return_unknown_args=True)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"{_one_line(errors.getvalue())}; see {prog} --help") from stop
    assert parsed is not None
    if unknown:
        raise UserError(f"unexpected argument {unknown[0]!r}; see {prog} --help")
    return parsed


def is_utf8(text: str) -> bool:
    """Return whether a text can be written as UTF-8: names of files need not be."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextlib.contextmanager
def _minimal_width() -> Iterator[None]:
    """Let the terminal have at least `MIN_COLUMNS` in the block: with a few, tyro's help never ends."""
    given = os.environ.get("COLUMNS")
    if shutil.get_terminal_size().columns < MIN_COLUMNS:
        os.environ["COLUMNS"] = str(MIN_COLUMNS)
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        if given is not None:
            os.environ["COLUMNS"] = given


def peek(argv: list[str], *names: str) -> str | None:
    """Return the value of an option before the command line is parsed; None: not there."""
    for word, next_word in pairwise([*argv, None]):
        flag, equals, value = (word or "").partition("=")
        if flag.replace("_", "-") in names:
            return value if equals else next_word
    return None


def options_of(argv: list[str]) -> list[str]:
    """Return the options of a command line, without their values."""
    return [word.partition("=")[0] for word in argv if OPTION.match(word)]


def drop(config: Any, argv: list[str], *names: str) -> list[str]:
    """Return the command line of a dataclass without these options, in any spelling, and without their values."""
    known, kept, keeps = _flags(config), list[str](), True
    dropped = {known[name] for name in names}
    for word in argv:
        if OPTION.match(word):
            keeps = known.get(word.partition("=")[0].replace("_", "-")) not in dropped
        kept += [word] * keeps
    return kept


def split_options(config: Any, argv: list[str]) -> tuple[list[str], list[str]]:
    """Split a command line in the options of a dataclass, with their values, and all else."""
    known, own, others = _flags(config), list[str](), list[str]()
    words = others
    for word in argv:
        if OPTION.match(word):
            words = own if word.partition("=")[0].replace("_", "-") in known else others
        words.append(word)
    return own, others


def check_device(name: str) -> str:
    """Return the device for `name` ("auto", "cpu", "cuda", "cuda:1").

    Raises:
        UserError: an unknown device, or one that is not available; Stable-Baselines3 would silently use the CPU.
    """
    import torch

    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if n_gpus else "cpu"
    if name == "cpu":
        return name
    index = re.fullmatch(r"cuda(?::(\d+))?", name)
    if index is None:
        raise UserError(f"there is no device {name!r}; use auto, cpu, cuda or cuda:1")
    if not n_gpus:
        raise UserError(f"--device {name}: torch finds no GPU here; use --device cpu, and see srwm-rl doctor")
    if int(index[1] or 0) >= n_gpus:
        raise UserError(f"--device {name}: the GPUs here are cuda:0 to cuda:{n_gpus - 1}")
    return name


def _check_flags(config: Any, argv: list[str], prog: str) -> None:
    """Refuse unknown and repeated options: tyro keeps the last of two values, and blames an option's neighbours."""
    known = _flags(config)
    seen: set[str | None] = set()
    for previous, word in pairwise(["", *argv]):
        if not OPTION.match(word):
            continue
        option = word.partition("=")[0].replace("_", "-")
        if option not in known:
            if previous in known and not word.startswith("--"):
                raise UserError(f"unknown option {word!r}; if it is the value of {previous}, write {previous}={word}")
            raise UserError(f"unknown option {word.partition('=')[0]!r}{_nearest(option, known)}; see {prog} --help")
        flag = known[option]
        if flag in seen:
            raise UserError(f"{flag} is given twice; give it once{_with_values(config, flag)}")
        seen |= {flag} - {None}


def _nearest(option: str, known: Iterable[str]) -> str:
    """Return `"; did you mean --x?"` for the option that one may have meant; "" if there is none."""
    word = option.strip("-")
    names = [name[2:] for name in known if name.startswith("--") and not name.startswith("--no-")]
    near = [name for name in names if "-" in name and "".join(part[0] for part in name.split("-")) == word]
    near += get_close_matches(word, names, n=1, cutoff=0.6)
    near += [name for name in names if word in name.split("-") or (len(word) > 3 and name.startswith(word))]
    return f"; did you mean '--{near[0]}'?" if near else ""


def _with_values(config: Any, flag: str | None) -> str:
    takes_several = any(
        f"--{field.name.replace('_', '-')}" == flag and isinstance(field.default, tuple) for field in fields(config)
    )
    return ", with all its values" if takes_several else ""


def _flags(config: Any) -> dict[str, str | None]:
    """Return the option that each spelling stands for, None for one that may be repeated."""
    known: dict[str, str | None] = {"-h": "--help", "--help": "--help"}
    hints = get_type_hints(config, include_extras=True)
    for field in fields(config):
        marks = getattr(hints[field.name], "__metadata__", ())
        if tyro.conf.Positional in marks:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        spellings = [flag, *(alias for mark in marks for alias in getattr(mark, "aliases", None) or ())]
        if isinstance(field.default, bool):
            spellings.append(f"--no-{flag[2:]}")
        known |= dict.fromkeys(spellings, None if tyro.conf.UseAppendAction in marks else flag)
    return known


_NO_NUMBER = r"Error parsing (\S+): no type matching {None}\|%s could be instantiated from \[(.*?)\].*"
TYRO_ERRORS = (  # tyro's messages, and ours
    (r"Error parsing \w+Config: (.*)", r"\1"),  # a UserError
    (r"Error parsing (\S+): invalid literal for int\(\) with base 10: (.*)", r"\1 takes a whole number, not \2"),
    (r"Error parsing (\S+): could not convert string to float: (.*)", r"\1 takes a number, not \2"),
    (r"Error parsing (\S+): Exceeds the limit .*", r"\1 takes a number of fewer digits"),
    (_NO_NUMBER % "INT", r"\1 takes a whole number, not \2"),
    (_NO_NUMBER % "FLOAT", r"\1 takes a number, not \2"),
    (r"Missing value for argument '(\S+)'.*", r"\1 needs a value"),
    (r"invalid choice (.*) for argument '(\S+)'\. Expected one of \((.*?),?\)\.", r"\2 takes one of \3, not \1"),
    (r"Missing from [^:]*: [A-Z]+ (.*?)\.? \(required\)", r"something is missing: \1"),
)


def _one_line(text: str) -> str:
    """Return tyro's message without its title, frame, footer and short spellings of options."""
    lines = [re.sub(r"[│╭╮╰╯]+", " ", line).strip() for line in text.splitlines()[1:]]
    message = re.sub(r"-\w/(?=--)", "", " ".join("\n".join(lines).partition("─")[0].split()))
    for pattern, replacement in TYRO_ERRORS:
        if re.fullmatch(pattern, message):
            return re.sub(pattern, replacement, message)
    return message or "the options cannot be read"


def check_writable(file: str | Path | None, option: str) -> None:
    """Raise a `UserError` unless a file can be written, or none is wanted: before work whose results would be lost."""
    if file is None:
        return
    path = Path(file)
    folder = path.resolve().parent
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}: {folder} is no folder to write in")
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise UserError(f"cannot write {path}: give {option} the name of a file")


def write_json(path: str | None, report: Any) -> None:
    """Write a report to a file, if one is wanted; see `write_output`."""
    if path is not None:
        write_output(path, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())


def write_output(file: str | Path, content: bytes) -> None:
    """Write a file that the user names, whole or not at all; the target of a link, a pipe or a device as it is.

    Raises:
        OSError: it cannot be written, as on a full disk; an older file of its name is untouched.
    """
    path = Path(file)
    if path.exists() and not path.is_file():  # such as /dev/stdout
        try:
            path.write_bytes(content)
        except OSError as error:
            error.filename = error.filename or str(path)
            raise
    else:
        write_whole(path.resolve(), content)


def say(message: str) -> None:
    """Print a line on stdout at once, where it is no result: a full disk costs the line alone."""
    try:
        print(message, flush=True)
    except BrokenPipeError:
        raise
    except UnicodeEncodeError as error:
        print(message.encode(error.encoding, "backslashreplace").decode(error.encoding), flush=True)
    except OSError as error:
        warn(f"cannot print on stdout ({error.strerror or error}); training continues")
        drop_stdout()


def announce(what: str) -> None:
    """Say on stderr what takes the next seconds, if it can be written; of several processes, the first says it."""
    if os.environ.get("RANK", "0") == "0":
        warn(f"{what} ...")


def drop_stdout() -> None:
    """Print nothing on stdout from now on: another error would follow, the last one when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def warn(message: str) -> None:
    """Print one line on stderr, if it can be written; processes of a distributed run print their rank, but process 0.

    What cannot be encoded is escaped.
    """
    rank = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else "0"
    prefix = "srwm-rl: " if rank == "0" else f"srwm-rl: process {rank}: "
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    line = f"{prefix}{message}".encode(encoding, "backslashreplace").decode(encoding)
    with contextlib.suppress(OSError, ValueError, AttributeError):  # full disk, closed stream, none at all
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def print_own_warnings() -> Iterator[None]:
    """Print warnings of this package, in the block, once, in one line, without the place in its code; others as is."""
    show, package = warnings.showwarning, Path(srwm_rl.__file__).parent
    printed = set[str]()

    def show_warning(message: Any, category: Any, filename: str, *more: Any) -> None:
        if Path(filename).is_relative_to(package):
            if str(message) not in printed:  # Python's own memory of them ends where a library changes the filters
                printed.add(str(message))
                warn(f"warning: {message}")
        else:
            show(message, category, filename, *more)

    warnings.showwarning = show_warning  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.showwarning = show


def quoted_path(path: str | Path) -> str:
    """Return a path as a shell reads it and no command takes for an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def foreign_wrappers(wrappers: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Return those that are not of this package: code that is not imported because a file names it."""
    return [words for words in wrappers if OWN_WRAPPER not in words[:1]]


def own_code_options(settings: Mapping[str, Any]) -> str:
    """Return the options, after a space each, by which a command names the code of one's own that a run needs.

    `settings` are those of the run, as `config.json` holds them.
    """
    own = {name: settings[name] for name in ("core", "env") if ":" in settings[name].removeprefix("srwm_rl:")}
    options = [[f"--{name}", value] for name, value in own.items()]
    wrappers = settings.get("wrapper", ())
    options += [["--wrapper", *words] for words in wrappers if foreign_wrappers(wrappers)]
    return "".join(f" {option} {shlex.join(values)}" for option, *values in options)


def allow_core(core: str, named: str | None) -> None:
    """Import a user's core, `my_module:MyCore`, if --core names it: a file must not choose imported code."""
    if ":" not in core:
        return
    if named != core:
        raise UserError(f"core {core!r} is code of your own, which no file can start: add --core {core}")
    from srwm_rl import import_core

    import_core(core)
