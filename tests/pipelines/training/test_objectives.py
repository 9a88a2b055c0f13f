"""Training by JAFAR's and by FeatUp's objective: runs that continue as if they hadn't stopped, alone or together, and their
checkpoints in extraction."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.program import pick_word
from jobs.train import NAMES
from operators.readouts import READOUTS
from operators.upsamplers import UPSAMPLERS, UpsamplerError, find_method, split_method
from pipelines.config import ConfigError
from pipelines.costs.runtime import RuntimeConfig
from pipelines.executors import InlineExecutor
from pipelines.extraction.run import extract
from pipelines.features.levels import LevelChoice
from pipelines.training.data import Loaded, load
from pipelines.training.featup import FeatUpObjective, FeatUpTraining
from pipelines.training.images import ImageTraining
from pipelines.training.jafar import JafarTraining
from pipelines.training.loop import read_metrics
from pipelines.training.objectives import OBJECTIVES, trainings
from pipelines.training.run import train_inline
from storage.paths import Folder
from storage.runs import read_checkpoint, read_last
from storage.store import FeatureStore
from tests.as_on_ray import train_in_processes
from tests.pipelines.training.test_lift import together
from tests.readout_runs import continued, losses, prepared

pytestmark = pytest.mark.usefixtures("narrow")

BOTH = ("jafar", "featup")

OWN: dict[str, dict[str, object]] = {
    "jafar": {"net_precision": "fp32", "lr": 3e-3},
    "featup": {"jitters": 2, "lr": 1e-2, "radius": 1},
}


@pytest.fixture
def small(tmp_path, make_tars):
    """A run of 5 training images in 3 epochs of 3 steps (the last of 1 image), timm's test_vit at 64 px."""
    data = make_tars(count=1, each=7)

    def make(name: str, **changes: object) -> ImageTraining:
        values: dict[str, object] = {
            "data": (data,),
            "out": str(tmp_path / f"run-{name}"),
            "val_rows": 2,
            "model": "test_vit.r160_in1k",
            "weights": "random",
            "size": 64,
            "precision": "fp32",
            "batch": 2,
            "epochs": 3,
            "log_every": 1,
            "checkpoint_every": 2,
            "validate_every": 4,
            "executor": "inline",
            "device": "cpu",
        }
        return OBJECTIVES[name].of(**{**values, **OWN[name], **changes})

    return make


@pytest.fixture
def nothing_dropped(monkeypatch):
    """What is dropped is drawn for each micro-batch; without it, a step's loss doesn't depend on how it is cut."""
    for name in ("dropout", "dropout2d"):
        monkeypatch.setattr(torch.nn.functional, name, lambda values, *_, **__: values)
    monkeypatch.setattr("operators.objectives.featup.KEPT", 1.1)


# --- the registry -----------------------------------------------------------------------------------------------------


def test_every_method_that_is_trained_is_a_word_and_its_objective_is_there():
    trained = {name: by for name in UPSAMPLERS if (by := find_method(name).trained_by)}

    assert set(trained.values()) == OBJECTIVES.keys()
    assert {name: type(config) for name, config in trainings().items()} == {n: OBJECTIVES[by] for n, by in trained.items()}
    words = {name: f"{name}-upsampler" if name in READOUTS else name for name in trained}
    assert {name: (type(NAMES[word]), NAMES[word].method) for name, word in words.items()} == {
        name: (OBJECTIVES[by], name) for name, by in trained.items()
    }


@pytest.mark.parametrize(("said", "meant"), [("vit-up", "vit_up"), ("vit_up", "vit_up"), ("resize-conv", "resize_conv")])
def test_methods_are_named_with_hyphens_too_and_spelled_in_one_way(said, meant):
    level = LevelChoice.parse(f"x2={said}:s3://bucket/run-1", "float16")
    assert (level.method, level.url) == (meant, "s3://bucket/run-1")
    assert find_method(said).name == meant
    assert split_method("my-module:Class") == ("my-module", "Class")
    assert OBJECTIVES[find_method(said).trained_by].of(method=said).method == meant
    assert RuntimeConfig.of(methods=(said,), settings=(f"{said}.size=8",)).named_methods == [(meant, "")]
    assert pick_word([said, "--plan"], NAMES) == meant
    assert pick_word(["vit_up-vit_tiny_photos"], NAMES) == "vit-up-vit-tiny-photos"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("jafar", {"method": "lift"}, "--method lift isn't trained by JAFAR's objective; these are: jafar"),
        ("featup", {"method": "jbu"}, "--method jbu isn't trained by FeatUp's objective; these are: featup"),
        ("lift", {"method": "jafar"}, "isn't trained by LiFT's self-supervision"),
        ("jafar", {"method": "nobody:Knows"}, "--method nobody:Knows"),
        ("jafar", {"shrink": (0.5, 0.25)}, "--shrink 0.5 0.25"),
        ("jafar", {"shrink": (0.5, 2.0)}, "--shrink 0.5 2"),
        ("jafar", {"consistency": -1.0}, "--consistency -1"),
        ("jafar", {"size": 96}, "the image, its half and its quarter .* nearest is 128"),
        ("featup", {"size": 48}, "the image and its half .* nearest is 64"),
        ("featup", {"size": 32, "radius": 2}, "--size 32 --radius 2: .* more cells than 1x1"),
        ("featup", {"jitters": 0}, "--jitters 0"),
        ("featup", {"crf_weight": -0.1}, "--crf-weight -0.1"),
        ("featup", {"clip": None, "clip_steps": 5}, "--clip-steps 5 would change nothing"),
        ("featup", {"jitter": 0.1, "features": "x.zarr"}, "--jitter 0.1: the stored"),
    ],
)
def test_what_cannot_be_trained_so_is_refused_by_the_flag(small, name, changes, message):
    OWN.setdefault("lift", {})
    with pytest.raises(ConfigError, match=message):
        small(name, **changes).resolve()


# --- the run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
def test_a_continued_run_is_the_uninterrupted_one_bit_for_bit(small, tmp_path, name):
    """Stopped before the first checkpoint, and in the second epoch behind one."""
    whole, broken = (small(name, epochs=2, out=str(tmp_path / place)) for place in ("whole", "broken"))

    found = continued(whole, broken, (1, 5))

    assert (found.step, found.progress["images"]) == (6, 10)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("jafar", {"shrink": (0.5, 0.5), "lr": 3e-3}),
        ("jafar", {"shrink": (0.5, 0.5), "lr": 3e-3, "antialias": True, "consistency": 0.0}),
        ("featup", {"jitters": 1}),
        ("featup", {"jitters": 1, "downsampler": "simple", "tv_weight": 0.01, "channel_norm": False}),
    ],
)
def test_the_loss_falls_on_an_image_and_others_are_measured_beside_bilinear_enlargement(small, name, changes):
    config = small(name, val_rows=6, batch=1, epochs=24, checkpoint_every=24, validate_every=24, **changes)

    train_inline(prepared(config))

    found = losses(config.out)
    assert len(found) == 24
    assert np.mean(found[-5:]) < np.mean(found[:5])
    first, last = (line for line in read_metrics(Folder(config.out)) if "val_loss" in line)
    names = {each for each in last if each.startswith("val_")} - {"val_images", "val_left_out", "val_empty", "val_seen"}
    octaves = ("loss", "cosine", "cosine_beyond", *(["cosine_twice"] if name == "jafar" else []))
    assert names == {f"val_{each}{suffix}" for each in octaves for suffix in ("", "_bilinear")}
    assert all(0 < last[each] < 1 for each in names if "cosine" in each)
    assert first["val_cosine_bilinear"] == last["val_cosine_bilinear"]
    assert len(Folder(config.out).sizes("pictures")) == 2


def test_a_random_scale_is_a_steps_whichever_images_it_has(small):
    """Of a shrunk image at 128 px and patches of 16, 2 to 4 cells a side."""
    seen: dict[int, set[int]] = {}
    for micro_batch in (1, 2):
        setup = prepared(small("jafar", size=128, micro_batch=micro_batch, consistency=0.0, out=f"memory://{micro_batch}"))
        objective = setup.objective(torch.device("cpu"))
        run = objective.run_net
        for loaded in load(setup.images, setup.order.micro_batches(0), InlineExecutor(), 1):
            sizes = seen.setdefault(loaded.item.step, set())
            objective.run_net = lambda guide, maps, grid, sizes=sizes, run=run: (
                sizes.add(maps.shape[-1]) or run(guide, maps, grid)
            )
            objective.accumulate(loaded)

    assert all(len(sizes) == 1 for sizes in seen.values())
    assert set.union(*seen.values()) == {2, 3, 4}


@pytest.mark.usefixtures("nothing_dropped")
@pytest.mark.parametrize("name", BOTH)
def test_micro_batches_add_up_to_the_batch(small, tmp_path, name):
    train_inline(prepared(small(name, out=str(tmp_path / "a"), max_steps=4)))
    train_inline(prepared(small(name, out=str(tmp_path / "b"), max_steps=4, micro_batch=1)))

    np.testing.assert_allclose(losses(str(tmp_path / "a")), losses(str(tmp_path / "b")), rtol=1e-3)


@pytest.mark.soak
@pytest.mark.usefixtures("nothing_dropped")
@pytest.mark.parametrize("name", BOTH)
def test_two_workers_take_the_steps_of_one(small, tmp_path, name):
    """Two processes do so below, and threads for LiFT; here, beyond an epoch's end."""
    settings = {"micro_batch": 1, "max_steps": 4}  # the third is of one image, the fourth of the next epoch
    train_inline(prepared(small(name, out=str(tmp_path / "one"), **settings)))
    trainers = together(prepared(small(name, out=str(tmp_path / "two"), **settings)), 2)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda trainer: trainer.run(InlineExecutor()), trainers))

    np.testing.assert_allclose(losses(str(tmp_path / "two")), losses(str(tmp_path / "one")), rtol=1e-4)
    one, two = ({**trainer.net.state_dict(), **trainer.beside.state_dict()} for trainer in trainers)
    assert all(torch.equal(one[each], two[each]) for each in one)


@pytest.mark.parametrize("name", BOTH)
def test_two_processes_train_the_weights_of_one(parent, small, tmp_path, name):
    """What is dropped is a micro-batch's, whichever process has it."""
    settings = {"micro_batch": 1, "epochs": 1}
    whole = small(name, out=str(tmp_path / "one"), **settings)
    shared = small(name, out=str(tmp_path / "two"), **settings, workers=2, executor="ray", loaders=1)
    train_inline(prepared(whole))

    assert train_in_processes(parent, shared, tmp_path / "processes").step == 3

    np.testing.assert_allclose(losses(shared.out), losses(whole.out), rtol=1e-4)
    one, two = (read_last(Folder(config.out)) for config in (whole, shared))
    # Three steps of at most --lr each; where a gradient is next to nothing, their sign is a matter of rounding.
    for there, here in ((one.model, two.model), (one.resume, two.resume)):
        assert there.keys() == here.keys()
        for each in there:
            close = np.isclose(here[each], there[each], rtol=1e-3, atol=1e-2 * whole.lr)
            assert close.mean() > 0.99, each


# --- FeatUp -----------------------------------------------------------------------------------------------------------


def first_loaded(config: ImageTraining) -> tuple[FeatUpObjective, Loaded]:
    setup = prepared(config)
    loaded = next(load(setup.images, setup.order.micro_batches(0), InlineExecutor(), 1))
    return setup.objective(torch.device("cpu")), loaded


@pytest.mark.usefixtures("nothing_dropped")
def test_gradients_that_meet_at_the_map_are_those_of_a_run_of_the_network_for_each_jitter(small):
    config = small("featup", jitters=3, tv_weight=0.1)
    objective, loaded = first_loaded(config)
    total, n = objective.accumulate(loaded)
    trained = [*objective.net.parameters(), *objective.beside.parameters()]
    found = [parameter.grad for parameter in trained]
    objective.net.zero_grad()
    objective.beside.zero_grad()

    from pipelines.training.data import generator
    from pipelines.training.featup import _JITTERS

    images, maps = objective.given(loaded)
    rng = generator(_JITTERS, config.seed, loaded.item.step)
    each = [objective._loss(images, objective._pixels(images, maps), rng, first=k == 0) for k in range(3)]
    (sum(each) * n).backward()

    assert float(total) == pytest.approx(float(sum(each).detach()) * n, rel=1e-5)
    for ours, parameter in zip(found, trained, strict=True):
        if parameter.requires_grad:
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-6)
        else:
            assert ours is None


def test_what_is_trained_beside_is_kept_to_continue_and_is_not_in_the_checkpoints_network(small):
    config = small("featup", epochs=1)

    last = read_checkpoint(Folder(config.out), train_inline(prepared(config)).last)

    beside = {name for name in last.resume if name.startswith("beside/") and ":" not in name}
    assert beside == {
        f"beside/{name}"
        for name in (
            *("downsampler.w", "downsampler.b", "downsampler.attention_net.1.weight", "downsampler.attention_net.1.bias"),
            *("uncertainty.net.weight", "uncertainty.net.bias"),
        )
    }
    assert {f"{name}:exp_avg" for name in beside} < last.resume.keys()
    assert "up1.range_temp:mu_product" in last.resume  # NAdam's
    assert not any("downsampler" in name or "uncertainty" in name for name in last.model)
    # The LayerNorm before the network isn't trained.
    np.testing.assert_array_equal(last.model["norm.weight"], np.ones(64, np.float32))
    assert not any(name.startswith("norm.") for name in last.resume)


def test_gradients_are_clipped_in_the_first_steps_alone(small, monkeypatch):
    clipped = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda _, most: clipped.append(most))

    train_inline(prepared(small("featup", clip_steps=2, max_steps=4)))

    assert clipped == [1e-4, 1e-4]
    assert small("featup", clip_steps=None).clipping(10_000) == 1e-4
    assert [FeatUpTraining().clipping(step) for step in (9, 10)] == [1e-4, None]


def test_published_settings_are_the_defaults():
    jafar, featup = JafarTraining(), FeatUpTraining()

    assert (jafar.features.size, jafar.shrink, jafar.consistency, jafar.batch) == (448, (0.25, 0.5), 0.1, 4)
    assert (jafar.lr, jafar.weight_decay, jafar.schedule, jafar.clip, jafar.net_precision) == (
        2e-4,
        1e-5,
        "constant",
        None,
        "bf16",
    )
    assert (featup.features.size, featup.jitters, featup.projected, featup.batch) == (224, 5, 30, 4)
    assert (featup.crf_weight, featup.tv_weight, featup.lr, featup.schedule) == (0.001, 0.0, 1e-3, "constant")


# --- stores, and the checkpoint in use --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
def test_stored_features_train_as_computed_ones(small, tiny, tmp_path, name):
    plain = {"interpolation": "bicubic"}
    features = tiny(small(name).data[0], levels=("x1@float32",), out=str(tmp_path / "stored.zarr"))
    extract(features, InlineExecutor())
    train_inline(prepared(small(name, **plain, max_steps=4, out=str(tmp_path / "computed"))))
    train_inline(prepared(small(name, **plain, max_steps=4, features=features.out, out=str(tmp_path / "read"))))

    np.testing.assert_allclose(losses(str(tmp_path / "read")), losses(str(tmp_path / "computed")), rtol=1e-4)
    with pytest.raises(ConfigError, match="geometry .* store 'crop' .* now 'squash'"):
        small(name, **plain, features=features.out, geometry="squash").resolve()


@pytest.mark.parametrize(("name", "level", "cells"), [("jafar", "x4", 16), ("jafar", "7x9", None), ("featup", "x16", 64)])
def test_extraction_takes_the_checkpoint(small, make_tars, tiny, name, level, cells):
    config = small(name, epochs=1)
    url = f"{config.out}/{train_inline(prepared(config)).last}"
    data = make_tars(count=1, each=2, folder="other")

    features = tiny(data, levels=("x1", f"{level}={name}:{url}"))
    extract(features, InlineExecutor())

    shape = FeatureStore.open(features.out).read(slice(None), level).shape
    assert shape == (2, cells or 7, cells or 9, 64)
    other = "featup" if name == "jafar" else "jafar"
    with pytest.raises(UpsamplerError, match=f"holds a {name}, not a {other}"):
        extract(tiny(data, levels=("x1", f"{level}={other}:{url}")), InlineExecutor())


@pytest.mark.parametrize(
    ("name", "changes", "sides"),
    [("jafar", {"size": 128}, [128, 64, 48, 32]), ("jafar", {"consistency": 0.0}, [32, 16]), ("featup", {}, [64])],
)
def test_a_checkpoint_says_which_maps_its_network_was_given(small, name, changes, sides):
    config = small(name, max_steps=1, **changes)
    last = train_inline(prepared(config)).last

    said = json.loads((Path(config.out) / last / "config.json").read_text())
    assert said["backbone"]["sides"] == sides
    assert said["upsampler"]["method"] == name
