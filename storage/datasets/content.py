"""What the files of a data set hold: digests of their bytes, by which a file that was corrected, or replaced by another one of
its name and size, is known from the one that was there before."""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from storage.datasets.files import DatasetError
from storage.ledger import image_digest

logger = logging.getLogger(__name__)

UNREADABLE = "unreadable"
"""The digest of what can't be read."""

MANY = 5000
"""Files whose reading takes long enough to say so."""


class HasContent(Protocol):
    """A file of a data set, or a part of one."""

    @property
    def displayed(self) -> str:
        """Its place as it may be printed."""

    def content(self) -> bytes:
        """The bytes that count. Raises `DatasetError` where they can't be read."""


def content_digests(files: Sequence[HasContent]) -> list[str]:
    """`image_digest` of each file's bytes, in order; what can't be read has a digest of that.

    All are read, many at once: what was corrected in place must be found, and of a sample, most corrections aren't part.
    """
    if len(files) > MANY:
        logger.info("reading %d images and labels once, to know them again", len(files))
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(_digest, files))


def _digest(file: HasContent) -> str:
    try:
        return image_digest(file.content())
    except DatasetError:  # left out, or refused, by whoever needs it
        return UNREADABLE


def joint_digest(digests: Iterable[str]) -> str:
    """One sha256 for all of them, in their order."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
