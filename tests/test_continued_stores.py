"""A run on stored features that is asked for again after the store was replaced: by one that differs in one property.

Every field of `FeatureSpec` and of `Level` has a store that differs in it, or the reason why none can differ in it alone; and
there are stores of other photographs, of other copies of them, and such as lack some.
"""

import io
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

from pipelines.evaluation import correspondence, discovery, readouts, similarity
from pipelines.evaluation.correspondence import CorrespondenceConfig
from pipelines.evaluation.discovery import DiscoveryConfig
from pipelines.evaluation.readouts import ProbeConfig
from pipelines.evaluation.similarity import SimilarityConfig
from pipelines.extraction.config import ExtractConfig
from pipelines.tables.grid_cells import GridConfig
from pipelines.training.lift import X2Config
from pipelines.training.readout import ReadoutTraining
from storage.spec import FeatureSpec, Level
from storage.store import FeatureStore
from tests.conftest import write_tar
from tests.other_bytes import InputObject, objects_in
from tests.second_runs import (
    HERE,
    SETTINGS,
    STEPS,
    VIT,
    X2,
    Held,
    Kind,
    Outcome,
    Refused,
    complaint,
    evaluated,
    extracted,
    kind_of,
    tabled,
    trained,
    write_weights,
)

LEARNED = "x2=resize_conv:WORLD/upsampler"

PLAIN = {**SETTINGS, "weights": "WORLD/weights", "levels": ("x1", LEARNED), "force_upsampler": True}
"""What all stores are made with, where nothing else is said."""

OF_FIELD: Mapping[str, Mapping[str, object]] = {
    "model": {"model": "test_vit2.r160_in1k", "weights": "random", "levels": ("x1", "x2")},
    "weights": {"weights": "WORLD/weights_b"},
    "weights_source": {"weights": "random"},
    "layers": {"layers": (0,)},
    "facet": {"facet": "key"},
    "norm": {"norm": False},
    "stride": {"stride": 8},
    "pos_embed": {"pos_embed": "dino"},
    "input_size": {"size": "96"},
    "geometry": {},
    "crop_pct": {"crop_pct": 0.875},
    "interpolation": {"weights": "WORLD/interpolation"},
    "mean": {"weights": "WORLD/mean"},
    "std": {"weights": "WORLD/std"},
    "precision": {"precision": "bf16"},
    "jpeg_draft": {"jpeg_draft": True},
    "model_args": {"weights": "WORLD/model_args"},
    "levels": {"levels": ("x1",)},
    "level name": {"levels": ("x1", LEARNED.replace("x2", "8x8"))},
    "level method": {"levels": ("x1", "x2=bicubic")},
    "level dtype": {"levels": ("x1@float32", f"{LEARNED}@float32")},
    "level digest": {"levels": ("x1", f"{LEARNED}_b")},
    "level compression": {"levels": ("x1@float16-raw", f"{LEARNED}@float16-raw")},
    "level channels": {"layers": (0, -1), "levels": ("x1", "x2")},
}
"""Settings of the extraction that differ, by the field of the spec, or of a level, that they change. `geometry` is another than
the consumer's."""

FOLLOWS = {
    "level grid": "from input_size, stride and the level's name",
    "level start": "from stride",
    "level step": "from stride",
    "level scale": "said where the name is another one; tests/pipelines/features/test_level_names.py",
    "level made_from": "said of levels that a finished store was given; tests/pipelines/extraction/test_add_level.py",
    "jpeg_decoder": "needs a GPU; tests/pipelines/extraction/test_nvjpeg.py holds that a store is refused by it",
    "compiled": "takes a minute; tests/pipelines/extraction/test_extract.py holds that a store is refused by it",
}
"""Fields that don't differ alone."""


def test_every_property_has_a_store_that_differs_in_it():
    known = {*OF_FIELD, *FOLLOWS}

    assert known == {each.name for each in fields(FeatureSpec)} | {f"level {each.name}" for each in fields(Level)}


# --- who reads stores -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Consumer:
    """A kind of run on stored features."""

    kind: Kind
    setting: str
    "that names the store"
    images: str
    "what is extracted"
    geometry: str

    def on(self, held_config, url: Path):
        """The settings with the store at `url`."""
        several = isinstance(getattr(held_config, self.setting, ()), tuple) and self.setting == "stores"
        return held_config.changed(**{self.setting: (str(url),) if several else str(url)})


VOC, VOC07 = "VOC2012/VOCdevkit/VOC2012/JPEGImages", "VOC2007/VOCdevkit/VOC2007/JPEGImages"

_READOUT = {"data": "WORLD/VOC2012", "dataset": "voc", "side": 64, "level": "x2", "max_failed_fraction": 1.0}
_READOUT |= {**HERE, **STEPS}

CONSUMERS: Mapping[str, Consumer] = {
    "readout": Consumer(kind_of(ReadoutTraining, trained, **_READOUT), "store", VOC, "crop"),
    "grid": Consumer(
        kind_of(
            GridConfig,
            tabled,
            backbones=(f"{VIT}@64",),
            tasks=("voc",),
            methods=("linear",),
            data=("voc=WORLD/VOC2012",),
            speed=False,
            cell=ReadoutTraining.of(side=64, level="x2", max_failed_fraction=1.0, **STEPS),
            **HERE,
        ),
        "store",
        VOC,
        "squash",
    ),
    "probe": Consumer(
        kind_of(ProbeConfig, evaluated("probe", readouts), data="WORLD/VOC2012", readouts=("WORLD/readout",), pictures=0, **HERE),
        "stores",
        VOC,
        "crop",
    ),
    "discovery": Consumer(
        kind_of(DiscoveryConfig, evaluated("discovery", discovery), data="WORLD/VOC2007", pictures=0, **HERE),
        "stores",
        VOC07,
        "squash",
    ),
    "similarity": Consumer(
        kind_of(SimilarityConfig, evaluated("similarity", similarity), data=f"WORLD/{VOC07}", pictures=0, **HERE),
        "stores",
        VOC07,
        "squash",
    ),
    "correspondence": Consumer(
        kind_of(
            CorrespondenceConfig,
            evaluated("correspondence", correspondence),
            data="WORLD/SPair-71k",
            pairs_per_category=0,
            pictures=0,
            **HERE,
        ),
        "stores",
        "SPair-71k/JPEGImages",
        "pad",
    ),
    "x2": Consumer(
        kind_of(X2Config, trained, **{**X2, "interpolation": "bicubic", "max_failed_fraction": 1.0}),
        "features",
        "images/part-000.tar",
        "squash",
    ),
}

OTHER_GEOMETRY = {"crop": "squash", "squash": "crop", "pad": "squash"}


# --- stores of other images -------------------------------------------------------------------------------------------


def _photographs(found: InputObject) -> bytes:
    return next(found.others())


def _squashed(found: InputObject) -> bytes:
    out = io.BytesIO()
    Image.open(io.BytesIO(found.data())).resize((128, 128)).save(out, "JPEG", quality=95)
    return out.getvalue()


def _broken(found: InputObject) -> bytes:
    return found.data()[:200]


OF_IMAGES: Mapping[str, Callable[[InputObject], bytes]] = {
    "photographs": _photographs,
    "squashed copies": _squashed,
    "broken": _broken,
    "lacking": lambda found: b"",
    "failed": InputObject.data,
}
"""What the images are that another store was made of; of the last ones, one image. That it `failed` isn't the image's fault."""

ALL_OF_THEM = ("photographs", "squashed copies")


def _photographs_in(images: Path) -> list[InputObject]:
    """In a folder, or in the tar of one."""
    return [each for each in objects_in(images if images.is_dir() else images.parent) if each.name.endswith(".jpg")]


def _copy_of(images: Path, place: Path, change: str) -> Path:
    """The images, all or the last of them changed, or left out."""
    photographs = _photographs_in(images)
    of = OF_IMAGES[change]
    members = [(each, of(each) if change in ALL_OF_THEM or each is photographs[-1] else each.data()) for each in photographs]
    if not images.is_dir():
        return write_tar(place / images.name, [(each.name.rpartition("/")[2], data) for each, data in members if data])
    for each, data in members:
        path = place / images.name / each.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if data:
            path.write_bytes(data)
    return place / images.name


# --- the stores -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(world: Path) -> Path:
    """With weights that say other things of the input."""
    others = {"interpolation": "bilinear", "mean": [0.4, 0.4, 0.4], "std": [0.3, 0.3, 0.3]}
    for name, value in others.items():
        write_weights(world / name, seed=0, **{name: value})
    write_weights(world / "model_args", seed=0, args={"act_layer": "relu"})
    return world


@pytest.fixture(scope="module")
def stores(world, tmp_path_factory):
    """Stores by the images, the geometry, the variant and the size, each made once."""
    made: dict[tuple[str, ...], Path] = {}

    def of(consumer: Consumer, variant: str = "", size: str = "64") -> Path:
        key = consumer.images, consumer.geometry, variant, size
        if key not in made:
            place = tmp_path_factory.mktemp("store")
            settings = {**PLAIN, "geometry": consumer.geometry, "size": size, **OF_FIELD.get(variant, {})}
            if variant == "geometry":
                settings["geometry"] = OTHER_GEOMETRY[consumer.geometry]
            images = world / consumer.images
            if variant in OF_IMAGES:
                images = _copy_of(images, place, variant)
            if variant == "failed":
                settings["max_image_bytes"] = max(each.size for each in _photographs_in(images)) - 1
            config = kind_of(ExtractConfig, extracted, **settings, max_failed_fraction=1.0, data=(str(images),)).config(world)
            extracted(config.changed(out=str(place / "store.zarr")))
            made[key] = place / "store.zarr"
        return made[key]

    return of


@pytest.fixture(scope="module")
def held(world, stores, tmp_path_factory):
    """The first run of a consumer, on a store that is put at a place of its own."""
    found: dict[str, tuple[Held, Path]] = {}

    def of(name: str) -> tuple[Held, Path]:
        if name not in found:
            consumer, place = CONSUMERS[name], tmp_path_factory.mktemp(name)
            shutil.copytree(stores(consumer), place / "features.zarr")
            config = consumer.on(consumer.kind.config(world), place / "features.zarr")
            found[name] = Held(consumer.kind, config, place), place / "features.zarr"
        return found[name]

    return of


@pytest.fixture(scope="module")
def fresh(held, stores):
    """What a run into an empty folder comes to on a variant of the consumer's store, done once."""

    @cache
    def of(name: str, variant: str) -> Outcome:
        consumer, (first, _) = CONSUMERS[name], held(name)
        return first.fresh(consumer.on(first.config, stores(consumer, variant)))

    return of


@contextmanager
def standing_at(url: Path, store: Path) -> Iterator[None]:
    """While this holds, another store lies where one was."""
    url.rename(url.with_name("kept"))
    try:
        shutil.copytree(store, url)
        yield
    finally:
        shutil.rmtree(url)
        url.with_name("kept").rename(url)


# --- the law ----------------------------------------------------------------------------------------------------------


def variants(geometry: str) -> list[str]:
    return [each for each in (*OF_FIELD, *OF_IMAGES) if each != "crop_pct" or geometry == "crop"]


def _differing(one: Path, other: Path) -> list[str]:
    """What differs between the specs of two stores, as refusals call it."""
    found = FeatureStore.open(str(one)).spec.differences(FeatureStore.open(str(other)).spec).found
    return [name for each in found for name in (each.field.rpartition(".")[2], f"--{each.field}".replace("_", "-"))]


BY_PLACE = ("weights", "facet", "level digest", "level compression", "photographs", "lacking")
"""Stores that are given by another place, too: of other weights, settings, levels, bytes of the same numbers, images, and rows.
What else differs is looked for by the same comparison, whatever the place."""

COMPARED_ALIKE = ("grid", "probe", "discovery", "correspondence")
"""Consumers that look for what differs between the specs as others do: a grid's cells are readouts, and evaluations have one
source of stores. Those of `BY_PLACE` and of another geometry are tried with all, the other fields with these by `make soak`."""


def cases() -> Iterator[object]:
    for name, each in CONSUMERS.items():
        for variant in variants(each.geometry):
            alike = name in COMPARED_ALIKE and variant in OF_FIELD.keys() - {*BY_PLACE, "geometry"}
            marks = [pytest.mark.soak] if alike else []
            for place in ("there", *(["elsewhere"] if variant in BY_PLACE else [])):
                yield pytest.param(name, variant, place, id=f"{name}: {variant}-{place}", marks=marks)


@pytest.mark.parametrize(("name", "variant", "place"), cases())
def test_other_store_is_refused_by_name_or_counts(name, variant, place, held, stores, fresh):
    consumer, (first, url) = CONSUMERS[name], held(name)
    other = stores(consumer, variant)
    config = consumer.on(first.config, other)
    if place == "there":
        with standing_at(url, other):
            again = first.again()
    else:
        again = first.again(config)

    words = [consumer.setting, "rows of the store", str(url), str(other), *_differing(stores(consumer), other)]
    assert complaint(again, lambda: fresh(name, variant), words) == ""


@pytest.mark.parametrize("variant", OF_FIELD)
def test_stores_differ_in_what_they_are_named_for(variant, stores):
    consumer = CONSUMERS["readout"]
    here, other = (FeatureStore.open(str(stores(consumer, each))).spec for each in ("", variant))
    if variant.startswith("level "):
        field = variant.removeprefix("level ")
        assert [getattr(each, field) for each in here.levels] != [getattr(each, field) for each in other.levels]
    else:
        assert getattr(here, variant) != getattr(other, variant)


@pytest.mark.parametrize("variant", ALL_OF_THEM)
@pytest.mark.parametrize("name", CONSUMERS)
def test_store_of_other_images_is_refused(name, variant, stores, fresh):
    found = fresh(name, variant)

    assert isinstance(found, Refused)
    assert str(stores(CONSUMERS[name], variant)) in found.text


@pytest.mark.parametrize("variant", [*OF_FIELD, *ALL_OF_THEM])
def test_validation_on_another_store_is_refused_or_the_same(variant, held, stores):
    consumer, (first, _) = CONSUMERS["readout"], held("readout")
    other = stores(consumer, variant)

    found = first.fresh(first.config.changed(val_store=str(other)))

    assert found == first.first or (isinstance(found, Refused) and str(other) in found.text), found


OF_TWO_SIZES = tuple(each for each in (*OF_FIELD, *ALL_OF_THEM) if each not in ("input_size", "level name", "crop_pct"))


@pytest.fixture(scope="module")
def of_two_sizes(held, stores) -> Outcome:
    """What a run comes to on stores that differ in their size alone."""
    first, url = held("similarity")
    return first.fresh(first.config.changed(stores=(str(url), str(stores(CONSUMERS["similarity"], size="96")))))


@pytest.mark.parametrize("variant", OF_TWO_SIZES)
def test_stores_of_two_sizes_are_refused_or_alike(variant, held, stores, of_two_sizes):
    """Their lines stand in one table."""
    first, url = held("similarity")
    other = stores(CONSUMERS["similarity"], variant, size="96")

    found = first.fresh(first.config.changed(stores=(str(url), str(other))))

    expected = of_two_sizes
    assert found == expected or (isinstance(found, Refused) and str(other) in found.text), found
