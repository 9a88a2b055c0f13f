"""What lies in a tar, from its first byte to its last: members, damage, zeros, and bytes behind the end.

Unlike `tarfile` and webdataset, which end quietly at the first block that is no header, this goes on at the next valid
header, so that nothing but the file's end is an end: not a block of zeros, not an archive's own end marker (archives may
be joined with `cat`), not a damaged header.
"""

import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import BinaryIO

import numpy as np

from storage.inputs import InputFile
from storage.paths import InputError
from storage.redaction import query_free

BLOCK = tarfile.BLOCKSIZE

MAX_TEXT_BYTES = 2**20
"""Largest name or carried member that is taken."""

MAX_PAX_BYTES = 2**26
"""Largest pax header that is read: attributes and ACLs of files may fill megabytes."""

NO_END = "no end-of-archive marker: the tar may have been cut short"
JOINED = "end of an archive inside a tar, where archives were joined"
ZEROS = "stretch of zeros that no end of an archive explains (a hole, or an unfinished download)"
BEHIND = "stretch of bytes behind a tar's end"
NOTHING = "tar of zeros alone (an empty one, or a download that never began)"

_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
_NO_DATA = (tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE)
"""Members whose size field, as for `tarfile`, says nothing about what follows."""

_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENSIONS = (*_PAX, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
"""Headers that say something about the next one."""

_OTHER = {
    tarfile.DIRTYPE: "folder in a tar",
    tarfile.FIFOTYPE: "FIFO in a tar",
    tarfile.CHRTYPE: "device in a tar",
    tarfile.BLKTYPE: "device in a tar",
    b"D": "dump folder of GNU tar",
    b"M": "rest of a file that began in another volume",
    b"N": "list of long names of an old GNU tar",
    b"V": "volume label",
}
"""What no sample can be made of, in words. Members of unknown types are files, as POSIX asks."""

_RECORDS = (10_240, *(2**n for n in range(15, 23)))
"""Sizes in bytes to a multiple of which writers pad an archive: the usual one, and powers of two up to 4 MiB."""

_PAX_RECORD = re.compile(rb"(\d{1,8}) ([^=\n]{1,1000})=")

_FIRST_STEP, _MAX_STEP = 8 * BLOCK, 2**20

_IS_OCTAL = np.isin(np.arange(256), list(b" \x0001234567"))
_IS_DIGIT = np.isin(np.arange(256), list(b"01234567"))


@dataclass(frozen=True, slots=True)
class Member:
    """A file of the archive, or a link to one."""

    name: str
    offset: int
    "where its data begin, in bytes"
    size: int
    "bytes; of a link 0, unless the archive has its data again"
    target: str | None = None
    "for links: what they lead to, as the archive has it"
    is_symlink: bool = False
    problem: str | None = None
    "why its data can't be read by range"


@dataclass(frozen=True, slots=True)
class Gap:
    """A stretch of a tar that is damaged: whole samples may be lost in it."""

    first: int
    last: int
    why: str

    def __str__(self) -> str:
        return f"bytes {self.first} to {self.last} {self.why}"


@dataclass(frozen=True, slots=True)
class Aside:
    """What is neither a member of a sample nor damage; `is_usual` where well-formed tars have it."""

    reason: str
    what: str
    is_usual: bool = False


@dataclass(frozen=True, slots=True)
class _Said:
    """What extension headers said about the next member."""

    name: str = ""
    target: str = ""
    pax: Mapping[str, str] = field(default_factory=dict)
    why_not: str = ""
    "why nobody knows what it is called"


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Bytes from where a header should be to where the next one is, or to the file's end."""

    first: int
    last: int
    zeros_to: int
    "where the zeros at its beginning end"
    data_to: int
    "where the zeros at its end begin; `first` where all of it is zero"
    is_last: bool
    "there is no further header"


class TarWalk:
    """Goes through a tar once, reading headers only. `problems` is complete when the iteration has ended.

    Raises `InputError` for a file that begins with something else than a tar.
    """

    def __init__(self, stream: BinaryIO, file: InputFile):
        self.stream, self.file = stream, file
        self.problems: list[str] = []
        self._archive = 0  # where the current one of joined archives begins
        self._said = _Said()

    def __iter__(self) -> Iterator[Member | Gap | Aside]:
        position = 0
        while block := self._read(position, BLOCK):
            info = _header(block, self._said.pax)
            if info is None:
                stretch = self._stretch(position, block)
                self._said = _Said()
                yield from self._account(stretch)
                if stretch.is_last:
                    return
                position = stretch.last
                continue
            data = position + self._header_bytes(info, position)
            size = self._data_bytes(info, data)
            yield from self._member(info, position, data, size)
            position = data + _padded(size)
        self.problems.append(NO_END)

    def _read(self, position: int, size: int) -> bytes:
        if position >= self.file.size:  # headers may name places beyond what a filesystem can seek to
            return b""
        self.stream.seek(position)
        return self.stream.read(size)

    # --- members ------------------------------------------------------------------------------------------------------

    def _header_bytes(self, info: tarfile.TarInfo, position: int) -> int:
        """Old sparse members have further blocks of header, each of which says whether another follows."""
        size = BLOCK
        more = info.type == tarfile.GNUTYPE_SPARSE and self._read(position, BLOCK)[482:483] != b"\0"
        while more:
            more = self._read(position + size, BLOCK)[504:505] not in (b"\0", b"")
            size += BLOCK
        return size

    def _data_bytes(self, info: tarfile.TarInfo, data: int) -> int:
        """A hard link's size is mostly that of its target; some writers store the data again, which headers around tell."""
        if info.type in _NO_DATA:
            return 0
        if info.type == tarfile.LNKTYPE and info.size:
            follows, behind = self._read(data, BLOCK), self._read(data + _padded(info.size), BLOCK)
            is_stored = not _may_follow(follows) and _may_follow(behind)
            return info.size if is_stored else 0
        return info.size

    def _member(self, info: tarfile.TarInfo, start: int, data: int, size: int) -> Iterator[Member | Gap | Aside]:
        if info.type in _EXTENSIONS:
            self._said = self._extended(info, data)
            return
        if info.type == tarfile.XGLTYPE:
            return
        said, self._said = self._said, _Said()
        name = _text(said.pax.get("GNU.sparse.name") or said.pax.get("path") or said.name or info.name)
        if said.why_not:
            yield Gap(start, data + _padded(size), said.why_not)
        elif info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in said.pax):
            why = f"{name} is stored sparse; repack the tar with its holes filled (tar without --sparse, bsdtar --no-read-sparse)"
            yield Member(name, data, size, problem=why)
        elif info.type in _OTHER:
            yield Aside(_OTHER[info.type], name, is_usual=info.type == tarfile.DIRTYPE)
        elif info.type in _LINKS:
            target = _text(said.pax.get("linkpath") or said.target or info.linkname)
            yield Member(name, data, size, target, is_symlink=info.type == tarfile.SYMTYPE)
        else:
            yield Member(name, data, size)

    def _extended(self, info: tarfile.TarInfo, data: int) -> _Said:
        is_pax = info.type in _PAX
        if info.size > (MAX_PAX_BYTES if is_pax else MAX_TEXT_BYTES):
            what = "pax header" if is_pax else "name"
            return replace(self._said, why_not=f"are a member whose {what} has {info.size} bytes")
        payload = self._read(data, info.size)
        if is_pax:
            pax, is_whole = _parse_pax(payload)
            why_not = self._said.why_not if is_whole else "are a member whose pax header is damaged"
            if max(map(len, pax.values()), default=0) > MAX_TEXT_BYTES:
                why_not = f"are a member whose name has more than {MAX_TEXT_BYTES} bytes"
            return replace(self._said, pax=pax, why_not=why_not)
        text = payload.rstrip(b"\0").decode("utf-8", "surrogateescape")
        is_name = info.type == tarfile.GNUTYPE_LONGNAME
        return replace(self._said, name=text) if is_name else replace(self._said, target=text)

    # --- what is no header --------------------------------------------------------------------------------------------

    def _stretch(self, first: int, block: bytes) -> _Stretch:
        """Look for the next header behind `first`, in steps that grow, so that small damage costs little."""
        if first == 0 and _compression(block):
            raise InputError(_not_a_tar(self.file, block))
        position, step = first, _FIRST_STEP
        zeros_to, data_to = None, first
        while True:
            chunk = self._read(position, step + BLOCK - 1)
            found = None if _is_zero(chunk) else _find_header(chunk, 1 if position == first else 0, step)
            body = chunk[: step if found is None else found]
            if not _is_zero(body):
                bare = body.rstrip(b"\0")
                data_to = position + len(bare)
                zeros_to = data_to - len(bare.lstrip(b"\0")) if zeros_to is None else zeros_to
            if found is not None or len(chunk) <= step:
                last = position + (len(chunk) if found is None else found)
                return _Stretch(first, last, last if zeros_to is None else zeros_to, data_to, found is None)
            position, step = position + step, min(2 * step, _MAX_STEP)

    def _account(self, stretch: _Stretch) -> Iterator[Gap | Aside]:
        """What a stretch without headers means for who wants to know what was lost."""
        first, last = stretch.first, stretch.last
        if stretch.data_to > first:
            if stretch.is_last and first == 0:
                raise InputError(_not_a_tar(self.file, self._read(0, BLOCK)))
            zeros = first + _padded(stretch.data_to - first)
            data_to = zeros if stretch.is_last and last - zeros >= BLOCK else last
            if self._ends_before_data(stretch):
                yield self._bytes(BEHIND, stretch.zeros_to, data_to)
                self._archive = data_to
                if stretch.is_last and data_to == last:
                    return
            else:
                is_cut_header = stretch.is_last and last - first < BLOCK
                why = "are not a whole tar header" if is_cut_header else "hold no valid tar header"
                yield Gap(first, data_to, why)
            first = data_to
        if stretch.is_last:
            yield from self._end(first, last)
        elif first < last:
            yield from self._inner_zeros(first, last)

    def _ends_before_data(self, stretch: _Stretch) -> bool:
        """Whether the zeros at the beginning are an archive's end, and no header that was lost together with its image."""
        first, data = stretch.first, stretch.zeros_to
        is_open = stretch.is_last and stretch.last - stretch.data_to < BLOCK  # no end marker behind the data
        return data - first >= 2 * BLOCK and (is_open or self._is_padding(first, data))

    def _end(self, first: int, last: int) -> Iterator[Aside]:
        """The zeros before the file's end."""
        if first == 0:
            yield self._bytes(NOTHING, first, last)
        elif last - first < BLOCK:
            self.problems.append(NO_END)
        elif last - first > _RECORDS[0] + BLOCK and not self._is_padding(first, last):
            yield self._bytes(ZEROS, first, last)

    def _inner_zeros(self, first: int, last: int) -> Iterator[Aside]:
        """Zeros with a header behind them."""
        is_end = first > 0 and (last - first == 2 * BLOCK or self._is_padding(first, last))
        yield self._bytes(JOINED if is_end else ZEROS, first, last, is_usual=is_end)
        if last - first >= 2 * BLOCK:
            self._archive = last

    def _is_padding(self, first: int, last: int) -> bool:
        """Whether an archive that was padded to records of a usual size ends in such zeros."""
        size = last - self._archive
        zeros = last - first
        return zeros >= 2 * BLOCK and any(size % record == 0 and zeros < record + 2 * BLOCK for record in _RECORDS)

    def _bytes(self, reason: str, first: int, last: int, *, is_usual: bool = False) -> Aside:
        return Aside(reason, f"bytes {first} to {last}", is_usual)


def _is_zero(data: bytes) -> bool:
    return data == bytes(len(data))


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _text(name: str) -> str:
    """Names in other encodings stay apart: caf\\xe9 and caf\\xe8 are two keys."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _may_follow(block: bytes) -> bool:
    """Whether a member may be followed by this: a header, zeros, or the file's end."""
    return _is_zero(block) or _header(block, {}) is not None


def _header(block: bytes, pax: Mapping[str, str]) -> tarfile.TarInfo | None:
    """A header whose checksum is right and whose size can be one."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    if block[257:265] == tarfile.GNU_MAGIC:
        # Old GNU tars have times where POSIX has the first part of the name, which `tarfile` takes them for.
        info.name = block[:100].split(b"\0")[0].decode("utf-8", "surrogateescape")
    if info.type not in _EXTENSIONS and "size" in pax:
        if not re.fullmatch(r"\d{1,19}", pax["size"]):
            return None
        info.size = int(pax["size"])
    return info if 0 <= info.size < 2**62 else None


def _find_header(chunk: bytes, first: int, last: int) -> int | None:
    """Offset in `chunk`, from `first` to `last` (exclusive), of the first valid header.

    At whole blocks, and, since bytes may have been lost or inserted, wherever a header's magic word stands.
    """
    blocks = np.frombuffer(chunk, np.uint8, len(chunk) // BLOCK * BLOCK).reshape(-1, BLOCK)
    checksums = blocks[:, 148:156]
    maybe = _IS_OCTAL[checksums].all(axis=1) & _IS_DIGIT[checksums].any(axis=1)
    magic = np.fromiter((match.start() - 257 for match in re.finditer(b"ustar", chunk)), np.int64)
    magic = magic[(magic >= first) & (magic < min(last, len(chunk) - BLOCK + 1))]
    checksums = np.frombuffer(chunk, np.uint8)[magic[:, None] + np.arange(148, 156)]
    magic = magic[_IS_OCTAL[checksums].all(axis=1) & _IS_DIGIT[checksums].any(axis=1)]
    offsets = np.union1d(np.flatnonzero(maybe) * BLOCK, magic)
    inside = offsets[(offsets >= first) & (offsets < last)].tolist()
    return next((offset for offset in inside if _header(chunk[offset : offset + BLOCK], {}) is not None), None)


_PAX_WANTED = ("path", "linkpath", "size")


def _parse_pax(payload: bytes) -> tuple[dict[str, str], bool]:
    """Of the records `<length> <name>=<value>\\n` of a pax extended header, those that say where and what a member is; and
    whether all could be read."""
    records: dict[str, str] = {}
    start = 0
    while match := _PAX_RECORD.match(payload, start):
        end = start + int(match.group(1))
        if not match.end() < end <= len(payload):
            break
        name = match.group(2).decode("utf-8", "replace")
        if name in _PAX_WANTED or name.startswith("GNU.sparse."):
            records[name] = payload[match.end() : end - 1].decode("utf-8", "surrogateescape")
        start = end
    return records, not payload[start:].strip(b"\0")


_MAGIC = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"BZh": ("bzip2", "bunzip2"),
}
"""What compressed files begin with; by what, and what undoes it."""


def _compression(block: bytes) -> tuple[str, str] | None:
    return next((found for magic, found in _MAGIC.items() if block.startswith(magic)), None)


def _not_a_tar(file: InputFile, block: bytes) -> str:
    displayed = query_free(file.url)
    if found := _compression(block):
        name, undo = found
        return f"{displayed} is {name}-compressed: images can't be read from it by range. Decompress it first ({undo})"
    return f"{displayed} is not a tar archive (there is no tar header in it)"
