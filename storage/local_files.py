"""Files of a local disk: ranges of them read at once, and whole ones put under their names in one step."""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from storage.errors import StorageError
from storage.words import what_the_disk_says

PARTIAL = ".partial-"
"""How files begin that aren't whole yet, in the folder itself: an empty folder for them would stay in each that is written."""


def read_ranges_of_files(paths: Sequence[str], bounds: Sequence[tuple[int, int]]) -> list[bytes | None]:
    """The bytes from start to end, or to the file's end, of each file; None for files that don't exist."""
    # Threads pay off once the disk does the work; for a few small ranges they cost more than the reads.
    if sum(end - start for start, end in bounds) < 2**22:
        return [_read_range(*each) for each in zip(paths, bounds, strict=True)]
    with ThreadPoolExecutor(min(8, len(paths))) as pool:
        return list(pool.map(_read_range, paths, bounds))


def _read_range(path: str, bounds: tuple[int, int]) -> bytes | None:
    """From `bounds[0]` to `bounds[1]`, which are counted from the file's end where the first is negative."""
    start, stop = bounds
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - a third of the time of a small read
            first = start if start >= 0 else max(0, os.fstat(file.fileno()).st_size + start)
            return os.pread(file.fileno(), stop - start, first)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IsADirectoryError:
        raise StorageError(f"{path} is a folder where a file must be") from None


class DiskError(StorageError, OSError):
    """A disk takes nothing more, or never did."""


def read_ends_of_files(paths: Sequence[str], size: int) -> list[bytes | None]:
    """The last `size` bytes of each file, all of shorter ones; None for files that don't exist."""
    return [_read_range(path, (-size, 0)) for path in paths]


def put_file(root: str, name: str, data: bytes, put: Callable[[Path, Path], object]) -> None:
    """`put` a file with `data` under its name, in one step. Raises `FileExistsError` where `put` does, `StorageError` where a
    folder has the name, and `DiskError` for full and read-only disks and what else they say of themselves."""
    target = Path(root or "/", name)
    for tries_left in (4, 3, 2, 1, 0):
        try:
            with _partial_file(root, data) as partial:
                partial.stat()  # before a folder is made for it
                target.parent.mkdir(parents=True, exist_ok=True)
                put(partial, target)
            return
        except FileNotFoundError:
            # Another run that finished may have removed it. Where all is gone, nothing is to be begun anew.
            if not tries_left or not Path(root or "/").exists():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(target)) from None
        except IsADirectoryError:
            raise StorageError(f"{target} is a folder where a file must be; remove it") from None
        except OSError as error:
            if isinstance(error, DiskError) or error.errno not in _OF_DISKS:
                raise
            # Writes that fail don't say where; and a hidden name says nothing to who chose the folder.
            place = target.parent if target.name.startswith(".") else target
            raise DiskError(what_the_disk_says(OSError(error.errno, error.strerror, str(place)))) from None


_OF_DISKS = (
    errno.EACCES,
    errno.EPERM,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.EFBIG,
    errno.EIO,
    errno.ELOOP,
    errno.ENOTDIR,
)
"""Said of the file that was asked for, and not of the hidden one that becomes it."""


@contextlib.contextmanager
def _partial_file(root: str, data: bytes) -> Iterator[Path]:
    """A fully written and synced temporary file in `root`, gone at exit unless it was moved.

    Synced, because a rename can reach the disk before the data does and a commit says that the data is there.
    """
    path = Path(root or "/", f"{PARTIAL}{uuid.uuid4().hex}")
    is_new = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise DiskError(f"{root}: a file is there, or above it, where a folder must be; choose another place") from None
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        if is_new:  # an empty folder would be all that is left of what was begun
            with contextlib.suppress(OSError):
                path.parent.rmdir()
        raise
    try:
        yield path
    finally:
        # Also where it couldn't be written: a full disk would stay full.
        with contextlib.suppress(NotADirectoryError):
            path.unlink(missing_ok=True)


def remove_partial_files(root: str) -> None:
    """Remove what killed writers left."""
    shutil.rmtree(Path(root or "/", ".partial"), ignore_errors=True)  # of earlier versions
    for path in Path(root or "/").glob(f"{PARTIAL}*"):
        path.unlink(missing_ok=True)
