"""What a detector's state dict doesn't tell about it, and the published sizes (ViTDet, ECCV 2022, arXiv 2203.16527)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal, TypeAlias

from operators.upsamplers.protocol import UpsamplerError, given_settings
from storage.documents import JsonObject, JsonValue
from storage.errors import RayliftError

Size: TypeAlias = tuple[int, int]
"""Height and width in pixels."""

PATCH = 16
"""Pixels of a side of the backbone's patches; the pyramid's factors are made for it."""

STRIDES = (4, 8, 16, 32, 64)
"""Pixels of a side of a cell of p2, p3, p4, p5 and p6."""

LEVELS = (2, 3, 4, 5)
"""Of the pyramid, those that boxes and masks are pooled from."""

CANONICAL_LEVEL = 4
"""Where boxes of the canonical size are pooled from."""

RATIOS = (0.5, 1.0, 2.0)
"""Heights of anchors over their widths."""


class DetectorError(RayliftError, ValueError):
    """No such detector, its weights are another's, or it can't do what was asked."""


@dataclass(frozen=True, kw_only=True)
class DetectorSettings:
    """Sizes of the network and rules of selection. The defaults are those of the published Mask R-CNN with ViT-B.

    Pairs named `..._topk` are for training and for inference. Raises `DetectorError` where settings are impossible.
    """

    square_pad: int = 1024
    "pixels a side of the input: an image's longer side is brought to it, and zeros fill the rest"
    image_size: int = 1024
    "pixels a side that the tables of relative positions of the global blocks are made for"
    pretrain_size: int = 224
    "pixels a side that the table of absolute positions is made for"
    dim: int = 768
    "channels of the backbone"
    depth: int = 12
    "blocks"
    heads: int = 12
    window: int = 14
    "cells a side of the windows that the blocks attend in which aren't global"
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)
    "numbers, from 0 on, of the blocks that attend to the whole map"
    drop_path: float = 0.1
    "probability that training leaves out the last block; it rises to it linearly from 0"
    channels: int = 256
    "of the pyramid and of the heads' convolutions"
    fc: int = 1024
    "channels of the box head's layer"
    classes: int = 80
    anchor_sizes: tuple[tuple[float, ...], ...] = ((32,), (64,), (128,), (256,), (512,))
    "square roots of anchors' areas in pixels, of p2 to p6"
    pre_topk: tuple[int, int] = (2000, 1000)
    "proposals of a level that go into non-maximum suppression"
    post_topk: tuple[int, int] = (1000, 1000)
    "proposals of an image that it leaves"
    proposal_nms: float = 0.7
    "overlap (IoU) above which the worse of two proposals of a level goes"
    canonical_size: float = 224
    "pixels: boxes of so large an area's root are pooled from p4"
    score_threshold: float = 0.05
    "detections have higher scores"
    nms: float = 0.5
    "overlap (IoU) above which the worse of two detections of a class goes"
    topk: int = 100
    "detections of an image"
    cascade: bool = False
    "Cascade R-CNN's three stages instead of Mask R-CNN's one"
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    "of red, green and blue, 0 to 255"
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)

    @classmethod
    def published(cls, size: Literal["B", "L", "H"] = "B", *, cascade: bool = False) -> "DetectorSettings":
        """The published detectors with ViT-B, ViT-L and ViT-H."""
        if size == "B":
            return cls(cascade=cascade)
        dim, depth, drop_path = {"L": (1024, 24, 0.4), "H": (1280, 32, 0.5)}[size]
        last = tuple(range(depth // 4 - 1, depth, depth // 4))
        return cls(dim=dim, depth=depth, heads=16, global_blocks=last, drop_path=drop_path, cascade=cascade)

    @classmethod
    def parse(cls, given: JsonObject) -> "DetectorSettings":
        """From a JSON object; absent and null settings take the defaults. Raises `DetectorError`."""
        try:
            return cls(**given_settings(cls, given, "the detector"))
        except UpsamplerError as error:
            raise DetectorError(str(error)) from None

    def to_json(self) -> dict[str, JsonValue]:
        """As checkpoints have it."""
        return asdict(self)

    @property
    def anchors_per_cell(self) -> int:
        return len(self.anchor_sizes[0]) * len(RATIOS)

    def __post_init__(self) -> None:
        self._check_numbers()
        for name in ("square_pad", "image_size", "pretrain_size"):
            if getattr(self, name) % PATCH:
                raise DetectorError(f"{name} must be a multiple of {PATCH} pixels, got {getattr(self, name)}")
        if self.square_pad < STRIDES[3]:
            raise DetectorError(f"square_pad must be at least {STRIDES[3]} pixels, a cell of p5; got {self.square_pad}")
        if self.dim % self.heads or self.dim % 4:
            raise DetectorError(f"dim must be a multiple of 4 and of the {self.heads} heads, got {self.dim}")
        if any(not 0 <= block < self.depth for block in self.global_blocks):
            raise DetectorError(f"global_blocks must be numbers from 0 to {self.depth - 1}, got {self.global_blocks}")
        per_level = {len(sizes) for sizes in self.anchor_sizes}
        if len(self.anchor_sizes) != len(STRIDES) or len(per_level) != 1 or 0 in per_level:
            raise DetectorError(f"anchor_sizes must be {len(STRIDES)} lists of equally many sizes, got {self.anchor_sizes}")

    def _check_numbers(self) -> None:
        """Raise `DetectorError` where a value isn't of its field's kind."""
        for field in fields(self):
            value, default = getattr(self, field.name), field.default
            if type(default) is bool:
                fits, rule = type(value) is bool, "true or false"
            elif field.name in ("drop_path", "proposal_nms", "nms", "score_threshold"):
                fits, rule = _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"
            elif type(default) is int and field.name != "canonical_size":
                fits, rule = _is_count(value), "a whole number of at least 1"
            elif field.name == "global_blocks":
                fits, rule = isinstance(value, tuple) and all(type(each) is int for each in value), "whole numbers"
            elif field.name.endswith("topk"):
                fits, rule = _has(value, 2) and all(map(_is_count, value)), "two whole numbers of at least 1"
            elif field.name == "anchor_sizes":
                fits = isinstance(value, tuple) and all(
                    isinstance(each, tuple) and all(map(_is_positive, each)) for each in value
                )
                rule = "lists of numbers above 0"
            elif field.name == "pixel_mean":
                fits, rule = _has(value, 3) and all(map(_is_number, value)), "three numbers"
            elif field.name == "pixel_std":
                fits, rule = _has(value, 3) and all(map(_is_positive, value)), "three numbers above 0"
            else:
                fits, rule = _is_positive(value), "a number above 0"
            if not fits:
                raise DetectorError(f"{field.name} must be {rule}, got {value!r}")


def _has(value: object, length: int) -> bool:
    return isinstance(value, Sequence) and len(value) == length


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: object) -> bool:
    # Python counts True as the number 1.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _is_positive(value: object) -> bool:
    return _is_number(value) and value > 0  # type: ignore[operator]
