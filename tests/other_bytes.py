"""Other content for an object of a run's input: as many bytes, as valid, under the same name, with the same modification time.

What can be had of a kind of file is said by its extension, once, in `_OTHERS`; members of tars are objects as files are.
"""

import io
import json
import os
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class InputObject:
    """A file of the input, or a member of a tar."""

    name: str
    "below the input's root; of a member, behind its tar's"
    path: Path
    start: int
    size: int

    @property
    def kind(self) -> str:
        """Where objects like it lie: its folder, and its extension."""
        return f"{self.name.rpartition('/')[0]}/*{Path(self.name).suffix}"

    def data(self) -> bytes:
        return self.path.read_bytes()[self.start : self.start + self.size]

    def others(self) -> Iterator[bytes]:
        """Other contents of its size, the plainest first. Raises `KeyError` for a file that nothing here knows."""
        return _OTHERS[Path(self.name).suffix](self)

    @contextmanager
    def holding(self, data: bytes) -> Iterator[None]:
        """While this holds, the object has other bytes, and nothing else tells it."""
        assert len(data) == self.size
        times, before = os.stat(self.path), self.path.read_bytes()
        try:
            self._write(before[: self.start] + data + before[self.start + self.size :], times)
            yield
        finally:
            self._write(before, times)

    def _write(self, data: bytes, times: os.stat_result) -> None:
        self.path.write_bytes(data)
        os.utime(self.path, ns=(times.st_atime_ns, times.st_mtime_ns))


def objects_in(root: Path) -> list[InputObject]:
    """All there are below a folder."""
    found: list[InputObject] = []
    for path in sorted(each for each in root.rglob("*") if each.is_file()):
        name = str(path.relative_to(root))
        if path.suffix != ".tar":
            found.append(InputObject(name=name, path=path, start=0, size=path.stat().st_size))
            continue
        with tarfile.open(path) as tar:
            found += [InputObject(f"{name}/{each.name}", path, each.offset_data, each.size) for each in tar]
    return found


# --- by extension -----------------------------------------------------------------------------------------------------


def _photographs(found: InputObject) -> Iterator[bytes]:
    """The negative, mirrored, as a JPEG; a comment fills it up."""
    pixels = np.asarray(Image.open(io.BytesIO(found.data())))
    image = Image.fromarray(255 - pixels[:, ::-1])
    for quality in range(94, 10, -4):
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality)
        lacking = found.size - out.tell()
        if 4 <= lacking < 2**16:
            data = out.getvalue()
            yield data[:2] + b"\xff\xfe" + struct.pack(">H", lacking - 2) + bytes(lacking - 4) + data[2:]
            return


def _label_images(found: InputObject) -> Iterator[bytes]:
    """Values elsewhere in the image; a chunk that decoders skip fills it up."""
    image = Image.open(io.BytesIO(found.data()))
    values = np.asarray(image)
    for other in (values[::-1], values[:, ::-1], np.roll(values, values.shape[0] // 3, 0), np.full_like(values, values.max())):
        out = io.BytesIO()
        made = Image.fromarray(other)
        if image.mode == "P":
            made.putpalette(image.getpalette()[: 3 * (int(values.max()) + 1)])
        made.save(out, "PNG", optimize=True)
        lacking = found.size - out.tell()
        if lacking >= 12 and (other != values).any():
            data, body = out.getvalue(), b"teSt" + bytes(lacking - 12)
            chunk = struct.pack(">I", lacking - 12) + body + struct.pack(">I", zlib.crc32(body))
            yield data[:33] + chunk + data[33:]  # behind the signature and IHDR


def _lists(found: InputObject) -> Iterator[bytes]:
    """The lines in another order; another name instead of one of them."""
    lines = found.data().decode().split()
    if len(lines) > 1:
        yield "".join(f"{line}\n" for line in lines[::-1]).encode()
    stems = {each.stem for each in found.path.parents[2].rglob("*") if len(each.stem) == len(lines[-1])}
    for stem in sorted(stems - set(lines)):
        yield "".join(f"{line}\n" for line in [*lines[:-1], stem]).encode()


def _notes(found: InputObject) -> Iterator[bytes]:
    """JSON with other numbers or words, filled up with spaces."""
    value = json.loads(found.data())
    changes: list[Callable[[object], object]] = [
        lambda each: _in_lists(each, lambda number: max(0, number - 4)),
        lambda each: _in_lists(each, lambda number: max(0, number - 1)),
        lambda each: _in_lists(each, lambda number: number * 0.875 if isinstance(number, float) else number),
        _other_words,
    ]
    for change in changes:
        data = json.dumps(change(value), separators=(",", ":")).encode()
        if json.loads(data) != value and len(data) <= found.size:
            yield data + b" " * (found.size - len(data))


def _in_lists(value: object, change: Callable[[float], float], *, inside: bool = False) -> object:
    """The numbers in lists changed, which are coordinates or a model's constants; not the ids and sizes that stand alone."""
    if isinstance(value, Mapping):
        return {name: _in_lists(each, change) for name, each in value.items()}
    if isinstance(value, list):
        return [_in_lists(each, change, inside=True) for each in value]
    return change(value) if inside and type(value) in (int, float) else value


_WORDS = {"bilinear": "bicubic", "bicubic": "bilinear"}


def _other_words(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _other_words(each) for name, each in value.items()}
    return _WORDS.get(value, value) if isinstance(value, str) else value


def _boxes(found: InputObject) -> Iterator[bytes]:
    """XML with other coordinates, filled up with spaces."""

    def less(match: re.Match[str], by: int) -> str:
        return f"{match[1]}>{max(1, int(match[2]) - by)}"

    for by in (8, 2):
        text = re.sub(r"(?<=<)([xy]m..)>(\d+)", partial(less, by=by), found.data().decode())
        yield text.encode().ljust(found.size)


def _tensors(found: InputObject) -> Iterator[bytes]:
    """Every tensor's values in reverse order."""
    data = found.data()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    values = bytearray(data)
    for name, tensor in header.items():
        if name != "__metadata__" and tensor["dtype"] == "F32":
            first, last = (start + each for each in tensor["data_offsets"])
            values[first:last] = np.frombuffer(data[first:last], "<f4")[::-1].tobytes()
    yield bytes(values)


def _words(found: InputObject) -> Iterator[bytes]:
    yield bytes(each ^ 1 for each in found.data())


_OTHERS: Mapping[str, Callable[[InputObject], Iterator[bytes]]] = {
    ".jpg": _photographs,
    ".png": _label_images,
    ".txt": _lists,
    ".json": _notes,
    ".xml": _boxes,
    ".safetensors": _tensors,
    ".cls": _words,
}
