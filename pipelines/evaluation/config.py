"""Settings that every evaluation has; what a task needs beyond them is said by its subclass, beside the task."""

from dataclasses import dataclass
from typing import Any, Literal

from pipelines.config import (
    ConfigError,
    absolute,
    parse_options,
    public_settings,
    require_at_least,
    require_gpus,
    require_shareable,
    runs_inline,
)
from pipelines.features.rows import Drawing
from storage.datasets.frames import LabelFrame


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of one evaluation."""

    data: str = ""
    """The data set's folder in its official layout: a path or fsspec URL."""
    out: str = ""
    """The folder to write or continue: results.md, results.json, pictures/, and a part per finished piece of work."""
    stores: tuple[str, ...] = ()
    """Feature stores to read instead of running a model, one per input size; the model's settings are then the stores'."""

    model: str = "vit_small_patch16_224.dino"
    """timm name of the backbone, tag included."""
    weights: str = "pretrained"
    """`pretrained` (the hub, or its local cache), a file or folder at a path or URL, or `random[:SEED]`. What timm's config.json
    there says of the input and the network is used."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    layers: tuple[int, ...] = (-1,)
    """Blocks whose maps are taken, from 0 or negative from the end; several are concatenated along the channels."""
    facet: Literal["token", "key", "query", "value"] = "token"
    """What is taken of a block: its output, or a projection of its attention."""
    norm: bool | None = None
    """Apply the backbone's final norm to token maps; default: where the model has one."""
    stride: int | None = None
    """Input pixels between cells; below the patch size, patches overlap."""
    ragged: bool = False
    """Allow input sizes that patches don't fill: what lies beyond the last whole one isn't seen (LiFT's 56 px at patch 16)."""
    pos_embed: Literal["timm", "dino"] | None = None
    """Interpolation of position embeddings; default: timm's, and DINO's with a stride override."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Autocast of the backbone's forward."""
    levels: tuple[str, ...] = ("x1", "x2")
    """Maps to evaluate, named as for jobs/extract.py: x1 x2=lift:s3://bucket/ckpt. The low-resolution map and its bilinear
    enlargement to the same grid are always there, too."""
    force_upsampler: bool = False
    """Use a learned upsampler with other features than it was trained on."""
    encoding: Literal["float16", "float32"] = "float16"
    """Features are rounded to it, as in a store."""
    drawing: Drawing | None = None
    """`paper`: images are drawn as the protocol's code does it; `extract`: as jobs/extract.py does it. Default: paper with a
    model, extract with stores (which can't be otherwise)."""

    limit: int | None = None
    """Only the first N items (pairs, clips, images) of the data set."""
    pictures: int = 6
    """How many items to draw."""
    paper: bool = False
    """Print the published rows beside the measured ones."""

    storage_options: str | None = None
    """JSON for the filesystem, as for jobs/extract.py."""
    executor: Literal["auto", "ray", "inline"] = "auto"
    """`inline` runs in this process, without Ray; `auto` is Ray, except for memory://."""
    ray_address: str | None = None
    """A Ray cluster; default: the job's own under `ray job submit`, else a new local one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes GPUs where the cluster has any."""
    actors: int | None = None
    """Largest number of model actors; default: one per GPU, or per CPU where there is none."""
    actor_cpus: int | None = None
    """CPUs and threads of one actor; default: 1 on CPU, the node's share per GPU otherwise."""
    actor_gpus: float | None = None
    """GPUs of one actor; fractions pack several small models onto one."""
    accelerator: str | None = None
    """Only GPUs of this kind, as for jobs/extract.py."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "limit", "actors", "actor_cpus", "stride")
        require_at_least(0, self, "pictures")
        require_gpus(self, self.actor_gpus, "--actor-gpus")
        if any(text.endswith("@int8") for text in self.levels):
            raise ConfigError(
                "--levels ...@int8: a model's maps aren't quantised; evaluate a store of them with --stores"
            )
        if self.stores and self.drawing == "paper":
            raise ConfigError(
                "--drawing paper needs a model: the images of a store are drawn as jobs/extract.py does it"
            )
        if self.executor == "ray":
            require_shareable(*self._urls)

    @property
    def _urls(self) -> tuple[str, ...]:
        return self.data, self.out, *self.stores

    @property
    def options(self) -> dict[str, Any]:
        """`storage_options` parsed. Raises `ConfigError`."""
        return parse_options(self.storage_options)

    @property
    def is_inline(self) -> bool:
        """Whether this process does the work."""
        return runs_inline(self.executor, *self._urls)

    @property
    def how_drawn(self) -> Drawing:
        """`drawing`, its default resolved."""
        return self.drawing or ("extract" if self.stores else "paper")

    def required(self, name: Literal["data", "out"]) -> str:
        """The URL called `name`, which other processes on this machine find, too. Raises `ConfigError` where it is empty."""
        url: str = getattr(self, name)
        if not url:
            what = {"data": "no data: give --data the data set's folder", "out": "no output: give --out a folder"}
            raise ConfigError(what[name])
        return absolute(url)

    def public(self) -> dict[str, Any]:
        """All settings without credentials, for files and logs."""
        return public_settings(self, "data", "out", "weights", "stores", "levels")


@dataclass(frozen=True, kw_only=True)
class LabelledConfig(EvaluateConfig):
    """Settings of an evaluation that holds features against labels."""

    label_frame: LabelFrame | None = None
    """Of images that their EXIF mirrors or turns by half, and of square ones that it turns: whether labels are of the `stored`
    pixels or of the `upright` image. Default: such images are left out, and counted. Where sizes tell, they decide."""

    @property
    def turned_photographs(self) -> str:
        """What is done with them, for `choices`."""
        otherwise = f"else {self.label_frame}" if self.label_frame else "where it can't tell, the image is left out"
        return f"upright with their labels, which are of the stored or of the upright pixels by their size; {otherwise}"


_FREE = {
    "data", "out", "stores", "model", "weights", "revision", "layers", "facet", "norm", "stride", "ragged", "pos_embed",
    "precision", "levels", "force_upsampler", "encoding", "drawing", "pictures", "paper", "storage_options",
    "executor", "ray_address", "device", "actors", "actor_cpus", "actor_gpus", "accelerator",
}  # fmt: skip
"""May change when an evaluation is continued: how it is run, or recorded by what is found there (features, data)."""


def protocol_settings(config: EvaluateConfig) -> dict[str, Any]:
    """The settings that decide the score, apart from features and data."""
    return {name: value for name, value in config.public().items() if name not in _FREE}
