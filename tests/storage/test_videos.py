"""Frames of real videos, held against FFmpeg's own filters. Skipped where there is no PyAV."""

import io
import itertools
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from storage.ranges import RangedFile, read_range
from storage.videos import Frame, Place, Sampling, Video, VideoRefused, count_frames, exact_seconds, frame_key, opened_video
from tests.storage.test_samples import _Plain, _Ranged
from tests.storage.test_samples import serve as serve
from tests.videos import drawn, video

av = pytest.importorskip("av")

PICTURES = [drawn(i) for i in range(23)]

UNEVEN = list(itertools.accumulate(Fraction(n, 1000) for n in (0, *(40, 300, 100, 50, 800, 33) * 4)))[:23]


def pixels(frame: Frame | VideoRefused) -> np.ndarray:
    assert isinstance(frame, Frame), str(frame)
    header, _, rest = bytes(frame).partition(b"\n")
    _, width, height, _ = header.split()
    return np.frombuffer(rest, np.uint8).reshape(int(height), int(width), 3)


def place_of(folder: Path, data: bytes, before: bytes = b"") -> Place:
    """The video as a stretch of a file."""
    (folder / "file").write_bytes(before + data + b"behind it")
    return Place(str(folder / "file"), len(before), len(data))


def taken(place: Place, fps: float, frames: range | None = None, **settings: int) -> list[Frame | VideoRefused]:
    sampling = Sampling.of(fps)
    wanted = range(count_frames(place, sampling)) if frames is None else frames
    with opened_video(place, **settings) as opened:
        return list(opened.frames([exact_seconds(sampling.seconds(k)) for k in wanted]))


def by_ffmpeg(data: bytes, fps: float) -> list[np.ndarray]:
    """What FFmpeg's filters make of the whole video: `setpts=PTS-STARTPTS,fps=F:round=up,format=rgb24`."""

    def pulled() -> Iterator[np.ndarray]:
        while True:
            try:
                yield graph.pull().to_ndarray()
            except (av.error.BlockingIOError, av.error.EOFError):
                return

    found = []
    with av.open(io.BytesIO(data)) as container:
        stream, graph = container.streams.video[0], av.filter.Graph()
        nodes = [graph.add_buffer(template=stream), graph.add("setpts", "PTS-STARTPTS")]
        nodes += [graph.add("fps", f"{Sampling.of(fps).rate}:round=up"), graph.add("format", "rgb24"), graph.add("buffersink")]
        graph.link_nodes(*nodes).configure()
        for frame in container.decode(stream):
            graph.push(frame)
            found += pulled()
        graph.push(None)
        found += pulled()
    return found


B_FRAMES = {"bf": "3", "b_strategy": "0"}

VIDEOS = {
    "even": {},
    "B-frames": {"options": B_FRAMES},
    "open groups": {"options": {"x264-params": "open-gop=1:keyint=6:bframes=3"}},
    "uneven": {"times": UNEVEN},
    "uneven, B-frames": {"times": UNEVEN, "options": B_FRAMES},
    "begins late": {"times": [Fraction(3, 2) + Fraction(i, 10) for i in range(23)], "options": B_FRAMES},
    "10 bits": {"pixels": "yuv420p10le"},
    "full range": {"pixels": "yuvj420p"},
    "BT.709": {"settings": {"colorspace": 1, "color_range": 1}},
    "fragments": {"movflags": "frag_keyframe+empty_moov"},
    "sound that goes on": {"sound_s": 5},
    "Matroska": {"container": "matroska", "options": B_FRAMES, "sound_s": 3},
    "WebM": {"container": "webm", "codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "8"}},
    "VP9": {"container": "webm", "codec": "libvpx-vp9", "options": {"lag-in-frames": "8"}},
    "QuickTime": {"container": "mov", "codec": "mpeg4"},
}


@pytest.mark.parametrize("fps", [4, 10, 29.97])
@pytest.mark.parametrize("kind", VIDEOS)
def test_frames_are_those_of_ffmpeg(tmp_path, kind, fps):
    data = video(PICTURES, **VIDEOS[kind])
    expected = by_ffmpeg(data, fps)

    found = taken(place_of(tmp_path, data, b"other members"), fps)

    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.array_equal(pixels(ours), theirs)


def test_odd_sizes(tmp_path):
    data = video([drawn(i, 63, 47) for i in range(5)], container="webm", codec="libvpx-vp9")

    found = taken(place_of(tmp_path, data), 10)

    assert [pixels(each).shape for each in found] == [(47, 63, 3)] * 5
    assert all(np.array_equal(pixels(a), b) for a, b in zip(found, by_ffmpeg(data, 10), strict=True))


def test_time_is_the_frames_own(tmp_path):
    data = video(PICTURES, times=[Fraction(3, 2) + each for each in UNEVEN])

    found = taken(place_of(tmp_path, data), 4)

    times = [float(each) for each in UNEVEN]
    expected = [max(time for time in times if time <= k / 4) for k in range(len(found))]
    assert [each.time for each in found] == pytest.approx([1.5 + time for time in expected])


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_display_matrix_turns_frames(tmp_path, degrees):
    plain = taken(place_of(tmp_path, video(PICTURES[:3])), 10)
    turned = taken(place_of(tmp_path, video(PICTURES[:3], turn=degrees)), 10)

    assert {each.conversion for each in turned} == {"matrix-rotate"}
    with av.open(io.BytesIO(video(PICTURES[:3], turn=degrees))) as container:
        counterclockwise = next(container.decode(video=0)).rotation
    for ours, straight in zip(turned, plain, strict=True):
        assert np.array_equal(pixels(ours), np.rot90(pixels(straight), counterclockwise // 90))


@pytest.mark.parametrize("kind", ["B-frames", "open groups", "uneven, B-frames", "begins late", "Matroska", "VP9", "fragments"])
def test_any_stretch_has_the_same_frames(tmp_path, kind):
    place = place_of(tmp_path, video(PICTURES, **VIDEOS[kind]))
    whole = taken(place, 10)

    for first in range(len(whole)):
        part = taken(place, 10, range(first, min(first + 2, len(whole))))
        assert [(bytes(a), a.time, a.digest) for a in part] == [(bytes(a), a.time, a.digest) for a in whole[first : first + 2]]
    sparse = taken(place, 10, range(0, len(whole), 7), threads=2)
    assert [(bytes(a), a.digest) for a in sparse] == [(bytes(a), a.digest) for a in whole[::7]]


def test_digests_tell_frames_apart_also_where_their_packets_are_equal(tmp_path):
    still, other = (video([np.full((48, 64, 3), grey, np.uint8)] * 12, key_every=12) for grey in (90, 120))

    digests = [[each.digest for each in taken(place_of(tmp_path, data), 10)] for data in (still, other, still)]

    assert digests[0] == digests[2]
    assert len({*digests[0], *digests[1]}) == 24


def long_video(seconds: int = 120, key_every: int = 10) -> bytes:
    rng = np.random.default_rng(0)
    return video([rng.integers(0, 255, (48, 64, 3), np.uint8) for _ in range(seconds)], rate=1, key_every=key_every)


def count_decoding(monkeypatch: pytest.MonkeyPatch, decoded: list[Fraction]) -> None:
    """Have the times of all frames that are decoded noted."""
    original = Video._decode

    def decode(self: Video, *args: object) -> Iterator[object]:
        for each in original(self, *args):
            decoded.append(each.pts)
            yield each

    monkeypatch.setattr(Video, "_decode", decode)


def test_little_is_read_and_decoded_of_a_long_video(tmp_path, monkeypatch):
    place, read, decoded = place_of(tmp_path, long_video(400)), [], []
    monkeypatch.setattr(RangedFile, "FIRST", 2**12)
    monkeypatch.setattr(RangedFile, "LARGEST", 2**14)
    monkeypatch.setattr("storage.ranges.read_range", lambda *args: (read.append(args[3] - args[2]), read_range(*args))[1])

    assert count_frames(place, Sampling.of(0.02)) == 8
    assert sum(read) < place.size / 4  # FFmpeg looks at the first twenty frames, however few there are

    read.clear()
    with opened_video(place) as opened:
        count_decoding(monkeypatch, decoded)
        frames = list(opened.frames([Fraction(50 * k) for k in range(8)]))
    assert [each.time for each in frames] == [50 * k for k in range(8)]
    assert len(decoded) <= 8 * (10 + 2)  # groups are of ten frames
    assert sum(read) < place.size / 2


@pytest.mark.parametrize("handler", [_Plain, _Ranged])
def test_a_web_server_without_ranges_is_asked_once(tmp_path, serve, handler, monkeypatch):
    data = long_video(60)
    place = place_of(tmp_path, data, before=bytes(5000))
    monkeypatch.setattr(RangedFile, "FIRST", 2**10)
    monkeypatch.setattr(RangedFile, "LARGEST", 2**12)
    asked: list[str] = []
    base, _ = serve(type("Counting", (handler,), {"do_GET": lambda self: (asked.append(self.path), handler.do_GET(self))[1]}))
    far = Place(f"{base}/file", place.offset, place.size)

    with opened_video(far) as there, opened_video(place) as here:
        seconds = [Fraction(10 * k) for k in range(6)]
        assert [pixels(each).tobytes() for each in there.frames(seconds)] == [
            pixels(each).tobytes() for each in here.frames(seconds)
        ]

    assert (len(asked) == 1) == (handler is _Plain)


def test_rare_key_frames_are_not_sought_again_and_again(tmp_path, monkeypatch):
    place, decoded = place_of(tmp_path, long_video(key_every=1000)), []

    with opened_video(place) as opened:
        count_decoding(monkeypatch, decoded)
        assert len(list(opened.frames([Fraction(20 * k) for k in range(6)]))) == 6

    assert len(decoded) <= 2 * 120


# --- what can't be read -----------------------------------------------------------------------------------------------


def refusal(place: Place, sampling: Sampling | None = None) -> str:
    with pytest.raises(VideoRefused) as caught:
        count_frames(place, sampling or Sampling.of(2))
    return f"{caught.value.kind}: {caught.value}"


def sound() -> bytes:
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        heard = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        heard.sample_rate = 16000
        out.mux(stream.encode(heard))
        out.mux(stream.encode(None))
    return sink.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "NoVideo: the video has 0 bytes"),
        (b"hello" * 99, "NoVideo: FFmpeg can't open it as MP4 or Matroska"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "NoVideo: FFmpeg can't open it as MP4 or Matroska"),
        (b"ffconcat version 1.0\nfile other.mp4\n", "NoVideo: FFmpeg can't open it as MP4 or Matroska"),
    ],
)
def test_what_is_no_video(tmp_path, data, words):
    assert words in refusal(place_of(tmp_path, data))


def test_no_index_no_track_too_many_frames(tmp_path):
    data = video(PICTURES)

    assert "Truncated: it has no index (moov)" in refusal(place_of(tmp_path, data[: len(data) // 2]))
    assert "NoVideo: it has no video track (it has audio)" in refusal(place_of(tmp_path, sound()))
    assert "TooLong: 2 s are 5 frames at --fps 2, more than max_video_frames = 4" in refusal(
        place_of(tmp_path, data), Sampling.of(2, 4)
    )


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_video_that_was_cut_has_the_frames_that_are_there(tmp_path, container):
    noise = np.random.default_rng(0).integers(0, 255, (60, 48, 64, 3), np.uint8)
    data = video(list(noise), container=container)
    whole = taken(place_of(tmp_path, data), 10)
    if container == "mp4":  # its index is at the end
        place = place_of(tmp_path, data)
        start = data.index(b"mdat")
        blank = data[: start + 40_000] + bytes(len(data) - start - 60_000) + data[-20_000:]
        found = taken(place_of(tmp_path, blank), 10)
    else:
        place = place_of(tmp_path, data[: len(data) // 2])
        found = taken(place, 10)

    good = [i for i, each in enumerate(found) if isinstance(each, Frame)]
    assert len(found) == len(whole) == 60
    assert 10 < len(good) < 50
    assert all(bytes(found[i]) == bytes(whole[i]) for i in good)
    assert {each.kind for each in found if isinstance(each, VideoRefused)} <= {"Truncated", "Damaged"}


def test_more_pixels_than_allowed(tmp_path):
    with pytest.raises(VideoRefused, match="64 x 48 pixels are more than max_image_pixels = 1000"):
        taken(place_of(tmp_path, video(PICTURES[:2])), 10, range(1), max_pixels=1000)


def test_keys_are_in_order_of_time():
    sampling = Sampling.of(29.97)
    times = [sampling.seconds(k) for k in range(0, 3_000_000, 997)]

    keys = [frame_key("a", at) for at in times]

    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys)
    assert all(exact_seconds(at) == k * 997 / sampling.rate for k, at in enumerate(times))
