"""What is in a tar: its samples by WebDataset's rules, where their images lie, what is damaged, and what is no sample.

Reads headers (storage/tar_members.py), and the text members that a user wants carried along. Nothing of an archive
becomes a path or is unpickled: member names and what links lead to are labels within the archive.
"""

import bisect
import hashlib
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from storage.folders import SIDE_FILE, is_side_file
from storage.inputs import IMAGE_EXTENSIONS, InputFile, open_sequential
from storage.left_out import LeftOut, leave_out, left_out_lines
from storage.paths import InputError, StorageOptions
from storage.ranges import is_of_one_object
from storage.redaction import query_free, redact
from storage.tar_members import MAX_TEXT_BYTES, Aside, Gap, Member, TarWalk
from storage.videos import TAKES_FRAMES, VIDEO_EXTENSIONS, Place, Sampling, VideoRefused, count_frames, frame_key, is_video

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

AT = pa.field("at", pa.float64())
"""The further column of an index with frames of videos: how many seconds after the video's first frame a sample is taken.
`offset` and `size` are the video's then. Null for images, and for videos that can't be read."""


def index_schema(carried: Sequence[str], *, with_frames: bool) -> pa.Schema:
    """The columns of an index: `SCHEMA`, those of carried members, and of frames of videos where there may be any."""
    return pa.schema([*SCHEMA, *((name, pa.string()) for name in carried), *([AT] if with_frames else [])])


_Row = dict[str, str | int | float | None]
"""A row of the index by column; carried members have columns of their own."""

_ROWS = 2**13
"""Rows that are put into a table together."""

_READERS = 8
"""Headers of videos that are read at once."""


@dataclass(frozen=True, kw_only=True)
class MemberRules:
    """Which member of a sample is its image, and which others are copied into the index."""

    image: str | None = None
    "extension of the image member, for example `jpg` or `rgb.png`; None: the first known image extension"
    carry: tuple[str, ...] = ()
    "extensions of text members that become columns of the index, for example `cls`, `json`"
    skip_empty: bool = False
    "a tar without images, and what is no tar or can't be read, is left out; without it, it's an error"
    by_place: bool = False
    "the place of its source among the input's files is before the key of each sample; see `InputFile.place`"
    frames: Sampling | None = None
    "which frames of videos are samples; a sample's video comes before its images. None: videos are no images"

    @property
    def schema(self) -> pa.Schema:
        """The columns of an index of such members."""
        return index_schema(self.carry, with_frames=self.frames is not None)

    @property
    def members(self) -> tuple[str, ...]:
        """The extensions of what is a sample's image or video, the first in this order that it has."""
        if self.image:
            return (self.image.lower().lstrip("."),)
        return (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS) if self.frames else IMAGE_EXTENSIONS

    def is_video(self, member: object) -> bool:
        """Whether the extension is of a member whose frames are samples."""
        return self.frames is not None and is_video(f".{member}")

    def __post_init__(self) -> None:
        object.__setattr__(self, "carry", tuple(name.lower().lstrip(".") for name in self.carry))
        for name in self.carry:
            if name in (*SCHEMA.names, AT.name) or self.carry.count(name) > 1:
                raise InputError(f"--carry {name}: the index has a column of that name; rename the members, or drop it")


def split_name(name: str) -> tuple[str, str] | None:
    """WebDataset's rule: (key, extension), split at the first dot of the last path part; None if it has no dot."""
    # As its `^((?:.*/|)[^.]+)[.]([^/]*)$` has it, whose time for a name of n characters grows with n * n.
    line = name.find("\n")
    start = name.rfind("/", 0, line if line >= 0 else len(name)) + 1
    dot = name.find(".", start)
    if dot == start > 0:  # nothing before the dot: the folder is the key, unless it has a dot itself
        dot = name.find(".", name.rfind("/", 0, start - 1) + 1)
        start = 0 if dot == start else dot
    if dot <= start or "/" in name[dot:]:
        return None
    return name[:dot], name[dot + 1 :].lower()


# --- scanning one source ----------------------------------------------------------------------------------------------


@dataclass
class SourceScan:
    """What one source holds."""

    rows: pa.Table
    digest: str
    "sha256 over the rows"
    problems: list[str] = field(default_factory=list)
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    "what is in the source and in no row, by reason"

    @property
    def why_empty(self) -> str:
        """In words, why it holds no image, or video whose frames are taken; empty where it holds one."""
        if pc.any(pc.not_equal(self.rows["member"], "")).as_py():
            return ""
        nothing = ", but ".join(["it has no samples", *left_out_lines(self.left_out)])
        return str(self.rows["problem"][0]) if len(self.rows) else nothing


def scan_source(file: InputFile, rules: MemberRules, storage_options: StorageOptions | None = None) -> SourceScan:
    """List the samples of one tar (or the one sample of an image file, or those of a video).

    Raises `InputError` if it's no tar or can't be read, unless the rules skip such.
    """
    if file.is_image or rules.is_video(file.extension):
        key, member = split_name(file.name) or (file.name, file.extension)
        if rules.by_place:
            key, member = file.place, file.extension
        row = _empty_row(key, None) | {"member": member, "size": file.size}
        return _scan_result(_with_frames([row], file, rules, storage_options), rules, [], {})
    try:
        scan = _scan_tar(file, rules, storage_options)
        why = scan.why_empty if rules.skip_empty else ""
    except (InputError, OSError) as error:
        if isinstance(error, OSError) and not is_of_one_object(error):
            raise
        why = redact(str(error), storage_options)
        if not rules.skip_empty:
            raise InputError(f"{why}. {SKIP}" if isinstance(error, OSError) else f"{why}; {SKIP}") from None
        scan = _scan_result([], rules, [], {})
    if not why:
        return scan
    leave_out(scan.left_out, EMPTY, f"{query_free(file.url)}: {why}")
    return _scan_result([], rules, scan.problems, scan.left_out)


EMPTY = "shard without images"

SKIP = "--empty-shards skip leaves out what holds no image"


def _scan_tar(file: InputFile, rules: MemberRules, storage_options: StorageOptions | None) -> SourceScan:
    with open_sequential(file, storage_options) as stream:
        walk = TarWalk(stream, file)
        samples = _Samples(stream, file, rules)
        for part in walk:
            samples.add(part)
        rows = samples.finish()
    if rules.by_place:
        _put_place_first(rows, file.place)
    return _scan_result(_with_frames(rows, file, rules, storage_options), rules, walk.problems, samples.left_out)


def _put_place_first(rows: list[_Row], place: str) -> None:
    """Give each row a key that no row of another tar has, nor another one of this tar: the second of one key ends in `#2`."""
    counts: dict[str, int] = {}
    for row in rows:
        key = first = f"{place}/{row['key']}"
        while key in counts:  # a sample may be called `a#2`
            counts[first] += 1
            key = f"{first}#{counts[first]}"
        counts[key] = 1
        row["key"] = key


def _with_frames(
    rows: Iterable[_Row], file: InputFile, rules: MemberRules, storage_options: StorageOptions | None
) -> Iterator[_Row]:
    """`rows`, with those of the frames in the place of each video's; one that can't be read has one row, which says why."""
    sampling = rules.frames
    if sampling is None:
        yield from rows
        return

    def frames(row: _Row) -> tuple[_Row, int]:
        if row["problem"] or not rules.is_video(row["member"]):
            return row, 0
        try:
            place = Place(file.url, int(row["offset"] or 0), int(row["size"] or 0))
            return row, count_frames(place, sampling, storage_options)
        except VideoRefused as error:
            return row | {"problem": f"no frames: {error}"}, 0
        except OSError as error:
            if not is_of_one_object(error):
                raise
            return row | {"problem": redact(f"no frames: {error}", storage_options)}, 0

    with ThreadPoolExecutor(_READERS) as pool:
        for row, count in pool.map(frames, rows):
            if not count:
                yield row
            for at in map(sampling.seconds, range(count)):
                yield row | {"key": frame_key(str(row["key"]), at), AT.name: at}


def _scan_result(rows: Iterable[_Row], rules: MemberRules, problems: list[str], left_out: dict[str, LeftOut]) -> SourceScan:
    schema, digest = rules.schema, hashlib.sha256()
    names = [name for name in schema.names if name != "source"]
    tables, left = [schema.empty_table()], iter(rows)
    while some := list(islice(left, _ROWS)):
        tables.append(pa.Table.from_pylist(some, schema=schema))
        for row in some:
            digest.update(repr([row.get(name) for name in names]).encode())
    return SourceScan(pa.concat_tables(tables), digest.hexdigest(), problems, left_out)


@dataclass
class _Group:
    """Adjacent members of one key, by extension."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    problem: str | None = None

    @property
    def has_links(self) -> bool:
        return any(member.target is not None for member in self.members.values())


class _Samples:
    """Groups adjacent members of one key, as WebDataset does, and makes an index row of each group and each gap."""

    def __init__(self, stream: BinaryIO, file: InputFile, rules: MemberRules):
        self.stream, self.file, self.rules = stream, file, rules
        self.displayed = query_free(file.url).rsplit("/", 1)[-1]
        self.left_out: dict[str, LeftOut] = {}
        self._rows: list[_Row | _Group] = []
        self._group: _Group | None = None
        self._gaps: list[_Row] = []
        self._links: list[Member] = []

    def add(self, part: Member | Gap | Aside) -> None:
        if isinstance(part, Aside):
            self._leave_out(part.reason, part.what, is_usual=part.is_usual)
        elif isinstance(part, Gap):
            # Nobody knows which sample was lost here; the position stands in for its key. Its row comes after that of
            # the sample before it, whose members may go on behind the gap.
            self._gaps.append(_empty_row(f"{self.displayed}@{part.first}-{part.last}", f"damaged tar: {part}"))
        else:
            self._add_member(part)

    def _add_member(self, member: Member) -> None:
        if member.target is not None:
            self._links.append(member)
        split = split_name(member.name)
        if re.match(r"__[^/]*__($|/)", member.name):
            self._leave_out("member named __...__, which is no sample", member.name, is_usual=True)
        elif is_side_file(member.name) or "/__MACOSX/" in member.name:
            self._leave_out(SIDE_FILE, member.name, is_usual=True)
        elif split is None:
            self._leave_out("member without an extension", member.name)
        else:
            self._add_to_group(*split, member)

    def _add_to_group(self, key: str, extension: str, member: Member) -> None:
        if self._group is None or key != self._group.key:
            self._close_group()
            self._group = _Group(key)
        if extension in self._group.members:
            self._group.problem = f"the sample has two members named .{extension}"
        self._group.members[extension] = member

    def _close_group(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            # A link may lead to a member that is still to come.
            self._rows.append(group if group.has_links else self._row(group))
        self._rows += self._gaps
        self._gaps = []

    def finish(self) -> list[_Row]:
        """All rows, in the order of the archive."""
        self._close_group()
        links = _Links(self.stream, self.file, self._links)
        rows = [self._linked_row(row, links) if isinstance(row, _Group) else row for row in self._rows]
        return [row for row in rows if row is not None]

    def _leave_out(self, reason: str, what: str, *, is_usual: bool = False) -> None:
        leave_out(self.left_out, reason, f"{self.displayed}: {what}", is_usual=is_usual)

    def _linked_row(self, group: _Group, links: "_Links") -> _Row | None:
        """The row of a sample of which members are links; None where they all lead nowhere, so that nothing is there."""
        broken = {}
        for extension, member in group.members.items():
            if member.target is None:
                continue
            found = links.follow(member)
            if found is None:
                kind = "symlink" if member.is_symlink else "hard link"
                broken[extension] = f".{extension} is a {kind} to {member.target[:500]!r}, which is no member of this tar"
                self._leave_out(f"{kind} to no member of this tar", f"{member.name} -> {member.target}")
            else:
                group.members[extension] = replace(found, name=member.name)
        if len(broken) == len(group.members):
            return None
        return self._row(group, broken)

    def _row(self, group: _Group, broken: Mapping[str, str] | None = None) -> _Row:
        """`broken` says by extension why a link leads to no data."""
        broken, members = broken or {}, group.members
        image = next((name for name in self.rules.members if name in members), "")
        row = _empty_row(group.key, group.problem)
        if not image:
            has = ", ".join(f".{name[:50]}" for name in sorted(members)[:20]) + (", ..." if len(members) > 20 else "")
            row["problem"] = group.problem or f"no image member (has {has})"
        elif why := broken.get(image) or members[image].problem:
            row["problem"] = group.problem or f"no image: {why}"
        else:
            row |= {"member": image, "offset": members[image].offset, "size": members[image].size}
            row["problem"] = group.problem or _cut_short(members[image], "the image", self.file)
        for name in self.rules.carry:
            row[name] = None
            if name in members and name not in broken:
                cut = _cut_short(members[name], f".{name}", self.file)
                row["problem"] = row["problem"] or cut
                row[name] = None if cut else self._carried(members[name])
        self._leave_out_others(group, image, broken)
        return row

    def _carried(self, member: Member) -> str | None:
        """The text of a member. What can't be taken is null, and counted: the image is as good as without it."""
        if member.problem:
            self._leave_out("member to carry that is stored sparse", member.name)
        elif member.size > MAX_TEXT_BYTES:
            self._leave_out("member to carry of more than 1 MiB", member.name)
        else:
            self.stream.seek(member.offset)
            try:
                return self.stream.read(member.size).decode()
            except UnicodeDecodeError:
                self._leave_out("member to carry that is no UTF-8 text", member.name)
        return None

    def _leave_out_others(self, group: _Group, image: str, broken: Mapping[str, str]) -> None:
        """Members of a sample that are neither its image nor carried."""
        for extension, member in group.members.items():
            if extension == image or extension in self.rules.carry or extension in broken:
                continue
            last = extension.rsplit(".", 1)[-1][:50]
            kind = "further image" if extension in IMAGE_EXTENSIONS else "other member"
            video = f"; {TAKES_FRAMES}" if last in VIDEO_EXTENSIONS and not self.rules.frames else ""
            self._leave_out(f"{kind} of a sample (.{last}{video})", member.name, is_usual=True)


def _empty_row(key: str, problem: str | None) -> _Row:
    return {"key": key, "source": 0, "member": "", "offset": 0, "size": 0, "problem": problem}


MAX_LINKS = 64
"""Links over which a link is followed; Linux follows 40 symlinks."""


class _Links:
    """What the links of a tar lead to. Names are compared within the archive and never looked up on a disk."""

    def __init__(self, stream: BinaryIO, file: InputFile, links: list[Member]):
        self._found: dict[str, list[Member]] = {_target(link): [] for link in links}
        if not links:
            return
        # Headers are read once more, so that a tar without links costs no memory for the names of its members.
        for part in TarWalk(stream, file):
            if isinstance(part, Member) and (path := posixpath.normpath(part.name)) in self._found:
                self._found[path].append(part)

    def follow(self, link: Member) -> Member | None:
        """The member with the data, also over several links; None where there is none, or links lead in a circle or on and on."""
        member, seen = link, set[str]()
        while member.target is not None:
            path = _target(member)
            if path in seen or len(seen) == MAX_LINKS:
                return _own_data(link)
            seen.add(path)
            found = self._found[path]
            if not found:
                return _own_data(link)
            # As `tar` would do it: a hard link is made of what is there by then, a symlink is followed at the end.
            before = bisect.bisect_left(found, member.offset, key=lambda each: each.offset)
            member = found[-1] if member.is_symlink or not before else found[before - 1]
        return member


def _own_data(link: Member) -> Member | None:
    return link if link.size else None


def _target(link: Member) -> str:
    """A hard link names a member, a symlink a place as seen from its own folder."""
    folder = posixpath.dirname(link.name) if link.is_symlink else ""
    return posixpath.normpath(posixpath.join(folder, link.target or ""))


def _cut_short(member: Member, what: str, file: InputFile) -> str | None:
    missing = member.offset + member.size - file.size
    if missing <= 0:
        return None
    return f"the tar is cut short: the last {missing} of {member.size} bytes of {what} are missing"
