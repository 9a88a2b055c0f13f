"""Features from stores that were extracted before, one for each input size."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from pipelines.config import ConfigError, JobConfig
from pipelines.features.agreement import AskedFeatures, recorded
from pipelines.features.clipping import ClippedCounts, What
from pipelines.features.feature_source import CachedSource, distinct, finite_vector, in_words, maps_by_row, own_maps
from pipelines.features.join import Join, PlacedRow, Wanted, join
from pipelines.features.levels import level_name
from pipelines.features.pictures import Geometries, Picture
from pipelines.features.rows import Rendering, Row, Size, pooled_level, rows_of
from storage.datasets.content import joint_digest
from storage.datasets.frames import OrientedImage
from storage.datasets.images import EncodedImage
from storage.differences import differences
from storage.documents import JsonValue
from storage.paths import StorageOptions
from storage.shards import count_clipped
from storage.spec import FeatureSpec, Level, Use
from storage.store import FeatureStore

logger = logging.getLogger(__name__)


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
        levels = self._chosen(spec.levels) if size not in self.low_res_of else own_maps(spec.levels)[:1]
        return rows_of(levels, spec.stride, self.store(size).folder.displayed)

    def _chosen(self, levels: Sequence[Level]) -> list[Level]:
        asked, own = [level for level in levels if not self.levels or level.name in self.levels], own_maps(levels)
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
        return maps_by_row(rows, by_level, f"{store.folder.displayed}, row {row.row}")

    def pooled(self, picture: Picture) -> Tensor | None:
        store, row = self.recipe.store(picture.size), self._row(picture)
        level = pooled_level(store.spec.levels)
        if level is None:
            return None
        return finite_vector(
            self._read(picture, "pooled", store, row, [level])[level], f"{store.folder.displayed}, row {row.row}"
        )

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


def open_stores(
    urls: Sequence[str], asked: AskedFeatures | None, sizes: Sequence[Size], geometry: Geometries, options: StorageOptions
) -> tuple[StoreRecipe, tuple[Size, ...]]:
    """What `resolve_source` gives of stores."""
    stores = [FeatureStore.open(url, options) for url in urls]
    for store in stores if asked else ():
        asked.require(store, "--stores")
    by_size = {store.spec.input_size: store for store in stores}
    if len(by_size) < len(stores):
        raise ConfigError("--stores: two of them have one input size; give one store per size")
    for store in stores[1:]:
        require_alike(stores[0], store)
    levels = asked.settings.get("levels", ()) if asked else ()
    recipe = StoreRecipe(stores=by_size, levels=tuple(map(level_name, levels)))
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
