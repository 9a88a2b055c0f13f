"""Words for people, of what people didn't write: the operating system's errors, and names out of data sets."""

import errno
import os
import re

_ADVICE = {
    errno.ENOSPC: "make room, and run the same command again",
    errno.EDQUOT: "make room, and run the same command again",
    errno.EROFS: "choose a place on another disk, or mount this one for writing",
    errno.ENAMETOOLONG: "choose a shorter name (most disks take 255 bytes)",
    errno.ELOOP: "its symbolic links lead round in a circle",
    errno.EFBIG: "choose a place on a disk that takes larger files",
    errno.EIO: "look into the system's log; the disk may be broken",
    errno.ESTALE: "mount the network disk again",
    errno.ENOTEMPTY: "choose another name",
    errno.ENOENT: "check the path",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EEXIST: "remove it, or choose another name",
    errno.EISDIR: "a file must be there",
    errno.ENOTDIR: "a part of the path is a file, where a folder must be",
}
"""What a person can do about the operating system's errors that have to do with paths and disks."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What terminals obey, turns the direction of text, or is no character; not tabs and ends of lines."""


def counted(count: int, units: str) -> str:
    """A number of things by their plural: 1 batch, 2,000 pairs."""
    one = units.removesuffix("es") if units.endswith("ches") else units.removesuffix("s")
    return f"{count:,} {one if count == 1 else units}"


def is_of_disk(error: OSError) -> bool:
    """Whether an error is of a path or a disk, about which a person can do something; others are of the network, or a bug."""
    kinds = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, kinds) or error.errno in _ADVICE


def what_the_disk_says(error: OSError) -> str:
    """An error of a path or a disk as one sentence, with the path where the error has it."""
    if error.errno not in _ADVICE or len(error.args) < 2:
        return f"{type(error).__name__}: {error}"  # ours, or a library's
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return ": ".join(filter(None, [" -> ".join(names), f"{error.strerror}; {_ADVICE[error.errno]}"]))


def printable(text: str) -> str:
    """`text` with control characters written as escapes (`\\x1b`), but for tabs and ends of lines: a name out of a data set must
    not move the cursor, colour the terminal, or turn a line round."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable_name(name: str) -> str:
    """The same for a single name, which has no line's end."""
    return printable(name).replace("\n", "\\n").replace("\t", "\\t")
