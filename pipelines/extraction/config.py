"""Settings of an extraction: what a user can say, checked for contradictions, and without secrets where it is shown."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_type_hints

from pipelines.config import (
    ConfigError,
    parse_options,
    public_settings,
    require_at_least,
    require_gpus,
    require_shareable,
)
from storage.documents import Document, decode
from storage.paths import Folder, redact

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Settings of one extraction."""

    data: tuple[str, ...] = ()
    """WebDataset tars (URLs; braces and globs allowed) or folders of tars or images."""
    out: str = ""
    """The Zarr store to write or continue: a path or fsspec URL."""

    model: str = "vit_small_patch16_224.dino"
    """timm name of the backbone, tag included."""
    weights: str = "pretrained"
    """`pretrained` (the hub, or its local cache), a file or folder at a path or URL, or `random[:SEED]`. What timm's config.json
    there says of the input and the network is used."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    size: str | None = None
    """Input pixels, `SIDE` or `HEIGHTxWIDTH`; default: the model's own."""
    ragged: bool = False
    """Allow a --size that patches don't fill: what lies beyond the last whole one isn't seen (LiFT's 56 px at patch 16)."""
    geometry: Literal["crop", "squash", "pad"] = "crop"
    """Centre crop, aspect not kept, or letterbox."""
    crop_pct: float = 1.0
    """With `crop`: the image is resized to cover size / crop_pct before the centre is cut out."""
    layers: tuple[int, ...] = (-1,)
    """Blocks whose maps are stored, from 0 or negative from the end; several are concatenated along the channels."""
    facet: Literal["token", "key", "query", "value"] = "token"
    """What is taken of a block: its output, or a projection of its attention."""
    norm: bool | None = None
    """Apply the backbone's final norm to token maps; default: where the model has one."""
    stride: int | None = None
    """Input pixels between cells; below the patch size, patches overlap."""
    pos_embed: Literal["timm", "dino"] | None = None
    """Interpolation of position embeddings; default: timm's, and DINO's with a stride override."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Autocast of the backbone's forward."""
    jpeg_draft: bool = False
    """Decode large JPEGs at reduced scale: faster, slightly other pixels."""

    levels: tuple[str, ...] = ("x1", "pooled")
    """`NAME[=METHOD][@ENCODING]`: x1, x2, x0.5, 112x112, pooled; methods bilinear, bicubic, nearest, average, cls, mean,
    and learned ones with a checkpoint's URL: x2=lift:s3://bucket/ckpt."""
    force_upsampler: bool = False
    """Use a learned upsampler with other features than it was trained on."""
    encoding: Literal["float16", "float32", "int8"] = "float16"
    """How features are stored, unless a level says otherwise."""

    image_member: str | None = None
    """Extension of the image inside a sample, where it isn't the first of jpg, jpeg, png, webp, bmp, tif, gif, avif and so on."""
    carry: tuple[str, ...] = ()
    """Text members that become columns of the index, for example `cls json`."""
    limit: int | None = None
    """Only the first N samples."""
    max_image_pixels: int = 89_478_485
    """Images with more pixels fail instead of filling the memory; the default is Pillow's."""
    max_image_bytes: int = 2**29
    """Images in larger files fail before they are read."""
    max_failed_fraction: float = 0.01
    """The failure budget: with a larger part of the images failed, the run ends with an error."""
    retry_failed: bool = False
    """Run tasks with failed rows again, also where their images were repaired since."""
    replace_changed: bool = False
    """Run tasks again whose images aren't those that were extracted any more; without it, changed input is refused."""

    storage_options: str | None = None
    """JSON for the filesystem, for example '{"endpoint_url": "http://host:9000"}', or one object per scheme. Better for
    secrets: a profile, environment variables, or fsspec's own configuration file."""
    executor: Literal["auto", "ray", "inline"] = "auto"
    """`inline` runs in this process, without Ray; `auto` is Ray, except for memory:// which only one process can see."""
    ray_address: str | None = None
    """A Ray cluster; default: the job's own under `ray job submit`, else a new local one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes GPUs where the cluster has any."""
    actors: int | None = None
    """Number of model actors; default: one per GPU, or per CPU where there is none."""
    actor_cpus: int | None = None
    """CPUs and threads of one actor; default: 1 on CPU, the node's share per GPU otherwise."""
    actor_gpus: float | None = None
    """GPUs of one actor; fractions pack several small models onto one."""
    accelerator: str | None = None
    """Only GPUs of this kind, as Ray calls it: L4, A10G, A100, H100. For clusters with several kinds."""
    decode_on: Literal["actor", "cluster"] = "actor"
    """`cluster` decodes in separate tasks on any CPU, for GPU nodes whose own CPUs can't keep up."""
    batch: int | None = None
    """Images per forward; default: 16 on CPU, 64 on GPU, less where memory is short."""
    block_rows: int | None = None
    """Images per task, a power of two; default: by input size and row size. Part of the store's layout."""

    plan: bool = False
    """Print what would be done and what it would cost, then stop."""
    json: bool = False
    """With --plan: as JSON."""

    def __post_init__(self) -> None:
        if not 0 < self.crop_pct <= 1:
            raise ConfigError(f"--crop-pct {self.crop_pct}: must be above 0 and at most 1")
        if not 0 <= self.max_failed_fraction <= 1:
            raise ConfigError(f"--max-failed-fraction {self.max_failed_fraction}: must lie between 0 and 1")
        require_at_least(1, self, "limit", "batch", "block_rows", "actors", "actor_cpus", "stride", "max_image_bytes")
        if self.block_rows is not None and self.block_rows & (self.block_rows - 1):
            raise ConfigError(f"--block-rows {self.block_rows}: must be a power of two")
        require_gpus(self, self.actor_gpus, "--actor-gpus")
        if self.executor == "ray":
            require_shareable(*self.data, self.out)

    @property
    def options(self) -> dict[str, Any]:
        """`storage_options` parsed. Raises `ConfigError`."""
        return parse_options(self.storage_options)

    @property
    def input_size(self) -> tuple[int, int] | None:
        """(height, width), or None for the model's own."""
        if self.size is None:
            return None
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", self.size)
        if not match:
            raise ConfigError(f"--size {self.size}: use SIDE or HEIGHTxWIDTH in pixels, for example 448 or 384x512")
        return int(match.group(1)), int(match.group(2) or match.group(1))

    def public(self) -> dict[str, Any]:
        """All settings without credentials, for files and logs."""
        return public_settings(self, "data", "levels", "out", "weights")


CONTENT_FIELDS = (
    "model",
    "weights",
    "revision",
    "size",
    "ragged",
    "geometry",
    "crop_pct",
    "layers",
    "facet",
    "norm",
    "stride",
    "pos_embed",
    "precision",
    "jpeg_draft",
    "levels",
    "force_upsampler",
    "encoding",
    "image_member",
    "carry",
    "limit",
    "max_image_pixels",
    "max_image_bytes",
    "block_rows",
)
"""Settings that decide what is in a store, as opposed to where and how it is made; these go into its attributes."""


def config_from_run(url: str, options: Mapping[str, Any] | None = None) -> ExtractConfig:
    """The config of an earlier run: a run.json, or a store, whose latest run is taken."""
    if not url.endswith(".json"):
        folder = Folder(url, options)
        runs = folder.folders("runs")
        if not runs:
            raise ConfigError(f"{folder.shown} has no runs; give a store or a run.json")
        document = Document(folder, f"runs/{runs[-1]}/run.json", "name another run's run.json")
    else:
        base, _, name = url.rpartition("/")
        document = Document(Folder(base or ".", options), name, "name another run's run.json")
    found = document.json()
    with document.parsing():
        saved = decode(Mapping[str, Any], found["config"], "config")
    unknown = set(saved) - {f.name for f in fields(ExtractConfig)}
    if unknown:
        raise ConfigError(
            f"{document.shown} has settings that this version does not know: {', '.join(sorted(unknown))}"
        )
    hints = get_type_hints(ExtractConfig)
    with document.parsing():
        settings = {name: decode(hints[name], value, f"config.{name}") for name, value in saved.items()}
    if "***" in str(settings.get("storage_options")):
        logger.warning("credentials were not saved in %s; give --storage-options again", redact(url))
        settings["storage_options"] = None
    return replace(ExtractConfig(), **settings)
