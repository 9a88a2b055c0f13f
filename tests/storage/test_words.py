"""What people read of the operating system's errors, and of names that aren't theirs."""

import errno
import os

import pytest

from storage.local_files import DiskError
from storage.paths import Folder, StorageError
from storage.words import is_of_disk, printable, printable_name, what_the_disk_says


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_disk_that_takes_nothing_is_named_with_what_to_do(tmp_path, monkeypatch, number):
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)

    with pytest.raises(DiskError, match=f"^{tmp_path}/a/b: {os.strerror(number)}; [a-z]") as caught:
        Folder(str(tmp_path)).write("a/b", b"data")

    assert isinstance(caught.value, StorageError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "/x/y"])
def test_folder_that_is_a_file_or_below_one_is_named(tmp_path, below):
    (tmp_path / "file").write_bytes(b"")
    folder = Folder(f"{tmp_path}/file{below}")

    for write in (folder.write, folder.write_new):
        with pytest.raises(DiskError, match=f"^{folder.url}: a file is there, or above it"):
            write("a", b"data")
    with pytest.raises(DiskError, match="a file is there"):
        folder.check_create_only("runs/.probe")


def test_names_that_are_too_long_say_so(tmp_path):
    with pytest.raises(DiskError, match="n: File name too long; choose a shorter name"):
        Folder(str(tmp_path)).write("n" * 300, b"")


def test_errors_of_paths_are_told_from_those_of_the_network_and_bugs():
    assert is_of_disk(OSError(errno.ENOSPC, "No space left on device"))
    assert is_of_disk(FileNotFoundError("s3://bucket/x does not exist"))
    assert not is_of_disk(OSError(errno.ECONNRESET, "Connection reset"))
    assert not is_of_disk(OSError("image file is truncated"))
    assert what_the_disk_says(FileNotFoundError("s3://bucket/x does not exist")) == (
        "FileNotFoundError: s3://bucket/x does not exist"
    )
    assert what_the_disk_says(OSError(errno.EXDEV, "Invalid cross-device link", "/a")).startswith("OSError: ")
    assert what_the_disk_says(PermissionError(errno.EACCES, "Permission denied", "/a", None, "/b")).startswith(
        "/a -> /b: Permission denied; "
    )


def test_what_terminals_obey_is_shown_and_not_done():
    assert printable("a\x1b[31mred\r\x00\x9b\u202etxt.exe\udce9 ü\u4e00\U0001f600\n\tb") == (
        r"a\x1b[31mred\r\x00\x9b\u202etxt.exe\udce9 " + "ü\u4e00\U0001f600\n\tb"
    )
    assert printable_name("a\nb\tc\x1b") == r"a\nb\tc\x1b"
