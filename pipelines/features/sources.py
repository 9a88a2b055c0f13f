"""Where an evaluation reads features from: a live model, or stores that were extracted, behind one interface.

Maps are made one image at a time, so that an image's features don't depend on which others are evaluated beside it, nor on
how many workers there are. The low-resolution row and the bilinear rows are made here, by the same code for both sources.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.config import ConfigError
from pipelines.features.bundle import ModelBundle, cells, describe_model, load_settings
from pipelines.features.config import LevelConfig, completed
from pipelines.features.model import FeatureModel
from pipelines.features.pictures import Geometries, Picture, draw
from pipelines.features.rows import Rendering, Row, Size, pooled_level, rows_of
from storage.datasets.frames import OrientedImage
from storage.datasets.images import EncodedImage, orientation_of
from storage.documents import JsonValue
from storage.orientation import EXIF_ROTATE, Orientation
from storage.paths import StorageError, StorageOptions
from storage.spec import FeatureSpec, Level, Use
from storage.store import FeatureStore

logger = logging.getLogger(__name__)

CACHE_BYTES = 2**29
"""Maps that one worker keeps for images that come again."""


class FeaturesMissing(StorageError):
    """A store lacks an image of the data set, or holds it otherwise placed."""


class FeatureSource(Protocol):
    """Features of images, from wherever they are."""

    device: torch.device
    "where its tensors are, and what is done with them is to be done"

    def rows(self, size: Size) -> tuple[Row, ...]:
        """What is evaluated for inputs of `size`; the low-resolution map first, then bilinear ones, then the methods'."""

    def oriented(self, image: EncodedImage, size: Size) -> OrientedImage:
        """How the image was turned for the maps of inputs of `size`: what `label_turn` needs. Raises `DatasetError`,
        `StorageError`."""

    def maps(self, picture: Picture) -> dict[str, Tensor]:
        """Float32 [h, w, C] by row name, of the upright image, on `device`."""

    def pooled(self, picture: Picture) -> Tensor | None:
        """The CLS vector, float32 [C] on `device`; None where no level is one. Cheap right after `maps` of the same picture."""


def _rows_of_maps(rows: Sequence[Row], by_level: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Maps by row name: levels as they are, and the low-resolution map enlarged bilinearly."""
    maps: dict[str, Tensor] = {}
    for row in rows:
        if row.level is not None:
            maps[row.name] = by_level[row.level].float()
        else:
            low = maps["low-res"].permute(2, 0, 1)[None]
            enlarged = F.interpolate(low, size=row.grid, mode="bilinear", align_corners=False)
            maps[row.name] = enlarged[0].permute(1, 2, 0).contiguous()
    _require_finite(maps.values(), name)
    return maps


def _vector(values_C: Tensor, name: str) -> Tensor:
    _require_finite([values_C.float()], name)
    return values_C.float()


def _require_finite(features: Iterable[Tensor], name: str) -> None:
    # Their extremes are NaN or infinite where any value is.
    extremes = [extreme for each in features for extreme in each.aminmax()]
    if not torch.stack(extremes).isfinite().all():
        raise StorageError(f"{name}: its features hold NaN or infinity")


# --- a live model -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LiveRecipe:
    """A model as it is sent to workers."""

    bundles: Mapping[bool, ModelBundle]
    "by whether inputs are ragged (not filled by patches)"
    patch: int
    rendering: Rendering
    sizes: tuple[Size, ...] = ()
    "of the inputs, as far as they are known beforehand"

    def open(self, device: str) -> "LiveSource":
        return LiveSource(self, device)

    def rows(self, size: Size) -> tuple[Row, ...]:
        """What is evaluated for inputs of `size`."""
        spec = self.spec(size)
        return rows_of(spec.levels, spec.stride, spec.model)

    def notes(self) -> list[str]:
        """What is no mistake, and who reads the scores should know."""
        return [note for size in self.sizes for note in self.bundle(size).unfamiliar(self.spec(size), self.patch)]

    def identity(self) -> dict[str, JsonValue]:
        """What makes the features, as JSON values."""
        spec = next(iter(self.bundles.values())).spec
        said = {name: value for name, value in spec.to_json().items() if name not in FeatureSpec.names(Use.PLACED)}
        said["levels"] = [[level.name, level.method, level.dtype, level.digest] for level in spec.levels]
        return {"drawing": self.rendering, "model": said}

    def bundle(self, size: Size) -> ModelBundle:
        """What builds the model for inputs of `size`."""
        spec = self.spec(size)
        return replace(self.bundles[is_ragged(size, self.patch, spec.stride)], spec=spec)

    def spec(self, size: Size) -> FeatureSpec:
        """The spec for inputs of `size`. Raises `ConfigError` where patches don't fill them and none were asked for."""
        ragged = is_ragged(size, self.patch, next(iter(self.bundles.values())).spec.stride)
        spec = self.bundles[ragged].spec
        old, new = (cells(each, self.patch, spec.stride) for each in (spec.input_size, size))
        return replace(spec, input_size=size, levels=tuple(_at(level, old, new) for level in spec.levels))


def _at(level: Level, old: Size, new: Size) -> Level:
    """A level for a backbone's grid of `new` instead of `old` cells; those that name their grid keep it."""
    if level.grid is None or (not level.name.startswith("x")):
        return level
    grid = tuple(n * cells for n, cells in zip(level.grid, new, strict=True))
    if any(n % cells for n, cells in zip(grid, old, strict=True)):
        raise ConfigError(f"--levels {level.name}: {new[0]}x{new[1]} cells times its factor are not whole")
    return replace(level, grid=tuple(n // cells for n, cells in zip(grid, old, strict=True)))


def is_ragged(size: Size, patch: int, stride: int) -> bool:
    """Whether pixels are left over beyond the last whole patch."""
    return any((side - patch) % stride for side in size)


class LiveSource:
    """Runs a model, one for each input size. Not thread-safe."""

    def __init__(self, recipe: LiveRecipe, device: str):
        self.recipe, self.device = recipe, torch.device(device)
        self._models: OrderedDict[Size, FeatureModel] = OrderedDict()
        self._vector: tuple[Picture | None, Tensor | None] = (None, None)
        "of the last picture"
        self._data: tuple[str, bytes] = ("", b"")
        "of the last image: a label asks how it is turned before its maps are asked for"

    def rows(self, size: Size) -> tuple[Row, ...]:
        return self.recipe.rows(size)

    def oriented(self, image: EncodedImage, size: Size) -> OrientedImage:  # noqa: ARG002
        self._data = image.displayed, image.data()
        return OrientedImage(image.displayed, orientation_of(self._data[1], image.displayed))

    def maps(self, picture: Picture) -> dict[str, Tensor]:
        spec = self.recipe.spec(picture.size)
        displayed, data = self._data
        data = data if displayed == picture.image.displayed else picture.image.data()
        pixels = draw(picture, data, spec, self.recipe.rendering)
        found = self._model(picture.size, spec)(pixels[None])
        by_level = {name: rows[0] for name, rows in found.levels.items()}
        pooled = pooled_level(spec.levels)
        self._vector = picture, _vector(by_level[pooled], picture.image.displayed) if pooled else None
        return _rows_of_maps(self.rows(picture.size), by_level, picture.image.displayed)

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


# --- stores -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StoreRecipe:
    """Open stores, one per input size."""

    stores: Mapping[Size, FeatureStore]
    rendering: ClassVar[Rendering] = "extract"

    def open(self, device: str) -> "StoreSource":
        return StoreSource(self, device)

    def rows(self, size: Size) -> tuple[Row, ...]:
        """What is evaluated for inputs of `size`."""
        spec = self.spec(size)
        return rows_of(spec.levels, spec.stride, self.store(size).folder.displayed)

    def notes(self) -> list[str]:
        """Those of the extraction."""
        return [note for store in self.stores.values() for note in store.root.notes or ()]

    def identity(self) -> dict[str, JsonValue]:
        """What made the features, as JSON values."""
        prints = {f"{h}x{w}": self.stores[h, w].root.fingerprint for h, w in sorted(self.stores)}
        return {"drawing": "extract", "stores": prints}

    def spec(self, size: Size) -> FeatureSpec:
        """The spec of the store of that size. Raises `ConfigError` if there is none."""
        return self.store(size).spec

    def store(self, size: Size) -> FeatureStore:
        """Raises `ConfigError` if there is none of that size."""
        if size not in self.stores:
            have = ", ".join(f"{h}x{w}" for h, w in self.stores)
            raise ConfigError(
                f"--stores: none was extracted at {size[0]}x{size[1]} px, but at {have}; extract with --size {size[0]}x{size[1]}"
            )
        return self.stores[size]


class StoreSource:
    """Reads rows of stores; what is read goes to the device once, as it is stored."""

    def __init__(self, recipe: StoreRecipe, device: str):
        self.recipe, self.device = recipe, torch.device(device)
        self._row_of: dict[tuple[str, Size], int] = {}
        "by image and input size: each is asked for as maps, as a vector, and for its orientation"

    def rows(self, size: Size) -> tuple[Row, ...]:
        return self.recipe.rows(size)

    def oriented(self, image: EncodedImage, size: Size) -> OrientedImage:
        store = self.recipe.store(size)
        row = self._row(size, image)
        (placed,) = PlacedRow.read(store, [row])
        if placed.width is None:
            store.pixels(row)  # raises with the reason
        return placed.oriented(store, image)

    def maps(self, picture: Picture) -> dict[str, Tensor]:
        store = self.recipe.store(picture.size)
        row = self._row(picture.size, picture.image)
        rows = self.rows(picture.size)
        by_level = {each.level: self._read(store, row, each.level) for each in rows if each.level}
        return _rows_of_maps(rows, by_level, f"{store.folder.displayed}, row {row}")

    def pooled(self, picture: Picture) -> Tensor | None:
        store = self.recipe.store(picture.size)
        level, row = pooled_level(store.spec.levels), self._row(picture.size, picture.image)
        return _vector(self._read(store, row, level), f"{store.folder.displayed}, row {row}") if level else None

    def _read(self, store: FeatureStore, row: int, level: str) -> Tensor:
        return torch.from_numpy(store.read(row, level)).to(self.device)

    def _row(self, size: Size, image: EncodedImage) -> int:
        asked = image.displayed, size
        if asked not in self._row_of:
            self._row_of[asked] = self._found_row(self.recipe.store(size), image)
        return self._row_of[asked]

    @staticmethod
    def _found_row(store: FeatureStore, image: EncodedImage) -> int:
        found = store.index.find(image.keys)
        if not found:
            raise FeaturesMissing(
                f"{store.folder.displayed} has no features of {image.displayed}: none of its keys is {' or '.join(image.keys)}"
            )
        return next(found[key] for key in image.keys if key in found)


@dataclass(frozen=True, kw_only=True)
class PlacedRow:
    """What a store's ledger says of how a row's image was read."""

    row: int
    width: int | None
    "upright, in pixels; None: the row has no features"
    height: int | None
    conversion: str | None

    @classmethod
    def read(cls, store: FeatureStore, rows: Sequence[int]) -> "list[PlacedRow]":
        """Of rows, in their order."""
        columns = [field.name for field in fields(cls)]
        return [cls(**record) for record in store.records(np.array(rows, np.int64), columns).to_pylist()]

    def oriented(self, store: FeatureStore, image: EncodedImage) -> OrientedImage:
        """How the image was turned when it was extracted. A store keeps upright sizes, and whether an image was turned, not
        how: then the image is read. Raises `FeaturesMissing` where it isn't the one that was extracted."""
        displayed = f"{image.displayed} (row {self.row} of {store.folder.displayed})"
        if EXIF_ROTATE not in (self.conversion or ""):
            return OrientedImage(displayed, Orientation(width=self.width, height=self.height))
        found = image.orientation()
        if found.exif == 1 or found.upright_size != (self.width, self.height):
            raise FeaturesMissing(
                f"{store.folder.displayed}: row {self.row} was made of an image that its EXIF turned to {self.width} x "
                f"{self.height} pixels; {image.displayed} has the orientation {found.exif} and {found.upright_size[0]} x "
                f"{found.upright_size[1]}. Extract the images again"
            )
        return OrientedImage(displayed, found)


def require_geometry(store: FeatureStore, geometry: Geometries) -> None:
    """Raise `ConfigError` unless the store's images lie in the model's input as the protocol has them."""
    if geometry is None:
        raise ConfigError("no store can serve this protocol: jobs/extract.py doesn't place images so. Leave --stores out")
    height, width = store.spec.input_size
    if store.spec.geometry != geometry or (geometry == "crop" and store.spec.crop_pct != 1):
        raise ConfigError(
            f"{store.folder.displayed} was extracted with --geometry {store.spec.geometry} --crop-pct {store.spec.crop_pct:g}; "
            f"this protocol places images as --geometry {geometry} does. Extract with --geometry {geometry} "
            f"--size {height}x{width}"
        )


# --- either -----------------------------------------------------------------------------------------------------------

Recipe = LiveRecipe | StoreRecipe


class CachedSource:
    """A source that keeps the maps used last, where they are, at most `max_bytes` of them, or of one image."""

    def __init__(self, source: FeatureSource, max_bytes: int = CACHE_BYTES):
        self.source, self.max_bytes, self.device = source, max_bytes, source.device
        self._kept: OrderedDict[tuple[str, Size], dict[str, Tensor]] = OrderedDict()
        self._oriented: dict[tuple[str, Size], OrientedImage] = {}

    def rows(self, size: Size) -> tuple[Row, ...]:
        return self.source.rows(size)

    def oriented(self, image: EncodedImage, size: Size) -> OrientedImage:
        name = image.displayed, size
        if name not in self._oriented:
            self._oriented[name] = self.source.oriented(image, size)
        return self._oriented[name]

    def maps(self, picture: Picture) -> dict[str, Tensor]:
        name = picture.image.displayed, picture.size
        if name not in self._kept:
            self._kept[name] = self.source.maps(picture)
            while len(self._kept) > 1 and self._bytes() > self.max_bytes:
                self._kept.popitem(last=False)
        self._kept.move_to_end(name)
        return self._kept[name]

    def _bytes(self) -> int:
        return sum(each.nbytes for maps in self._kept.values() for each in maps.values())

    def pooled(self, picture: Picture) -> Tensor | None:
        return self.source.pooled(picture)


@dataclass(frozen=True, kw_only=True)
class SourceChoice:
    """Where features are to come from."""

    features: LevelConfig
    "of a model"
    stores: tuple[str, ...] = ()
    "read instead of running a model, one per input size"
    rendering: Rendering
    options: StorageOptions


def resolve_source(choice: SourceChoice, sizes: Sequence[Size], geometry: Geometries) -> tuple[Recipe, tuple[Size, ...]]:
    """The model loaded, or the stores opened; and the input sizes: `sizes`, else the model's own, else the stores'.

    `geometry`: how jobs/extract.py would place the protocol's images (`Picture.geometry`).
    Raises `ConfigError`, `BackboneError`, `UpsamplerError`, `WeightsUnavailable`, `StorageError`.
    """
    recipe, sizes = (_open_stores if choice.stores else _load_model)(choice, sizes, geometry)
    for size in sizes:
        recipe.rows(size)
    for note in recipe.notes():
        logger.warning("%s", note)
    return recipe, sizes


def _load_model(choice: SourceChoice, sizes: Sequence[Size], geometry: Geometries) -> tuple[LiveRecipe, tuple[Size, ...]]:
    if choice.rendering == "extract" and geometry is None:
        raise ConfigError("--drawing extract: jobs/extract.py doesn't place images as this protocol does; use paper")
    features, options = choice.features, choice.options
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
    return LiveRecipe(bundles=bundles, patch=patch, rendering=choice.rendering, sizes=sizes), sizes


def _open_stores(choice: SourceChoice, sizes: Sequence[Size], geometry: Geometries) -> tuple[StoreRecipe, tuple[Size, ...]]:
    stores = [FeatureStore.open(url, choice.options) for url in choice.stores]
    by_size = {store.spec.input_size: store for store in stores}
    if len(by_size) < len(stores):
        raise ConfigError("--stores: two of them have one input size; give one store per size")
    recipe = StoreRecipe(stores=by_size)
    sizes = tuple(dict.fromkeys(sizes)) or tuple(sorted(by_size))
    for size in sizes:
        require_geometry(recipe.store(size), geometry)
    return recipe, sizes


def describe(recipe: Recipe) -> dict[str, JsonValue]:
    """What made the features, weights' digests included, for a report."""
    if isinstance(recipe, LiveRecipe):
        return recipe.identity()
    return {**recipe.identity(), "specs": [store.spec.to_json() for store in recipe.stores.values()]}
