"""Any mode of Pillow's to 8-bit RGB, with the conversion in words."""

from typing import cast

import numpy as np
from PIL import Image, ImageFile

from operators.codecs.refusal import ImageRefused
from operators.codecs.samples import Samples, refuse_dark

_NAMES = {"L": "grey", "P": "palette", "1": "bilevel"}


def stored_bits(image: ImageFile.ImageFile) -> int:
    """8 or 16: bits of a value in an image that is not loaded yet. Of 16-bit colours, Pillow will keep the high bytes."""
    raw = [tile.args if isinstance(tile.args, str) else tile.args[0] for tile in image.tile if tile.args]
    return 16 if _is_deep(image) or any(";16" in str(mode) for mode in raw) else 8


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def to_rgb(image: Image.Image, samples: Samples) -> tuple[Image.Image, str]:
    """8-bit RGB, and the conversion in words (empty for none). Transparency goes onto white.

    `samples` is what the file holds. Raises `ImageRefused` for values whose meaning is not known.
    """
    if _is_deep(image) or samples.kind == "int":
        return _grey_to_rgb(image, samples)
    if samples.bits == 16:
        return _high_bytes_to_rgb(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image, ""
    if image.has_transparency_data:
        return _on_white(image), f"{image.mode.lower()}+alpha->rgb on white"
    return image.convert("RGB"), f"{_NAMES.get(image.mode, image.mode.lower())}->rgb"


def _high_bytes_to_rgb(image: Image.Image) -> tuple[Image.Image, str]:
    if "transparency" in image.info:
        raise ImageRefused("16-bit colours of which one is transparent, which Pillow can't find; write an alpha channel")
    extrema = cast("tuple[tuple[int, int], ...]", image.getextrema())  # a pair for each of several bands
    # Without the alpha channel, whose brightest value says nothing of the colours.
    refuse_dark(max(high for _, high in extrema[: 4 if image.mode == "CMYK" else 3]), 8)
    if image.mode == "RGB":
        return image, "rgb16->rgb"
    if image.mode == "CMYK":
        return image.convert("RGB"), "cmyk16->rgb"
    return _on_white(image), "rgba16+alpha->rgb on white"


def _grey_to_rgb(image: Image.Image, samples: Samples) -> tuple[Image.Image, str]:
    values = np.asarray(image)
    if samples.kind == "int" and samples.bits == 8:
        values = values.view(np.int8)
    elif samples.kind == "uint" and samples.bits == 32:
        values = values.view(np.uint32)
    grey, conversion = samples.to_8_bit(values)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
        conversion = f"{conversion}, transparency on white"
    return Image.fromarray(grey).convert("RGB"), conversion


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
