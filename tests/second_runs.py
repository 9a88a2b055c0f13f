"""Runs that are begun once and asked for again after something was changed: tiny ones, in this process, and what they come to.

What is held of each: the second run is refused, in words that name what was changed, or it comes to what a run into an empty
folder comes to; never to what the first one came to (`Held.again`).
"""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors.numpy
import safetensors.torch
from PIL import Image

from operators.timm_models import create_model, state_arrays, weights_digest
from operators.vitdet.checkpoint import build, described
from pipelines.config import JobConfig
from pipelines.costs import runtime
from pipelines.costs.runtime import RuntimeConfig
from pipelines.demo_datasets import scene
from pipelines.evaluation import cka, correspondence, detection, discovery, fidelity, readouts, sharpness, similarity, video
from pipelines.evaluation.cka import CkaConfig
from pipelines.evaluation.correspondence import CorrespondenceConfig
from pipelines.evaluation.detection import DetectionConfig
from pipelines.evaluation.discovery import DiscoveryConfig
from pipelines.evaluation.fidelity import FidelityConfig
from pipelines.evaluation.readouts import ProbeConfig
from pipelines.evaluation.run import Task, evaluate
from pipelines.evaluation.sharpness import SharpnessConfig
from pipelines.evaluation.similarity import SimilarityConfig
from pipelines.evaluation.video import VideoConfig
from pipelines.executors import InlineExecutor
from pipelines.extraction.config import ExtractConfig
from pipelines.extraction.prepare import prepare, resolve
from pipelines.extraction.run import run_prepared
from pipelines.features.detectors import RANDOM
from pipelines.tables import grid as grids
from pipelines.tables.grid_cells import GridConfig
from pipelines.training import data as training_data
from pipelines.training.featup import FeatUpTraining
from pipelines.training.jafar import JafarTraining
from pipelines.training.lift import X2Config
from pipelines.training.readout import ReadoutTraining
from pipelines.training.vit_up import ViTUpTraining
from pipelines.training.vitdet import ViTDetTraining
from storage.datasets.labels import label_png
from storage.datasets.registry import DATASETS
from storage.documents import JsonValue
from storage.errors import RayliftError
from storage.paths import Folder
from storage.runs import named_checkpoint, read_last
from storage.store import FeatureStore
from tests.conftest import jpeg, write_tar
from tests.goldens import golden_file
from tests.readout_runs import held_out, train, write_sets

VIT = "test_vit.r160_in1k"

HERE: Mapping[str, object] = {"executor": "inline", "device": "cpu"}

SETTINGS: Mapping[str, object] = {"model": VIT, "precision": "fp32", **HERE}


@dataclass(frozen=True)
class Refused:
    """What a run ended with instead of numbers."""

    text: str


Outcome = JsonValue | Refused


@dataclass(frozen=True)
class Kind:
    """A job on a world's data."""

    config: Callable[[Path], JobConfig]
    "its settings but for --out, in a world"
    run: Callable[[JobConfig], JsonValue]
    "does it to the end; what it came to"
    reads: Collection[str]
    "top folders of the world that it is given"
    ends_with: str = ""
    "a pattern of what is written last: without these objects, the run stopped before its end"


# --- the world --------------------------------------------------------------------------------------------------------


def write_world(root: Path) -> Path:
    """Small data sets in their official layouts, tars, and of weights, upsamplers and readouts two each."""
    write_sets(root)
    _fewer_masks(root / "VOC2012/VOCdevkit/VOC2012")
    _fewer_objects(root / "coco")
    for path in [*root.glob("NYU/*/train/0000[34].*"), *root.glob("NYU/*/val/00002.*"), *root.glob("DAVIS/*/480p/*/0000[345].*")]:
        path.unlink()
    _write_clip(root / "DAVIS")
    for path in root.rglob("tvmonitor"):
        shutil.rmtree(path)
    for path in root.glob("SPair-71k/PairAnnotation/test/*:tvmonitor.json"):
        path.unlink()
    _write_photos(root / "photos_open")
    with tarfile.open(golden_file("navi_mini.tar")) as tar:
        tar.extractall(root, filter="data")
    _fewer_views(root / "navi_v1")
    for name, (image, mask, listed) in LAYOUTS.items():
        _write_layout(root / name, DATASETS[name].splits, image, mask, listed)
    for part, first in (("images", 0), ("held_out", 20)):
        members = [(f"{n:05d}.{kind}", data) for n in range(first, first + 3) for kind, data in _sample(n)]
        write_tar(root / f"{part}/part-000.tar", members)
    for name, seed in (("weights", 0), ("weights_b", 1)):
        write_weights(root / name, seed=seed)
    _write_checkpoints(root)
    for name, seed in (("detector", 3), ("detector_b", 1)):
        write_detector(root / name, seed)
    write_detector(root / "lifted", 3, {"method": "lift", "channels": RANDOM.dim, "patch": 16, "image_width": 8})
    return root


def _sample(number: int) -> list[tuple[str, bytes]]:
    return [("jpg", jpeg(number)), ("cls", str(number % 7).encode())]


def _fewer_masks(voc: Path, train: int = 3, val: int = 2) -> None:
    kept = set()
    for split, count in (("train", train), ("val", val)):
        path = voc / f"ImageSets/Segmentation/{split}.txt"
        names = path.read_text().split()[:count]
        path.write_text("".join(f"{name}\n" for name in names))
        kept |= set(names)
    for path in [*voc.glob("JPEGImages/*"), *voc.glob("SegmentationClass/*")]:
        if path.stem not in kept:
            path.unlink()


def _fewer_objects(coco: Path, count: int = 2) -> None:
    for path in coco.glob("annotations/*.json"):
        found = json.loads(path.read_text())
        left_out, found["images"] = found["images"][count:], found["images"][:count]
        gone = {each["id"] for each in left_out}
        found["annotations"] = [each for each in found["annotations"] if each["image_id"] not in gone]
        path.write_text(json.dumps(found))
        for each in left_out:
            next(coco.glob(f"*/{each['file_name']}")).unlink()


def _fewer_views(navi: Path) -> None:
    """One object, whose other scene has to be there and isn't read."""
    for path in [*navi.glob("*/*/masks"), *navi.glob("*/multiview*/depth"), *navi.glob("*/multiview*/images")]:
        shutil.rmtree(path)
    for name in ("egg_a", "only_multi"):
        shutil.rmtree(navi / name)


def _write_clip(davis: Path) -> None:
    """Another clip, whose name is as long, and a list that has it."""
    for path in list(davis.glob("*/480p/blocks/*")):
        copy = Path(str(path).replace("blocks", "bricks"))
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (davis / "ImageSets/2017/train.txt").write_text("bricks\n")


def _write_photos(root: Path) -> None:
    """Two tars of photographs, one a split, their class masks, and the same as COCO's objects."""
    images, notes = [], []
    for tar in range(2):
        members = []
        for n in (2 * tar, 2 * tar + 1):
            x1, x2 = 8 + 3 * n, 40 + 5 * n
            members.append((f"{n:05d}.jpg", _jpeg(scene(96, 72, [(x1, 10, x2, 50)], 200 + n))))
            _save(root / f"seg/{n:05d}.png", label_png(_rectangle(x1, x2, 1 + n % 2)))
            images.append({"id": n, "file_name": f"{n:05d}.jpg", "width": 96, "height": 72})
            note = {"id": n, "image_id": n, "category_id": 1, "iscrowd": 0, "area": (x2 - x1) * 40}
            notes.append({**note, "bbox": [x1, 10, x2 - x1, 40], "segmentation": [[x1, 10, x2, 10, x2, 50, x1, 50]]})
        write_tar(root / f"photos-open-{tar:06d}.tar", members)
    found = {"images": images, "annotations": notes, "categories": [{"id": 1, "name": "red"}]}
    _save(root / "instances.json", json.dumps(found).encode())


LAYOUTS: Mapping[str, tuple[str, str, str]] = {
    "ade20k": ("images/{part}/{n}.jpg", "annotations/{part}/{n}.png", ""),
    "cityscapes": ("leftImg8bit/{part}/city/{n}_leftImg8bit.jpg", "gtFine/{part}/city/{n}_gtFine_labelIds.png", ""),
    "coco_stuff": ("coco/{part}/{n}.jpg", "deap/trainval2017/{part}/{n}.png", ""),
    "coco_stuff27": (
        "dataset/images/{part}/{n}.jpg",
        "dataset/annotations/{part}/{n}.png",
        "curated/{part}/Coco164kFull_Stuff_Coarse.txt",
    ),
}
"""Where data sets with class masks have an image, its mask, and a list of their names, if they have one."""


def _write_layout(root: Path, parts: tuple[str, str], image: str, mask: str, listed: str) -> None:
    """Two images to train on and two others."""
    for p, part in enumerate(parts):
        names = [f"{n:012d}" for n in (2 * p, 2 * p + 1)]
        for n, name in enumerate(names, 2 * p):
            x1, x2 = 10 + 4 * n, 44 + 4 * n
            _save(root / image.format(part=part, n=name), _jpeg(scene(96, 72, [(x1, 10, x2, 50)], 300 + n)))
            _save(root / mask.format(part=part, n=name), label_png(_rectangle(x1, x2, 7 + n % 2)))
        if listed:
            _save(root / listed.format(part=part), "".join(f"{name}\n" for name in names).encode())


def _rectangle(x1: int, x2: int, value: int) -> np.ndarray:
    labels = np.zeros((72, 96), np.uint8)
    labels[10:50, x1:x2] = value
    return labels


def _save(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _jpeg(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=95)
    return out.getvalue()


def write_weights(folder: Path, seed: int, args: Mapping[str, object] | None = None, **config: object) -> None:
    """Weights as timm saves them, and what their config.json says of the input."""
    folder.mkdir(parents=True)
    model = create_model(VIT, (64, 64), None, seed)
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    pretrained = {"interpolation": "bicubic", "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.25, 0.25], **config}
    said = {"architecture": VIT.partition(".")[0], "pretrained_cfg": {"input_size": [3, 160, 160], **pretrained}}
    said |= {"model_args": args} if args else {}
    (folder / "config.json").write_text(json.dumps(said))


def write_detector(folder: Path, seed: int, upsampler: Mapping[str, JsonValue] | None = None) -> None:
    """A detector with random weights, which finds something whatever its scores are."""
    folder.mkdir(parents=True)
    described_as = described(replace(RANDOM, classes=2, score_threshold=0.0, topk=60), upsampler)
    safetensors.numpy.save_file(state_arrays(build(described_as, seed)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(described_as))


def _write_checkpoints(root: Path) -> None:
    kinds = {"upsampler": "x2", "readout": "readout: voc"}
    made = [(f"{name}{suffix}", kind, seed) for name, kind in kinds.items() for suffix, seed in (("", 0), ("_b", 1))]
    for name, kind, seed in made:
        config = KINDS[kind].config(root).changed(out=str(root / f"{name}-run"), seed=seed, epochs=10)  # else, all is background
        KINDS[kind].run(config.changed(checkpoint_every=100, validate_every=100))
        shutil.copytree(named_checkpoint(config.flat()["out"]).url, root / name)
        shutil.rmtree(root / f"{name}-run")
        for path in (root / name).iterdir():
            if path.name not in ("config.json", "model.safetensors"):
                path.unlink()


# --- what jobs come to ------------------------------------------------------------------------------------------------


def trained(config: JobConfig) -> JsonValue:
    train(config)
    last = read_last(Folder(config.out))
    return {"step": last.step, "weights": weights_digest(dict(last.model)), "scores": held_out(config.out)}


def evaluated(name: str, task: Task) -> Callable[[JobConfig], JsonValue]:
    def run(config: JobConfig) -> JsonValue:
        evaluate(name, task, config)
        found = json.loads((Path(config.out) / "results.json").read_text())
        return {part: found[part] for part in ("tables", "details", "left_out")}

    return run


def timed(config: JobConfig) -> JsonValue:
    """All but the times, which no two runs have alike."""
    evaluate("runtime", runtime, config)
    details = json.loads((Path(config.out) / "results.json").read_text())["details"]
    return {"cases": {each["case"]: each["macs"] for each in details.pop("timings")}, **details}


class CellRefused(RayliftError):
    """A cell of a grid says why it has no result."""


def tabled(config: JobConfig) -> JsonValue:
    try:
        list(grids.main(config))
    except grids.CellsFailed:
        cells = json.loads((Path(config.out) / "grid.json").read_text())["cells"]
        raise CellRefused("\n".join(cell["error"] for cell in cells if cell["error"])) from None
    found = json.loads((Path(config.out) / "grid.json").read_text())
    for cell in found["cells"]:
        del cell["train_seconds"]
    return {"cells": found["cells"], "entries": found["entries"]}


def extracted(config: JobConfig) -> JsonValue:
    run_prepared(prepare(resolve(config), InlineExecutor()), InlineExecutor())
    store = FeatureStore.open(config.out)
    rows = np.arange(store.layout.n_rows)
    records = store.records(rows, ["status", "digest"]).to_pylist()
    levels = {level.name: weights_digest({"": store.read_present(rows, level.name)[0]}) for level in store.spec.levels}
    return {"records": records, "levels": levels}


# --- kinds ------------------------------------------------------------------------------------------------------------

STEPS = {"batch": 2, "epochs": 1, "lr": 1e-2, "log_every": 1, "checkpoint_every": 1, "validate_every": 2}


def kind_of(
    kind: type[JobConfig], run: Callable[[JobConfig], JsonValue], *reads: str, ends_with: str = "", **settings: object
) -> Kind:
    """`WORLD` in settings is the world's folder."""

    def config(world: Path) -> JobConfig:
        def placed(value: object) -> object:
            if isinstance(value, tuple):
                return tuple(map(placed, value))
            return value.replace("WORLD", str(world)) if isinstance(value, str) else value

        return kind.of(**{name: placed(value) for name, value in settings.items()})

    return Kind(config=config, run=run, reads=reads, ends_with=ends_with)


_READOUT = {**SETTINGS, **STEPS, "weights": "WORLD/weights", "data": "WORLD/VOC2012", "side": 64, "size": 64}


def _readout(dataset: str, data: str, **settings: object) -> Kind:
    given = {**_READOUT, "data": f"WORLD/{data}", "dataset": dataset, **settings}
    return kind_of(ReadoutTraining, trained, data, "weights", **given)


def _evaluation(name: str, task: Task, kind: type[JobConfig], data: str, *reads: str, **settings: object) -> Kind:
    given = {**SETTINGS, "weights": "WORLD/weights", "data": f"WORLD/{data}", "pictures": 0, **settings}
    return kind_of(kind, evaluated(name, task), data, "weights", *reads, ends_with="parts/*", **given)


_ON_IMAGES = {
    **SETTINGS,
    **STEPS,
    "weights": "WORLD/weights",
    "data": ("WORLD/images/part-000.tar",),
    "val_data": ("WORLD/held_out/part-000.tar",),
}
_IMAGES = ("images", "held_out", "weights")

X2: Mapping[str, object] = {"method": "resize_conv", "size": 64, "facet": "token", "val_rows": 2, "jitter": 0.0, **_ON_IMAGES}

_VIT_UP = {
    "size": 128,
    "teacher_sizes": (32, 64, 128),
    "hidden_size": 64,
    "query_size": 128,
    "hidden_states": (0, 3, 6),
    "net_precision": "fp32",
    "warmup_steps": 1,
    "val_rows": 2,
    **_ON_IMAGES,
}

_JAFAR = {"size": 64, "net_precision": "fp32", "val_rows": 2, **_ON_IMAGES}

_FEATUP = {"size": 64, "radius": 1, "jitters": 1, "val_rows": 2, **_ON_IMAGES}

_VITDET = {
    "data": "WORLD/coco", "model": "tiny", "size": 64, "dim": 32, "heads": 2, "depth": 2, "global_blocks": (1,), "channels": 16,
    "fc": 8, "anchors": 16, "proposals": 8, "micro_batch": 2, "warmup_steps": 0, **HERE, **STEPS,
}  # fmt: skip

_SPAIR = {"sizes": (64,), "pairs_per_category": 0, "levels": ("x1", "x2=resize_conv:WORLD/upsampler"), "force_upsampler": True}

KINDS: Mapping[str, Kind] = {
    "x2": kind_of(X2Config, trained, *_IMAGES, **X2),
    "vit_up": kind_of(ViTUpTraining, trained, *_IMAGES, **_VIT_UP),
    "jafar": kind_of(JafarTraining, trained, *_IMAGES, **_JAFAR),
    "featup": kind_of(FeatUpTraining, trained, *_IMAGES, **_FEATUP),
    "readout: voc": _readout("voc", "VOC2012"),
    "readout: level": kind_of(ReadoutTraining, trained, "upsampler", **_READOUT, level="x2=resize_conv:WORLD/upsampler"),
    "readout: photos_open": _readout("photos_open", "photos_open"),
    "readout: nyu": _readout("nyu", "NYU", task="depth", placement="squash"),
    "readout: coco": _readout("coco", "coco", task="boundaries"),
    "readout: photos_open_instances": _readout("photos_open_instances", "photos_open", task="boundaries"),
    **{f"readout: {name}": _readout(name, name) for name in LAYOUTS},
    "vitdet": kind_of(ViTDetTraining, trained, "coco", **_VITDET),
    "grid": kind_of(
        GridConfig,
        tabled,
        "VOC2012",
        "weights",
        ends_with="*/cell.json",
        backbones=(f"{VIT}@64",),
        tasks=("voc",),
        methods=("linear",),
        data=("voc=WORLD/VOC2012",),
        weights="WORLD/weights",
        speed=False,
        speed_reference=VIT,
        speed_reference_size=64,
        speed_batch=1,
        speed_batches=1,
        cell=ReadoutTraining.of(side=64, precision="fp32", **STEPS),
        **HERE,
    ),
    "correspondence: lift": _evaluation(
        "correspondence", correspondence, CorrespondenceConfig, "SPair-71k", "upsampler", **_SPAIR
    ),
    "correspondence: vit-up": _evaluation(
        "correspondence", correspondence, CorrespondenceConfig, "SPair-71k", protocol="vit-up", sizes=(64,)
    ),
    "correspondence: navi": _evaluation(
        "correspondence", correspondence, CorrespondenceConfig, "navi_v1", protocol="navi", sizes=(64,), matches=20
    ),
    "video": _evaluation("video", video, VideoConfig, "DAVIS", sizes=(64,)),
    "discovery": _evaluation("discovery", discovery, DiscoveryConfig, "VOC2007", sizes=(64,)),
    "cka": _evaluation("cka", cka, CkaConfig, "VOC2012/VOCdevkit/VOC2012/JPEGImages", sizes=(32, 64)),
    "similarity": _evaluation("similarity", similarity, SimilarityConfig, "SPair-71k/JPEGImages", sizes=(64,)),
    "fidelity": _evaluation("fidelity", fidelity, FidelityConfig, "SPair-71k/JPEGImages", sizes=(32, 64)),
    "sharpness": _evaluation("sharpness", sharpness, SharpnessConfig, "VOC2012", sizes=(64,)),
    "probe": _evaluation("probe", readouts, ProbeConfig, "VOC2012", "readout", readouts=("WORLD/readout",)),
    "detection": kind_of(
        DetectionConfig,
        evaluated("detection", detection),
        "coco",
        "detector",
        ends_with="parts/*",
        data="WORLD/coco",
        detector="WORLD/detector",
        upsamplers=("lift",),
        size=64,
        pictures=0,
        **HERE,
    ),
    "runtime": kind_of(
        RuntimeConfig,
        timed,
        "weights",
        "upsampler",
        ends_with="parts/*",
        weights="WORLD/weights",
        size=64,
        grids=(8,),
        methods=("resize_conv:WORLD/upsampler",),
        warm_up=1,
        repeat=2,
        pictures=0,
        **SETTINGS,
    ),
    "extract": kind_of(
        ExtractConfig,
        extracted,
        "images",
        "weights",
        "upsampler",
        data=("WORLD/images/part-000.tar",),
        weights="WORLD/weights",
        size="64",
        levels=("x1", "x2=resize_conv:WORLD/upsampler"),
        force_upsampler=True,
        block_rows=2,
        batch=1,
        **SETTINGS,
    ),
}
"""Every job whose result may be asked for again."""


# --- the law ----------------------------------------------------------------------------------------------------------


class Held:
    """A run of some kind that was done once, and what is held of it when it is asked for again."""

    def __init__(self, kind: Kind, config: JobConfig, folder: Path):
        self.kind, self.config, self.folder = kind, config, folder
        self._count = 0
        self.first = self._run(config, folder / "first")
        assert not isinstance(self.first, Refused), self.first.text

    def again(self, config: JobConfig | None = None, *, stopped: bool = False) -> Outcome:
        """What a second run into the first one's folder comes to, with its settings or others. `stopped`: the first one stopped
        before its end."""
        place = self._place()
        shutil.copytree(self.folder / "first", place)
        if stopped:
            last = list(place.glob(self.kind.ends_with))
            assert last
            for path in last:
                path.unlink()
        return self._run(config or self.config, place)

    def fresh(self, config: JobConfig | None = None) -> Outcome:
        """What such a run into an empty folder comes to."""
        return self._run(config or self.config, self._place())

    def _place(self) -> Path:
        self._count += 1
        return self.folder / f"{self._count}"

    def _run(self, config: JobConfig, out: Path) -> Outcome:
        # Another run is another process, which keeps nothing in memory.
        training_data._open_store.cache_clear()
        training_data._indexes.clear()
        try:
            return self.kind.run(config.changed(out=str(out)))
        except (RayliftError, OSError) as error:
            return Refused(f"{type(error).__name__}: {error}")


def complaint(again: Outcome, fresh: Callable[[], Outcome], named: Collection[str]) -> str:
    """What is wrong with the outcome of a second run, in words; empty where nothing is. `named`: words of which a refusal must
    have one."""
    if isinstance(again, Refused):
        return (
            "" if any(name in again.text for name in named) else f"refused without a word of {' or '.join(named)}: {again.text}"
        )
    expected = fresh()
    if isinstance(expected, Refused):
        return f"has a result where a fresh run is refused: {expected.text}"
    return "" if again == expected else f"has another result than a fresh run: {_differing(again, expected)}"


def _differing(one: JsonValue, other: JsonValue) -> str:
    if isinstance(one, Mapping) and isinstance(other, Mapping) and one.keys() == other.keys():
        return "; ".join(f"{name}: {_differing(one[name], other[name])}" for name in one if one[name] != other[name])
    return f"{str(one)[:200]} and {str(other)[:200]}"
