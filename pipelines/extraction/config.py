"""Settings of an extraction: what a user can say, checked for contradictions, and without secrets where it is shown."""

import logging
from dataclasses import dataclass
from typing import Annotated, Literal

from pipelines.config import (
    ClusterConfig,
    ConfigError,
    Counts,
    Found,
    Free,
    Held,
    Identity,
    InputConfig,
    JobConfig,
    parse_options,
    require_at_least,
    settings_of,
    used_with,
)
from pipelines.features.config import FeatureConfig
from storage.documents import Document, JsonValue, as_object, decode
from storage.paths import Folder, StorageOptions, folder_of
from storage.redaction import redact
from storage.sample_images import MAX_IMAGE_BYTES
from storage.videos import MAX_FRAMES, Sampling

logger = logging.getLogger(__name__)


_NOT_ADDING = used_with("--add-level leaves the levels that are there as they are", add_level=False)


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(JobConfig):
    """Settings of one extraction."""

    data: Found[tuple[str, ...]] = ()
    """WebDataset tars (URLs; braces and globs allowed) or folders of tars or images."""
    out: Free[str] = ""
    """The Zarr store to write or continue: a path or fsspec URL. With more --data than it was made of, it grows: old rows stay as
    they are, new ones come after them."""
    features: Held[FeatureConfig] = FeatureConfig()

    image_member: Counts[str | None] = None
    """Extension of the image inside a sample, where it isn't the first of jpg, jpeg, png, webp, bmp, tif, gif, avif and so on."""
    input: Held[InputConfig] = InputConfig()
    carry: Counts[tuple[str, ...]] = ()
    """Text members that become columns of the index, for example `cls json`."""
    limit: Counts[int | None] = None
    """Only the first N samples."""
    fps: Annotated[Counts[float | None], _NOT_ADDING] = None
    """Take frames of videos (mp4, m4v, mov, mkv, webm; raylift[video]), so many a second: frame k is the one that is shown k/fps
    seconds after the video's first, of key `video#000012.500` (seconds). A sample's video comes before its images."""
    max_video_frames: Annotated[Counts[int], used_with(fps=True)] = MAX_FRAMES
    """A video of which more frames would be taken fails before it is read."""
    max_image_pixels: Counts[int] = 89_478_485
    """Images with more pixels fail instead of filling the memory; the default is Pillow's."""
    max_image_bytes: Counts[int] = MAX_IMAGE_BYTES
    """Images in larger files fail before they are read; of videos, files may have any size."""
    max_failed_fraction: Free[float] = 0.01
    """The failure budget: with a larger part of the images failed, the run ends with an error."""
    add_level: Free[tuple[str, ...]] = ()
    """Add levels, as --levels has them, to the finished store --out, and do nothing else: its settings are the store's, its
    photographs are read where they were. Readers see a level once it is whole."""
    added_from: Annotated[Free[Literal["stored", "backbone"]], used_with(add_level=True)] = "stored"
    """--add-level: of the stored map of the backbone (float32 or float16, as it was rounded) where the method needs no more, with
    the photographs if it needs those; other methods, or all: of the backbone, which runs again."""
    retry_failed: Annotated[Free[bool], _NOT_ADDING] = False
    """Run tasks with failed rows again, also where their images were repaired since."""
    replace_changed: Annotated[Free[bool], _NOT_ADDING] = False
    """Run tasks again whose images aren't those that were extracted any more; without it, changed input is refused."""

    cluster: Held[ClusterConfig] = ClusterConfig()
    decode_on: Free[Literal["actor", "cluster"]] = "actor"
    """`cluster` decodes in separate tasks on any CPU, for GPU nodes whose own CPUs can't keep up."""
    compile: Found[Literal["off", "on", "max-autotune-no-cudagraphs"]] = "off"
    """Have torch compile the backbone's blocks: `on`, or a mode of torch.compile. Plain ViTs; takes a minute or so when an actor
    starts. The numbers differ a little, and the store says so: it isn't continued without it."""
    batch: Free[int | None] = None
    """Images per forward; default: 16 on CPU, 64 on GPU, less where memory is short."""
    block_rows: Counts[int | None] = None
    """Images per task, a power of two; default: by input size and row size. Part of the store's layout."""

    plan: Free[bool] = False
    """Print what would be done and what it would cost, then stop. The input is listed and the cluster asked as the run would do
    it: without one, a local Ray is started and ended again; --executor inline needs none."""
    json: Free[bool] = False
    """With --plan: as JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.max_failed_fraction <= 1:
            raise ConfigError(f"--max-failed-fraction {self.max_failed_fraction}: must lie between 0 and 1")
        require_at_least(1, self, "limit", "batch", "block_rows", "max_image_bytes", "max_image_pixels", "max_video_frames")
        _ = self.frames
        if self.block_rows is not None and self.block_rows & (self.block_rows - 1):
            raise ConfigError(f"--block-rows {self.block_rows}: must be a power of two")

    @property
    def frames(self) -> Sampling | None:
        """Which frames of videos are samples. Raises `InputError` for rates that there aren't."""
        return None if self.fps is None else Sampling.of(self.fps, self.max_video_frames)

    @property
    def places(self) -> tuple[str, ...]:
        return *self.data, self.out

    def content(self) -> dict[str, JsonValue]:
        """What decides what is in a store, as opposed to where and how it is made: this goes into its attributes."""
        found = self.counted(Identity.COUNTS, Identity.FOUND)
        if found["jpeg_decoder"] == "cpu":  # as in stores from before there was another
            del found["jpeg_decoder"]
        return {name: found[name] for name in sorted(found, key=lambda name: (*_FIRST, name).index(name))}


_FIRST = (
    "model", "weights", "revision", "size", "ragged", "geometry", "crop_pct", "layers", "facet", "norm", "stride",
    "pos_embed", "precision", "jpeg_draft", "levels", "force_upsampler", "encoding",
)  # fmt: skip
"""The order in which stores have said these from the beginning, so that a store's root keeps its bytes; what else there is
follows as it is declared."""


def config_from_run(url: str, options: StorageOptions | None = None) -> ExtractConfig:
    """The config of an earlier run: a run.json, or a store, whose latest run is taken."""
    if not url.endswith(".json"):
        folder = Folder(url, options)
        runs = folder.folders("runs")
        if not runs:
            raise ConfigError(f"{folder.displayed} has no runs; give a store or a run.json")
        document = Document(folder, f"runs/{runs[-1]}/run.json", "name another run's run.json")
    else:
        document = Document(*folder_of(url, options), "name another run's run.json")
    found = document.json()
    with document.parsing():
        saved = as_object(found["config"], "config")
    known = settings_of(ExtractConfig)
    if unknown := saved.keys() - known.keys():
        raise ConfigError(f"{document.displayed} has settings that this version does not know: {', '.join(sorted(unknown))}")
    with document.parsing():
        settings = {name: decode(known[name].kind, value, f"config.{name}") for name, value in saved.items()}
    # Those runs had them without any use, which is refused now.
    settings |= {"json": False, "add_level": (), "added_from": "stored"}
    if settings.get("geometry", "crop") != "crop":
        settings["crop_pct"] = 1.0
    if "***" in str(settings.get("storage_options")):
        logger.warning("credentials were not saved in %s; give --storage-options again", redact(url))
        settings["storage_options"] = None
    return ExtractConfig.of(**settings)


def start_from_run(args: list[str], default: ExtractConfig) -> ExtractConfig:
    """The settings of the earlier run that `--from RUN` names, which is taken off `args`; without it, `default`."""
    url, others = _taken(args, "--from")
    if url is None:
        return default
    if not url:
        raise ConfigError("--from needs a run.json or a store")
    options, _ = _taken(args, "--storage-options")  # which may be needed to read the run.json
    args[:] = others
    return config_from_run(url, parse_options(options))


def _taken(args: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of a flag, as in `--flag value` or `--flag=value`, and the other words. None where there is no flag, and empty
    where it has no value."""
    for at, word in enumerate(args):
        name, equals, value = word.partition("=")
        if name == flag and equals:
            return value, [*args[:at], *args[at + 1 :]]
        if name == flag:
            values = [each for each in args[at + 1 : at + 2] if not each.startswith("--")]
            return "".join(values), [*args[:at], *args[at + 1 + len(values) :]]
    return None, args
