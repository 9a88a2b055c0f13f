"""Where an evaluation reads features from: a live model, or stores that were extracted, behind one interface.

Maps are made one image at a time, so that an image's features don't depend on which others are evaluated beside it, nor on
how many workers there are. The low-resolution row and the bilinear rows are made here, by the same code for both sources.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.config import ConfigError, JobConfig
from pipelines.features.agreement import AskedFeatures, recorded
from pipelines.features.bundle import describe_model, load_settings
from pipelines.features.clipping import ClippedCounts, What
from pipelines.features.config import LevelConfig, completed
from pipelines.features.join import Join, PlacedRow, Wanted, join
from pipelines.features.levels import level_name
from pipelines.features.model import FeatureModel, not_finite
from pipelines.features.model_bundle import ModelBundle, cells
from pipelines.features.photos import upright_pixels
from pipelines.features.pictures import Geometries, Picture, draw
from pipelines.features.rows import Rendering, Row, Size, pooled_level, rows_of
from storage.datasets.content import joint_digest
from storage.datasets.frames import OrientedImage
from storage.datasets.images import EncodedImage, orientation_of
from storage.differences import differences
from storage.documents import JsonValue
from storage.paths import StorageError, StorageOptions
from storage.shards import count_clipped
from storage.spec import FeatureSpec, Level, Use
from storage.store import FeatureStore

logger = logging.getLogger(__name__)

CACHE_BYTES = 2**29
"""Maps that one worker keeps for images that come again."""


class FeatureSource(Protocol):
    """Features of images, from wherever they are."""

    device: torch.device
    "where its tensors are, and what is done with them is to be done"
    clipped: ClippedCounts
    "what float16 couldn't hold, of the maps and vectors that were asked for"

    def rows(self, size: Size) -> tuple[Row, ...]:
        """What is evaluated for inputs of `size`; the low-resolution map first, then bilinear ones, then the methods'."""

    def require(self, image: EncodedImage, size: Size) -> None:
        """Raises `ItemLeftOut` where there are no features of the image for inputs of `size`: its extraction failed, or it can't
        be read."""

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
        levels = spec.levels if size not in self.low_res_of else _own_maps(spec.levels)[:1]
        return replace(spec, input_size=size, levels=tuple(_at(level, old, new) for level in levels))


def _own_maps(levels: Sequence[Level]) -> Sequence[Level]:
    """The backbone's own."""
    return [level for level in levels if level.method == "backbone" and level.grid]


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
    joins: Mapping[Size, Join] = field(default_factory=dict)
    "with the images that are asked for"
    levels: tuple[str, ...] = ()
    "names of those that were asked for, beside the backbone's map, which every table shows; none: all"
    low_res_of: frozenset[Size] = frozenset()
    "sizes of which the low-resolution map is asked for alone"
    rendering: ClassVar[Rendering] = "extract"

    def open(self, device: str) -> "StoreSource":
        return StoreSource(self, device)

    def source(self, device: str) -> "CachedSource":
        """What a worker reads from."""
        return CachedSource(self.open(device))

    def rows(self, size: Size) -> tuple[Row, ...]:
        """What is evaluated for inputs of `size`."""
        spec = self.spec(size)
        levels = self._chosen(spec.levels) if size not in self.low_res_of else _own_maps(spec.levels)[:1]
        return rows_of(levels, spec.stride, self.store(size).folder.displayed)

    def _chosen(self, levels: Sequence[Level]) -> list[Level]:
        asked, own = [level for level in levels if not self.levels or level.name in self.levels], _own_maps(levels)
        return asked if any(level in asked for level in own) else [*asked, *own[:1]]

    def recorded(self, config: JobConfig) -> dict[str, JsonValue]:
        """A job's settings as its documents have them."""
        return recorded(config, list(self.stores.values()))

    def notes(self) -> list[str]:
        """Those of the extraction."""
        return [note for store in self.stores.values() for note in store.root.notes or ()]

    def said(self) -> dict[str, str]:
        """What results say of the features, in words."""
        of = [f"{store.folder.displayed}: {in_words(store.spec)}" for store in self.stores.values()]
        notes = {"upsamplers": self.notes(), "stores": [note for each in self.joins.values() for note in each.notes()]}
        return {"backbone": "; ".join(of), **{name: "; ".join(each) for name, each in notes.items() if each}}

    def joined(self, images: Mapping[Size, Sequence[EncodedImage]], contents: Mapping[str, str]) -> "StoreRecipe":
        """Itself, with the row of each image. `images`: by input size; `contents`: digests of their bytes, by their displayed
        names. Raises `FeaturesMissing`, and `ConfigError` where there is no store of a size."""
        wanted = {
            image.displayed: Wanted.of(image, contents[image.displayed]) for of_size in images.values() for image in of_size
        }
        joins = {
            size: join(self.store(size), [wanted[image.displayed] for image in distinct(of_size)])
            for size, of_size in images.items()
        }
        for size, each in joins.items():
            read = {row.level for row in self.rows(size) if row.level}
            for note in (*each.notes(), *each.clipped_lines(self.spec(size).levels, read)):
                logger.warning("%s", note)
        return replace(self, joins=joins)

    def identity(self) -> dict[str, JsonValue]:
        """What made the features, as JSON values."""
        prints = {f"{h}x{w}": self.stores[h, w].root.fingerprint for h, w in sorted(self.stores)}
        rows = {"rows_content": joint_digest(self.joins[size].content for size in sorted(self.joins))} if self.joins else {}
        # Nothing where all are evaluated, as before one could choose.
        all_maps = {level.name for store in self.stores.values() for level in store.spec.levels if level.grid}
        chosen = {"levels": sorted(self.levels)} if self.levels and all_maps - set(self.levels) else {}
        return {"drawing": "extract", "stores": prints, **chosen, **rows}

    def described(self) -> dict[str, JsonValue]:
        """What made the features, weights' digests included, for a report."""
        specs = [store.spec.to_json() for store in self.stores.values()]
        return {**self.identity(), "specs": specs, "joins": [each.to_json() for each in self.joins.values()]}

    def planned(self) -> list[str]:
        """Lines on it for a plan."""
        return [f"features   {self.described()}"]

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
        self.recipe, self.device, self.clipped = recipe, torch.device(device), ClippedCounts()

    def rows(self, size: Size) -> tuple[Row, ...]:
        return self.recipe.rows(size)

    def require(self, image: EncodedImage, size: Size) -> None:
        self._placed(image, size).require(image.displayed)

    def oriented(self, image: EncodedImage, size: Size) -> OrientedImage:
        return self._placed(image, size).oriented(self.recipe.store(size), image)

    def maps(self, picture: Picture) -> dict[str, Tensor]:
        store, row = self.recipe.store(picture.size), self._row(picture)
        rows = self.rows(picture.size)
        by_level = self._read(picture, "maps", store, row, [each.level for each in rows if each.level])
        return _rows_of_maps(rows, by_level, f"{store.folder.displayed}, row {row.row}")

    def pooled(self, picture: Picture) -> Tensor | None:
        store, row = self.recipe.store(picture.size), self._row(picture)
        level = pooled_level(store.spec.levels)
        if level is None:
            return None
        return _vector(self._read(picture, "pooled", store, row, [level])[level], f"{store.folder.displayed}, row {row.row}")

    def _read(
        self, picture: Picture, what: What, store: FeatureStore, row: PlacedRow, levels: Sequence[str]
    ) -> dict[str, Tensor]:
        values = {level: store.read([row.row], level) for level in levels}
        # The ledger says how many there are in all levels of the row; what is merely rounded to the limit isn't among them.
        # Nearly every row has none, and its values needn't be looked at.
        halves = {
            level: min(row.clipped, int(count_clipped(each)[0])) if row.clipped else 0
            for level, each in values.items()
            if each.dtype == np.float16
        }
        self.clipped.add(picture, what, halves, store.spec.levels)
        return {level: torch.from_numpy(each[0]).to(self.device) for level, each in values.items()}

    def _row(self, picture: Picture) -> PlacedRow:
        self.require(picture.image, picture.size)
        return self._placed(picture.image, picture.size)

    def _placed(self, image: EncodedImage, size: Size) -> PlacedRow:
        return self.recipe.joins[size].of(image.displayed)


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


def distinct(images: Sequence[EncodedImage]) -> list[EncodedImage]:
    """Each image once."""
    return list({image.displayed: image for image in images}.values())


def in_words(spec: FeatureSpec) -> str:
    """What the features are, for people: all that `FeatureSpec` says, but for how images are placed and the levels."""
    what = {"token": "tokens", "key": "keys", "query": "queries", "value": "values"}[spec.facet]
    layers, norm = " ".join(map(str, spec.layers)), ", normalised" if spec.norm else ""
    made = f"{spec.model}, {spec.weights_source} weights {spec.weights[:12]}"
    return f"{made}, {what} of block {layers}{norm}, stride {spec.stride}, {spec.precision}"


class CachedSource:
    """A source that keeps the maps used last, where they are, at most `max_bytes` of them, or of one image."""

    def __init__(self, source: FeatureSource, max_bytes: int = CACHE_BYTES):
        self.source, self.max_bytes, self.device, self.clipped = source, max_bytes, source.device, source.clipped
        self._kept: OrderedDict[tuple[str, Size], dict[str, Tensor]] = OrderedDict()
        self._oriented: dict[tuple[str, Size], OrientedImage] = {}

    def rows(self, size: Size) -> tuple[Row, ...]:
        return self.source.rows(size)

    def require(self, image: EncodedImage, size: Size) -> None:
        self.source.require(image, size)

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
        self.clipped.use(picture, "maps")
        return self._kept[name]

    def _bytes(self) -> int:
        return sum(each.nbytes for maps in self._kept.values() for each in maps.values())

    def pooled(self, picture: Picture) -> Tensor | None:
        self.clipped.use(picture, "pooled")
        return self.source.pooled(picture)


@dataclass(frozen=True, kw_only=True)
class SourceChoice:
    """Where features are to come from."""

    features: LevelConfig
    "of a model"
    stores: tuple[str, ...] = ()
    "read instead of running a model, one per input size"
    asked: AskedFeatures | None = None
    "what stores must agree with"
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
    for store in stores if choice.asked else ():
        choice.asked.require(store, "--stores")
    by_size = {store.spec.input_size: store for store in stores}
    if len(by_size) < len(stores):
        raise ConfigError("--stores: two of them have one input size; give one store per size")
    for store in stores[1:]:
        require_alike(stores[0], store)
    asked = choice.asked.settings.get("levels", ()) if choice.asked else ()
    recipe = StoreRecipe(stores=by_size, levels=tuple(map(level_name, asked)))
    sizes = tuple(dict.fromkeys(sizes)) or tuple(sorted(by_size))
    for size in sizes:
        require_geometry(recipe.store(size), geometry)
    return recipe, sizes


def require_alike(first: FeatureStore, other: FeatureStore) -> None:
    """Raises `ConfigError` unless two stores, of different sizes, hold the same features otherwise: their lines stand in one
    table under one name."""
    names = FeatureSpec.names(*(use for use in Use if use is not Use.PLACED))
    common = first.levels.keys() & other.levels.keys()

    def made_of(spec: FeatureSpec) -> dict[str, JsonValue]:
        said = {name: value for name, value in spec.to_json().items() if name in names}
        # Whatever their grids: those are of the size.
        levels = [{n: getattr(level, n) for n in ("name", "scale", "method", "dtype", "digest")} for level in spec.levels]
        return {**said, "levels": [level for level in levels if level["name"] in common]}

    there, here = made_of(first.spec), made_of(other.spec)
    if found := differences(there, here):
        raise ConfigError(
            f"--stores: {other.folder.displayed} holds other features than {first.folder.displayed}:\n"
            f"{found.text('the first', 'this one')}\nEvaluate them one after the other, each with an --out of its own."
        )
