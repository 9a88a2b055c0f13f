"""What makes features, as a user can say it. Resolved against the model, it is a `FeatureSpec` (storage/spec.py).

`FeatureConfig` is all of it, made of parts, since not every job can offer everything: what holds less is given the defaults of
the rest (`completed`). Each field is declared once, here; another default is given by whoever holds a part.
"""

import re
from dataclasses import dataclass, fields
from typing import Annotated, Any, Generic, Literal, TypeVar

from pipelines.config import ConfigError, Counts, Found, require_at_least, used_with
from storage.spec import Encoding

Size = TypeVar("Size", str | None, int, int | None)


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The backbone."""

    model: Counts[str] = "vit_small_patch16_224.dino"
    """timm name of the backbone, tag included."""
    weights: Found[str] = "pretrained"
    """`pretrained` (the hub, or its local cache), a file or folder at a path or URL, or `random[:SEED]`. What timm's config.json
    there says of the input and the network is used."""
    revision: Annotated[Found[str | None], used_with(weights="pretrained")] = None
    """Branch, tag or commit of the hub repository."""
    precision: Counts[Literal["bf16", "fp16", "fp32"]] = "bf16"
    """Autocast of the backbone's forward."""


@dataclass(frozen=True, kw_only=True)
class MapConfig(BackboneConfig):
    """The backbone's own map."""

    layers: Counts[tuple[int, ...]] = (-1,)
    """Blocks whose maps are taken, from 0 or negative from the end; several are concatenated along the channels."""
    facet: Counts[Literal["token", "key", "query", "value"]] = "token"
    """What is taken of a block: its output, or a projection of its attention."""
    norm: Counts[bool | None] = None
    """Apply the backbone's final norm to token maps; default: where the model has one."""
    pos_embed: Counts[Literal["timm", "dino"] | None] = None
    """Interpolation of position embeddings; default: timm's, and DINO's with a stride override."""


@dataclass(frozen=True, kw_only=True)
class DenseConfig(MapConfig):
    """Maps of any stride, upsampled and rounded."""

    stride: Counts[int | None] = None
    """Input pixels between cells; below the patch size, patches overlap."""
    ragged: Counts[bool] = False
    """Allow input sizes that patches don't fill: what lies beyond the last whole one isn't seen (LiFT's 56 px at patch 16)."""
    force_upsampler: Counts[bool] = False
    """Use a learned upsampler with other features than it was trained on."""
    encoding: Counts[Encoding] = "float16"
    """How features are stored, or rounded where they aren't, unless a level says otherwise; -raw: without compression."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "stride")


@dataclass(frozen=True, kw_only=True)
class LevelConfig(DenseConfig):
    """Several maps, and the pooled vector."""

    levels: Counts[tuple[str, ...]] = ("x1", "pooled")
    """`[NAME:]SCALE[=METHOD[,SETTING=VALUE]][@ENCODING]`: x1, x2, x0.5, 112x112, pooled; methods bilinear, bicubic, nearest,
    average, cls, mean, and learned ones with a checkpoint's URL: x2=lift:s3://bucket/ckpt. A name of its own lets a level stand
    beside others of its scale, and is what it is read by: x2 sharp:x2=lift:URL finer:x2=vit_up:URL. Of a checkpoint of vit_up,
    hidden_size and query_size (pixels) may be others than it was trained with: x4=vit_up,hidden_size=448:URL."""


@dataclass(frozen=True, kw_only=True)
class SizedConfig(Generic[Size]):
    """The size of the model's input."""

    size: Counts[Size] = None  # type: ignore[assignment]  # whoever has no None gives a number
    """Input pixels: SIDE, or HEIGHTxWIDTH where the input needn't be square; default, where there is none: the model's own, or
    the store's."""


@dataclass(frozen=True, kw_only=True)
class PlacedConfig:
    """How images become the input."""

    geometry: Counts[Literal["crop", "squash", "pad", "corner"]] = "crop"
    """Centre crop, aspect not kept, letterbox, or letterbox in the upper left corner, as ViTDet has images."""


_ON_ITS_GPU = used_with(
    "nvJPEG runs on the GPU of the actor that computes (--device auto or cuda, --decode-on actor)",
    device=("auto", "cuda"),
    decode_on="actor",
)


@dataclass(frozen=True, kw_only=True)
class FeatureConfig(LevelConfig, SizedConfig[str | None], PlacedConfig):
    """All that makes features."""

    crop_pct: Counts[float] = 1.0
    """With `crop`: the image is resized to cover size / crop_pct before the centre is cut out."""
    jpeg_draft: Annotated[Counts[bool], used_with(jpeg_decoder="cpu")] = False
    """Decode large JPEGs at reduced scale: faster, slightly other pixels."""
    jpeg_decoder: Annotated[Counts[Literal["cpu", "nvjpeg"]], _ON_ITS_GPU] = "cpu"
    """`nvjpeg` decodes and resizes baseline and progressive JPEGs on the GPU of each actor (raylift[nvjpeg]), all else on its
    CPUs: slightly other pixels, and part of what the store is. Not tried on a GPU yet."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.crop_pct <= 1:
            raise ConfigError(f"--crop-pct {self.crop_pct}: must be above 0 and at most 1")
        if self.crop_pct != 1 and self.geometry != "crop":
            raise ConfigError(
                f"--crop-pct {self.crop_pct} is for --geometry crop; --geometry {self.geometry} shows the whole image"
            )

    @property
    def input_size(self) -> tuple[int, int] | None:
        """(height, width), or None for the model's own. Raises `ConfigError`."""
        if self.size is None:
            return None
        match = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", self.size)
        if not match:
            raise ConfigError(f"--size {self.size}: use SIDE or HEIGHTxWIDTH in pixels, for example 448 or 384x512")
        return int(match.group(1)), int(match.group(2) or match.group(1))


def completed(part: BackboneConfig, **others: Any) -> FeatureConfig:
    """All that makes features, from a part of it; `others` are fields that it doesn't have, or has otherwise."""
    return FeatureConfig(**{each.name: getattr(part, each.name) for each in fields(part)} | others)
