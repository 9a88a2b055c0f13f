"""Videos for tests: small ones that PyAV writes, and pretended ones, where nothing reads videos."""

import contextlib
import io
import math
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import pytest

from storage import sample_images, tars
from storage.ledger import image_digest
from storage.paths import StorageOptions
from storage.ranges import RangedFile
from storage.videos import Frame, Place, Sampling, VideoRefused


def pretended(name: str, seconds: float, good: float = math.inf) -> bytes:
    """A file that `pretend` takes for a video of so many seconds, of which so many can be decoded."""
    return f"pretended {name} {seconds} {good}".encode()


class _Pretended:
    """Ten frames a second, each of one colour."""

    def __init__(self, data: bytes):
        found = re.fullmatch(rb"pretended (\w+) (\S+) (\S+)", data)
        if found is None:
            raise VideoRefused("NoVideo", "not pretended to be a video")
        self.name, self.length, self.good = found[1], Fraction(found[2].decode()), float(found[3])

    def frames(self, seconds: Sequence[Fraction]) -> Iterator[Frame | VideoRefused]:
        for each in seconds:
            number = math.floor(each * 10)
            if number >= 10 * self.good:
                yield VideoRefused("Truncated", f"none can be decoded at {float(each):.3f} s")
                continue
            digest = image_digest(self.name + b"%d" % number)
            colour = np.frombuffer(bytes.fromhex(digest[:6]), np.uint8)
            drawn = np.broadcast_to(colour, (48, 64, 3)).copy()
            yield Frame.of(drawn, time=number / 10, digest=digest, conversion="")


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> list[Place]:
    """Read `pretended` videos instead of real ones; returns the places that were opened for frames."""
    opened: list[Place] = []

    def read(place: Place, options: StorageOptions | None) -> _Pretended:
        return _Pretended(RangedFile(*place, options).read())

    def count(place: Place, sampling: Sampling, options: StorageOptions | None = None) -> int:
        return math.ceil(read(place, options).length * sampling.rate)

    @contextlib.contextmanager
    def open_(place: Place, options: StorageOptions | None = None, **_: object) -> Iterator[_Pretended]:
        opened.append(place)
        yield read(place, options)

    monkeypatch.setattr(tars, "count_frames", count)
    monkeypatch.setattr(sample_images, "opened_video", open_)
    monkeypatch.setattr("pipelines.extraction.first_look.require_decoder", lambda: None)
    return opened


def drawn(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """A smooth picture that tells its number, uint8 [height, width, 3]."""
    y, x = np.mgrid[:height, :width]
    r = 128 + 100 * np.sin(x / 9 + number)
    g = 128 + 100 * np.cos(y / 7 + 2 * number)
    b = (37 * number + x + y) % 256
    return np.stack([r, g, b], axis=-1).astype(np.uint8)


def video(
    frames: Sequence[np.ndarray],
    *,
    times: Sequence[Fraction] | None = None,
    rate: int = 10,
    container: str = "mp4",
    codec: str = "libx264",
    pixels: str = "yuv420p",
    key_every: int = 5,
    options: dict[str, str] | None = None,
    settings: dict[str, int] | None = None,
    movflags: str = "",
    sound_s: float = 0,
    turn: int = 0,
) -> bytes:
    """A video of these pictures at `rate`, or at their `times` in seconds. Skips the test where there is no PyAV."""
    av = pytest.importorskip("av")
    sink = io.BytesIO()
    flags = {"movflags": movflags} if movflags else {}
    with av.open(sink, "w", format=container, options=flags) as out:
        stream = out.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames[0].shape[:2] if len(frames) else (48, 64)
        stream.pix_fmt = pixels
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        stream.codec_context.gop_size = key_every
        for name, value in (settings or {}).items():
            setattr(stream.codec_context, name, value)
        if turn:
            stream.set_display_rotation(turn)
        sound = out.add_stream("aac", rate=16000, layout="mono") if sound_s else None
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = round(1000 * (times[number] if times else Fraction(number, rate)))
            frame.time_base = Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if sound is not None:
            for first in range(0, int(sound_s * 16000), 1024):
                heard = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                heard.sample_rate, heard.pts, heard.time_base = 16000, first, Fraction(1, 16000)
                out.mux(sound.encode(heard))
            out.mux(sound.encode(None))
    return sink.getvalue()
