"""Frames of videos: how many a rate comes to, and their pixels, read by ranges of the file.

Of a rate F, frame k of a video is the one that is shown k/F seconds after its first: the last whose presentation time is no
later, up to the last frame's end. That is FFmpeg's `-vf setpts=PTS-STARTPTS,fps=F:round=up`; by default, `fps` takes frames that
are shown half a step later.

Needs PyAV, whose wheels bring FFmpeg's libraries; it's imported when the first video is opened.
"""

import contextlib
import functools
import hashlib
import importlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from storage.paths import InputError, StorageError, StorageOptions, extension
from storage.ranges import RangedFile

VIDEO_EXTENSIONS = ("mp4", "m4v", "mov", "mkv", "webm")
"""Members and files that are taken for videos."""

TAKES_FRAMES = "--fps takes frames"
"""What is said of videos that are left out."""

MAX_FRAMES = 1_000_000
"""Frames of one video where nothing says another limit: 139 hours at two a second."""

MATRIX_ROTATE = "matrix-rotate"
"""How a ledger says that a video's display matrix turned or mirrored a frame."""

_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm"
"""What FFmpeg may open. It knows more, playlists among them, which name other files."""

_LARGEST_TERM = 125_000
"""Of a rate as a fraction: larger ones couldn't be told from their neighbours in seconds as float64."""

_GROUP_BYTES = 2**25
"""Packets that are held back until it's known whether any frame of theirs is wanted."""

MAX_PIXELS = 2**28
"""Of a frame, where nothing says another limit."""

_FAR = Fraction(10)
"""Seconds that are skipped by seeking; less is read through."""


def is_video(name: str) -> bool:
    """Whether a file or member is taken for a video, by its name."""
    return extension(name) in VIDEO_EXTENSIONS


class VideoRefused(StorageError):
    """What is wrong with one video, in words; `kind` is its short name."""

    def __init__(self, kind: str, message: str):
        self.kind = kind
        super().__init__(message)


class Frame(bytes):
    """A frame, upright, as the bytes of a PPM image."""

    time: float
    "its presentation time as the file has it, in seconds"
    digest: str
    "of what it was decoded from: the packets from its key frame up to its own, in the order of the file"
    conversion: str
    "what was done beyond decoding, or empty"

    @classmethod
    def of(cls, rgb_HWC: np.ndarray, *, time: float, digest: str, conversion: str) -> "Frame":
        height, width, _ = rgb_HWC.shape
        frame = cls(b"P6 %d %d 255\n" % (width, height) + rgb_HWC.tobytes())
        frame.time, frame.digest, frame.conversion = time, digest, conversion
        return frame


class Place(NamedTuple):
    """Where a video's bytes lie."""

    url: str
    offset: int
    size: int


# --- the rate ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """Which frames of videos are samples."""

    rate: Fraction
    "a second"
    most: int = MAX_FRAMES
    "of one video: one that has more is a single sample, which can't be read"

    @classmethod
    def of(cls, fps: float, most: int = MAX_FRAMES) -> "Sampling":
        """Raises `InputError` for rates that there aren't."""
        # As people write them: 29.97, or 30000/1001 rounded somewhere.
        rate = Fraction(str(fps)).limit_denominator(1001) if math.isfinite(fps) else Fraction(0)
        if not Fraction(1, 1000) <= rate <= 1000 or rate.numerator > _LARGEST_TERM:
            raise InputError(f"--fps {fps:g}: frames a second, from 0.001 to 1000")
        return cls(rate, most)

    def __str__(self) -> str:
        return f"{float(self.rate):g}"

    def seconds(self, frame: int) -> float:
        """When a frame is taken, after the video's first."""
        return float(frame / self.rate)


def exact_seconds(at: float) -> Fraction:
    """What `Sampling.seconds` rounded."""
    return Fraction(at).limit_denominator(_LARGEST_TERM)


def frame_key(key: str, at: float) -> str:
    """The key of the frame that is taken `at` seconds after the first of the video `key`; in order of time up to 11 days."""
    return f"{key}#{at:010.3f}"


def named_frame(name: str) -> str | None:
    """The key of a frame that a file is called by, with or without an extension: `clip#000012.500.jpg`. None for other names."""
    found = re.fullmatch(r"(.*#\d{6,}\.\d{3})(\.[^./]*)?", name, re.DOTALL)
    return found[1] if found else None


def count_frames(place: Place, sampling: Sampling, options: StorageOptions | None = None) -> int:
    """How many frames of a video are samples. Reads its header, and of containers that don't say how long a track is, what
    follows its last key frame. Raises `VideoRefused`, and what the filesystem raises."""
    with opened_video(place, options) as video:
        seconds = video.seconds()
    count = max(1, math.ceil(seconds * sampling.rate))
    if count > sampling.most:
        raise VideoRefused(
            "TooLong",
            f"{float(seconds):,.0f} s are {count:,} frames at --fps {sampling}, more than max_video_frames = {sampling.most}; "
            "raise --max-video-frames if it's that long",
        )
    return count


# --- opening ----------------------------------------------------------------------------------------------------------


def require_decoder() -> None:
    """Raise `InputError` where there is nothing that reads videos."""
    _library()


@functools.cache
def _library() -> ModuleType:
    """PyAV."""
    try:
        av = importlib.import_module("av")
    except ModuleNotFoundError as error:
        if error.name != "av":
            raise InputError(_broken(error)) from None
        raise InputError("reading videos (--fps) needs PyAV, which isn't installed: pip install 'raylift[video]'") from None
    except (ImportError, OSError) as error:
        raise InputError(_broken(error)) from None
    av.logging.set_level(av.logging.PANIC)  # what FFmpeg says of damaged files is in the errors, too
    return av


def _broken(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0][:200]
    return f"PyAV, which reads videos (--fps), can't be loaded ({first}): pip install --force-reinstall 'raylift[video]'"


@contextlib.contextmanager
def opened_video(
    place: Place, options: StorageOptions | None = None, *, threads: int = 1, max_pixels: int = MAX_PIXELS
) -> "Iterator[Video]":
    """The video at a place. Raises `VideoRefused` for what is wrong with it, also from within, and what the filesystem raises."""
    av, file, is_open = _library(), RangedFile(*place, options), False
    try:
        with av.open(file, options={"format_whitelist": _FORMATS}) as container:
            is_open = True
            yield Video(container, file, threads, max_pixels)
    except av.FFmpegError as error:
        if file.error is not None:
            raise file.error from None
        text = getattr(error, "strerror", None) or str(error)
        raise VideoRefused(*(("Damaged", f"FFmpeg can't read it ({text})") if is_open else _why_closed(text, file))) from None


def _why_closed(text: str, file: RangedFile) -> tuple[str, str]:
    """The kind of fault, and in words, why a file can't be opened."""
    if not file.size:
        return "NoVideo", "the video has 0 bytes"
    file.seek(0)
    head = file.read(12)
    if head[4:8] in (b"ftyp", b"mdat", b"wide", b"free"):
        return "Truncated", f"it has no index (moov), as of a recording or a download that was cut short ({text})"
    return "NoVideo", f"FFmpeg can't open it as MP4 or Matroska ({text}; the first bytes are {head!r})"


class _Decoded(NamedTuple):
    """A frame as the decoder gave it."""

    pts: Fraction
    "seconds"
    end: Fraction
    "when it isn't shown any more, as far as its own packet says"
    frame: Any
    digest: str
    lost: Fraction | None
    "when the first of the frames that should have come before it, but couldn't be decoded, was to be shown"


class Video:
    """The main video track of a container that was opened."""

    def __init__(self, container: Any, file: RangedFile, threads: int, max_pixels: int):
        self._container, self._file = container, file
        tracks = [each for each in container.streams.video if not each.disposition & each.disposition.attached_pic]
        if not tracks:
            others = ", ".join(sorted({each.type for each in container.streams})) or "nothing"
            raise VideoRefused("NoVideo", f"it has no video track (it has {others})")
        best = container.streams.best("video")
        self._stream = best if best in tracks else tracks[0]
        for each in container.streams:
            if each is not self._stream:
                each.discard = _library().stream.Discard.all  # what is not wanted is not read
        codec = self._stream.codec_context
        if codec is None:
            raise VideoRefused("UnknownCodec", "FFmpeg has no decoder for its video track")
        if codec.width * codec.height > max_pixels:
            raise VideoRefused(
                "TooLarge",
                f"{codec.width} x {codec.height} pixels are more than max_image_pixels = {max_pixels}; raise --max-image-pixels "
                "if that is no attack",
            )
        codec.options = {**codec.options, "max_pixels": str(max_pixels)}  # the size may change within
        codec.thread_type, codec.thread_count = ("AUTO", threads) if threads > 1 else ("NONE", 1)
        self._unit = _fraction(self._stream.time_base)
        self._usual = 1 / (_fraction(self._stream.average_rate) or Fraction(25))
        self._wanted: Fraction = self.first
        self._key: Fraction | None = None
        "when the last key frame that was read is shown"
        self._seeks = True
        self._to_rgb = _ToRgb()

    @property
    def first(self) -> Fraction:
        """The presentation time of the first frame, in seconds."""
        return int(self._stream.start_time or 0) * self._unit

    def seconds(self) -> Fraction:
        """From the first frame's time to the last one's end."""
        if self._stream.duration:
            return int(self._stream.duration) * self._unit
        end = self._last_end()
        if end is None:
            raise VideoRefused("NoFrames", "its video track has no frames")
        if self._container.duration and _is_cut_matroska(self._file):
            end = max(end, self.first + Fraction(self._container.duration, 1_000_000))
        return end - self.first

    def _last_end(self) -> Fraction | None:
        """When the last frame ends, by what follows the last key frame; None where there is no frame."""
        if self._container.duration:
            about = self.first + Fraction(self._container.duration, 1_000_000)
            with contextlib.suppress(_library().FFmpegError):  # of containers without an index, all is read
                self._container.seek(math.floor(about / self._unit), stream=self._stream)
        ends = (self._end(packet) for packet in self._container.demux(self._stream) if packet.pts is not None)
        return max(ends, default=None)

    def _end(self, timed: Any) -> Fraction:
        """When a packet or frame isn't shown any more."""
        return int(timed.pts) * self._unit + (int(timed.duration) * self._unit if timed.duration else self._usual)

    # --- frames -------------------------------------------------------------------------------------------------------

    def frames(self, seconds: Sequence[Fraction]) -> "Iterator[Frame | VideoRefused]":
        """The frames that are shown at these times after the first one, in order of time. Packets are read from the key frame
        before the first of them on, and only those decoded that lead to one of them."""
        if not seconds:
            return
        shown: _Decoded | None = None
        decoded = self._decoded_from(self.first + seconds[0])
        coming = next(decoded, None)
        for each in seconds:
            self._wanted = wanted = self.first + each
            if self._seeks and coming is not None and wanted - coming.pts > _FAR:
                before = self._key
                decoded = self._decoded_from(wanted)
                shown, coming = None, next(decoded, None)
                # Where key frames are rarer than what is wanted, seeking would begin at the same one again and again.
                self._seeks = self._landed is not None and before is not None and self._landed > before
            while coming is not None and (coming.pts <= wanted or shown is None):
                shown, coming = coming, next(decoded, None)
            yield self._taken(wanted, shown, coming)

    def _taken(self, wanted: Fraction, shown: _Decoded | None, coming: _Decoded | None) -> "Frame | VideoRefused":
        at = f"{float(wanted):.3f} s"
        if shown is None:
            return VideoRefused("Damaged", "none of its frames can be decoded")
        if coming is None and wanted >= shown.end:
            return VideoRefused("Truncated", f"its last frame ends at {float(shown.end):.3f} s; none can be decoded at {at}")
        if shown.frame.is_corrupt or (coming is not None and coming.lost is not None and wanted >= coming.lost):
            return VideoRefused("Damaged", f"the frame at {at} is damaged")
        turned, conversion = _upright(self._to_rgb(shown.frame), shown.frame)
        return Frame.of(turned, time=float(shown.pts), digest=shown.digest, conversion=conversion)

    def _decoded_from(self, wanted: Fraction) -> Iterator[_Decoded]:
        """Frames in order, from one that is shown at a time or before on."""
        back = Fraction(0)
        while wanted - back > self.first:
            # An index may list a key frame by when it's decoded: it may be shown after that, and after what is wanted.
            self._wanted = wanted
            try:
                self._container.seek(math.floor((wanted - back) / self._unit), stream=self._stream)
            except _library().FFmpegError:
                break
            decoded = self._decoded()
            found = next(decoded, None)
            if found is not None and found.pts <= wanted:
                yield found
                yield from decoded
                return
            back = max(2 * back, Fraction(1))
        self._wanted = wanted
        self._container.seek(math.floor(min(self.first, Fraction(0)) / self._unit), stream=self._stream)
        yield from self._decoded()

    def _decoded(self) -> Iterator[_Decoded]:
        """Frames from the next key frame on. Groups of packets of which no frame is wanted are skipped."""
        self._digests: dict[int, str] = {}
        self._damage = False
        self._landed: Fraction | None = None
        chain = hashlib.sha256()
        held: list[Any] = []
        size = 0
        for packet in self._container.demux(self._stream):
            if packet.is_keyframe and packet.pts is not None:
                self._key = int(packet.pts) * self._unit
                self._landed = self._key if self._landed is None else self._landed
                yield from self._decode(held, self._key)
                if self._key <= self._wanted:
                    self._stream.codec_context.flush_buffers()
                    self._digests.clear()
                    self._damage = False
                held, size, chain = [], 0, hashlib.sha256()
            if packet.pts is not None:
                chain.update(packet)
                self._digests[packet.pts] = chain.hexdigest()[:32]
            held.append(packet)
            size += packet.size
            if size > _GROUP_BYTES:
                yield from self._decode(held)
                held, size = [], 0
        yield from self._decode(held)

    def _decode(self, packets: Sequence[Any], until: Fraction | None = None) -> Iterator[_Decoded]:
        """Frames of packets; `until`: when the key frame that follows them is shown, from which on none of them is wanted."""
        for packet in packets:
            if until is not None and until <= self._wanted:
                return
            try:
                frames = self._stream.codec_context.decode(packet if packet.size else None)
            except _library().FFmpegError:
                self._damage = True
                continue
            for frame in frames:
                if frame.pts is None:
                    frame.pts = frame.dts
                if frame.pts is None:
                    continue
                digest = self._digests.pop(frame.pts, "")
                # Frames come in order; some packets have none on purpose.
                passed: list[int] = sorted(pts for pts in self._digests if pts < frame.pts)
                for pts in passed:
                    del self._digests[pts]
                lost = passed[0] * self._unit if passed and self._damage else None
                yield _Decoded(int(frame.pts) * self._unit, self._end(frame), frame, digest, lost)


def _fraction(ratio: Any) -> Fraction:
    """What PyAV gives as a fraction, or as a ratio of its own; 0 where it gives none."""
    return Fraction(ratio.numerator, ratio.denominator) if ratio else Fraction(0)


class _ToRgb:
    """Pixels as the program `ffmpeg -pix_fmt rgb24` has them: by its own filter, of which `frame.to_ndarray` differs by up to 40
    of 255 in 10-bit video."""

    def __init__(self) -> None:
        self._made_for: object = None

    def __call__(self, frame: Any) -> np.ndarray:
        """uint8 [height, width, 3]."""
        looks = (frame.width, frame.height, frame.format.name, int(frame.colorspace), int(frame.color_range))
        if looks != self._made_for:  # which may change within a video
            graph = _library().filter.Graph()
            nodes = [
                graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000)),
                graph.add("format", "rgb24"),
                graph.add("buffersink"),
            ]
            graph.link_nodes(*nodes).configure()
            self._graph, self._made_for = graph, looks
        self._graph.push(frame)
        pixels: np.ndarray = self._graph.pull().to_ndarray()
        return pixels


def _upright(rgb_HWC: np.ndarray, frame: Any) -> tuple[np.ndarray, str]:
    """The pixels as the display matrix has them shown, and what was done, in words."""
    side = frame.side_data.get("DISPLAYMATRIX")
    if side is None:
        return rgb_HWC, ""
    # The point (x, y) is shown at (a x + c y, b x + d y), in 16.16 fixed point.
    a, b, _, c, d, *_ = np.frombuffer(bytes(side)[:36], np.int32).astype(np.int64).tolist()
    turned = rgb_HWC
    if abs(b) + abs(c) > abs(a) + abs(d):
        turned, a, d = turned.transpose(1, 0, 2), c, b
    if a < 0:
        turned = turned[:, ::-1]
    if d < 0:
        turned = turned[::-1]
    return turned, "" if turned is rgb_HWC else MATRIX_ROTATE


def _is_cut_matroska(file: RangedFile) -> bool:
    """Whether a Matroska file ends before its segment does."""
    file.seek(0)
    head, at = file.read(4096), 0
    for _ in range(2):  # the header, and the segment
        if at + 12 > len(head):
            return False
        is_segment = head[at : at + 4] == b"\x18\x53\x80\x67"
        first = head[at + 4]
        width = 9 - first.bit_length()
        if width > 8:
            return False
        bits = 7 * width
        length = int.from_bytes(head[at + 4 : at + 4 + width], "big") & ((1 << bits) - 1)
        at += 4 + width
        if is_segment:
            return length != (1 << bits) - 1 and at + length > file.size
        at += length
    return False
