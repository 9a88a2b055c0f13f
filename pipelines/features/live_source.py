"""Features from a model that runs while they are evaluated."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipelines.config import ConfigError, JobConfig
from pipelines.features.bundle import describe_model, load_settings
from pipelines.features.clipping import ClippedCounts
from pipelines.features.config import LevelConfig, completed
from pipelines.features.feature_source import CachedSource, finite_vector, in_words, maps_by_row, own_maps
from pipelines.features.model import FeatureModel, not_finite
from pipelines.features.model_bundle import ModelBundle, cells
from pipelines.features.photos import upright_pixels
from pipelines.features.pictures import Geometries, Picture, draw
from pipelines.features.rows import Rendering, Row, Size, pooled_level, rows_of
from storage.datasets.frames import OrientedImage
from storage.datasets.images import EncodedImage, orientation_of
from storage.documents import JsonValue
from storage.paths import StorageError, StorageOptions
from storage.spec import FeatureSpec, Level, Use


@dataclass(frozen=True, kw_only=True)
class LiveRecipe:
    """A model as it is sent to workers."""

    bundles: Mapping[bool, ModelBundle]
    "by whether inputs are ragged (not filled by patches)"
    patch: int
    rendering: Rendering
    sizes: tuple[Size, ...] = ()
    "of the inputs, as far as they are known beforehand"
    low_res_of: frozenset[Size] = frozenset()
    "sizes of which the low-resolution map is asked for, and nothing that is made of it"

    def open(self, device: str) -> "LiveSource":
        return LiveSource(self, device)

    def source(self, device: str) -> "CachedSource":
        """What a worker reads from."""
        return CachedSource(self.open(device))

    def rows(self, size: Size) -> tuple[Row, ...]:
        """What is evaluated for inputs of `size`."""
        spec = self.spec(size)
        return rows_of(spec.levels, spec.stride, spec.model)

    def recorded(self, config: JobConfig) -> dict[str, JsonValue]:
        """A job's settings as its documents have them."""
        return config.public()

    def notes(self) -> list[str]:
        """What is no mistake, and who reads the scores should know."""
        notes = (note for size in self.sizes for note in self.bundle(size).unfamiliar(self.spec(size), self.patch))
        return list(dict.fromkeys(notes))

    def said(self) -> dict[str, str]:
        """What results say of the features, in words."""
        bundle = next(iter(self.bundles.values()))
        steps = [f"{level}: {weights.step}" for level, weights in bundle.upsamplers.items() if weights.step]
        found = {"upsamplers": self.notes(), "checkpoints": steps}
        return {"backbone": in_words(bundle.spec), **{name: "; ".join(each) for name, each in found.items() if each}}

    def joined(self, images: Mapping[Size, Sequence[EncodedImage]], contents: Mapping[str, str]) -> "LiveRecipe":  # noqa: ARG002
        """Itself: a model runs on the very images."""
        return self

    def identity(self) -> dict[str, JsonValue]:
        """What makes the features, as JSON values."""
        spec = next(iter(self.bundles.values())).spec
        said = {name: value for name, value in spec.to_json().items() if name not in FeatureSpec.names(Use.PLACED)}
        # Without a scale where that is the name, as those of earlier versions are.
        said["levels"] = [
            [level.name, level.method, level.dtype, level.digest, *filter(None, [level.scale])] for level in spec.levels
        ]
        return {"drawing": self.rendering, "model": said}

    def described(self) -> dict[str, JsonValue]:
        """What made the features, weights' digests included, for a report."""
        return self.identity()

    def planned(self) -> list[str]:
        """Lines on it for a plan."""
        return [f"features   {self.described()}"]

    def bundle(self, size: Size) -> ModelBundle:
        """What builds the model for inputs of `size`."""
        spec = self.spec(size)
        return replace(self.bundles[is_ragged(size, self.patch, spec.stride)], spec=spec)

    def spec(self, size: Size) -> FeatureSpec:
        """The spec for inputs of `size`. Raises `ConfigError` where patches don't fill them and none were asked for."""
        ragged = is_ragged(size, self.patch, next(iter(self.bundles.values())).spec.stride)
        spec = self.bundles[ragged].spec
        old, new = (cells(each, self.patch, spec.stride) for each in (spec.input_size, size))
        levels = spec.levels if size not in self.low_res_of else own_maps(spec.levels)[:1]
        return replace(spec, input_size=size, levels=tuple(_at(level, old, new) for level in levels))


def _at(level: Level, old: Size, new: Size) -> Level:
    """A level for a backbone's grid of `new` instead of `old` cells; those that name their grid keep it."""
    if level.grid is None or not level.is_relative:
        return level
    grid = tuple(n * cells for n, cells in zip(level.grid, new, strict=True))
    if any(n % cells for n, cells in zip(grid, old, strict=True)):
        raise ConfigError(f"--levels {level.asked}: {new[0]}x{new[1]} cells times its factor are not whole")
    return replace(level, grid=tuple(n // cells for n, cells in zip(grid, old, strict=True)))


def is_ragged(size: Size, patch: int, stride: int) -> bool:
    """Whether pixels are left over beyond the last whole patch."""
    return any((side - patch) % stride for side in size)


class LiveSource:
    """Runs a model, one for each input size. Not thread-safe."""

    def __init__(self, recipe: LiveRecipe, device: str):
        self.recipe, self.device, self.clipped = recipe, torch.device(device), ClippedCounts()
        self._models: OrderedDict[Size, FeatureModel] = OrderedDict()
        self._vector: tuple[Picture | None, Tensor | None] = (None, None)
        "of the last picture"
        self._data: tuple[str, bytes] = ("", b"")
        "of the last image: a label asks how it is turned before its maps are asked for"

    def rows(self, size: Size) -> tuple[Row, ...]:
        return self.recipe.rows(size)

    def require(self, image: EncodedImage, size: Size) -> None:  # noqa: ARG002
        if self._data[0] != image.displayed:  # else it was read for another size
            data = image.data()
            upright_pixels(image, data)
            self._data = image.displayed, data

    def oriented(self, image: EncodedImage, size: Size) -> OrientedImage:  # noqa: ARG002
        self._data = image.displayed, image.data()
        return OrientedImage(image.displayed, orientation_of(self._data[1], image.displayed))

    def maps(self, picture: Picture) -> dict[str, Tensor]:
        spec = self.recipe.spec(picture.size)
        displayed, data = self._data
        data = data if displayed == picture.image.displayed else picture.image.data()
        pixels = draw(picture, data, spec, self.recipe.rendering)
        found = self._model(picture.size, spec)(pixels[None])
        if found.bad.any():  # before what is infinite is clamped
            raise StorageError(f"{picture.image.displayed}: {not_finite(spec)}")
        levels, clipped = found.as_stored()
        by_level, pooled = {name: rows[0] for name, rows in levels.items()}, pooled_level(spec.levels)
        for what, names in (("maps", {row.level for row in self.rows(picture.size)}), ("pooled", {pooled})):
            self.clipped.add(picture, what, {name: n[0] for name, n in clipped.items() if name in names}, spec.levels)
        self._vector = picture, finite_vector(by_level[pooled], picture.image.displayed) if pooled else None
        return maps_by_row(self.rows(picture.size), by_level, picture.image.displayed)

    def pooled(self, picture: Picture) -> Tensor | None:
        if self._vector[0] != picture:
            self.maps(picture)
        return self._vector[1]

    def _model(self, size: Size, spec: FeatureSpec) -> FeatureModel:
        if size not in self._models:
            if len(self._models) >= 8:
                self._models.popitem(last=False)
            try:
                self._models[size] = self.recipe.bundle(size).build(str(self.device))
            except RuntimeError as error:
                raise ConfigError(
                    f"{spec.model} can't be given inputs of {size[0]}x{size[1]} px as well: {error}; run each size by itself"
                ) from None
        self._models.move_to_end(size)
        return self._models[size]


def load_model(
    features: LevelConfig, rendering: Rendering, sizes: Sequence[Size], geometry: Geometries, options: StorageOptions
) -> tuple[LiveRecipe, tuple[Size, ...]]:
    """What `resolve_source` gives of a model."""
    if rendering == "extract" and geometry is None:
        raise ConfigError("--drawing extract: jobs/extract.py doesn't place images as this protocol does; use paper")
    first = load_settings(features, next(iter(sizes), None), options)
    sizes = tuple(dict.fromkeys(sizes)) or (first.size,)
    patch = int(first.model.feature_info[-1]["reduction"])
    firsts: dict[bool, Size] = {}
    for size in sizes:
        firsts.setdefault(is_ragged(size, patch, features.stride or patch), size)
    if True in firsts and not features.ragged:
        displayed = "x".join(map(str, firsts[True]))
        raise ConfigError(f"inputs of {displayed} px aren't filled by patches of {patch}; use another size, or --ragged")
    bundles = {}
    for ragged, size in firsts.items():
        loaded = first if size == first.size else load_settings(features, size, options, first.description)
        wanted = completed(features, ragged=ragged, geometry="squash")
        bundles[ragged], _ = describe_model(wanted, loaded, options)
    return LiveRecipe(bundles=bundles, patch=patch, rendering=rendering, sizes=sizes), sizes
