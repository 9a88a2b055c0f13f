"""Which row of a feature store is of which image: the one place where a store and a data set are joined.

A name alone doesn't tell: `train/00001.png` and `val/00001.png` are both `00001` to a store that was made of one folder, and
WebDataset keys like `000000` recur everywhere. So a row is an image's if its key is one of the image's names, and the ledger's
digest is that of the image's bytes. Rows without a digest (of stores that earlier versions made, or of images that are no file,
as in HDF5) must at least be of images of the same size, each of another image.
"""

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np

from storage.datasets.content import joint_digest
from storage.datasets.files import DatasetError, ItemLeftOut
from storage.datasets.frames import OrientedImage
from storage.datasets.images import EncodedImage, H5Image
from storage.documents import JsonValue
from storage.orientation import EXIF_ROTATE, Orientation
from storage.paths import StorageError
from storage.spec import Level
from storage.store import FeatureStore
from storage.totals import FIRST_KEYS, Clipped, clipped_lines, float16_levels


class FeaturesMissing(StorageError):
    """A store lacks images of the data set, or has rows of others under their names."""


class NotExtracted(ItemLeftOut):
    """A store has a row of the image, and no features in it."""


@dataclass(frozen=True, kw_only=True)
class PlacedRow:
    """What a store's ledger says of a row: of its image, and how that was read."""

    row: int
    status: str | None
    "`ok` or `failed`; None: not written yet"
    stage: str | None
    message: str | None
    "why it failed"
    width: int | None
    "upright, in pixels"
    height: int | None
    conversion: str | None
    clipped: int | None
    "values beyond float16's range, clamped"
    digest: str | None
    "of the image's bytes"

    @classmethod
    def read(cls, store: FeatureStore, rows: Sequence[int]) -> "list[PlacedRow]":
        """Of rows, in their order."""
        columns = [each.name for each in fields(cls)]
        records = store.records(np.array(rows, np.int64), columns).to_pylist()
        # The ledger says nothing at all of a row that isn't written yet.
        return [cls(**{**record, "row": row}) for row, record in zip(rows, records, strict=True)]

    @property
    def lack(self) -> str:
        """Why the row has no features; nothing where it has."""
        if self.status is None:
            return "its row of the store isn't written yet"
        return "" if self.status == "ok" else f"its extraction failed: {self.stage}: {self.message}"

    @property
    def size(self) -> tuple[int, int] | None:
        """(width, height) of the upright image in pixels."""
        return None if self.width is None or self.height is None else (self.width, self.height)

    def require(self, displayed: str) -> None:
        """Raises `NotExtracted` where the row has no features."""
        if self.lack:
            raise NotExtracted(displayed, self.lack)

    def oriented(self, store: FeatureStore, image: EncodedImage) -> OrientedImage:
        """How the image was turned when it was extracted. A store keeps upright sizes, and whether an image was turned, not
        how: then the image is read. Raises `NotExtracted`, and `FeaturesMissing` where it isn't the one that was extracted."""
        displayed = f"{image.displayed} (row {self.row} of {store.folder.displayed})"
        self.require(image.displayed)
        if EXIF_ROTATE not in (self.conversion or ""):
            return OrientedImage(displayed, Orientation(width=self.width, height=self.height))
        found = image.orientation()
        if found.exif == 1 or found.upright_size != self.size:
            raise FeaturesMissing(
                f"{store.folder.displayed}: row {self.row} was made of an image that its EXIF turned to {self.width} x "
                f"{self.height} pixels; {image.displayed} has the orientation {found.exif} and {found.upright_size[0]} x "
                f"{found.upright_size[1]}. Extract the images again"
            )
        return OrientedImage(displayed, found)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """An image whose features are looked for."""

    displayed: str
    keys: tuple[str, ...]
    "what a store may call it, the surest first"
    digest: str | None
    "of its bytes; None: they aren't those that were extracted"
    size: Callable[[], tuple[int, int] | None]
    "asked for where digests can't tell: (width, height), upright; None: it can't be read. Raises `DatasetError`"

    @classmethod
    def of(cls, image: EncodedImage, digest: str) -> "Wanted":
        """An image of a data set; `digest`: of its content."""
        # What extraction was given of an entry of HDF5 was a file made of it, whose bytes aren't known.
        return cls(
            displayed=image.displayed,
            keys=image.keys,
            digest=None if isinstance(image, H5Image) else digest,
            size=functools.cache(lambda: image.orientation().upright_size),  # read once, however many stores it is looked for in
        )


@dataclass(frozen=True, kw_only=True)
class JoinCounts:
    """How the images of a data set were found in a store."""

    images: int
    by_digest: int
    "their row is of the same bytes"
    by_size: int
    "their row has no digest, but an image of the same size and name"
    by_name: int
    "their row has neither, since it has no features"
    chosen: int
    "of images with several rows under their names, the one with their bytes was taken"
    without_features: int
    "their row failed, or isn't written yet"
    clipped_rows: int
    "with values beyond float16's range, clamped"
    clipped_values: int


@dataclass(frozen=True, kw_only=True)
class Join:
    """A store's rows of images."""

    displayed: str
    "the store"
    images: tuple[str, ...]
    "as they are displayed"
    rows: tuple[PlacedRow, ...]
    "of each image"
    counts: JoinCounts

    @functools.cached_property
    def by_image(self) -> Mapping[str, PlacedRow]:
        """The row of each image, as it is displayed."""
        return dict(zip(self.images, self.rows, strict=True))

    def of(self, displayed: str) -> PlacedRow:
        """The row of an image. Raises `FeaturesMissing` for one that wasn't joined."""
        if displayed not in self.by_image:
            raise FeaturesMissing(f"{self.displayed} was opened for other images than {displayed}")
        return self.by_image[displayed]

    @property
    def content(self) -> str:
        """A digest of what the ledger says of the rows: a store that was continued or repaired says something else."""
        return joint_digest(str(asdict(row)) for row in self.rows)

    def notes(self) -> Iterator[str]:
        """What who reads results should know of the join."""
        counts = self.counts
        if counts.without_features:
            first = next(f"{image}: {row.lack}" for image, row in zip(self.images, self.rows, strict=True) if row.lack)
            yield f"{self.displayed} has no features of {counts.without_features} of {counts.images} images (the first: {first})"
        if counts.by_size:
            yield f"{self.displayed} has no digests of {counts.by_size} of {counts.images} images: found by name and size alone"

    def clipped_lines(self, levels: Sequence[Level], read: Collection[str]) -> Iterator[str]:
        """What float16 couldn't hold of these images, and what to do, for the log. `levels`: the store's, of which those called
        `read` are read; if none of them is float16, there is nothing to say."""
        if float16_levels([level for level in levels if level.name in read]):
            first = [image for image, row in zip(self.images, self.rows, strict=True) if row.clipped][:FIRST_KEYS]
            found = Clipped(rows=self.counts.clipped_rows, values=self.counts.clipped_values, first=tuple(first))
            for line in clipped_lines(found, self.counts.images - self.counts.without_features, levels):
                yield f"{self.displayed}: {line}"

    def to_json(self) -> dict[str, JsonValue]:
        """The counts, with the store's name."""
        return {"store": self.displayed, **asdict(self.counts)}


def clipped_images(rows: Sequence[PlacedRow], read: Sequence[Level]) -> int:
    """How many of the rows have values that float16 couldn't hold, where one of the levels that are read is float16."""
    return sum(bool(row.clipped) for row in rows) if float16_levels(read) else 0


def join(store: FeatureStore, wanted: Sequence[Wanted], numbers: Mapping[str, int] | None = None) -> Join:
    """The row of each image; `numbers`: rows by key, where they were looked up already. Raises `FeaturesMissing` with what the
    store lacks, has of other images under the same names, or can't tell apart: how many, and the first of each."""
    if numbers is None:
        numbers = store.index.find([key for each in wanted for key in each.keys])
    found = [list(dict.fromkeys(numbers[key] for key in each.keys if key in numbers)) for each in wanted]
    every = sorted({row for rows in found for row in rows})
    ledger = dict(zip(every, PlacedRow.read(store, every), strict=True))
    chosen: list[PlacedRow] = []
    faults = _Faults(store, len(wanted))
    how: Counter[str] = Counter()
    for each, rows in zip(wanted, found, strict=True):
        row = _row_of(each, [ledger[row] for row in rows], how, faults)
        if row is not None:
            chosen.append(row)
    faults.of_shared_rows(wanted, chosen)
    faults.refuse()
    counts = JoinCounts(
        images=len(wanted),
        by_digest=how["digest"],
        by_size=how["size"],
        by_name=how["name"],
        chosen=how["chosen"],
        without_features=sum(bool(row.lack) for row in chosen),
        clipped_rows=sum(bool(row.clipped) for row in chosen),
        clipped_values=sum(row.clipped or 0 for row in chosen),
    )
    names = tuple(each.displayed for each in wanted)
    return Join(displayed=store.folder.displayed, images=names, rows=tuple(chosen), counts=counts)


def _row_of(wanted: Wanted, rows: Sequence[PlacedRow], how: Counter[str], faults: "_Faults") -> PlacedRow | None:
    """The one of the rows under the image's names that is the image's; None, with a fault, where there is none."""
    if not rows:
        faults.lacking(wanted)
        return None
    for row in rows:
        kind = _kinship(wanted, row)
        if kind:
            how[kind] += 1
            how["chosen"] += len(rows) > 1
            return row
    faults.other(wanted, rows[0])
    return None


def _kinship(wanted: Wanted, row: PlacedRow) -> str:
    """By what the row is the image's; nothing where it isn't."""
    if row.digest and wanted.digest is not None:
        return "digest" if row.digest == wanted.digest else ""
    if row.size is None:
        return "name"  # it has no features, so that there is nothing to mistake
    try:
        return "size" if wanted.size() == row.size else ""
    except DatasetError:
        return "name"  # left out, or refused, when it is to be read


class _Faults:
    """What keeps a store from serving a data set."""

    def __init__(self, store: FeatureStore, images: int):
        self.store, self.images = store, images
        self._found: dict[str, list[str]] = {}

    def lacking(self, wanted: Wanted) -> None:
        """There is no row of the image."""
        self._add("are not in it", f"{wanted.displayed}: none of its keys is {' or '.join(wanted.keys)}")

    def other(self, wanted: Wanted, row: PlacedRow) -> None:
        """The row under the image's name is another image's."""
        of = f"an image of {row.width} x {row.height} pixels and other bytes" if row.size else "other bytes"
        self._add("have another image's row under their names", f"{wanted.displayed}: row {row.row} was made of {of}")

    def of_shared_rows(self, wanted: Sequence[Wanted], chosen: Sequence[PlacedRow]) -> None:
        """Images that share a row, which only those of the same bytes may."""
        if len(chosen) < len(wanted):
            return
        first: dict[int, Wanted] = {}
        for each, row in zip(wanted, chosen, strict=True):
            other = first.setdefault(row.row, each)
            same = other.displayed == each.displayed or (row.digest and each.digest is not None and each.digest == other.digest)
            if not same:
                what = f"{other.displayed} and {each.displayed}: both are row {row.row}, and no digest tells which"
                self._add("can't be told apart", what)

    def _add(self, what: str, example: str) -> None:
        self._found.setdefault(what, []).append(example)

    def refuse(self) -> None:
        """Raises `FeaturesMissing` if there is any."""
        if not self._found:
            return
        faults = [f"  {len(each)} of {self.images} images {what}; the first: {each[0]}" for what, each in self._found.items()]
        first, last = f"{self.store.folder.displayed} doesn't fit the data set:", "Extract the data set's own files"
        raise FeaturesMissing("\n".join([first, *faults, f"{last}, or give --data those that were extracted."]))
