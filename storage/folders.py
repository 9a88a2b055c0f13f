"""What lies below a folder, or matches a glob: symlinks followed, and what can't be entered or read counted."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NotRequired, TypedDict

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from storage.left_out import LeftOut, leave_out

SIDE_FILE = "side file of macOS"


def is_side_file(path: str) -> bool:
    """Whether it's what macOS puts beside files, into archives too."""
    name = path.rsplit("/", 1)[-1]
    return name.startswith("._") or name in (".DS_Store", "__MACOSX") or path.startswith("__MACOSX/")


class Entry(TypedDict):
    """What fsspec says of a file or folder; filesystems add fields of their own."""

    name: str
    type: str
    "`file`, `directory`, or what else the filesystem has"
    size: int | None
    "bytes; None where a web server doesn't give it"
    islink: NotRequired[bool]
    ETag: NotRequired[str]
    etag: NotRequired[str]


@dataclass(frozen=True)
class Below:
    """Files, and for a glob also folders, sorted by name."""

    entries: list[Entry] = field(default_factory=list)
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    has_links: bool = False


def files_below(fs: fsspec.AbstractFileSystem, folder: str) -> Below:
    """The files below a folder, but those that are hidden or lie in a hidden folder."""

    def is_hidden(path: str) -> bool:
        return any(part.startswith(".") or part == "__MACOSX" for part in path.removeprefix(folder).split("/"))

    walk = _Walk(fs, folder, enter=lambda path: not is_hidden(path))
    files: list[Entry] = []
    for entry in walk.entries():
        if is_hidden(entry["name"]):
            if is_side_file(entry["name"]):
                walk.leave_out(SIDE_FILE, entry, is_usual=True)
            else:
                walk.leave_out(f"hidden {'folder' if entry['type'] == 'directory' else 'file'}", entry)
        elif entry["type"] == "file":
            files.append(entry)
    return Below(sorted(files, key=_name), walk.left_out, walk.has_links)


def matches(fs: fsspec.AbstractFileSystem, pattern: str) -> Below:
    """The files and folders whose paths match a glob."""
    if fs.async_impl:
        return Below(sorted(fs.glob(pattern, detail=True).values(), key=_name))
    # Walked here, from the last folder before any wildcard, so that what can't be read is counted.
    fixed = pattern[: min(pattern.find(each) for each in "*?[" if each in pattern)]
    root, slash, _ = fixed.rpartition("/")
    parts, wanted = pattern.split("/"), re.compile(glob_translate(pattern))

    def enter(path: str) -> bool:
        """Whether something below `path` may match."""
        upper = parts[: path.count("/") + 1]
        if "**" in upper:  # which stands for any number of folders
            return True
        return len(upper) < len(parts) and re.match(glob_translate("/".join(upper)), path) is not None

    walk = _Walk(fs, root or slash, enter=enter, wanted=lambda path: wanted.match(path) is not None)
    return Below(sorted(walk.entries(), key=_name), walk.left_out, walk.has_links)


def without_repeats(entries: Sequence[Entry], below: Below, key: Callable[[Entry], str]) -> list[Entry]:
    """`entries` without symlinks to a file that is among them itself, under an equal `key`."""
    if not below.has_links:
        return list(entries)
    # Under another key it's another sample on purpose; under the same one it would be refused as a duplicate.
    places = [(os.path.realpath(entry["name"]), key(entry)) for entry in entries]
    first: dict[tuple[str, str], Entry] = {}
    for place, entry in zip(places, entries, strict=True):
        if place not in first or entry["name"] == place[0]:
            first[place] = entry
    for place, entry in zip(places, entries, strict=True):
        if first[place] is not entry:
            leave_out(below.left_out, "symlink to a file that is listed itself", entry["name"])
    return [entry for place, entry in zip(places, entries, strict=True) if first[place] is entry]


def _name(entry: Entry) -> str:
    return entry["name"]


class _Walk:
    """Goes through a folder once. Object stores list all that is below it in one go; elsewhere, folder by folder.

    `enter` says of a folder whether to look into it, `wanted` of any path whether it matters.
    """

    def __init__(
        self,
        fs: fsspec.AbstractFileSystem,
        root: str,
        *,
        enter: Callable[[str], bool],
        wanted: Callable[[str], bool] = lambda path: True,  # noqa: ARG005
    ):
        self.fs, self.root, self.enter, self.wanted = fs, root, enter, wanted
        self.left_out: dict[str, LeftOut] = {}
        self.has_links = False
        self._is_local = isinstance(fs, LocalFileSystem)
        self._entered = {os.path.realpath(root)}

    def entries(self) -> Iterator[Entry]:
        """Files that can be read and have a name that can be stored; folders where they are listed."""
        for entry in self._all():
            if not self.wanted(entry["name"]):
                continue
            if entry["type"] not in ("file", "directory"):
                self.leave_out("neither a file nor a folder", entry)
            elif not _is_text(entry["name"]):
                self.leave_out("name that is no UTF-8", entry)
            else:
                yield entry

    def _all(self) -> Iterator[Entry]:
        if self.fs.async_impl:
            found = self.fs.find(self.root, detail=True).values()
            yield from (entry for entry in found if not entry["name"].endswith("/"))  # those are marks of empty folders
            return
        todo = [self.root]
        while todo:
            folder = todo.pop()
            for entry in self._inside(folder):
                yield entry
                if entry["type"] == "directory" and self.enter(entry["name"]) and self._may_enter(entry, folder):
                    todo.append(entry["name"])

    def _inside(self, folder: str) -> Iterator[Entry]:
        """Entries of one folder; for symlinks, what they lead to."""
        try:
            listed = sorted(self.fs.ls(folder, detail=True), key=_name)
        except FileNotFoundError:
            return
        except OSError as error:
            leave_out(self.left_out, f"folder that can't be read ({error.strerror or type(error).__name__})", folder)
            return
        for entry in listed:
            if entry.get("islink") or entry["type"] == "link":
                self.has_links = True
                try:
                    target: Entry = self.fs.info(entry["name"])
                    entry = {**target, "islink": True}
                except OSError:
                    if self.wanted(entry["name"]):
                        self.leave_out("symlink that leads nowhere", entry)
                    continue
            yield entry

    def _may_enter(self, entry: Entry, folder: str) -> bool:
        """A symlink is entered unless it leads in a circle; a folder only once by a symlink, which bounds the number of paths."""
        if not entry.get("islink"):
            return True
        if not self._is_local:
            self.leave_out("symlink to a folder, which is followed on local disks only", entry)
            return False
        target, here = os.path.realpath(entry["name"]), os.path.realpath(folder)
        if target in self._entered or f"{here}/".startswith(f"{target.rstrip('/')}/"):
            self.leave_out("symlink to a folder that is listed already", entry)
            return False
        self._entered.add(target)
        return True

    def leave_out(self, reason: str, entry: Entry, *, is_usual: bool = False) -> None:
        leave_out(self.left_out, reason, entry["name"], is_usual=is_usual)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
