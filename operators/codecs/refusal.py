"""What is wrong with an image's bytes."""


class ImageRefused(ValueError):
    """The bytes hold no image, or one that is not accepted."""


class ImageDamaged(ImageRefused, OSError):
    """A decoder failed on the bytes, or made of them what they don't hold in full."""
