"""Settings that every evaluation has; what a task needs beyond them is said by its subclass, beside the task."""

from dataclasses import dataclass
from typing import Literal

from pipelines.config import (
    ClusterConfig,
    ConfigError,
    Counts,
    Found,
    Free,
    Held,
    JobConfig,
    absolute,
    require_at_least,
    require_out,
)
from pipelines.features.agreement import AskedFeatures
from pipelines.features.comparison import Comparison
from pipelines.features.config import LevelConfig
from pipelines.features.rows import Rendering
from pipelines.features.sources import SourceChoice
from storage.datasets.frames import LabelFrame


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(JobConfig):
    """Settings of one evaluation, whatever is evaluated."""

    data: Found[str] = ""
    """The data set's folder in its official layout: a path or fsspec URL."""
    out: Free[str] = ""
    """The folder to write or continue: results.md, results.json, pictures/, and a part per finished piece of work."""
    limit: Counts[int | None] = None
    """Only the first N items (pairs, clips, images) of the data set."""
    pictures: Free[int] = 6
    """How many items to draw."""
    against: Free[str] = ""
    """The line of the tables that the others' differences are to, by its name there or its level's: low-res, x2, lift0. Default:
    the bilinear one of the same grid; of readouts, the first one on a bilinear map, else the first."""
    means: Free[tuple[str, ...]] = ()
    """NAME=LINE,LINE,...: a further line, the mean of these, for example of one training by several seeds. Its interval and its
    difference are the mean's own."""
    paper: Free[bool] = False
    """Print the published rows beside the measured ones."""
    plan: Free[bool] = False
    """Print what would be done, and what is done already, then stop: nothing is computed or begun, and no cluster is asked."""

    cluster: Held[ClusterConfig] = ClusterConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "limit")
        require_at_least(0, self, "pictures")
        Comparison.parse(self.against, self.means)

    @property
    def comparison(self) -> Comparison:
        """Of `against` and `means`. Raises `ConfigError`."""
        return Comparison.parse(self.against, self.means)

    @property
    def places(self) -> tuple[str, ...]:
        return self.data, self.out

    def required(self, name: Literal["data", "out"]) -> str:
        """The URL called `name`, which other processes on this machine find, too. Raises `ConfigError` where it is empty."""
        url: str = getattr(self, name)
        if name == "out":
            require_out(url, "a folder")
        elif not url.strip():
            raise ConfigError("no data: give --data the data set's folder")
        return absolute(url)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EvaluationConfig):
    """Settings of one evaluation of features."""

    stores: Found[tuple[str, ...]] = ()
    """Feature stores to read instead of running a model, one per input size; the model's settings are then the stores', and
    --levels names those of their levels that are evaluated (default: all)."""

    features: Held[LevelConfig] = LevelConfig(levels=("x1", "x2"))

    drawing: Found[Rendering | None] = None
    """`paper`: images are drawn as the protocol's code does it; `extract`: as jobs/extract.py does it. Default: paper with a
    model, extract with stores (which can't be otherwise)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features.encoding == "int8" or any(text.endswith("@int8") for text in self.features.levels):
            raise ConfigError("--levels ...@int8: a model's maps aren't quantised; evaluate a store of them with --stores")
        if self.stores and self.drawing == "paper":
            raise ConfigError("--drawing paper needs a model: the images of a store are drawn as jobs/extract.py does it")

    @property
    def places(self) -> tuple[str, ...]:
        return self.data, self.out, *self.stores

    @property
    def rendering(self) -> Rendering:
        """`drawing`, its default resolved."""
        return self.drawing or ("extract" if self.stores else "paper")

    @property
    def source(self) -> SourceChoice:
        """Where the features come from."""
        return SourceChoice(
            features=self.features,
            stores=self.stores,
            asked=AskedFeatures.of(self),
            rendering=self.rendering,
            options=self.options,
            comparison=self.comparison,
        )


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Labels of photographs that their EXIF turns."""

    label_frame: Counts[LabelFrame | None] = None
    """Of images that their EXIF mirrors or turns by half, and of square ones that it turns: whether labels are of the `stored`
    pixels or of the `upright` image. Default: such images are left out, and counted. Where sizes tell, they decide."""

    @property
    def turned_photographs(self) -> str:
        """What is done with them, for `choices`."""
        otherwise = f"else {self.label_frame}" if self.label_frame else "where it can't tell, the image is left out"
        return f"upright with their labels, which are of the stored or of the upright pixels by their size; {otherwise}"


@dataclass(frozen=True, kw_only=True)
class LabelledConfig(LabelConfig, EvaluateConfig):
    """Settings of an evaluation that holds features against labels."""
