"""The files of the input: what a user's `--data` matches, and reading one from its start to its end."""

import contextlib
import errno
import glob
import io
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, overload

import fsspec
from braceexpand import braceexpand
from fsspec.implementations.local import LocalFileSystem

from storage.folders import SIDE_FILE, Entry, files_below, is_side_file, matches, without_repeats
from storage.left_out import LeftOut, leave_out, left_out_lines, merge_left_out
from storage.paths import Folder, InputError, StorageOptions, extension, filesystem, is_memory, is_web, opened, reaching
from storage.redaction import query_free, redact
from storage.videos import TAKES_FRAMES, is_video

COMMON_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")
"""What is mostly a photograph; format 2's stores took no others."""

IMAGE_EXTENSIONS = (
    *COMMON_EXTENSIONS,
    *("jfif", "jpe", "jif", "avif", "avifs", "jp2", "j2k", "jpx", "jpf", "j2c", "jpc"),
    *("ppm", "pnm", "pgm", "pbm", "tga", "icb", "vda", "vst", "dib", "apng", "ico"),
)
"""Members that are taken for the image of a sample; of several, the first in this order, which has those first that are
seldom a mask beside a photograph. All that operators/image.py opens but .pfm, which is float data without a range."""

GLOBBED_FOLDER = "folder that a glob matches (name the folder itself)"

_COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tlz|tzst|tz|tar\.(gz|bz2?|xz|zstd?|lz4?|lzma|z|br|sz))$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One tar, image or video of the input."""

    url: str
    "fsspec URL, credentials included; `redact` it before it is shown or stored"
    size: int
    "bytes"
    etag: str
    "the store's ETag, or `mtime:<ns>,ctime:<ns>` for files, which have none; empty where neither is known"
    base: str = ""
    "for a file of a plain folder: the folder's URL; keys are relative to it"
    root: str = ""
    "the folder that all files of the input lie below, where their places are part of the keys"

    @property
    def name(self) -> str:
        """The path below `base`, or without that the file's name; a signed URL's query is no part of it."""
        url = _without_query(self.url)
        return url[len(self.base) :].lstrip("/") if self.base else url.rsplit("/", 1)[-1]

    @property
    def place(self) -> str:
        """The path below `root`, without the extension: no two files of an input have the same but for the extension."""
        return _without_extension(_without_query(self.url)[len(self.root) :].lstrip("/"))

    @property
    def extension(self) -> str:
        """What is behind the last dot of its name, in lower case."""
        return extension(self.name)

    @property
    def is_image(self) -> bool:
        return _is_image(self.name)

    @property
    def is_video(self) -> bool:
        return is_video(self.name)

    @property
    def is_common(self) -> bool:
        """A tar, or an image of one of `COMMON_EXTENSIONS`."""
        return not self.is_image or extension(self.name) in COMMON_EXTENSIONS


@dataclass(frozen=True)
class Listing(Sequence[InputFile]):
    """The files of an input in order, and what was found beside them and not taken."""

    files: tuple[InputFile, ...] = ()
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)

    @overload
    def __getitem__(self, index: int) -> InputFile: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[InputFile, ...]: ...
    def __getitem__(self, index: int | slice) -> InputFile | tuple[InputFile, ...]:
        return self.files[index]

    def __len__(self) -> int:
        return len(self.files)


def _joined(listings: Iterable[Listing]) -> Listing:
    listings = list(listings)
    files = tuple(file for listing in listings for file in listing.files)
    return Listing(files, merge_left_out(*(listing.left_out for listing in listings)))


@dataclass(frozen=True)
class _Keys:
    """Which files of plain folders are taken, how they get keys, and which is taken of those with one key."""

    image: str | None = None
    "the extension of the one that is taken"
    whole: bool = False
    "a key is the whole name without its extension; else what is before the first dot, as in a tar"
    videos: bool = False
    "frames of videos are taken, too"

    def take(self, name: str) -> bool:
        """Whether a file is an image, or a video whose frames are taken."""
        return _is_image(name) or (self.videos and is_video(name))

    def why_not(self, name: str, *, beside_tars: bool = False) -> str:
        """Why a file is left out."""
        if is_video(name) and not self.videos:
            return f"video (.{extension(name)}; {TAKES_FRAMES})"
        if beside_tars and self.take(name):
            return f"{'video' if is_video(name) else 'image'} beside tars"
        return _why_not(name)

    def of(self, path: str) -> str:
        """The part of a file's name that is the key of its sample; empty for a tar, whose name is none."""
        name = path.rsplit("/", 1)[-1]
        if _is_tar(name):
            return ""
        return _without_extension(name) if self.whole else name.split(".", 1)[0] or name


def expand_inputs(
    patterns: Sequence[str],
    storage_options: StorageOptions | None = None,
    image: str | None = None,
    *,
    by_place: bool = False,
    videos: bool = False,
) -> Listing:
    """List what `patterns` match: tar files, or the images of plain folders, in the order given, globs sorted.

    A pattern is a URL with braces (`{000..127}`) and globs; a folder stands for its tars, or, where it has none, for
    the images below it. Symlinks are followed. Of images with one key in a folder, the one with the extension `image` is
    taken. `by_place`: files are to be told by their places (`InputFile.place`), not by what is before a name's first dot.
    `videos` are taken as images are.
    Raises `InputError` if a pattern matches nothing or names a file that does not exist.
    """
    if not patterns:
        raise InputError("no input: give --data one or more URLs of tars (braces and globs allowed) or folders of images")
    if not all(pattern.strip() for pattern in patterns):
        raise InputError(f"--data {' '.join(map(repr, patterns))}: one is empty, as of a variable that isn't set; drop it")
    keys = _Keys(image, by_place, videos)
    listing = _joined(_expand_pattern(pattern, storage_options, keys) for pattern in patterns)
    return _rooted(listing) if by_place else listing


def _rooted(listing: Listing) -> Listing:
    """The files with the folder that they all lie below."""
    folders = {(file.base or _without_query(file.url).rpartition("/")[0]).rstrip("/") for file in listing}
    alike = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*(folder.split("/") for folder in folders), strict=False))
    root = "/".join(parts[0] for parts in alike)
    return replace(listing, files=tuple(replace(file, root=root) for file in listing))


def _without_query(url: str) -> str:
    return query_free(url) if is_web(url) else url


def _without_extension(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{name.rpartition('.')[0] or name}"


_FIRST_ANSWER_S = 15.0
"""How long a web server may take to say what a file is."""

_MOST_NAMES = 10_000_000
"""That braces may stand for; ten times as many as the largest published data sets have tars."""


def _expand_pattern(pattern: str, options: StorageOptions | None, keys: _Keys) -> Listing:
    try:
        pattern.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{pattern}: this path is no UTF-8 text, which an index can hold; rename it, or name a link to it"
        ) from None
    is_there = _is_there(pattern)
    ranges = [range(int(first), int(last)) for first, last in re.findall(r"\{(-?\d{1,20})\.\.(-?\d{1,20})", pattern)]
    if not is_there and math.prod(1 + abs(each.stop - each.start) for each in ranges) > _MOST_NAMES:
        raise InputError(f"{redact(pattern, options)}: its braces stand for more than {_MOST_NAMES:,} names; give fewer")
    try:
        urls = [pattern] if is_there else list(braceexpand(pattern))
    except ValueError:  # braceexpand's UnbalancedBracesError, which its type stub lacks
        raise InputError(f"{redact(pattern, options)}: unbalanced braces") from None
    with ThreadPoolExecutor(min(16, len(urls))) as pool:
        found = list(pool.map(lambda url: _expand_url(url, options, keys), urls))
    missing = [url for url, files in zip(urls, found, strict=True) if files is None]
    if missing:
        listed = ", ".join(redact(url, options) for url in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise InputError(f"{redact(pattern, options)}: {len(missing)} of {len(urls)} do not exist: {listed}")
    listing = _joined(each for each in found if each is not None)
    if not listing:
        left_out = "".join(f"\n  left out: {line}" for line in left_out_lines(listing.left_out))
        if folders := listing.left_out.get(GLOBBED_FOLDER):
            given, s = redact(pattern.rstrip("/"), options), "s" * (folders.count > 1)
            raise InputError(
                f"{given} matches {folders.count:,} folder{s}, and no tar and no image; for all that lies below "
                f"name the folder above, for images {given}/*.jpg, for tars {given}/*.tar{redact(left_out, options)}"
            )
        if "*" not in pattern and Folder(pattern, options).size("zarr.json") is not None:
            raise InputError(
                f"{redact(pattern, options)} is a Zarr store, not images; name the tars or folder that it was made of"
            )
        raise InputError(
            f"{redact(pattern, options)} matches no tar and no image ({', '.join(IMAGE_EXTENSIONS)}); check the path"
            + (", in which [ ] stands for one of the characters in it where there is no such name" if "[" in pattern else "")
            + redact(left_out, options)
        )
    return listing


def _is_there(url: str) -> bool:
    """Whether a local file or folder has just this name, braces and brackets included."""
    if "*" in url or "?" in url or ("://" in url and not url.startswith("file://")):
        return False
    return os.path.lexists(filesystem(url)[1])


def _as_glob(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """A path with wildcards as a glob, in which the brackets of files and folders that have just this name are none; empty where
    no wildcard is left, as in a path without any."""
    exists = os.path.lexists if isinstance(fs, LocalFileSystem) else fs.exists
    head, tail = path, ""
    while any(c in head for c in "*?[") and ("*" in head or "?" in head or not exists(head)):
        head, slash, name = head.rpartition("/")
        tail = f"{slash}{name}{tail}"
    return f"{glob.escape(head)}{tail}" if any(c in tail for c in "*?[") else ""


def _expand_url(url: str, options: StorageOptions | None, keys: _Keys) -> Listing | None:
    """The files of one URL without braces; None if it names nothing that exists."""
    with reaching(redact(url, options)):
        fs, path = opened(url, options)
        if not is_web(url) and (pattern := _as_glob(fs, path)):
            return _list_glob(fs, pattern, keys)
        try:
            info = fs.info(path, **({"timeout": _FIRST_ANSWER_S} if is_web(url) else {}))
        except (FileNotFoundError, NotADirectoryError) as error:
            if is_web(url) and error.__cause__ is not None and getattr(error.__cause__, "status", None) not in (404, 410):
                raise error.__cause__ from None  # fsspec says of whatever goes wrong that nothing is there
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:  # a symlink that leads to itself
                return None
            raise
        if info["type"] == "directory":
            return _list_folder(fs, path, url, keys)
    if info["type"] == "other":
        raise InputError(f"{redact(url, options)} is neither a file nor a folder")
    if info.get("size") is None:
        raise InputError(f"{redact(url, options)}: the server does not tell the file's size, which ranged reads need")
    if is_video(_without_query(info["name"])) and not keys.videos:
        raise InputError(f"{redact(url, options)} is a video; jobs/extract.py --fps 2 takes two frames of each second of it")
    return Listing((_input_file(fs, info),))


def _list_glob(fs: fsspec.AbstractFileSystem, pattern: str, keys: _Keys) -> Listing:
    """What a glob matches: tars and images by name; where there are none, every file is taken for a tar."""
    below = matches(fs, pattern)
    files = [entry for entry in below.entries if entry["type"] == "file" and not is_side_file(entry["name"])]
    named = [entry for entry in files if _is_tar(entry["name"]) or keys.take(entry["name"])]
    taken = named or [entry for entry in files if not is_video(entry["name"])]
    names = {entry["name"] for entry in taken}
    for entry in below.entries:
        if entry["type"] == "directory":
            leave_out(below.left_out, GLOBBED_FOLDER, entry["name"])
        elif is_side_file(entry["name"]):
            leave_out(below.left_out, SIDE_FILE, entry["name"], is_usual=True)
        elif entry["name"] not in names:
            leave_out(below.left_out, keys.why_not(entry["name"]), entry["name"])
    taken = without_repeats(taken, below, lambda entry: keys.of(entry["name"]))
    return _chosen([_input_file(fs, entry) for entry in taken], keys, below.left_out)


def _list_folder(fs: fsspec.AbstractFileSystem, path: str, url: str, keys: _Keys) -> Listing:
    """The tars directly inside a folder, or else the images, and videos, below it."""
    below = files_below(fs, path)
    depth = path.rstrip("/").count("/") + 1
    tars = [e for e in below.entries if _is_tar(e["name"]) and e["name"].count("/") == depth]
    taken = tars or [e for e in below.entries if keys.take(e["name"])]
    names = {entry["name"] for entry in taken}
    for entry in below.entries:
        if entry["name"] not in names:
            leave_out(below.left_out, keys.why_not(entry["name"], beside_tars=bool(tars)), entry["name"])
    if tars:
        taken = without_repeats(tars, below, lambda entry: keys.of(entry["name"]))
    files = [_input_file(fs, entry, base="" if tars else url) for entry in taken]
    return _chosen(sorted(files, key=lambda file: file.url), keys, below.left_out)


def _is_tar(name: str) -> bool:
    return extension(name) == "tar"


def _is_image(name: str) -> bool:
    return extension(name) in IMAGE_EXTENSIONS


def _why_not(name: str) -> str:
    if _is_tar(name):
        return "tar in a subfolder (name that folder, too)"
    if _COMPRESSED.search(name):
        return "compressed tar (decompress it)"
    ending = extension(name)
    return f"neither tar nor image (.{ending})" if ending else "file without an extension"


def _chosen(files: Sequence[InputFile], keys: _Keys, left_out: dict[str, LeftOut]) -> Listing:
    """Of several images with one key, the one that `keys.image` names, the only video where those are taken, or the only one of a
    common format, if there is one.

    Others stay, and are refused as two samples of one key.
    """
    image = keys.image
    by_key: dict[str, list[InputFile]] = {}
    for file in files:
        if keys.take(file.name):
            by_key.setdefault(f"{file.url.rpartition('/')[0]}/{keys.of(file.name)}", []).append(file)
    dropped: set[str] = set()
    for same in by_key.values():
        named = [file for file in same if image and file.name.lower().endswith(f".{image.lower().lstrip('.')}")]
        videos = [file for file in same if file.is_video]
        common = [file for file in same if extension(file.name) in COMMON_EXTENSIONS]
        one = next((each[0] for each in (named, videos, common) if len(each) == 1), None)
        if one is not None and len(same) > 1:
            dropped |= {file.url for file in same if file is not one}
    for file in files:
        if file.url in dropped:
            leave_out(left_out, "further image of one key", query_free(file.url))
    return Listing(tuple(file for file in files if file.url not in dropped), left_out)


def _input_file(fs: fsspec.AbstractFileSystem, info: Entry, base: str = "") -> InputFile:
    size = info["size"]
    assert size is not None, "files of unknown size are refused where they are listed"
    return InputFile(url=_full_url(fs, info["name"]), size=int(size), etag=_stamp(fs, info), base=base and _full_url(fs, base))


def _stamp(fs: fsspec.AbstractFileSystem, info: Entry) -> str:
    """See `InputFile.etag`."""
    if isinstance(fs, LocalFileSystem):
        found = Path(info["name"]).stat()  # of what a link points to
        # The second time can't be set: it tells a file that was replaced under its old time.
        return f"mtime:{int(found.st_mtime * 1e9)},ctime:{int(found.st_ctime * 1e9)}"
    return str(info.get("ETag") or info.get("etag") or "").strip('"')


def _full_url(fs: fsspec.AbstractFileSystem, name: str) -> str:
    """The URL of a path on `fs`; local ones absolute and without `..`."""
    if isinstance(fs, LocalFileSystem):
        return fs.unstrip_protocol(os.path.normpath(fs._strip_protocol(name)))
    return name if is_web(name) else fs.unstrip_protocol(fs._strip_protocol(name))


@contextlib.contextmanager
def open_sequential(file: InputFile, storage_options: StorageOptions | None) -> Iterator[BinaryIO]:
    """A binary file that is cheap to read and skip forward: 8 MiB read-ahead on object storage."""
    fs, path = filesystem(file.url, storage_options)
    ahead = {} if isinstance(fs, LocalFileSystem) else {"block_size": 2**23, "cache_type": "readahead"}
    with reaching(query_free(file.url)):
        # Taken whole: a web server may not answer ranges, and what is in memory costs nothing.
        if is_memory(file.url) or is_web(file.url):
            yield io.BytesIO(fs.cat_file(path))
            return
        with fs.open(path, "rb", **ahead) as stream:
            yield stream
