"""What is wrong with an image's bytes."""

from storage.errors import RayliftError


class ImageRefused(RayliftError, ValueError):
    """The bytes hold no image, or one that is not accepted."""

    kind = "ImageRefused"
    "what a ledger calls the error"


class GpuDecoderFailed(RayliftError, MemoryError):
    """A GPU couldn't decode an image for reasons of its own, most likely for lack of memory: no fault of the image."""

    exit_code = 1


class ImageDamaged(ImageRefused, OSError):
    """A decoder failed on the bytes, or made of them what they don't hold in full."""

    kind = "ImageDamaged"

    @classmethod
    def by(cls, error: Exception) -> "ImageDamaged":
        """A decoder's own `error`, whose type and text are kept."""
        damaged = cls(str(error) or type(error).__name__)
        damaged.kind = type(error).__name__
        return damaged
