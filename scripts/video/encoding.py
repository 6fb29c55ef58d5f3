"""Write frames as H.264 in MP4, for every browser, or as a GIF."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from srwm_rl.errors import UserError
from srwm_rl.lazy import import_optional
from srwm_rl.scripts.video.canvas import Bytes
from srwm_rl.storage.safe_file import temporary_path

ENCODERS = ("libx264", "libopenh264", "h264_videotoolbox")
EXTENSIONS = (".mp4", ".gif")
_QUALITY = "20"  # x264's constant rate factor: small text stays sharp


def check_video(path: Path) -> None:
    """Raise a `UserError` unless a video with this name can be encoded here."""
    if path.suffix.lower() not in EXTENSIONS:
        raise UserError(f"cannot write {path}: a video's name ends in {' or '.join(EXTENSIONS)}")
    if path.suffix.lower() == ".mp4":
        _encoder()


def _encoder() -> str:
    av = import_optional("av", "an MP4", "av, or name a .gif")
    for name in ENCODERS:
        with suppress(ValueError):  # no such encoder
            av.Codec(name, "w")
            return name
    raise UserError("this build of av has no H.264 encoder: pip install --force-reinstall av; or name a .gif")


def write_video(path: Path, frames: Iterator[Bytes], n_frames: int, fps: int) -> None:
    """Write frames `[height, width, 3]`, both even; the file is complete or does not exist.

    Raises:
        UserError: as `check_video`.
        OSError: the file cannot be written.
    """
    check_video(path)
    unfinished = temporary_path(path)
    try:
        if path.suffix.lower() == ".gif":
            _write_gif(unfinished, frames, n_frames, fps)
        else:
            _write_mp4(unfinished, frames, fps)
        unfinished.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # not under the temporary name
    finally:
        unfinished.unlink(missing_ok=True)


def _write_mp4(path: Path, frames: Iterator[Bytes], fps: int) -> None:
    import av

    first = next(frames)
    # faststart: the index comes first, so that a browser plays the file before it is loaded completely.
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream: Any = container.add_stream(_encoder(), rate=Fraction(fps))
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = "yuv420p"  # the only format of all browsers
        # Matrix, primaries and curve of the colours, which players would guess otherwise (1: BT.709).
        stream.codec_context.colorspace = stream.codec_context.color_primaries = stream.codec_context.color_trc = 1
        if stream.codec.name == "libx264":
            stream.options = {"crf": _QUALITY, "preset": "veryfast", "tune": "animation"}
        for frame in chain([first], frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace="ITU709")))
        container.mux(stream.encode())


def _write_gif(path: Path, frames: Iterator[Bytes], n_frames: int, fps: int) -> None:
    images = (
        Image.fromarray(frame).quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE) for frame in frames
    )
    # GIF's delays are multiples of 10 ms; rounded one by one, they would drift.
    delays = [10 * (round(100 * (t + 1) / fps) - round(100 * t / fps)) for t in range(n_frames)]
    next(images).save(path, "GIF", save_all=True, append_images=images, duration=delays, loop=0)
