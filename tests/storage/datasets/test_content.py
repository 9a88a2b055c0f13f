"""What files of data sets hold, and what is said of those that hold no image."""

import pytest

from storage.datasets.content import content_digests, joint_digest
from storage.datasets.files import DatasetError, DatasetFile
from storage.datasets.images import orientation_of
from storage.ledger import image_digest
from storage.paths import Folder


def test_contents_are_digests_of_bytes_in_order(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(bytes([i]))
    folder = Folder(str(tmp_path))
    files = [DatasetFile(folder=folder, name=f"{i}.png") for i in (*range(40), 99)]

    found = content_digests(files)

    assert found[:40] == [image_digest(bytes([i])) for i in range(40)]
    assert found[40] == "unreadable"
    assert joint_digest(found) != joint_digest(found[::-1])


def test_reasons_are_the_same_in_every_run():
    reasons = set()
    for _ in range(3):
        with pytest.raises(DatasetError, match="can't be read as an image") as error:
            orientation_of(b"nonsense", "a.png")
        reasons.add(str(error.value))

    assert reasons == {"a.png can't be read as an image: UnidentifiedImageError: cannot identify image file"}
