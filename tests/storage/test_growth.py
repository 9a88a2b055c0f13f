"""A store that grows by further input: old rows keep their keys, numbers and bytes, and readers are right at every moment."""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr

from jobs.extract import run
from pipelines.executors import InlineExecutor
from pipelines.extraction.host import ModelDevice
from pipelines.extraction.plan import make_plan
from pipelines.extraction.prepare import prepare, resolve
from pipelines.extraction.run import RunFailed, extract, run_prepared
from pipelines.feature_datasets import FeatureDataset
from pipelines.showing.status import read_status
from storage.paths import Folder, InputError
from storage.root import StoreReplaced
from storage.scans import DuplicateKeys
from storage.store import FeatureStore
from tests.conftest import write_tar
from tests.pipelines.extraction.test_s3 import tree
from tests.stops import dying_at_task
from tests.storage.test_input_identity import (
    IMAGES,
    all_samples,
    assert_holds,
    bmps,
    config_of,
    in_places,
    samples_of,
    tar_of,
    write_tars,
)
from tests.storage.test_input_identity import features as features
from tests.storage.test_input_identity import place as place

LEVELS = ("x1", "x2@int8", "x0.5@float16-raw", "pooled")
"""Chunks of a row and of a block, scales, and chunks that are all equally long."""


def go(tars: list[str], out: Path | str, **changes: object):
    return extract(config_of(tars, out, **changes), InlineExecutor())


def objects(out: Path | str) -> dict[str, bytes]:
    return tree(Folder(str(out)))


@contextmanager
def counting() -> Iterator[list[int]]:
    """How many images were computed, a batch each."""
    original, found = ModelDevice.begin, []

    def begin(self, images, batch):
        found.append(int(images.reshape(len(images), -1).any(axis=1).sum()))
        return original(self, images, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelDevice, "begin", begin)
        yield found


def everything(store: FeatureStore, n_rows: int) -> dict[str, object]:
    """All that a reader gets of the first rows."""
    rows = np.arange(n_rows)
    found: dict[str, object] = {level: store.read(rows, level, missing="nan").tobytes() for level in store.levels}
    found["one by one"] = [store.read(int(row), "x1", missing="nan").tobytes() for row in rows]
    found["records"] = store.records(rows, ["row", "key", "status", "digest", "width"]).to_pylist()
    keys = store.index.take(rows, ["key"])["key"].to_pylist()
    found["rows"] = store.rows(keys).tolist()
    found["failed"] = [each for each in store.failures(["row", "message"]).to_pylist() if each["row"] < n_rows]
    found["valid"] = store.valid(rows).tolist()
    return found


def as_others_read(out: Path | str, n_rows: int) -> dict[str, bytes]:
    group = zarr.open_group(str(out), mode="r")
    return {name: group[name]["features"][:n_rows].tobytes() for name in ("x1", "x2", "x0.5", "pooled")}


def test_six_tars_and_one_more(tmp_path):
    numbers = {f"t{i}": [3 * i, 3 * i + 1, 3 * i + 2] for i in range(7)}
    tars, out = write_tars(tmp_path, numbers), tmp_path / "out.zarr"
    go(tars[:6], out, levels=LEVELS)
    before, rows = objects(out), everything(FeatureStore.open(str(out)), 18)

    plan = make_plan(prepare(resolve(config_of(tars, out, levels=LEVELS)), InlineExecutor()))
    assert (plan.pending, plan.new_images, plan.state) == (2, 3, "4 of 6 tasks done, 1 in part")
    assert "new        3 images of 1 new source (t6.tar), on rows 18 to 20" in plan.describe()
    assert objects(out) == before
    with counting() as computed:
        summary = go(tars, out, levels=LEVELS)

    assert sum(computed) == summary.this_run == 3
    store = FeatureStore.open(str(out))
    assert (len(store), store.status) == (21, "complete")
    assert everything(store, 18) == rows
    assert store.rows([f"t6-{i}" for i in range(3)]).tolist() == [18, 19, 20]
    assert [(each.n_rows, each.fingerprint) for each in store.root.generations] == [
        (18, json.loads(before["zarr.json"])["attributes"]["raylift"]["fingerprint"])
    ]
    after = objects(out)
    blocks = {name: data for name, data in before.items() if "/c/" in name and not name.startswith("index/")}
    assert {name for name, data in blocks.items() if after[name] != data} == {
        name for name in blocks if name.split("/")[3] == "4"
    }
    records = pq.read_table(out / "ledger/commits")
    assert sorted(records["row"].to_pylist()) == list(range(21))
    again = objects(out)
    assert go(tars, out, levels=LEVELS).this_run == 0
    assert objects(out) == again


@in_places("when", ["finished", "begun", "without its last block"], on_s3="without its last block")
def test_tar_that_sorts_before_the_others(place, features, when):
    for name, numbers in {"b": (0, 1, 2, 3, 4), "c": (5, 6), "a": (7, 8, 9)}.items():
        place["put"](f"in/{name}.tar", tar_of(bmps(name, *numbers)))
    base, out, options = place["base"], f"{place['base']}/out.zarr", place["options"]
    settings = {"storage_options": json.dumps(options)} if options else {}
    if when == "finished":
        go([f"{base}/in/*.tar".replace("*", "[bc]")], out, **settings)
    else:
        with dying_at_task({"begun": 0, "without its last block": 1}[when]):
            go([f"{base}/in/b.tar", f"{base}/in/c.tar"], out, **settings)

    go([f"{base}/in/*.tar"], out, **settings)

    samples = {
        key: data
        for name, numbers in {"b": (0, 1, 2, 3, 4), "c": (5, 6), "a": (7, 8, 9)}.items()
        for key, data in samples_of(tar_of(bmps(name, *numbers))).items()
    }
    assert_holds(out, samples, features, options)
    store = FeatureStore.open(out, options)
    assert store.index.keys(0, 10).to_pylist() == list(samples)
    assert go([f"{base}/in/*.tar"], out, **settings).this_run == 0


def test_folder_of_images_with_more_of_them(tmp_path, features):
    folder, out = tmp_path / "photos", tmp_path / "out.zarr"
    folder.mkdir()
    for n in (1, 3, 5, 7, 9):
        (folder / f"{n}.bmp").write_bytes(IMAGES[n])
    go([str(folder)], out)
    for n in (0, 2, 4):
        (folder / f"{n}.bmp").write_bytes(IMAGES[n])

    assert go([str(folder)], out).this_run == 3

    assert_holds(out, {str(n): IMAGES[n] for n in (1, 3, 5, 7, 9, 0, 2, 4)}, features)
    assert FeatureStore.open(str(out)).rows(["1", "9", "0", "4"]).tolist() == [0, 4, 5, 7]


def test_growing_twice_with_readers_that_were_open_before(place, features):
    numbers = {"a": (0, 1, 2, 3, 4), "b": (5,), "c": (6, 7, 8, 9)}
    for name, some in numbers.items():
        place["put"](f"in/{name}.tar", tar_of(bmps(name, *some)))
    tars, out, options = [f"{place['base']}/in/{name}.tar" for name in numbers], f"{place['base']}/out.zarr", place["options"]
    settings = {"levels": LEVELS} | ({"storage_options": json.dumps(options)} if options else {})
    go(tars[:1], out, **settings)
    read, unread = FeatureStore.open(out, options), FeatureStore.open(out, options)
    expected = everything(read, 5)
    data = FeatureDataset(out, ["x1", "pooled"], storage_options=options)
    for n in (2, 3):
        go(tars[:n], out, **settings)

    # One has files open that are gone by now, the other opens them now.
    assert everything(read, 5) == everything(unread, 5) == expected
    assert (len(read), len(unread), len(data)) == (5, 5, 5)
    read.require_unreplaced()
    assert [sample["key"] for sample in data.__getitems__([0, 4])] == ["a-0", "a-4"]
    assert read.row("c-3") == 9
    assert unread.read(9, "x1").tobytes() == read.read("c-3", "x1").tobytes()
    assert unread.refresh() is False
    assert len(unread) == len(read) == 10
    with pytest.raises(KeyError):
        read.row("d-0")
    assert [each.n_rows for each in read.root.generations] == [5, 6]
    assert_holds(
        out,
        {key: data for name, some in numbers.items() for key, data in samples_of(tar_of(bmps(name, *some))).items()},
        features,
        options,
    )


def test_growing_by_a_tar_that_holds_a_key_once_more_is_refused(tmp_path):
    tars, out = write_tars(tmp_path, {"a": [0, 1], "b": [2]}), tmp_path / "out.zarr"
    go(tars, out)
    write_tar(tmp_path / "c.tar", [("c-0.bmp", IMAGES[3]), ("a-1.bmp", IMAGES[4])])
    before = objects(out)

    with pytest.raises(DuplicateKeys, match=r"keeps its keys: 1 keys.*\n  'a-1': .*a\.tar .*c\.tar"):
        go([*tars, str(tmp_path / "c.tar")], out)
    assert objects(out) == before


def test_input_that_lacks_a_source_is_refused_by_name_also_beside_new_ones(tmp_path):
    tars, out = write_tars(tmp_path, {"a": [0, 1], "b": [2], "c": [3]}), tmp_path / "out.zarr"
    go(tars[:2], out)

    with pytest.raises(InputError, match=r"a\.tar is gone from the input\n.*c\.tar is new\nFurther input is added"):
        go(tars[1:], out)


def test_growing_by_nothing(tmp_path):
    tars, out = write_tars(tmp_path, {"a": [0, 1]}), tmp_path / "out.zarr"
    write_tar(tmp_path / "empty.tar", [("x.txt", b"no image")])
    go(tars, out)
    with pytest.raises(InputError, match="holds no images"):
        go([*tars, str(tmp_path / "empty.tar")], out)
    before = objects(out)
    skip = {"empty_shards": "skip"}
    other = tmp_path / "other.zarr"
    go(tars, other, **skip)

    assert go([*tars, str(tmp_path / "empty.tar")], other, **skip).this_run == 0

    store = FeatureStore.open(str(other))
    assert (store.status, len(store), len(store.index.sources)) == ("complete", 2, 2)
    assert {name: data for name, data in objects(other).items() if "/c/" in name} == {
        name: data for name, data in before.items() if "/c/" in name
    }
    assert go([*tars, str(tmp_path / "empty.tar")], other, **skip).this_run == 0


def test_a_source_changed_and_one_added_at_once(tmp_path, features):
    tars, out = write_tars(tmp_path, {"a": [0, 1, 2, 3], "b": [4, 5], "c": [6, 7, 8]}), tmp_path / "out.zarr"
    go(tars[:2], out)
    reader = FeatureStore.open(str(out))
    write_tars(tmp_path, {"a": [0, 20, 2, 3]})

    with pytest.raises(InputError, match=r"1 of its images differ, for example 'a-1'\n(.*\n)?.*Use --replace-changed"):
        go(tars, out)
    go(tars, out, replace_changed=True)

    assert_holds(out, all_samples(tars), features)
    with pytest.raises(StoreReplaced):
        reader.require_unreplaced()
    assert go(tars, out).this_run == 0


def test_failed_rows_stay_failed_and_are_retried_where_asked(tmp_path, features):
    images = {"a-0": IMAGES[0], "a-1": b"no image", "a-2": IMAGES[2]}
    a = write_tar(tmp_path / "a.tar", [(f"{key}.bmp", data) for key, data in images.items()])
    tars, out = [str(a), *write_tars(tmp_path, {"b": [4], "c": [5, 6]})], tmp_path / "out.zarr"
    go(tars[:1], out, levels=LEVELS)
    before = everything(FeatureStore.open(str(out)), 3)

    with counting() as computed:
        go(tars[:2], out, levels=LEVELS)
    assert sum(computed) == 1
    assert everything(FeatureStore.open(str(out)), 3) == before
    with counting() as computed:
        go(tars, out, levels=LEVELS, retry_failed=True)

    assert sum(computed) == 5  # a's two again, b, and c
    assert_holds(out, {**images, **samples_of(Path(tars[1])), **samples_of(Path(tars[2]))}, features)


def test_limit_holds_for_what_comes(tmp_path, features):
    tars, out = write_tars(tmp_path, {"a": [0, 1, 2], "b": [3, 4, 5], "c": [6]}), tmp_path / "out.zarr"
    go(tars[:1], out, limit=5)

    go(tars, out, limit=5)

    assert FeatureStore.open(str(out)).index.keys(0, 5).to_pylist() == ["a-0", "a-1", "a-2", "b-0", "b-1"]
    assert go(tars, out, limit=5).this_run == 0


def test_keys_by_place_stay_what_they_are(tmp_path, features):
    for folder, numbers in {"x/1": [0, 1], "x/2": [2, 3], "y": [4]}.items():
        (tmp_path / folder).mkdir(parents=True)
        write_tar(tmp_path / folder / "t.tar", bmps("a", *numbers))
    x1, x2, y = (str(tmp_path / name / "t.tar") for name in ("x/1", "x/2", "y"))
    write_tar(tmp_path / "x/t.tar", bmps("a", 5))
    rename = {"duplicate_keys": "rename"}
    go([x1, x2], tmp_path / "out.zarr", **rename)

    with pytest.raises(InputError, match=r"that is another folder, and '1/t/a-0' would begin with 'x/1/t'"):
        go([x1, x2, y], tmp_path / "out.zarr", **rename)
    go([x1, x2, str(tmp_path / "x/t.tar")], tmp_path / "out.zarr", **rename)

    assert FeatureStore.open(str(tmp_path / "out.zarr")).index.keys(0, 5).to_pylist() == [
        "1/t/a-0",
        "1/t/a-1",
        "2/t/a-0",
        "2/t/a-1",
        "t/a-0",
    ]


@pytest.mark.parametrize("damage", ["x1/features/c/0/0/0/0", "x2/scale/c/0/0", "pooled/features/c/0/0"])
def test_block_that_is_damaged_where_it_must_grow_is_done_anew(tmp_path, features, caplog, damage):
    tars, out = write_tars(tmp_path, {"a": [0, 1], "b": [2]}), tmp_path / "out.zarr"
    go(tars[:1], out, levels=LEVELS)
    data = bytearray((out / damage).read_bytes())
    data[8] ^= 0xFF
    (out / damage).write_bytes(data)

    with counting() as computed:
        go(tars, out, levels=LEVELS)

    assert sum(computed) == 3
    assert "done anew" in caplog.text
    assert_holds(out, all_samples(tars), features)


class LoadsApart(InlineExecutor):
    """Tasks are loaded by another worker than the one that computes them, and `between` comes what happens meanwhile."""

    def __init__(self, between: Callable[[], None] = lambda: None):
        self.between = between

    def stream(self, make_worker, tasks, pool, how="actor"):
        loader, worker = make_worker(model=False), make_worker()
        for task in tasks:
            loaded = loader.load(task)
            self.between()
            yield worker.run(task, loaded)


@pytest.mark.parametrize("executor", [InlineExecutor(), LoadsApart()], ids=["loaded here", "loaded apart"])
def test_rows_that_a_block_has_already_are_read_once(tmp_path, monkeypatch, executor):
    tars, out = write_tars(tmp_path, {"a": [0, 1, 2, 3, 4], "b": [5, 6]}), tmp_path / "out.zarr"
    go(tars[:1], out, levels=LEVELS)
    read, names = Folder.read, []
    monkeypatch.setattr(Folder, "read", lambda self, name: names.append(name) or read(self, name))

    extract(config_of(tars, out, levels=LEVELS), executor)

    shards = [name for name in names if "/c/" in name]
    assert sorted(shards) == ["pooled/features/c/1/0", "x0.5/features/c/1/0/0/0", "x1/features/c/1/0/0/0",
                              "x2/features/c/1/0/0/0", "x2/scale/c/1/0"]  # fmt: skip


def test_damage_that_the_loader_did_not_see(tmp_path, features):
    tars, out = write_tars(tmp_path, {"a": [0, 1], "b": [2]}), tmp_path / "out.zarr"
    go(tars[:1], out, levels=LEVELS)
    shard = out / "x1/features/c/0/0/0/0"

    def damage() -> None:
        data = bytearray(shard.read_bytes())
        data[8] ^= 0xFF
        shard.write_bytes(data)

    with counting() as computed:
        extract(config_of(tars, out, levels=LEVELS), LoadsApart(damage))

    assert sum(computed) == 3
    assert_holds(out, all_samples(tars), features)


def test_two_that_add_other_tars_at_once(tmp_path, features):
    tars, out = write_tars(tmp_path, {"a": [0, 1], "b": [2], "c": [3]}), tmp_path / "out.zarr"
    go(tars[:1], out)
    late = prepare(resolve(config_of([tars[0], tars[2]], out)), InlineExecutor())
    go(tars[:2], out)

    with pytest.raises(RunFailed, match="changed by another run just now"):
        run_prepared(late, InlineExecutor())
    with pytest.raises(InputError, match=r"b\.tar is gone"):
        go([tars[0], tars[2]], out)
    go(tars, out)

    assert_holds(out, all_samples(tars), features)


def test_driver_whose_store_grows_meanwhile_stops(tmp_path, features, monkeypatch):
    tars, out = write_tars(tmp_path, {"a": [0, 1, 2, 3, 4, 5], "b": [6]}), tmp_path / "out.zarr"
    original, begun = ModelDevice.begin, []

    def begin(self, images, batch):
        begun.append(len(images))
        if len(begun) == 1:
            go(tars, out)
        return original(self, images, batch)

    monkeypatch.setattr(ModelDevice, "begin", begin)
    with pytest.raises(RunFailed, match="has grown: another run adds further input"):
        go(tars[:1], out)

    assert_holds(out, all_samples(tars), features)


# --- readers at every moment ------------------------------------------------------------------------------------------


@contextmanager
def after_each_change(check: Callable[[], None]) -> Iterator[list[str]]:
    """Call `check` after each object that is written or removed; gives their names."""
    names: list[str] = []
    busy = False

    def wrapped(method: Callable[..., object]) -> Callable[..., object]:
        def call(self, name, *arguments, **named):
            nonlocal busy
            done = method(self, name, *arguments, **named)
            if not busy and not str(name).startswith("runs/"):
                busy = True
                names.append(str(name))
                check()
                busy = False
            return done

        return call

    with pytest.MonkeyPatch.context() as patch:
        for method in ("write", "write_new", "remove"):
            patch.setattr(Folder, method, wrapped(getattr(Folder, method)))
        yield names


@pytest.mark.parametrize("begun", ["finished", "unfinished"])
def test_readers_see_old_rows_after_each_object_that_is_written(tmp_path, begun):
    tars, out = write_tars(tmp_path, {"a": [0, 1, 2, 3, 4, 5], "b": [6, 7, 8, 9]}), tmp_path / "out.zarr"
    if begun == "finished":
        go(tars[:1], out, levels=LEVELS)
        n_rows = 6
    else:
        with dying_at_task(1):
            go(tars[:1], out, levels=LEVELS)
        n_rows = 4
    early = [FeatureStore.open(str(out)) for _ in range(40)]
    expected, others = everything(early[0], n_rows), as_others_read(out, n_rows)
    seen = []

    def check() -> None:
        now = FeatureStore.open(str(out))
        readers = [now, early[0], *([early.pop()] if len(early) > 1 else [])]
        assert all(everything(reader, n_rows) == expected for reader in readers)
        assert as_others_read(out, n_rows) == others
        assert read_status(now).finished >= n_rows
        seen.append(int(now.valid().sum()) if len(now) == 10 else 0)
        if watcher := next(iter(watching), None):
            new = watcher.read(slice(None), "x1", missing="nan")
            assert np.count_nonzero(~np.isnan(new).all(axis=(1, 2, 3))) >= seen[-1]
        elif len(now) == 10:
            watching.append(now)

    watching: list[FeatureStore] = []
    with after_each_change(check) as names:
        go(tars, out, levels=LEVELS)

    assert len(names) > 20
    assert seen == sorted(seen)
    assert seen[-1] == 10
    assert {6, 8, 10} <= set(seen) if begun == "finished" else {4, 8, 10} <= set(seen)


def test_any_growth_ends_as_its_rows_say(tmp_path, features):
    """Tars that come in any number and order, with runs that die; each row is right, and old ones keep their bytes."""
    draw = random.Random(7)
    for trial in range(3):
        names, out = draw.sample("abcdefgh", 5), tmp_path / f"{trial}.zarr"
        numbers = {name: draw.sample(range(24), draw.randint(1, 6)) for name in names}
        tars = write_tars(tmp_path / f"in{trial}", numbers)
        known: dict[str, bytes] = {}
        given: list[str] = []
        while len(given) < len(tars):
            given += tars[len(given) : len(given) + draw.randint(1, 2)]
            draw.shuffle(given)
            last = (sum(len(numbers[Path(tar).stem]) for tar in given) - 1) // 4
            if draw.random() < 0.5:
                with dying_at_task(last):
                    go(given, out, levels=("x1", "pooled"))
            go(given, out, levels=("x1", "pooled"))
            assert_holds(out, all_samples(given), features)
            store = FeatureStore.open(str(out))
            keys = store.index.keys(0, len(store)).to_pylist()
            assert keys[: len(known)] == list(known)
            now = {key: store.read(row, "x1").tobytes() + store.read(row, "pooled").tobytes() for row, key in enumerate(keys)}
            assert all(now[key] == data for key, data in known.items())
            known = now


def test_the_program_adds_and_says_so(tmp_path, capfd, caplog):
    tars = write_tars(tmp_path, {"a": [0, 1, 2], "b": [3, 4]})
    settings = ["--out", str(tmp_path / "out.zarr"), "--model", "test_vit.r160_in1k", "--weights", "random", "--size", "64",
                "--levels", "x1", "--precision", "fp32", "--executor", "inline"]  # fmt: skip
    caplog.set_level("INFO")
    assert run(["--data", tars[0], *settings]) == 0

    assert run(["--data", f"{tmp_path}/{{a,b}}.tar", *settings]) == 0

    assert "2 images of 1 new source (b.tar), on rows 3 to 4" in caplog.text
    assert "5 images ok, 0 failed\nthis run: 2 images" in capfd.readouterr().out
