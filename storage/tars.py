"""What is in a tar: its samples by WebDataset's rules, where their images lie, and what is damaged.

Reads headers, and the text members that a user wants carried along. Nothing of an archive becomes a path or is
unpickled: member names are labels.
"""

import hashlib
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import pyarrow as pa

from storage.inputs import IMAGE_EXTENSIONS, InputFile, open_sequential
from storage.paths import InputError, query_free

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.int32()),
        ("member", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("problem", pa.string()),
    ]
)
"""One row per sample. `source` is the position in `SampleIndex.sources`; `offset` and `size` (bytes) locate the image
inside the source; `problem` says why the sample has no readable image, or is null."""

MAX_CARRIED_BYTES = 2**20

_EXTENSIONS = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
"""Headers that say something about the next one."""

_NO_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE)
"""Members whose size field, as for `tarfile`, says nothing about what follows."""


@dataclass(frozen=True, kw_only=True)
class MemberRules:
    """Which member of a sample is its image, and which others are copied into the index."""

    image: str | None = None
    "extension of the image member, for example `jpg` or `rgb.png`; None: the first known image extension"
    carry: tuple[str, ...] = ()
    "extensions of text members that become columns of the index, for example `cls`, `json`"

    def __post_init__(self) -> None:
        object.__setattr__(self, "carry", tuple(name.lower().lstrip(".") for name in self.carry))
        for name in self.carry:
            if name in SCHEMA.names or self.carry.count(name) > 1:
                raise InputError(f"--carry {name}: the index has a column of that name; rename the members, or drop it")


def split_name(name: str) -> tuple[str, str] | None:
    """WebDataset's rule: (key, extension), split at the first dot of the last path part; None if it has no dot."""
    match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", name)
    return (match.group(1), match.group(2).lower()) if match else None


# --- scanning one source ----------------------------------------------------------------------------------------------


@dataclass
class _Member:
    name: str
    offset: int
    size: int


@dataclass
class _Gap:
    """A stretch of a tar that is not read."""

    first: int
    last: int
    why: str

    def __str__(self) -> str:
        return f"bytes {self.first} to {self.last} {self.why}"


@dataclass
class SourceScan:
    """What one source holds."""

    rows: pa.Table
    digest: str
    "sha256 over the rows"
    problems: list[str] = field(default_factory=list)


def scan_source(file: InputFile, rules: MemberRules, storage_options: Mapping[str, Any] | None = None) -> SourceScan:
    """List the samples of one tar (or the one sample of an image file). Raises `InputError` if it's no tar."""
    if file.is_image:
        return _scan_image_file(file, rules)
    problems: list[str] = []
    with open_sequential(file, storage_options) as stream:
        rows = list(_samples(_members(stream, file, problems), stream, file, rules))
    return _scan_result(rows, rules, problems)


def _scan_result(rows: list[dict[str, Any]], rules: MemberRules, problems: list[str]) -> SourceScan:
    table = pa.Table.from_pylist(rows, schema=index_schema(rules))
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr([row.get(name) for name in table.column_names if name != "source"]).encode())
    return SourceScan(table, digest.hexdigest(), problems)


def index_schema(rules: MemberRules) -> pa.Schema:
    """`SCHEMA` and a string column for each carried member."""
    return pa.schema([*SCHEMA, *((name, pa.string()) for name in rules.carry)])


def _scan_image_file(file: InputFile, rules: MemberRules) -> SourceScan:
    name = file.url[len(file.base) :].lstrip("/") if file.base else file.url.rsplit("/", 1)[-1]
    key, extension = split_name(name) or (name, "")
    row = {"key": key, "source": 0, "member": extension, "offset": 0, "size": file.size, "problem": None}
    return _scan_result([row], rules, [])


def _members(stream: BinaryIO, file: InputFile, problems: list[str]) -> Iterator[_Member | _Gap]:
    """Regular members of a tar in order, and the stretches between them that can't be read.

    Unlike `tarfile`, which ends quietly at a damaged or cut header, this verifies each header's checksum, goes on at
    the next valid one, and reports what lies between.
    """
    position, long_name, pax = 0, None, {}
    bad_from: int | None = None
    zeros_from: int | None = None  # within a damaged stretch
    while True:
        stream.seek(position)
        block = stream.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            if position == 0 and block:
                raise InputError(_not_a_tar(file, block))
            if bad_from is not None and zeros_from is not None and not block:
                yield _Gap(bad_from, zeros_from, "hold no valid tar header")
                return
            if bad_from is not None or block:
                yield _Gap(position if bad_from is None else bad_from, file.size, "are not a whole tar header")
            problems.append("no end-of-archive marker: the tar may have been cut short")
            return
        try:
            info = _header(block, pax)
        except tarfile.EOFHeaderError:
            if bad_from is None:
                return
            # Zeros may be data of the image whose header is lost; only up to the file's end are they the end marker.
            zeros_from = position if zeros_from is None else zeros_from
            position += tarfile.BLOCKSIZE
            continue
        except tarfile.HeaderError:
            if position == 0:
                raise InputError(_not_a_tar(file, block)) from None
            bad_from = position if bad_from is None else bad_from
            position += tarfile.BLOCKSIZE
            long_name, pax, zeros_from = None, {}, None
            continue
        if bad_from is not None:
            yield _Gap(bad_from, position, "hold no valid tar header")
            bad_from = zeros_from = None
        start, data, size = position, position + tarfile.BLOCKSIZE, info.size
        position = data + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if info.type in _EXTENSIONS:
            payload = stream.read(size) if size <= MAX_CARRIED_BYTES else b""
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = payload.rstrip(b"\0").decode("utf-8", "surrogateescape")
            else:
                pax = _parse_pax(payload)
            continue
        name = pax.get("path") or long_name or info.name
        # Names in other encodings stay apart: caf\xe9 and caf\xe8 are two keys.
        name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        if info.type == tarfile.GNUTYPE_SPARSE:
            yield _Gap(start, position, f"are no plain file: {name} is stored sparse; repack without --sparse")
        elif info.isreg():
            yield _Member(name, data, size)
        long_name, pax = None, {}


def _header(block: bytes, pax: Mapping[str, str]) -> tarfile.TarInfo:
    """A header whose checksum is right and whose size can be one. Raises `tarfile.HeaderError`."""
    info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    if info.type not in _EXTENSIONS and "size" in pax:
        if not re.fullmatch(r"\d{1,19}", pax["size"]):
            raise tarfile.InvalidHeaderError("size is no number")
        info.size = int(pax["size"])
    if not 0 <= info.size < 2**62:
        raise tarfile.InvalidHeaderError("size out of range")
    if info.type in _NO_DATA:
        info.size = 0
    return info


def _not_a_tar(file: InputFile, block: bytes) -> str:
    shown = query_free(file.url)
    if block.startswith(b"\x1f\x8b"):
        return f"{shown} is gzip-compressed: images can't be read from it by range. Decompress it first (gunzip)"
    return f"{shown} is not a tar archive (its first 512 bytes are no tar header)"


def _parse_pax(payload: bytes) -> dict[str, str]:
    """Records `<length> <name>=<value>\\n` of a pax extended header."""
    records: dict[str, str] = {}
    while match := re.match(rb"(\d+) ([^=]+)=", payload):
        length = int(match.group(1))
        if length <= match.end():
            break
        value = payload[match.end() : length - 1]
        records[match.group(2).decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        payload = payload[length:]
    return records


def _samples(
    members: Iterable[_Member | _Gap], stream: BinaryIO, file: InputFile, rules: MemberRules
) -> Iterator[dict[str, Any]]:
    """Group adjacent members of one key, as WebDataset does, and make an index row of each group and each gap."""
    key: str | None = None
    group: dict[str, _Member] = {}
    problem: str | None = None
    gaps: list[dict[str, Any]] = []
    for member in members:
        if isinstance(member, _Gap):
            # Nobody knows which sample was lost here; the position stands in for its key. Its row comes after that of
            # the sample before it, whose members may go on behind the gap.
            name = f"{query_free(file.url).rsplit('/', 1)[-1]}@{member.first}-{member.last}"
            gaps.append(
                {"key": name, "source": 0, "member": "", "offset": 0, "size": 0, "problem": f"damaged tar: {member}"}
            )
            continue
        if re.match(r"__[^/]*__($|/)", member.name):
            continue
        split = split_name(member.name)
        if split is None:
            continue
        if split[0] != key:
            if key is not None:
                yield _row(key, group, problem, stream, file, rules)
            yield from gaps
            key, group, problem, gaps = split[0], {}, None, []
        if split[1] in group:
            problem = f"the sample has two members named .{split[1]}"
        group[split[1]] = member
    if key is not None:
        yield _row(key, group, problem, stream, file, rules)
    yield from gaps


def _row(
    key: str, group: dict[str, _Member], problem: str | None, stream: BinaryIO, file: InputFile, rules: MemberRules
) -> dict[str, Any]:
    wanted = (rules.image.lower().lstrip("."),) if rules.image else IMAGE_EXTENSIONS
    extension = next((name for name in wanted if name in group), "")
    row: dict[str, Any] = {"key": key, "source": 0, "member": extension, "offset": 0, "size": 0, "problem": problem}
    if not extension:
        row["problem"] = problem or f"no image member (has {', '.join('.' + name for name in sorted(group))})"
    else:
        member = group[extension]
        row |= {"offset": member.offset, "size": member.size}
        row["problem"] = problem or _cut_short(member, "the image", file)
    for name in rules.carry:
        row[name] = None
        if name in group:
            cut = _cut_short(group[name], f".{name}", file)
            row["problem"] = row["problem"] or cut
            row[name] = None if cut else _text(stream, group[name], file)
    return row


def _cut_short(member: _Member, what: str, file: InputFile) -> str | None:
    missing = member.offset + member.size - file.size
    if missing <= 0:
        return None
    return f"the tar is cut short: the last {missing} of {member.size} bytes of {what} are missing"


def _text(stream: BinaryIO, member: _Member, file: InputFile) -> str:
    if member.size > MAX_CARRIED_BYTES:
        raise InputError(
            f"{query_free(file.url)}: {member.name} has {member.size} bytes; carried members are at most 1 MiB"
        )
    stream.seek(member.offset)
    try:
        return stream.read(member.size).decode()
    except UnicodeDecodeError:
        raise InputError(
            f"{query_free(file.url)}: {member.name} is not UTF-8 text, so it can't be carried into the index; drop its "
            "extension from --carry"
        ) from None
