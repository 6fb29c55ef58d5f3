"""Render a template as an HTML page; everything that comes from a run is escaped."""

from __future__ import annotations

import base64
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import srwm_rl
from srwm_rl.errors import UserError
from srwm_rl.scripts.reports.charts import short_number

MAX_VIDEO_BYTES = 32 * 2**20


def render_page(template: str, **data: Any) -> str:
    """Fill one of the templates; text in `data` is escaped, `Markup` is not."""
    env = Environment(
        loader=PackageLoader("srwm_rl.scripts.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"short": short_number, "number": _number, "signed": _signed, "percent": "{:.1%}".format}
    env.filters["plain"] = lambda value: value if isinstance(value, str) else json.dumps(value)
    style = files("srwm_rl.scripts.reports").joinpath("templates/style.css").read_text()
    return env.get_template(template).render(style=Markup(style), version=srwm_rl.__version__, **data)


def _number(value: float | None, digits: int = 2) -> str:
    return "?" if value is None else f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _signed(value: float | None, digits: int = 2) -> str:
    return _number(value, digits) if value is None or value < 0 else f"+{_number(value, digits)}"


def read_video(path: str) -> str:
    """Return an MP4 file as a data URL.

    Raises:
        UserError: it cannot be read, is no MP4, or is too large to be part of a page.
    """
    try:
        size = Path(path).stat().st_size
        if size > MAX_VIDEO_BYTES:
            raise UserError(f"{path} has {size / 2**20:.0f} MB; a page takes videos up to 32 MB, record a shorter one")
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if content[4:8] != b"ftyp":
        raise UserError(f"{path} is no MP4 video; give --video a file that is")
    return f"data:video/mp4;base64,{base64.b64encode(content).decode()}"
