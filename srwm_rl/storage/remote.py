"""Model files from an https address that holds their sha256, downloaded once, of bounded size."""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from srwm_rl.errors import UserError
from srwm_rl.regular_file import read_small
from srwm_rl.storage.safe_file import write_whole

SCHEME = "https://"
MAX_DOWNLOAD = 2**28
TIMEOUT = 60  # seconds without a byte


def is_address(path: object) -> bool:
    """Return whether a path is an address; a `Path` has lost one of its slashes."""
    return isinstance(path, str) and "://" in path


def fetch(address: str) -> Path:
    """Return the file of an address `https://...#sha256=HEX`, from the cache if it was downloaded before.

    The cache is `srwm-rl` in `XDG_CACHE_HOME`, by default `~/.cache`; a damaged file there is downloaded again.

    Raises:
        UserError: the address is no such one, cannot be read, or has another content or too much of it; or the cache
            cannot be written.
    """
    url, _, digest = address.partition("#sha256=")
    if not url.startswith(SCHEME) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise UserError(
            f"{address:.200} cannot be used: an address is https://...#sha256=HEX, with the 64 digits of the file's "
            "sha256, which whoever shares it prints (srwm-rl share)"
        )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srwm-rl"
    file = cache / f"{digest}.safetensors"
    with suppress(UserError):  # there is none that can be read
        if hashlib.sha256(read_small(file, MAX_DOWNLOAD)).hexdigest() == digest:
            return file
    content = _download(url)
    if (actual := hashlib.sha256(content).hexdigest()) != digest:
        raise UserError(f"{url:.200} has sha256 {actual}, not the {digest} of its address: it is not used")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        write_whole(file, content)
    except OSError as error:
        raise UserError(
            f"cannot write a download to {cache}: {error.strerror or error}; set XDG_CACHE_HOME to another folder"
        ) from error
    return file


def _download(url: str) -> bytes:
    try:
        with urlopen(url, timeout=TIMEOUT) as response:
            content: bytes = response.read(MAX_DOWNLOAD + 1)
    except (OSError, HTTPException, ValueError) as error:  # URLError is an OSError
        raise UserError(f"cannot download {url:.200}: {getattr(error, 'reason', error)}") from error
    if len(content) > MAX_DOWNLOAD:
        raise UserError(f"{url:.200} has more than the {MAX_DOWNLOAD:,} bytes that are downloaded")
    return content
