"""Which pixels the labels of an image are of: those of its file, or those that are seen.

An image whose file has an EXIF orientation is stored otherwise than it is seen. Extraction turns it, and so does everything
that reads it here; its labels are turned with it, unless they are of the upright image already. Their size tells.
"""

from typing import Literal, NamedTuple, TypeAlias

from storage.datasets.files import DatasetError, ItemLeftOut
from storage.orientation import Orientation

LabelFrame: TypeAlias = Literal["stored", "upright"]
"""The pixels that a label is of: the file's, or those that are seen."""

CANNOT_TELL = (
    "its EXIF turns it, and its size doesn't tell whether labels are of the stored or of the upright image; say which with "
    "--label-frame"
)


class FrameUnknown(ItemLeftOut):
    """A label may be of the image as stored or as seen. `displayed` is the image."""

    def __init__(self, displayed: str):
        super().__init__(displayed, CANNOT_TELL)


class OrientedImage(NamedTuple):
    """An image as its pixels, or its features, were had: in words for messages, and how it was turned."""

    displayed: str
    orientation: Orientation


def require_size(displayed: str, image: Orientation, size: tuple[int, int], says: str = "its annotation says") -> None:
    """Raises `DatasetError` unless a label of `size` = (width, height) is of the image, as stored or upright."""
    if size in (image.stored_size, image.upright_size):
        return
    (width, height), upright = image.stored_size, image.upright_size
    turned = "" if upright == image.stored_size else f" ({upright[0]} x {upright[1]} upright)"
    raise DatasetError(
        f"{displayed} has {width} x {height} pixels{turned}, {says} {size[0]} x {size[1]}; check that they are of one data set"
    )


def label_turn(
    image: OrientedImage, size: tuple[int, int], frame: LabelFrame | None, says: str = "its annotation says"
) -> Orientation:
    """How labels of an image of `size` = (width, height) are turned onto the upright image.

    Quarter turns exchange the sides, so that the size tells whether the label is of the stored pixels or of the upright ones.
    It doesn't where the image is mirrored, turned by half, or square: then `frame` does. Raises `DatasetError` for a size that
    is neither, and `FrameUnknown` where nothing tells.
    """
    displayed, turn = image
    require_size(displayed, turn, size, says)
    upright = Orientation(width=turn.upright_size[0], height=turn.upright_size[1])
    if turn.exif == 1 or turn.stored_size != turn.upright_size:
        return turn if size == turn.stored_size else upright
    if frame is None:
        raise FrameUnknown(displayed)
    return turn if frame == "stored" else upright
