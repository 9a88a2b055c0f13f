"""Commit records of finished stores lie in packs: what is there, what a run that goes on makes of them, what damage means."""

import json
from collections import Counter
from pathlib import Path

import pytest

from jobs.extract import run
from jobs.show import run as show
from pipelines.executors import InlineExecutor
from pipelines.extraction.adding import lines as add_lines
from pipelines.extraction.run import extract
from pipelines.showing.status import read_status
from storage import root
from storage.documents import DamagedObject
from storage.paths import Folder, StorageError
from storage.store import FeatureStore
from tests.conftest import write_tar
from tests.stops import dying_at_task
from tests.storage.test_growth import LEVELS, counting, everything, go, objects
from tests.storage.test_input_identity import IMAGES, all_samples, assert_holds, bmps, config_of, samples_of, tar_of, write_tars
from tests.storage.test_input_identity import features as features
from tests.storage.test_input_identity import place as place

PACKED = "ledger/commits/packed"


@pytest.fixture(autouse=True)
def _two_together(monkeypatch):
    """Tasks of 4 images each, two in a pack."""
    monkeypatch.setattr("storage.commits.PACK_BLOCKS", 2)


def names(out: Path | str, options=None) -> tuple[list[str], list[str]]:
    """Of packs, and of records that lie alone."""
    folder = Folder(str(out), options)
    return sorted(folder.sizes(PACKED)), sorted(folder.sizes("ledger/commits"))


def alone(*blocks: int) -> list[str]:
    return [f"{block:08d}.parquet" for block in blocks]


def test_a_finished_store_has_a_pack_for_each_whole_stretch(tmp_path, monkeypatch, features):
    tars = write_tars(tmp_path, {"a": range(11), "b": range(11, 18)})
    go(tars, tmp_path / "out.zarr", levels=LEVELS)
    monkeypatch.setattr("storage.commits.PACK_BLOCKS", 256)
    go(tars, tmp_path / "each.zarr", levels=LEVELS)

    store, each = (FeatureStore.open(str(tmp_path / name)) for name in ("out.zarr", "each.zarr"))
    assert names(tmp_path / "out.zarr") == (["000000", "000001"], alone(4))
    assert names(tmp_path / "each.zarr") == ([], alone(0, 1, 2, 3, 4))
    assert (store.root.format, each.root.format) == (5, 4)
    assert everything(store, 18) == everything(each, 18)
    differ = {name for name, data in objects(tmp_path / "each.zarr").items() if objects(tmp_path / "out.zarr").get(name) != data}
    assert differ == {"zarr.json", *(f"ledger/commits/{name}" for name in alone(0, 1, 2, 3))}
    assert_holds(tmp_path / "out.zarr", all_samples(tars), features)


def test_it_goes_on_as_before(place, features):
    numbers = {"a": range(11), "b": (11, 12), "c": range(13, 20)}
    for name, some in numbers.items():
        place["put"](f"in/{name}.tar", tar_of(bmps(name, *some)))
    base, options = place["base"], place["options"]
    out, tars = f"{base}/out.zarr", [f"{base}/in/{name}.tar" for name in numbers]
    settings = {"storage_options": json.dumps(options)} if options else {}
    go(tars[:1], out, **settings)
    assert names(out, options) == (["000000"], alone(2))
    before = Folder(out, options).read(f"{PACKED}/000000")
    assert go(tars[:1], out, **settings).this_run == 0

    assert go(tars[:2], out, **settings).this_run == 2  # rows 11 and 12
    assert names(out, options) == (["000000"], alone(2, 3))
    assert go(tars, out, **settings).this_run == 7

    assert names(out, options) == (["000000", "000001"], alone(4))
    assert Folder(out, options).read(f"{PACKED}/000000") == before
    samples = {key: data for name, some in numbers.items() for key, data in samples_of(tar_of(bmps(name, *some))).items()}
    assert_holds(out, samples, features, options)


def test_a_command_on_a_finished_store_looks_at_no_pack(tmp_path, monkeypatch):
    tars, out = write_tars(tmp_path, {"a": range(23)}), tmp_path / "out.zarr"
    go(tars, out)
    seen = Counter()
    for method in ("read", "read_ranges", "read_ends", "names"):
        original = getattr(Folder, method)

        def asked(self, what, *arguments, original=original):
            for each in [what] if isinstance(what, str) else what:
                seen[each if isinstance(each, str) else each[0]] += 1
            return original(self, what, *arguments)

        monkeypatch.setattr(Folder, method, asked)

    assert go(tars, out).this_run == 0

    assert not [name for name in seen if name.startswith(PACKED)]
    assert seen["ledger/commits"] <= 6


def test_failed_rows_are_done_again_alone(tmp_path, features):
    images = [("a-0.bmp", IMAGES[0]), ("a-1.bmp", b"no image"), *((f"a-{n}.bmp", IMAGES[n]) for n in range(2, 17))]
    tar, out = write_tar(tmp_path / "a.tar", images), tmp_path / "out.zarr"
    go([str(tar)], out)
    before = objects(out)
    write_tar(tmp_path / "a.tar", [images[0], ("a-1.bmp", IMAGES[1]), *images[2:]])

    with counting() as computed:
        go([str(tar)], out, retry_failed=True)

    assert sum(computed) == 4
    assert names(out) == (["000000", "000001"], alone(4))
    assert objects(out)[f"{PACKED}/000001"] == before[f"{PACKED}/000001"]
    assert_holds(out, samples_of(tar), features)
    go([str(tar)], tmp_path / "new.zarr")
    assert objects(tmp_path / "new.zarr")[f"{PACKED}/000000"] != before[f"{PACKED}/000000"]


def test_changed_images_are_done_again_also_in_packs(tmp_path, features):
    tars, out = write_tars(tmp_path, {"a": range(17)}), tmp_path / "out.zarr"
    go(tars, out)
    write_tars(tmp_path, {"a": [*range(9), 20, *range(10, 17)]})

    with counting() as computed:
        go(tars, out, replace_changed=True)

    assert sum(computed) == 4
    assert_holds(out, all_samples(tars), features)


def test_levels_that_are_added_have_packs_of_their_own(tmp_path):
    tars, out = write_tars(tmp_path, {"a": range(14), "b": range(14, 20)}), tmp_path / "out.zarr"
    config = config_of(tars[:1], out, levels=("x1", "pooled"))
    extract(config, InlineExecutor())
    before = objects(out)
    list(add_lines(config.changed(add_level=("x2",)), InlineExecutor()))

    after = objects(out)
    assert {name for name in before if after[name] != before[name]} == {"zarr.json"}
    added = sorted(name for name in after if name.startswith("ledger/added/"))
    assert added == [f"ledger/added/x2{rest}" for rest in (".json", "/00000002.parquet", "/00000003.parquet", "/packed/000000")]
    reader = FeatureStore.open(str(out))
    rows = everything(reader, 14)
    extract(config.changed(data=tuple(tars)), InlineExecutor())
    assert everything(FeatureStore.open(str(out)), 14) == everything(reader, 14) == rows
    # Blocks 2 and 3 are a pack now; the level's own record of block 2 counts, the one of block 3 stands in the ledger's.
    assert names(out) == (["000000", "000001"], alone(4))
    assert sorted(Folder(str(out)).sizes("ledger/added/x2/packed")) == ["000000", "000001"]
    assert not Folder(str(out)).sizes("ledger/added/x2")
    assert FeatureStore.open(str(out)).ledger.torn(range(5)) == {}
    list(add_lines(config.changed(add_level=("pale:x2",)), InlineExecutor()))
    assert (
        FeatureStore.open(str(out)).read(slice(None), "pale").tobytes()
        == FeatureStore.open(str(out)).read(slice(None), "x2").tobytes()
    )


@pytest.mark.parametrize("share", [0, 16])
def test_programs_read_records_in_packs(tmp_path, capsys, monkeypatch, share):
    monkeypatch.setattr("storage.commits.WHOLE_SHARE", share)  # no pack is read whole, or each
    tars, out = write_tars(tmp_path, {"a": range(14)}), tmp_path / "out.zarr"
    go(tars, out)

    status = read_status(FeatureStore.open(str(out)))
    assert (status.finished, status.tasks_done, status.objects) == (14, 4, 4)
    for argv in (["view", str(out), "--out", str(tmp_path / "v.png")], ["status", str(out)], ["rows", str(out)]):
        assert show(argv) == 0
    capsys.readouterr()
    assert show(["push", str(out), str(tmp_path / "copy.zarr")]) == 0
    assert objects(out).items() <= objects(tmp_path / "copy.zarr").items()


def test_records_beside_the_packs_of_a_finished_store_do_not_count(tmp_path, features):
    """What a copy was sent before the store was finished, or a worker wrote that was late."""
    tars, out = write_tars(tmp_path, {"a": range(17), "b": (17,)}), tmp_path / "out.zarr"
    go(tars[:1], out)
    (out / "ledger/commits/00000001.parquet").write_bytes(b"of then")

    assert FeatureStore.open(str(out)).ledger.torn(range(5)) == {}
    assert go(tars, out).this_run == 1

    assert names(out) == (["000000", "000001"], alone(4))
    assert_holds(out, all_samples(tars), features)


def test_a_copy_that_is_pushed_in_each_state_has_the_records_of_that_state(tmp_path, features):
    """A record that lay alone when it was copied would count before the later one in a pack, and one that was revoked would say
    that its task is done."""
    images = [("a-0.bmp", IMAGES[0]), ("a-1.bmp", b"no image"), *((f"a-{n}.bmp", IMAGES[n]) for n in range(2, 17))]
    tar, out, copy = write_tar(tmp_path / "a.tar", images), tmp_path / "out.zarr", tmp_path / "copy.zarr"

    def push() -> None:
        assert show(["push", str(out), str(copy), "--unfinished"]) == 0
        here, there = objects(out), objects(copy)
        kept = ("ledger/", "index/", "x1/", "zarr.json")
        assert {n: d for n, d in there.items() if n.startswith(kept)} == {n: d for n, d in here.items() if n.startswith(kept)}
        stores = [FeatureStore.open(str(folder)) for folder in (out, copy)]
        read = [(each.valid().tolist(), each.read(slice(None), "x1", missing="nan").tobytes()) for each in stores]
        assert read[0] == read[1]
        assert stores[0].ledger.listed() == stores[1].ledger.listed()

    with dying_at_task(3):
        go([str(tar)], out)
    push()
    go([str(tar)], out)
    push()
    write_tar(tmp_path / "a.tar", [images[0], ("a-1.bmp", IMAGES[1]), *images[2:]])
    with dying_at_task(0):
        go([str(tar)], out, retry_failed=True)
    push()
    assert FeatureStore.open(str(copy)).ledger.listed() == {1, 2, 3, 4}

    with counting() as computed:
        go([str(tar)], copy)

    assert sum(computed) == 4
    assert_holds(copy, samples_of(tar), features)


def test_a_copy_gets_no_record_of_a_shard_that_it_lacks(tmp_path, capsys, monkeypatch):
    """A run that ends while its store is copied writes packs anew, with tasks that came after the shards were listed."""
    tars, out, copy = write_tars(tmp_path, {"a": range(17)}), tmp_path / "out.zarr", tmp_path / "copy.zarr"
    go(tars, out)
    pack, original = Folder(str(out)).read(f"{PACKED}/000000"), Folder.read_many

    def read_many(self, names, threads):
        if f"{PACKED}/000000" in names:
            (out / PACKED / "000000").write_bytes(pack + b"later")
        return original(self, names, threads)

    monkeypatch.setattr(Folder, "read_many", read_many)

    assert show(["push", str(out), str(copy)]) == 2

    assert f"{PACKED}/000000 was written anew; the same command makes the copy whole" in capsys.readouterr().err
    assert not (copy / "zarr.json").exists()


def test_a_record_that_is_damaged_in_its_pack_is_done_again(tmp_path, features, caplog):
    tars, out = write_tars(tmp_path, {"a": range(17), "b": (17,)}), tmp_path / "out.zarr"
    go(tars[:1], out)
    before = objects(out)
    pack = bytearray(before[f"{PACKED}/000000"])
    pack[-200] ^= 0xFF  # the second record's end
    (out / PACKED / "000000").write_bytes(pack)

    with counting() as computed:
        go(tars, out)

    assert sum(computed) == 4 + 1
    assert f"{PACKED}/000000 " in caplog.text
    assert objects(out)[f"{PACKED}/000000"] == before[f"{PACKED}/000000"]
    assert_holds(out, all_samples(tars), features)


def test_a_pack_whose_index_is_damaged_is_named_and_without_it_its_tasks_run_again(tmp_path, features, capsys):
    tars, out = write_tars(tmp_path, {"a": range(17), "b": (17,)}), tmp_path / "out.zarr"
    go(tars[:1], out)
    pack = out / PACKED / "000001"
    pack.write_bytes(pack.read_bytes()[:-1])
    argv = ["--out", str(out), "--model", "test_vit.r160_in1k", "--weights", "random", "--size", "64", "--levels", "x1",
            "--precision", "fp32", "--executor", "inline", "--block-rows", "4", "--data", *tars]  # fmt: skip

    assert run(argv) == 2
    said = capsys.readouterr().err
    assert f"{PACKED}/000001 is damaged" in said
    assert "restore it from a copy; or remove it, and the same extraction does its tasks again" in said
    pack.unlink()
    with counting() as computed:
        assert run(argv) == 0

    assert sum(computed) == 8 + 1
    assert_holds(out, all_samples(tars), features)


def test_a_pack_of_another_store_is_none_of_this_one(tmp_path):
    tars = write_tars(tmp_path, {"a": range(8)})
    go(tars, tmp_path / "out.zarr")
    go(tars, tmp_path / "other.zarr", weights="random:1")
    (tmp_path / "out.zarr" / PACKED / "000000").write_bytes((tmp_path / "other.zarr" / PACKED / "000000").read_bytes())

    with pytest.raises(DamagedObject, match=r"packed/000000 .*belongs to another store"):
        FeatureStore.open(str(tmp_path / "out.zarr")).ledger.record(1)


def test_versions_before_packs_refuse_such_a_store(tmp_path, monkeypatch):
    tars, out = write_tars(tmp_path, {"a": range(8)}), tmp_path / "out.zarr"
    go(tars, out)
    monkeypatch.setattr(root, "READABLE", (2, 3, 4))
    monkeypatch.setattr(root, "PACKED", 4)

    with pytest.raises(StorageError, match="format 5, this version reads 2, 3 and 4; update Raylift"):
        FeatureStore.open(str(out))
