"""Training: an order that nothing changes, a run that continues as if it hadn't stopped, and the same steps on Ray Train."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.upsamplers import learned_upsampler
from pipelines.config import ConfigError
from pipelines.executors import InlineExecutor
from pipelines.extraction.run import extract
from pipelines.training.config import TrainSetup, Validation
from pipelines.training.data import TrainOrder
from pipelines.training.lift import X2Config, X2Objective
from pipelines.training.loop import Group, Trainer, TrainFailed, read_metrics
from pipelines.training.run import main, summarise, train_inline, train_on_ray
from storage.paths import Folder, InputError
from storage.runs import read_checkpoint, read_last, read_pointers
from storage.store import FeatureStore
from tests.conftest import jpeg, write_tar
from tests.readout_runs import continued, losses, prepared
from tests.stops import Died, dies_after
from tests.storage.test_input_identity import bitmap


@pytest.fixture
def small(tmp_path, make_tars):
    """A run of 12 training images in 3 epochs of 3 steps (the last of 2 images), timm's test_vit at 64 px."""
    data = make_tars(count=2, each=7)

    def make(**changes: object) -> X2Config:
        values: dict[str, object] = {
            "method": "resize_conv",
            "data": (data,),
            "out": str(tmp_path / "run"),
            "val_rows": 2,
            "model": "test_vit.r160_in1k",
            "weights": "random",
            "size": 64,
            "precision": "fp32",
            "batch": 5,
            "epochs": 3,
            "log_every": 1,
            "checkpoint_every": 2,
            "validate_every": 4,
            "executor": "inline",
            "device": "cpu",
        }
        return X2Config.of(**{**values, **changes})

    return make


# --- order and images -------------------------------------------------------------------------------------------------

ORDERS = st.builds(
    TrainOrder,
    n_rows=st.integers(1, 60),
    batch=st.integers(1, 20),
    micro_batch=st.integers(1, 20),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 5),
)


@given(order=ORDERS, world=st.integers(1, 5))
@settings(deadline=None, max_examples=200)
def test_every_row_comes_once_an_epoch_and_workers_share_the_micro_batches_of_one(order, world):
    alone = list(order.micro_batches(0))
    shared = [item for rank in range(world) for item in order.micro_batches(0, rank, world)]

    assert sorted(shared, key=lambda item: (item.step, item.part)) == alone
    for epoch in range(order.epochs):
        assert sorted(row for item in alone if item.epoch == epoch for row in item.rows) == list(range(order.n_rows))
    for step in range(order.steps):
        assert [row for item in alone if item.step == step for row in item.rows] == order.rows(step).tolist()
        assert 1 <= len(order.rows(step)) <= order.batch


@given(order=ORDERS, world=st.integers(1, 3), data=st.data())
@settings(deadline=None, max_examples=100)
def test_an_order_from_the_middle_is_the_rest_of_it(order, world, data):
    step = data.draw(st.integers(0, order.steps))
    rank = data.draw(st.integers(0, world - 1))

    whole = list(order.micro_batches(0, rank, world))

    assert list(order.micro_batches(step, rank, world)) == [item for item in whole if item.step >= step]


def test_seeds_and_epochs_have_orders_of_their_own():
    order = TrainOrder(n_rows=50, batch=50, micro_batch=50, epochs=2, seed=0)

    assert order.rows(0).tolist() != order.rows(1).tolist()
    assert order.rows(0).tolist() != replace(order, seed=1).rows(0).tolist()
    assert replace(order, max_steps=1).steps == 1


def test_images_of_an_epoch_are_the_same_whoever_loads_them(small):
    source = prepared(small()).images

    both = source.load([3, 8], 1).arrays["pixels"]
    alone = source.load([8], 1).arrays["pixels"]
    later = source.load([8], 2).arrays["pixels"]
    plain = source.load([8], None).arrays["pixels"]

    np.testing.assert_array_equal(both[1], alone[0])
    assert (later[0] != alone[0]).any()
    assert (plain[0] != alone[0]).any()


# --- the loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "changes", "part"),
    # jbu only weighs neighbours, with no say over channels: random features leave it little to learn.
    [("lift", {}, 0.9), ("resize_conv", {}, 0.95), ("jbu", {"radius": 1, "lr": 0.03}, 0.99)],
)
def test_the_loss_falls_on_a_few_images(small, method, changes, part):
    config = small(method=method, batch=12, epochs=40, jitter=0.0, checkpoint_every=40, validate_every=40, **changes)

    train_inline(prepared(config))

    found = losses(config.out)
    assert len(found) == 40
    assert np.mean(found[-5:]) < part * np.mean(found[:5])


def test_every_step_and_validation_is_in_the_metrics_and_has_its_picture(small):
    config = small()

    summary = train_inline(prepared(config))

    lines = read_metrics(Folder(config.out))
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 10))
    assert [line["images"] for line in lines if "loss" in line] == [5, 10, 12, 17, 22, 24, 29, 34, 36]
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 4, 8, 9]
    assert sorted(Folder(config.out).sizes("pictures")) == [f"step-{n:08d}.png" for n in (0, 4, 8, 9)]
    assert (summary.step, summary.last, summary.failed) == (9, "steps/00000009", {})
    assert len(Folder(config.out).sizes("tensorboard")) == 1
    best = min((line for line in lines if "val_loss" in line and line["step"]), key=lambda line: line["val_loss"])
    assert read_pointers(Folder(config.out)).best_loss == best["val_loss"]
    run = json.loads(Folder(config.out).read("run.json"))
    assert run["config"]["batch"] == 5
    assert run["identity"]["backbone"]["facet"] == "key"


def test_rates_are_of_all_the_time_since_the_line_before(small, monkeypatch, caplog):
    """Twelve images in nine steps; a clock that goes on by itself while images are waited for, and in every validation."""
    clock = [100.0]
    monkeypatch.setattr("pipelines.training.loop.time.perf_counter", lambda: clock[0])
    waits = iter([7.0, 0.5, 40.0, 0.5, 0.5, 30.0, 0.5, 0.5, 2.5])  # as bursts from a loader are

    class Waits(InlineExecutor):
        def map(self, do, items, *, loaders=None):
            for loaded in super().map(do, items, loaders=loaders):
                clock[0] += next(waits)
                yield loaded

    trainer = Trainer(prepared(small(log_every=4)), Group(), torch.device("cpu"))
    measure = trainer.objective.measure
    validations = []

    def slow(step):
        validations.append(step)
        clock[0] += 20.0 if step else 1000.0  # before the first step: not training
        return measure(step)

    trainer.objective.measure = slow
    with caplog.at_level("INFO"):
        trainer.run(Waits())

    lines = [line for line in read_metrics(Folder(trainer.config.out)) if "images_per_s" in line]
    assert [(line["step"], line["images"]) for line in lines] == [(1, 5), (4, 17), (8, 34), (9, 36)]
    # The next step's images are waited for within a step: 7 + 0.5; 40 + 0.5 + 0.5; 20 + 30 + 0.5 + 0.5 + 2.5; 20.
    seconds = [7.5, 41.0, 53.5, 20.0]
    assert [line["images_per_s"] for line in lines] == [
        pytest.approx(n / s, abs=0.006) for n, s in zip((5, 12, 17, 2), seconds, strict=True)
    ]
    assert lines[-1]["run_images_per_s"] == pytest.approx(36 / sum(seconds), abs=0.006)
    assert validations == [0, 4, 8, 9]
    assert "step 9 of 9, epoch 3: loss" in caplog.text
    assert "0.1 images/s, 0.3 over the run" in caplog.text


@pytest.mark.parametrize("method", ["lift", "jbu"])
def test_a_continued_run_is_the_uninterrupted_one_bit_for_bit(small, tmp_path, method):
    """LiFT from the enlargement of its maps, which the first validation is near."""
    changes = {"radius": 1} if method == "jbu" else {"start": "enlargement"}
    whole, broken = (small(method=method, out=str(tmp_path / name), **changes) for name in ("whole", "broken"))

    found = continued(whole, broken, (1, 5))

    assert (found.step, found.progress["images"]) == (9, 36)
    if method == "lift":
        first = read_metrics(Folder(whole.out))[0]
        assert first["val_cosine"] == pytest.approx(first["val_cosine_bilinear"], abs=0.05)


def test_a_killed_run_trains_no_image_twice(small):
    trained: dict[int, list[int]] = {}

    def until(last: int):
        def on_step(step: int, rows: list[int]) -> None:
            trained[step] = rows
            if step == last:
                raise Died

        return on_step

    with pytest.raises(Died):
        train_inline(prepared(small(), until(5)))
    state = read_last(Folder(small().out))
    kept = {step: rows for step, rows in trained.items() if step <= state.step}
    trained.clear()

    train_inline(prepared(small(), until(99)))

    assert state.step == 4
    assert sorted(trained) == [5, 6, 7, 8, 9]
    steps = {**kept, **trained}
    for epoch in range(3):
        assert sorted(row for step in range(3) for row in steps[3 * epoch + step + 1]) == list(range(12))


def test_micro_batches_add_up_to_the_batch(small, tmp_path):
    train_inline(prepared(small(out=str(tmp_path / "a"))))
    train_inline(prepared(small(out=str(tmp_path / "b"), micro_batch=2)))

    np.testing.assert_allclose(losses(str(tmp_path / "a")), losses(str(tmp_path / "b")), rtol=1e-4)


class Together:
    """Threads that train as processes would."""

    def __init__(self, rank: int, world: int, shared: SimpleNamespace):
        self.rank, self.world, self.shared = rank, world, shared

    def gather(self, value):
        self.shared.values[self.rank] = value
        self.shared.barrier.wait()
        values = list(self.shared.values)
        self.shared.barrier.wait()
        return values

    def sum(self, values: torch.Tensor) -> None:
        values.copy_(sum(self.gather(values.clone())))


def together(setup: TrainSetup, world: int) -> list[Trainer]:
    shared = SimpleNamespace(barrier=threading.Barrier(world, timeout=60), values=[None] * world)
    return [Trainer(setup, Together(rank, world, shared), torch.device("cpu")) for rank in range(world)]


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.soak), 3])
def test_several_workers_take_the_steps_of_one(small, tmp_path, world):
    """Of the epoch's last batch, two images, two micro-batches are left: the third worker has none."""
    train_inline(prepared(small(out=str(tmp_path / "one"), micro_batch=1)))
    setup = prepared(small(out=str(tmp_path / "many"), micro_batch=1))
    trainers = together(setup, world)

    with ThreadPoolExecutor(world) as pool:
        list(pool.map(lambda trainer: trainer.run(InlineExecutor()), trainers))

    np.testing.assert_allclose(losses(str(tmp_path / "many")), losses(str(tmp_path / "one")), rtol=1e-4)
    one, many = trainers[0].net.state_dict(), trainers[1].net.state_dict()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_unreadable_images_are_left_out_with_a_reason(small, tmp_path, caplog):
    members = [(f"{n:03d}.jpg", jpeg(n) if n != 4 else jpeg(n)[:200]) for n in range(14)]
    write_tar(tmp_path / "bad" / "a.tar", members)
    config = small(data=(str(tmp_path / "bad" / "a.tar"),), max_failed_fraction=0.2)

    summary = train_inline(prepared(config))

    assert list(summary.failed) == ["4"]
    assert summary.failed["4"].startswith("004: ")
    assert (summary.metrics["images"], summary.metrics["failed"]) == (33, 3)
    assert sum("left out" in record.message for record in caplog.records) == 1


def test_too_many_unreadable_images_end_the_run_until_they_are_allowed(small, tmp_path):
    members = [(f"{n:03d}.jpg", jpeg(n) if n % 2 else b"nothing") for n in range(14)]
    write_tar(tmp_path / "bad" / "a.tar", members)
    config = small(data=(str(tmp_path / "bad" / "a.tar"),))

    with pytest.raises(TrainFailed, match="max-failed-fraction"):
        train_inline(prepared(config))
    assert "stopped" in read_metrics(Folder(config.out))[-1]
    with pytest.raises(TrainFailed, match="max-failed-fraction"):
        train_inline(prepared(config))
    summary = train_inline(prepared(replace(config, max_failed_fraction=0.6)))

    assert (summary.step, summary.metrics["images"], summary.metrics["failed"]) == (9, 18, 18)
    with pytest.raises(TrainFailed, match="18 of 36"):
        train_inline(prepared(config))
    train_inline(prepared(replace(config, max_failed_fraction=0.6)))
    assert not any("stopped" in line for line in read_metrics(Folder(config.out)))


def damaged(folder: Path, *numbers: int) -> str:
    """A tar of 6 images, some of which are none."""
    members = [(f"{n:03d}.jpg", b"nothing" if n in numbers else jpeg(100 + n)) for n in range(6)]
    return str(write_tar(folder / "held-out.tar", members))


def validations(config: X2Config) -> list[dict[str, float]]:
    return [line for line in read_metrics(Folder(config.out)) if "val_left_out" in line]


def test_held_out_images_that_cannot_be_read_are_counted_and_said_once_each(small, tmp_path, make_tars, caplog):
    good = write_tar(tmp_path / "good.tar", [(f"{n:03d}.jpg", jpeg(100 + n)) for n in (0, 2, 3, 5)])
    config = small(val_rows=6, val_data=(damaged(tmp_path, 1, 4),), max_failed_fraction=0.4, out=str(tmp_path / "bad"))
    other = small(val_rows=6, val_data=(str(good),), out=str(tmp_path / "good"))

    summary = train_inline(prepared(config))
    train_inline(prepared(other))

    assert sorted(summary.held_out) == ["1", "4"]
    assert summary.held_out["4"].startswith("004: ")
    assert summary.failed == {}
    said = [record.message for record in caplog.records if record.message.startswith("left out: held-out row")]
    assert [message.partition(",")[0] for message in said] == ["left out: held-out row 1", "left out: held-out row 4"]
    assert [line["step"] for line in validations(config)] == [0, 4, 8, 9]
    for line, same in zip(validations(config), validations(other), strict=True):
        assert (line["val_images"], line["val_left_out"], same["val_images"], same["val_left_out"]) == (4, 2, 4, 0)
        assert line["val_loss"] == pytest.approx(same["val_loss"], rel=1e-4)
    printed = "\n".join(main(config))
    assert "over 4 of 6 held-out images, 2 left out" in printed
    assert "held-out row 1, 001: " in printed


def test_too_many_unreadable_held_out_images_end_the_run_until_they_are_allowed(small, tmp_path):
    config = small(val_rows=6, val_data=(damaged(tmp_path, 1, 4),), max_failed_fraction=0.3)

    with pytest.raises(TrainFailed, match=r"2 of 6 held-out images .* more than --max-failed-fraction 0.3:\n  row 1, 001"):
        train_inline(prepared(config))
    assert (read_metrics(Folder(config.out))[-1]["step"], read_last(Folder(config.out))) == (0, None)
    summary = train_inline(prepared(replace(config, max_failed_fraction=0.4)))

    assert (summary.step, summary.metrics["val_images"]) == (9, 4)
    with pytest.raises(TrainFailed, match="2 of 6 held-out"):
        train_inline(prepared(config))


def test_a_validation_of_nothing_ends_the_run(small, tmp_path):
    config = small(val_rows=6, val_data=(damaged(tmp_path, *range(6)),), max_failed_fraction=0.99)

    with pytest.raises(TrainFailed, match="6 of 6 held-out images"):
        train_inline(prepared(config))
    summary = train_inline(prepared(replace(config, max_failed_fraction=1.0)))
    assert (summary.best, summary.metrics["val_images"], summary.metrics["val_left_out"]) == (None, 0, 6)
    assert "val_loss" not in summary.metrics


@pytest.mark.parametrize("after", [0, 4, 9])
def test_all_workers_end_together_with_too_many_held_out_images_unreadable(small, tmp_path, monkeypatch, after):
    """At the first validation, in the middle, and at the end, though one of them alone validates."""
    setup = prepared(small(micro_batch=1, val_rows=6, val_data=(damaged(tmp_path),)))
    measure = X2Objective.measure

    def later(self, step):
        found = measure(self, step)
        return replace(found, left_out={3: "gone"}) if step >= after else found

    monkeypatch.setattr(X2Objective, "measure", later)
    trainers = together(setup, 2)

    with ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(trainer.run, InlineExecutor()) for trainer in trainers]

    assert [str(end.exception()) for end in ends] == [
        "1 of 6 held-out images could not be read, more than --max-failed-fraction 0.01:\n  row 3, gone"
    ] * 2
    assert [trainer.step for trainer in trainers] == [after] * 2


def test_a_diverged_run_ends_with_the_step(small):
    setup = prepared(small(checkpoint_every=1, validate_every=1))
    trainer = Trainer(setup, Group(), torch.device("cpu"))
    with torch.no_grad():
        next(trainer.net.parameters()).fill_(float("nan"))

    with pytest.raises(TrainFailed, match="nan at step 1"):
        trainer.run(InlineExecutor())

    assert read_last(setup.folder) is None


# --- the checkpoint in use --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lift", "resize_conv"])
def test_extraction_takes_the_checkpoint(small, make_tars, tiny, tmp_path, method):
    config = small(method=method, epochs=1)
    summary = train_inline(prepared(config))
    url = f"{config.out}/{summary.last}"

    features = tiny(make_tars(count=1, each=3, folder="other"), facet="key", levels=("x1", f"x2={method}:{url}"))
    extract(features, InlineExecutor())

    assert FeatureStore.open(features.out).read(slice(None), "x2").shape == (3, 8, 8, 64)
    saved = read_checkpoint(Folder(config.out), summary.last)
    state = {name: torch.from_numpy(array) for name, array in saved.model.items()}
    assert learned_upsampler(saved.config["upsampler"], state).method.name == method


def test_a_run_on_s3_is_continued_there(small, s3_options, tmp_path):
    options = json.dumps(s3_options["options"])
    config = small(out=f"s3://{s3_options['bucket']}/runs/one", storage_options=options)
    with pytest.raises(Died):
        train_inline(prepared(config, dies_after(5)))

    summary = train_inline(prepared(config))

    local = small(out=str(tmp_path / "local"))
    train_inline(prepared(local))
    expected = read_last(Folder(local.out))
    found = read_last(Folder(config.out, config.options))
    assert summary.step == 9
    assert all(np.array_equal(expected.model[name], found.model[name]) for name in expected.model)
    run = Folder(config.out, config.options).read("run.json").decode()
    assert "test-secret-value" not in run


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "--batch 0"),
        ({"micro_batch": 6}, "--micro-batch 6 is larger than --batch 5"),
        ({"workers": 2, "executor": "ray"}, "--micro-batch 2, or fewer workers"),
        ({"workers": 2, "micro_batch": 1}, "needs --executor ray"),
        ({"validate_every": 3}, "multiple of --checkpoint-every 2"),
        ({"jitter": 0.6}, "--jitter 0.6"),
        ({"relational_weight": 1.0, "relational_cells": 1}, "--relational-cells 1: must be at least 2"),
        ({"lr": 0.0}, "--lr 0.0"),
        ({"out": "memory://x", "executor": "ray"}, "one process only"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(small, changes, message):
    with pytest.raises(ConfigError, match=message):
        small(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 96}, "the nearest is 128"),
        ({"val_rows": 14}, "leaves none of the 14 images"),
        ({"kernel": 3, "method": "lift"}, "--kernel is no setting of lift"),
        ({"method": "jbu", "radius": 3}, "--radius 3"),
        ({"out": ""}, "no output"),
    ],
)
def test_settings_that_do_not_fit_model_or_data_are_refused(small, changes, message):
    with pytest.raises(ConfigError, match=message):
        prepared(small(**changes))


@given(order=ORDERS)
@settings(deadline=None, max_examples=200)
def test_the_fewest_images_of_a_forward_are_known_beforehand(order):
    assert order.fewest == min(len(item.rows) for item in order.micro_batches(0))


@pytest.mark.parametrize("changes", [{"batch": 5, "limit": 8}, {"batch": 5, "micro_batch": 2, "limit": 7}, {"batch": 1}])
def test_batchnorm_over_a_single_value_is_refused_before_anything_is_trained(small, changes):
    config = small(method="lift", **changes)

    with pytest.raises(ConfigError, match=r"--batch \d.*leaves a forward of a single one.*--size 64.*1 x 1 cells of 16 px"):
        prepared(config)

    assert not (Path(config.out) / "run.json").exists()


@pytest.mark.parametrize("changes", [{"batch": 5, "limit": 9}, {"method": "resize_conv", "batch": 1}, {"size": 128, "batch": 1}])
def test_a_forward_of_one_image_is_trained_on_where_it_can_be(small, changes):
    assert train_inline(prepared(small(**{"method": "lift", "max_steps": 2, "epochs": 1, **changes}))).step == 2


def test_a_run_is_not_continued_with_other_settings(small, make_tars):
    train_inline(prepared(small(epochs=1)))

    with pytest.raises(ConfigError) as error:
        prepared(small(lr=0.01, seed=3))
    assert "lr               run 0.001   now 0.01" in str(error.value)
    assert "seed             run 0   now 3" in str(error.value)
    with pytest.raises(ConfigError, match="backbone"):
        prepared(small(weights="random:5"))
    with pytest.raises(InputError, match="other input"):
        prepared(small(data=(make_tars(count=1, each=14, folder="other"),)))
    assert train_inline(prepared(small(epochs=2))).step == 6


def test_a_run_whose_images_were_replaced_says_so_and_one_with_a_damaged_index_goes_on(small, tmp_path):
    """Bitmaps, so that other images have the same names and sizes."""
    write_tar(tmp_path / "b.tar", [(f"{n}.bmp", bitmap(n)) for n in range(6)])
    config = small(data=(str(tmp_path / "b.tar"),), val_rows=2)
    prepared(config)
    sources = Path(config.out) / "index/sources.parquet"
    before = sources.read_bytes()

    sources.write_bytes(before[:100])
    prepared(config)
    assert sources.read_bytes() == before
    write_tar(tmp_path / "b.tar", [(f"{n}.bmp", bitmap(n + 10)) for n in range(6)])
    with pytest.raises(ConfigError, match=r"other images, held-out images under the same names"):
        prepared(config)


def test_a_finished_run_is_left_as_it_is(small):
    train_inline(prepared(small(epochs=1)))
    before = Folder(small().out).read("checkpoints.json")

    assert train_inline(prepared(small(epochs=1))).step == 3
    assert Folder(small().out).read("checkpoints.json") == before


def test_held_out_images_may_come_from_elsewhere(small, tmp_path):
    config = small(val_data=(damaged(tmp_path),), val_rows=3)

    setup = prepared(config)

    assert (setup.order.n_rows, setup.held_out_rows) == (14, (0, 1, 2))
    assert train_inline(setup).metrics["val_loss"] > 0


# --- held-out images that are trained on ------------------------------------------------------------------------------


def test_held_out_images_that_are_trained_on_are_refused_unless_that_is_asked_for(small, make_tars, caplog):
    """The first three of the training's 14, in a tar of their own."""
    copies = make_tars(count=1, each=3, folder="copies")

    with pytest.raises(
        ConfigError,
        match=r"3 of the 3 held-out images are among those to train on, byte for byte: .*/copies/s-000.tar: 00000 is "
        r".*/in/s-000.tar: 00000\. .*other --val-data; or give --overlap",
    ):
        prepared(small(val_data=(copies,), val_rows=6))
    config = small(val_data=(copies,), val_rows=6, overlap=True, epochs=1, limit=15)
    caplog.set_level("INFO")
    printed = "\n".join(main(config))

    assert "over 3 of 3 held-out images, 3 of the 3 are trained on" in printed
    assert "--val-rows 6: --val-data holds 3 images, of which all are taken" in caplog.messages
    assert "--limit 15: --data holds 14 images, of which all are taken" in caplog.messages
    assert "held-out images are judged at the start and the end only (--validate-every 4)" in caplog.messages
    assert "note       3 of the 3 held-out images are among those to train on" in printed
    assert [line["val_seen"] for line in validations(config)] == [3, 3]
    with pytest.raises(ConfigError, match="--overlap"):
        prepared(replace(config, overlap=False))


def test_copies_are_found_by_their_bytes_among_images_of_one_size(small, tmp_path):
    """Bitmaps, so that all have one size. The last two are held out, of which one is the first again; one copy is no image."""
    images = {f"{n}.bmp": bitmap(n) for n in (0, 1, 2, 3)} | {"4.bmp": bytes(len(bitmap(0)))}
    own = write_tar(tmp_path / "own.tar", [*images.items(), ("5.bmp", bitmap(5)), ("6.bmp", bitmap(1))])
    apart = write_tar(tmp_path / "apart.tar", [("0.bmp", bitmap(7)), ("1.bmp", images["4.bmp"]), ("2.bmp", bitmap(8))])

    with pytest.raises(ConfigError, match=r"1 of the 2 held-out images is .*own.tar: 6 is .*own.tar: 1\. .*Remove the copies"):
        prepared(small(data=(str(own),), val_rows=2))
    assert prepared(small(data=(str(own),), val_rows=1, limit=6, out=str(tmp_path / "less"))).seen == 0
    assert prepared(small(data=(str(own),), val_data=(str(apart),), val_rows=3, out=str(tmp_path / "two"))).seen == 0
    other = small(data=(str(own),), val_data=(str(own),), val_rows=3, overlap=True, out=str(tmp_path / "three"))
    assert prepared(other).seen == 3


def test_a_run_among_its_own_images_is_refused_where_its_pictures_would_be_some(small, tmp_path):
    (tmp_path / "photos").mkdir()
    for n in range(4):
        (tmp_path / f"photos/{n}.jpg").write_bytes(jpeg(n))
    photos = {"data": (str(tmp_path / "photos"),), "val_rows": 1}

    for out in ("photos", "photos/runs/one"):
        with pytest.raises(ConfigError, match=f"--out .*{out} is in .*photos, whose images are --data: .* a place outside"):
            small(**photos, out=str(tmp_path / out)).resolve()
    small(**photos, out=str(tmp_path / "photos-run")).resolve()
    # Beside tars there are no images.
    small(out=str(tmp_path / "in/run")).resolve()


# --- Ray Train --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_session")
def test_two_ray_workers_of_which_one_is_killed_take_the_steps_of_one_process(small, tmp_path):
    train_inline(prepared(small(out=str(tmp_path / "one"), micro_batch=2)))
    marker = str(tmp_path / "killed")

    def die_once(step: int, rows: list[int]) -> None:
        if step == 5 and not os.path.exists(marker):
            open(marker, "w").close()
            os._exit(1)

    config = small(out=str(tmp_path / "two"), micro_batch=2, workers=2, executor="ray", max_failures=2, loaders=1)
    summary = train_on_ray(prepared(config, die_once), "cpu")

    assert os.path.exists(marker)
    assert summary.step == 9
    np.testing.assert_allclose(losses(config.out), losses(str(tmp_path / "one")), rtol=1e-4)
    assert summarise(Folder(config.out)).metrics["images"] == 36
    assert Folder(config.out).folders("ray_train") == []


# --- maps that are kept ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("from_store", [False, True])
def test_kept_maps_train_as_computed_ones_and_each_is_computed_once(small, stored, tmp_path, monkeypatch, from_store):
    plain = stored() if from_store else {"jitter": 0.0}
    train_inline(prepared(small(**plain, out=str(tmp_path / "computed"))))
    given: list[int] = []
    features = X2Objective.features
    monkeypatch.setattr(X2Objective, "features", lambda self, images: (given.append(len(images)), features(self, images))[1])
    monkeypatch.setattr(X2Objective, "measure", lambda *_: Validation(values={"val_loss": 1.0}, images=2))
    whole, broken = (small(**plain, keep_maps=True, out=str(tmp_path / name)) for name in ("whole", "broken"))

    train_inline(prepared(whole))
    once = list(given)
    continued(whole, broken, (5,))

    assert once == [1] * 12 * (2 if from_store else 3)
    np.testing.assert_allclose(losses(whole.out), losses(str(tmp_path / "computed")), rtol=1e-4)


@pytest.mark.parametrize(("changes", "said"), [({}, "--jitter 0.2 "), ({"jitter": 0.0, "crop": 0.5}, "--crop 0.5 ")])
def test_maps_of_images_that_change_are_not_kept(small, changes, said):
    with pytest.raises(ConfigError, match=f"--keep-maps: with {said}an image has other maps each time"):
        small(keep_maps=True, **changes)


# --- features from a store --------------------------------------------------------------------------------------------


@pytest.fixture
def stored(small, tiny, tmp_path):
    """A store of the features that `small` trains on, and the settings that go with it."""
    plain = {"jitter": 0.0, "interpolation": "bicubic"}
    config = small(**plain)

    def make(**changes: object) -> dict[str, object]:
        values = {"facet": "key", "geometry": "squash", "levels": ("x1@float32",), "out": str(tmp_path / "stored.zarr")}
        features = tiny(config.data[0], **{**values, **changes})
        extract(features, InlineExecutor())
        return {**plain, "features": features.out}

    return make


def test_stored_features_train_as_computed_ones(small, stored, tmp_path):
    settings = stored()
    train_inline(prepared(small(**{**settings, "features": ""}, out=str(tmp_path / "computed"))))
    train_inline(prepared(small(**settings, out=str(tmp_path / "read"))))

    np.testing.assert_allclose(losses(str(tmp_path / "read")), losses(str(tmp_path / "computed")), rtol=1e-5)


def test_other_features_than_the_trainings_are_refused(small, stored):
    settings = stored(facet="query")

    with pytest.raises(ConfigError, match="facet .* store 'query' .* now 'key'"):
        prepared(small(**settings))
    with pytest.raises(ConfigError, match="--jitter 0"):
        small(**{**settings, "jitter": 0.2})


def test_images_without_stored_features_are_left_out(small, stored, make_tars, tmp_path):
    settings = stored()
    more = make_tars(count=2, each=9, folder="more")

    summary = train_inline(prepared(small(**settings, data=(more,), out=str(tmp_path / "more"), max_failed_fraction=0.5)))

    assert summary.failed
    assert all("no features in" in reason for reason in summary.failed.values())
