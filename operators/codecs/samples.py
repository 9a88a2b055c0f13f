"""What the numbers of an image mean: their bits and sign, which of them is white, and how that becomes 8 bits.

Pillow hands out grey values as they lie in the file, and says neither how many bits of 16 are used nor which end is white.
What the file's own tags say decides; what they leave open, and the values don't settle either, is refused.
"""

from dataclasses import dataclass

import numpy as np

from operators.codecs.refusal import ImageRefused

DARK_BITS = 12
"""Untagged 16-bit values that all fit into so few bits are most likely a camera's or a sensor's own 10 or 12 bits."""

_CHUNK = 2**20


@dataclass(frozen=True, kw_only=True)
class Samples:
    """How grey values are stored."""

    bits: int = 8
    kind: str = "uint"
    "`uint`, `int` or `float`"
    white_is_zero: bool = False
    in_full: bool = False
    "the format or the file's tags say that `bits` are used in full"
    low: float | None = None
    "black, where the file says so"
    high: float | None = None

    @property
    def name(self) -> str:
        """In words, for the ledger."""
        name = {"uint": "grey", "int": "int", "float": "float"}[self.kind] + str(self.bits)
        name += f" {self.low:g}..{self.high:g}" if self.low is not None else ""
        return f"{name} white is zero" if self.white_is_zero else name

    def to_8_bit(self, values: np.ndarray) -> tuple[np.ndarray, str]:
        """Grey `values` [H, W] as uint8, 255 white, and the conversion in words.

        Raises `ImageRefused` where the range of the values is neither said by the file nor to be seen.
        """
        note = ""
        if self.low is not None and self.high is not None:
            low, high = self.low, self.high
        elif self.kind == "float":
            raise ImageRefused("a 32-bit float image has no defined range; convert it to 8 or 16 bit")
        else:
            half = 2 ** (self.bits - 1)
            low, high = (-half, half - 1) if self.kind == "int" else (0, 2 * half - 1)
            note = "" if self.in_full else self._check_use(values)
        grey = np.empty(values.shape, np.uint8)
        rows = max(1, _CHUNK // values.shape[1])
        for start in range(0, len(values), rows):
            grey[start : start + rows] = self._scaled(values[start : start + rows], low, high)
        return (~grey if self.white_is_zero else grey), f"{self.name}{note}->rgb"

    def _scaled(self, values: np.ndarray, low: float, high: float) -> np.ndarray:
        if self.kind == "float":
            if not np.isfinite(values).all():
                raise ImageRefused("a float image with NaN or infinity among its values")
            return np.rint(np.clip((values.astype(np.float64) - low) / (high - low), 0, 1) * 255).astype(np.uint8)
        # Of 16 bits this is the high byte, of 12 the upper 8.
        parts = np.floor((values.astype(np.float64) - low) * (256 / (high - low + 1)))
        return np.clip(parts, 0, 255).astype(np.uint8)

    def _check_use(self, values: np.ndarray) -> str:
        """What to say of values that leave much of their type's range unused. Raises `ImageRefused` where it's too much."""
        least, most = int(values.min()), int(values.max())
        if self.kind == "uint" and self.bits == 16:
            refuse_dark(most, 16)
            return f" (brightest {most} of 65535)" if 0 < most < 2**14 else ""
        if most - least < 2 ** (self.bits - 1) and (least, most) != (0, 0):
            raise ImageRefused(
                f"{self.bits}-bit {self.kind} values from {least} to {most}: the file doesn't say which are black and white "
                "(TIFF: SMinSampleValue, SMaxSampleValue); write these tags, or convert it to 8 or 16 bit"
            )
        return ""


def refuse_dark(brightest: int, bits: int) -> None:
    """Raise `ImageRefused` where a 16-bit image is that dark that another number of bits is likelier than night."""
    limit = 2 ** (bits - 16 + DARK_BITS)
    if 0 < brightest < limit:
        raise ImageRefused(
            f"16-bit values that all lie below {2**DARK_BITS} of 65535: either black, or fewer bits than the file says (TIFF: "
            "MaxSampleValue); write that tag, or convert it to 8 bit"
        )
