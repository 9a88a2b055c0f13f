"""Stores that were damaged or edited: every command ends in the right result, or in an error that names the object."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from jobs.extract import run
from pipelines.config import ConfigError
from pipelines.evaluation.run import Piece, _records
from pipelines.executors import InlineExecutor
from pipelines.extraction.config import config_from_run
from pipelines.showing.status import failure_lines, failures, read_status, row_lines, status_lines
from pipelines.showing.views import colours_for
from storage.documents import DamagedObject, decode
from storage.ledger import Ledger
from storage.paths import Folder, StorageError
from storage.spec import FeatureSpec, Layout, Level, fingerprint_of
from storage.store import FeatureStore
from tests.conftest import jpeg, write_tar

ROWS, BLOCK_ROWS = 8, 2


@dataclass(frozen=True)
class Pair:
    """A finished store, and one of which two tasks of four are done; the command that made both."""

    finished: Path
    half: Path
    argv: list[str]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    folder = tmp_path_factory.mktemp("whole")
    members = []
    for i in range(ROWS):
        members += [(f"{i}.jpg", jpeg(i, 48, 40) if i != 5 else b"not an image"), (f"{i}.txt", f"photo {i}".encode())]
    data = write_tar(folder / "in/a.tar", members)
    argv = f"--data {data} --model test_vit.r160_in1k --weights random --size 64 --levels x1 x2@int8 pooled --precision fp32"
    argv += " --executor inline --device cpu --block-rows 2 --max-failed-fraction 0.5 --carry txt"
    out = folder / "finished.zarr"
    assert run([*argv.split(), "--out", str(out)]) == 0
    store = FeatureStore.open(str(out))
    colours_for(store, store.level("x1"))
    half = shutil.copytree(out, folder / "half.zarr")
    store = FeatureStore.open(str(half))
    store.set_writing()
    store.ledger.revoke([1, 3])
    shutil.rmtree(half / "ledger/samples")
    (half / "x1/features/c/1/0/0/0").unlink()
    return Pair(finished=out, half=half, argv=argv.split())


def everything(store: FeatureStore) -> dict[str, Any]:
    """All that can be read of a store."""
    valid = store.valid()
    found: dict[str, Any] = {name: store.read(slice(None), name, missing="nan") for name in store.levels}
    keys = store.index.take(np.arange(len(store)), ["key", "txt"]).to_pylist()
    found |= {"valid": valid.tolist(), "keys": keys, "rows": store.rows([each["key"] for each in keys]).tolist()}
    found["records"] = store.records(slice(None), ["row", "key", "status", "width", "x_scale"]).to_pylist()
    found["failures"] = store.failures()["key"].to_pylist()
    found["sources"] = [(source.url, source.size) for source in store.index.sources]
    return found


def look(store: FeatureStore) -> str:
    """What jobs/show.py says of a store, but for times."""
    status = read_status(store)
    lines = [*row_lines(store, status, 8), *failure_lines(failures(store), status.rows), *list(status_lines(status))[:4]]
    colours_for(store, store.level("x1"))
    config_from_run(store.folder.url, store.folder.options)
    return "\n".join(line.partition(" has been silent")[0] for line in lines).replace(store.folder.displayed, "")


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return found.keys() == expected.keys() and all(
        np.array_equal(found[name], expected[name], equal_nan=True)
        if isinstance(expected[name], np.ndarray)
        else found[name] == expected[name]
        for name in expected
    )


def objects(store: Path) -> list[str]:
    return sorted(str(path.relative_to(store)) for path in store.rglob("*") if path.is_file())


# --- what is done to objects --------------------------------------------------------------------------------------------


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def empty(data: bytes) -> bytes:
    return b""


def garbage(data: bytes) -> bytes:
    return random.Random(0).randbytes(len(data))


def flipped(data: bytes) -> bytes:
    """One bit in the middle is another."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :]


def a_list(data: bytes) -> bytes:
    return b"[1, 2, 3]"


def another_table(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": [1.5, 2.5]}), sink)
    return sink.getvalue().to_pybytes()


DAMAGE = (cut, empty, garbage, flipped, a_list, another_table)

LEVELS_METADATA = "/zarr.json"
"""Zarr's documents below the root are for other tools; we read none of them, and who continues the store restores them."""


def complaint(store: Path, command: Callable[[FeatureStore], Any], expected: Any, named: str) -> str:
    """What is wrong with how `command` takes the store: empty where it gives what is expected, or names the object."""
    try:
        found = command(FeatureStore.open(str(store)))
    except (StorageError, ConfigError) as error:
        return "" if named in str(error) else f"does not name {named}: {error}"
    right = same(found, expected) if isinstance(expected, dict) else found == expected
    return "" if right else "another result"


@pytest.mark.parametrize(("which", "damages"), [("finished", DAMAGE), ("half", (cut, garbage))])
def test_damaged_object_is_named_or_does_not_matter(pair, tmp_path, which, damages):
    store = shutil.copytree(getattr(pair, which), tmp_path / "copy.zarr")
    results = [(command, command(FeatureStore.open(str(store)))) for command in (everything, look)]
    complaints = []
    for name in objects(store):
        if name.endswith(LEVELS_METADATA):
            continue
        whole = (store / name).read_bytes()
        for damage in damages:
            (store / name).write_bytes(damage(whole))
            for command, expected in results:
                if found := complaint(store, command, expected, name):
                    complaints.append(f"{name}, {damage.__name__}, {command.__name__}: {found}")
        (store / name).write_bytes(whole)

    assert complaints == []


@pytest.mark.parametrize(
    "name", ["index/sources.parquet", "index/samples/part-00000.parquet", "ledger/samples/part-00000.parquet"]
)
def test_object_that_is_missing_is_named(pair, tmp_path, name):
    store = shutil.copytree(pair.finished, tmp_path / "copy.zarr")
    (store / name).unlink()

    with pytest.raises(DamagedObject, match=f"{name} is missing"):
        everything(FeatureStore.open(str(store)))


def test_what_file_managers_and_other_tools_leave_is_no_part_of_the_store(pair, tmp_path):
    """Beside every object, and empty folder markers, copies, and records of tasks that there aren't."""
    store = shutil.copytree(pair.half, tmp_path / "copy.zarr")
    expected = [command(FeatureStore.open(str(store))) for command in (everything, look)]
    for folder in [store, *(path for path in store.rglob("*") if path.is_dir())]:
        for name in (".DS_Store", "_$folder$", "Thumbs.db", "notes (1).txt"):
            (folder / name).write_bytes(b"\0\0\0\1Bud1")
    commits = store / "ledger/commits"
    record = (commits / "00000000.parquet").read_bytes()
    for name in ("00000001 (1).parquet", "00000099.parquet", "1.parquet", "00000001.parquet.tmp", "-0000001.parquet"):
        (commits / name).write_bytes(record)
    (commits / "00000003.parquet").mkdir()
    (store / "runs/.Trash").mkdir()

    opened = FeatureStore.open(str(store))

    assert opened.ledger.done() == {0, 2}
    assert same(everything(opened), expected[0])
    assert look(opened) == expected[1]
    (commits / "00000003.parquet").rmdir()
    assert run([*pair.argv, "--out", str(store)]) == 0
    assert everything(FeatureStore.open(str(store)))["records"] == everything(FeatureStore.open(str(pair.finished)))["records"]


def test_folder_markers_on_s3_are_no_part_of_the_store(pair, tmp_path, s3_options):
    """Empty objects that consoles and Hadoop make for folders."""
    fs, base = s3fs.S3FileSystem(**s3_options["options"]), f"{s3_options['bucket']}/copy.zarr"
    for name in objects(pair.half):
        fs.pipe_file(f"{base}/{name}", (pair.half / name).read_bytes())
    for path in [pair.half, *(path for path in pair.half.rglob("*") if path.is_dir())]:
        name = str(path.relative_to(pair.half)).strip(".")
        for marker in (f"{base}/{name}/".replace("//", "/"), f"{base}/{name}_$folder$"):
            fs.call_s3("put_object", Bucket=marker.partition("/")[0], Key=marker.partition("/")[2], Body=b"")
    options = {"s3": s3_options["options"]}

    store = FeatureStore.open(f"s3://{base}", options)

    assert store.ledger.done() == {0, 2}
    assert same(everything(store), everything(FeatureStore.open(str(pair.half))))
    assert look(store) == look(FeatureStore.open(str(pair.half)))
    assert run([*pair.argv, "--out", f"s3://{base}", "--storage-options", json.dumps(options)]) == 0
    assert FeatureStore.open(f"s3://{base}", options).status == "complete"


# --- the root ---------------------------------------------------------------------------------------------------------


def edited(store: Path, change: Callable[[dict[str, Any]], Any], *, consistent: bool = True) -> None:
    """Change the root's attributes; `consistent`: with a fingerprint that fits them."""
    path = store / "zarr.json"
    document = json.loads(path.read_text())
    own = document["attributes"]["raylift"]
    before = own["fingerprint"]
    change(own)
    if consistent and own.get("fingerprint") == before and "spec" in own and "layout" in own:
        own["fingerprint"] = fingerprint_of(own["spec"], own["layout"])
    path.write_text(json.dumps(document))


@pytest.fixture
def copied(pair, tmp_path) -> Path:
    return shutil.copytree(pair.finished, tmp_path / "parent/copy.zarr")


@pytest.mark.parametrize("change", [{"model": "resnet50"}, {"weights": "0" * 64}, {"layers": [3]}, {"input_size": [32, 32]}])
def test_spec_that_does_not_fit_the_fingerprint_is_refused(copied, change):
    edited(copied, lambda own: own["spec"].update(change), consistent=False)

    with pytest.raises(DamagedObject, match=r"copy.zarr/zarr.json was edited or damaged: its fingerprint doesn't match"):
        FeatureStore.open(str(copied))


def test_root_of_which_any_value_has_another_type_is_named(pair, tmp_path):
    """Each value of the attributes, the spec, a level and the layout in turn, with a fingerprint that fits."""
    store = shutil.copytree(pair.finished, tmp_path / "copy.zarr")
    whole, expected = (store / "zarr.json").read_bytes(), everything(FeatureStore.open(str(store)))
    own = json.loads(whole)["attributes"]["raylift"]
    places = [(), ("spec",), ("layout",), ("spec", "levels", 0), ("spec", "levels", 2)]
    complaints = []
    for place in places:
        for key in _at(own, place):
            for value in ("x", -1, None, [1, 2, 3], {}, True, 10**400, _LACKS):
                edited(store, lambda own: _set(_at(own, place), key, value))  # noqa: B023 - called at once
                # Words that decide no shape are believed: they can't be told from others, once the fingerprint fits.
                free = isinstance(_at(own, place)[key], str) and value == "x"
                if not free and (found := complaint(store, everything, expected, "zarr.json")):
                    complaints.append(f"{place} {key} {value!r}: {found}")
                (store / "zarr.json").write_bytes(whole)

    assert complaints == []


_LACKS = object()


def _at(own: dict[str, Any], place: tuple[str | int, ...]) -> Any:
    for key in place:
        own = own[key]  # type: ignore[index]
    return own


def _set(values: dict[str, Any], key: str, value: object) -> None:
    if value is _LACKS:
        del values[key]
    else:
        values[key] = value


IMPOSSIBLE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "level leads out": lambda own: own["spec"]["levels"][0].update(name="../../EVIL"),
    "level below a level": lambda own: own["spec"]["levels"][0].update(name="x1/features"),
    "level in the index": lambda own: own["spec"]["levels"][0].update(name="index"),
    "level without a name": lambda own: own["spec"]["levels"][0].update(name=""),
    "level at the disk's root": lambda own: own["spec"]["levels"][0].update(name="/EVIL"),
    "level called dot": lambda own: own["spec"]["levels"][0].update(name="."),
    "two levels of one name": lambda own: own["spec"]["levels"][0].update(name="x2"),
    "no levels": lambda own: own["spec"].update(levels=[]),
    "negative grid": lambda own: own["spec"]["levels"][0].update(grid=[-4, 4]),
    "huge grid": lambda own: own["spec"]["levels"][0].update(grid=[10**9, 10**9]),
    "grid of one axis": lambda own: own["spec"]["levels"][0].update(grid=[16]),
    "no channels": lambda own: own["spec"]["levels"][0].update(channels=0),
    "start of one axis": lambda own: own["spec"]["levels"][0].update(start=[8.0]),
    "step of three axes": lambda own: own["spec"]["levels"][0].update(step=[16.0, 16.0, 16.0]),
    "step of nothing": lambda own: own["spec"]["levels"][0].update(step=[0.0, 16.0]),
    "unknown dtype": lambda own: own["spec"]["levels"][0].update(dtype="bfloat16"),
    "three rows a block": lambda own: own["layout"].update(block_rows=3),
    "no rows a block": lambda own: own["layout"].update(block_rows=0),
    "fewer rows than none": lambda own: own["layout"].update(n_rows=-8),
    "more rows than counted": lambda own: own["layout"].update(n_rows=9),
    "as many rows as fit nowhere": lambda own: own["layout"].update(n_rows=10**30),
    "counts that don't add up": lambda own: own["counts"].update(ok=8),
    "negative counts": lambda own: own["counts"].update(ok=9, failed=-1),
    "counts of what there isn't": lambda own: own["counts"].update(ok=6, lost=1),
    "format in words": lambda own: own.update(format="3"),
    "unknown setting": lambda own: own["spec"].update(temperature=1),
}


@pytest.mark.parametrize("change", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_root_that_no_store_can_have_is_refused_by_every_command(pair, copied, capfd, change):
    beside = sorted(copied.parent.parent.rglob("*"))
    edited(copied, change)

    with pytest.raises(StorageError, match=r"copy\.zarr/zarr\.json "):
        FeatureStore.open(str(copied))
    assert run([*pair.argv, "--out", str(copied)]) == 2
    said = capfd.readouterr().err
    assert "copy.zarr/zarr.json" in said
    assert "Traceback" not in said
    assert sorted(copied.parent.parent.rglob("*")) == beside


def test_level_that_no_store_can_have_is_refused_when_it_is_made():
    with pytest.raises(StorageError, match=r"can't be called '\.\./EVIL'"):
        Level(name="../EVIL", method="backbone", grid=(2, 2), channels=3, start=(0.0, 0.0), step=(1.0, 1.0))
    with pytest.raises(StorageError, match="power of two"):
        Layout(n_rows=5, block_rows=6, index="")


@pytest.mark.parametrize("name", ["../evil", "a//b", "/evil", "", "a/../../evil", "."])
def test_no_name_leads_out_of_a_folder(tmp_path, name):
    folder = Folder(str(tmp_path / "in"))

    for change in (lambda: folder.write(name, b""), lambda: folder.write_new(name, b""), lambda: folder.remove([name])):
        with pytest.raises(StorageError, match="no name of an object"):
            change()


# --- continuing -------------------------------------------------------------------------------------------------------


def _record(store: Path, change: Callable[[pa.Table], pa.Table], block: int = 0) -> None:
    """Change a commit record that is whole otherwise."""
    path = store / f"ledger/commits/{block:08d}.parquet"
    table = change(pq.read_table(path))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    path.write_bytes(sink.getvalue().to_pybytes())


def _metadata(table: pa.Table, **changes: str) -> pa.Table:
    return table.replace_schema_metadata({**table.schema.metadata, **{k.encode(): v for k, v in changes.items()}})


def _with(table: pa.Table, column: str, values: list[Any]) -> pa.Table:
    at = table.column_names.index(column)
    return table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))


def _damage(name: str, damage: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def change(store: Path) -> None:
        (store / name).write_bytes(damage((store / name).read_bytes()))

    return change


RECORD = "ledger/commits/00000000.parquet"

REPAIRED: dict[str, Callable[[Path], Any]] = {
    "record cut": _damage(RECORD, cut),
    "record empty": _damage(RECORD, empty),
    "record of another table": _damage(RECORD, another_table),
    "record of another task": lambda store: shutil.copy(store / "ledger/commits/00000002.parquet", store / RECORD),
    "record of another store": lambda store: _record(store, lambda t: _metadata(t, fingerprint="0" * 64)),
    "record of no store": lambda store: _record(store, lambda t: t.replace_schema_metadata(None)),
    "record that lists other objects": lambda store: _record(
        store, lambda t: _metadata(t, objects=json.dumps({"../../etc/passwd": 1}))
    ),
    "record whose sizes are words": lambda store: _record(
        store, lambda t: _metadata(t, objects=json.dumps(dict.fromkeys(json.loads(t.schema.metadata[b"objects"]), "x")))
    ),
    "record of fewer rows": lambda store: _record(store, lambda t: t.slice(0, 1)),
    "record of other rows": lambda store: _record(store, lambda t: _with(t, "row", [4, 5])),
    "record of an unknown status": lambda store: _record(store, lambda t: _with(t, "status", ["ok", "fine"])),
    "shard cut": _damage("x1/features/c/0/0/0/0", cut),
    "level's metadata edited": _damage("x1/features/zarr.json", lambda data: data.replace(b"float16", b"float32")),
    "level's metadata gone": lambda store: (store / "x2/scale/zarr.json").unlink(),
    "coordinates edited": _damage("x1/y/c/0", garbage),
    "list of sources cut": _damage("index/sources.parquet", cut),
    "index cut": _damage("index/samples/part-00000.parquet", cut),
    "index of another table": _damage("index/samples/part-00000.parquet", another_table),
    "keys in order cut": _damage("index/keys/part-00000.parquet", cut),
    "notes on a run": lambda store: next(store.glob("runs/*/run.json")).write_bytes(b"{"),
    "colours": _damage("views/rgb-64.json", cut),
}


@pytest.mark.parametrize("change", REPAIRED.values(), ids=REPAIRED)
def test_what_a_continued_run_can_do_again_it_does(pair, tmp_path, capfd, change):
    store = shutil.copytree(pair.half, tmp_path / "copy.zarr")
    change(store)

    assert run([*pair.argv, "--out", str(store)]) == 0, capfd.readouterr().err

    for name in objects(pair.finished):
        if not name.startswith(("runs/", "views/")):
            assert (store / name).read_bytes() == (pair.finished / name).read_bytes(), name
    assert "Traceback" not in capfd.readouterr().err


def test_a_stopped_run_goes_on_by_what_it_lists(pair, tmp_path, monkeypatch):
    """No record is read, and no shard looked at, before its first task; at its end each record is read once."""
    store = shutil.copytree(pair.half, tmp_path / "copy.zarr")
    asked: list[object] = []
    record, size, stream = Ledger.record, Folder.size, InlineExecutor.stream
    monkeypatch.setattr(Ledger, "record", lambda self, block, held=None: asked.append(block) or record(self, block, held))
    monkeypatch.setattr(Folder, "size", lambda self, name: asked.append(name) or size(self, name))
    monkeypatch.setattr(InlineExecutor, "stream", lambda *each: asked.append("first task") or stream(*each))

    assert run([*pair.argv, "--out", str(store)]) == 0

    assert asked[0] == "first task"
    assert sorted(each for each in asked if isinstance(each, int)) == [0, 1, 2, 3]
    # Of the tasks that an earlier run did, the shards, too: the other run's are this one's own.
    shards = [each for each in asked if isinstance(each, str) and "/c/" in each]
    assert sorted({int(name.split("/c/")[1].split("/")[0]) for name in shards}) == [0, 2]


REFUSED: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "record of other keys": (RECORD, lambda store: _record(store, lambda t: _with(t, "key", ["0", "7"])))
}


@pytest.mark.parametrize(("name", "change"), REFUSED.values(), ids=REFUSED)
def test_what_a_continued_run_cannot_do_again_it_names(pair, tmp_path, capfd, name, change):
    store = shutil.copytree(pair.half, tmp_path / "copy.zarr")
    change(store)

    code = run([*pair.argv, "--out", str(store)])

    said = capfd.readouterr().err
    assert code in (1, 2)
    assert f"copy.zarr/{name}" in said
    assert "Traceback" not in said
    assert FeatureStore.open(str(store)).status == "writing"


@pytest.mark.parametrize("content", [b"[1]\n", b'{"a": 1}\n{"b', b"\xff\n"])
def test_damaged_part_of_an_evaluation_is_named(tmp_path, content):
    folder = Folder(str(tmp_path))
    folder.write("parts/first.jsonl", content)

    with pytest.raises(DamagedObject, match=r"parts/first.jsonl is damaged .*; delete it and run the same command"):
        _records(folder, [Piece(name="first", items=(0,))])


# --- typed values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (int, True, "it must be int, not True"),
        (int, 1.0, "it must be int, not 1.0"),
        (float, "1", "it must be float, not '1'"),
        (tuple[int, ...], [1, "x"], r"\[1\] must be int, not 'x'"),
        (tuple[int, int], [1], "it must be a list of 2, not"),
        (tuple[int, int] | None, "x", "it must be a list, not 'x'"),
        (Layout, {"n_rows": 1, "block_rows": 1}, "it lacks index"),
        (Layout, {"n_rows": 1, "block_rows": 1, "index": "", "more": 1}, "it has more, which this version"),
    ],
)
def test_what_is_not_of_its_type_is_refused_with_its_place(kind, value, message):
    with pytest.raises(ValueError, match=message):
        decode(kind, value)


def test_values_are_decoded_as_they_were_encoded(pair):
    spec = FeatureStore.open(str(pair.finished)).spec

    assert FeatureSpec.from_json(spec.to_json()) == spec
    assert decode(float, 1) == 1
    assert decode(tuple[int, int] | None, None) is None
