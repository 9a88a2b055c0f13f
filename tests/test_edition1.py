"""What the first edition's code wrote (tests/data/edition1) is read, and continued to the end that it came to itself.

Only command lines and stored files are used, so that this holds whatever modules are called.
"""

import importlib
import json
import re
import shlex
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import zarr

ARCHIVE = Path(__file__).parent / "data/edition1/written.tar.gz"

PROGRAMS = {"extract": ("extract",), "train": ("train",), "evaluate": ("evaluate",), "grid": ("tables", "grid")}
"""What the jobs that wrote it are called now."""

MEASURED = {"images_per_s", "run_images_per_s", "seconds", "train_seconds"}
"""What documents say of the time that something took."""

Run = Callable[..., str]


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """A copy of all that was written, as the working directory."""
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys) -> Run:
    """Run a command line; returns what it printed. The exit code must be `code`."""

    def run(program: str, *argv: str, code: int = 0) -> str:
        found = importlib.import_module(f"jobs.{program}").run(list(argv))
        printed = capsys.readouterr()
        assert found == code, printed.err
        return printed.err if code else printed.out

    return run


def again(old: Path, out: str, *more: str) -> tuple[str, list[str]]:
    """The program and the command line that wrote `out`, with more flags."""
    (found,) = [each for each in json.loads((old / "commands.json").read_text()) if each["out"] == out]
    program, *words = PROGRAMS[found["program"]]
    return program, [*words, *shlex.split(found["line"]), "--out", out, *more]


def objects(folder: Path) -> dict[str, bytes]:
    """All files, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lasting(folder: Path) -> dict[str, bytes]:
    """All files but what says how a run went and where the input lies, and what a run draws."""
    passing = r"runs/|views/rgb|index/sources|(.*/)?(pictures|tensorboard)/|.*\.png$"
    return {name: data for name, data in objects(folder).items() if not re.match(passing, name)}


def plain(value: object, without: set[str]) -> object:
    """A JSON value without some of its objects' entries."""
    if isinstance(value, dict):
        return {name: plain(each, without) for name, each in value.items() if name not in without}
    return [plain(each, without) for each in value] if isinstance(value, list) else value


def leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """All values that are neither objects nor lists, with their places."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(each, f"{name}/{key}")
    else:
        yield name, value


def require_close(found: object, expected: object, without: set[str] = MEASURED, tolerance: float = 2e-3) -> None:
    """JSON values equal but for some entries, what is said since, and the last bits of numbers: processors differ in them."""
    ours, theirs = (dict(leaves(plain(each, without))) for each in (found, expected))
    assert ours.keys() >= theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, float):
            assert ours[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
        else:
            assert ours[name] == value, name


def read_json(path: Path) -> object:
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- stores -----------------------------------------------------------------------------------------------------------


def ledger(store: Path) -> pa.Table:
    return pq.read_table(store / "ledger/samples/part-00000.parquet").drop_columns(["source"])


ADDED_SINCE = {f"index/{array}/{name}" for array in ("key", "valid") for name in ("zarr.json", "c/0")}
"""What a store that is begun today has beside what the first edition wrote."""


def require_same_store(found: Path, expected: Path, *, begun_today: bool = False) -> None:
    """Metadata, index and ledger equal but for versions and for where the input lies, features up to rounding.

    `begun_today`: in today's format. One that was begun in an older format stays in it."""
    assert lasting(found).keys() == lasting(expected).keys() | (ADDED_SINCE if begun_today else set())
    documents = [read_json(each / "zarr.json")["attributes"] for each in (found, expected)]
    require_close(*documents, without={"versions"} | ({"format"} if begun_today else set()), tolerance=0)
    assert ledger(found) == ledger(expected)
    for path in expected.rglob("zarr.json"):
        if read_json(path)["node_type"] != "array":
            continue
        name = str(path.parent.relative_to(expected))
        array, ours = zarr.open_array(path.parent, mode="r")[:], zarr.open_array(found / name, mode="r")[:]
        assert (ours.dtype, ours.shape) == (array.dtype, array.shape)
        tolerance = 1 if array.dtype == np.int8 else 2e-3
        np.testing.assert_allclose(ours.astype(float), array.astype(float), atol=tolerance, rtol=2e-3, err_msg=name)


def test_finished_store_is_shown_and_stays_as_it_is(old, run):
    before = objects(old / "finished.zarr")

    assert "complete" in run("show", "status", "finished.zarr")
    assert "ImageRefused" in run("show", "failures", "finished.zarr")
    assert "00008" in run("show", "rows", "finished.zarr")
    assert "1.0000" in run("show", "compare", "finished.zarr", "finished.zarr", "--level", "x2")
    assert run("show", "export", "images.zarr", "--level", "x2", "--out", "vectors")
    assert objects(old / "finished.zarr") == before

    program, argv = again(old, "finished.zarr")
    run(program, *argv)
    after = objects(old / "finished.zarr")
    assert {name for name in before if after[name] != before[name]} <= {"index/sources.parquet"}
    assert all(name.startswith("runs/") for name in after.keys() - before.keys())


def test_half_finished_store_ends_as_the_finished_one(old, run):
    half, finished = old / "half.zarr", old / "finished.zarr"
    kept = {
        name: data
        for name, data in objects(half).items()
        if re.search(r"(ledger/commits/0000000[012]\.parquet|/(features|scale)/c/[012]/.*)$", name)
    }
    assert len(kept) == 3 + 3 * 4
    assert "complete" not in run("show", "status", "half.zarr").splitlines()[0]

    program, argv = again(old, "half.zarr")
    assert "8 images ok, 1 failed" in run(program, *argv)

    after = objects(half)
    assert {name: after[name] for name in kept} == kept
    assert not any(name.startswith(".partial/") for name in after)
    require_same_store(half, finished)
    assert "complete" in run("show", "status", "half.zarr")


def test_failed_rows_are_tried_again(old, run):
    program, argv = again(old, "finished.zarr", "--retry-failed")

    assert "this run: 2 images" in run(program, *argv)


def test_old_checkpoints_give_the_levels_that_are_stored(old, run):
    (old / "images.zarr").rename(old / "expected.zarr")

    program, argv = again(old, "images.zarr")
    run(program, *argv)

    require_same_store(old / "images.zarr", old / "expected.zarr", begun_today=True)


def test_settings_of_a_store_are_those_it_was_begun_with(old, run):
    before = objects(old / "half.zarr")
    program, argv = again(old, "half.zarr", "--facet", "key")

    assert "FingerprintMismatch" in run(program, *argv, code=2)
    assert objects(old / "half.zarr") == before


# --- training ---------------------------------------------------------------------------------------------------------

TRAINED = ("lift", "vit-up", "deap", "linear-stored")


def require_same_training(found: Path, expected: Path) -> None:
    """Checkpoints and metrics equal but for time and rounding."""
    assert lasting(found).keys() == lasting(expected).keys()
    require_close(read_lines(found / "metrics.jsonl"), read_lines(expected / "metrics.jsonl"))
    require_close(read_json(found / "checkpoints.json"), read_json(expected / "checkpoints.json"))
    for path in expected.glob("steps/*/*"):
        ours = found / path.relative_to(expected)
        if path.suffix == ".json":
            assert read_json(ours) == read_json(path)
            continue
        arrays, wanted = safetensors.numpy.load(ours.read_bytes()), safetensors.numpy.load(path.read_bytes())
        assert arrays.keys() == wanted.keys()
        for name, array in wanted.items():
            assert arrays[name].dtype == array.dtype
            np.testing.assert_allclose(arrays[name], array, atol=2e-3, rtol=2e-2, err_msg=name)


@pytest.mark.parametrize("name", TRAINED)
def test_half_finished_training_ends_as_the_finished_one(old, run, name):
    half = old / f"{name}-half"
    begun = (half / "run.json").read_bytes()
    assert read_json(half / "checkpoints.json")["last"] == "steps/00000002"
    assert f"{name}-half" in run("show", "training", f"{name}-half", name)

    program, argv = again(old, f"{name}-half")
    assert "steps" in run(program, *argv)

    assert (half / "run.json").read_bytes() == begun
    require_same_training(half, old / name)


def test_finished_training_stays_as_it_is(old, run):
    for name in ("lift", "jbu", "vit-up", "deap", "linear", "linear-stored"):
        before = lasting(old / name)
        program, argv = again(old, name)

        run(program, *argv)

        after = lasting(old / name)
        assert {each for each in before if after[each] != before[each]} <= {"metrics.jsonl"}, name
        assert read_lines(old / name / "metrics.jsonl")[-1]["step"] in (6, 8)
        assert after.keys() == before.keys()


def test_finished_trainings_are_shown_side_by_side(old, run):
    names = ("lift", "jbu", "vit-up", "deap", "linear")

    displayed = run("show", "training", *names)

    assert all(re.search(rf"\b{name}\b", displayed) for name in names)
    assert "0.0" in displayed


@pytest.mark.parametrize("name", TRAINED)
def test_settings_of_a_training_are_those_it_was_begun_with(old, run, name):
    before = lasting(old / f"{name}-half")
    program, argv = again(old, f"{name}-half", "--lr", "0.5")

    assert "was begun with other settings" in run(program, *argv, code=2)
    assert lasting(old / f"{name}-half") == before


def test_other_images_under_the_same_names_are_refused(old, run):
    (old / "s-0.tar").write_bytes((old / "s-0.tar").read_bytes().replace(b"\xff\xd9", b"\xff\xd8"))
    program, argv = again(old, "lift-half")

    assert "other images, held-out images under the same names" in run(program, *argv, code=2)


# --- evaluations ------------------------------------------------------------------------------------------------------

EVALUATED = ("correspondence", "similarity", "probe")

STORED = {
    "model",
    "weights",
    "precision",
    "layers",
    "facet",
    "norm",
    "pos_embed",
    "stride",
    "encoding",
    "levels",
    "force_upsampler",
}
"""Settings of an evaluation of stores: results say those of the stores, where they used to say what nothing had used."""


def report_of(folder: Path, name: str) -> object:
    found = read_json(folder / "results.json")
    if name == "similarity":  # of a store
        found["config"] = plain(found["config"], STORED)
    return found


SAID_SINCE = {"versions", "items", "clipped"}
"""What is another version's, or wasn't said by the first one."""


@pytest.mark.parametrize("name", EVALUATED)
def test_half_finished_evaluation_ends_as_the_finished_one(old, run, name):
    half, finished = old / f"{name}-half", old / name
    begun = {each: data for each, data in objects(half).items() if not each.startswith(".partial/")}
    program, argv = again(old, f"{name}-half")

    assert "low-res" in run(program, *argv)

    after = objects(half)
    assert {each: after[each] for each in begun} == begun
    assert {each for each in lasting(half) if not each.startswith(".partial/")} == lasting(finished).keys()
    require_close(report_of(half, name), report_of(finished, name), {*SAID_SINCE, "out"}, tolerance=0.05)
    for path in (finished / "parts").iterdir():
        require_close(read_lines(half / "parts" / path.name), read_lines(path), tolerance=0.02)


@pytest.mark.parametrize("name", EVALUATED)
def test_finished_evaluation_gives_its_report_again(old, run, name):
    before, expected = objects(old / name), report_of(old / name, name)
    program, argv = again(old, name)

    run(program, *argv)

    after = objects(old / name)
    assert {each for each in before if after[each] != before[each]} <= {"results.json", "results.md"}
    require_close(report_of(old / name, name), expected, SAID_SINCE, tolerance=1e-9)


def test_settings_of_an_evaluation_are_those_it_was_begun_with(old, run):
    program, argv = again(old, "correspondence-half", "--seed", "3")

    assert "was begun with other settings" in run(program, *argv, code=2)


# --- grids ------------------------------------------------------------------------------------------------------------

CELLS = tuple(f"test_vit.r160_in1k-64-voc-linear-{seed}" for seed in (0, 1))
SPEEDS = {"speeds", "speed", "images_per_s", "reference_images_per_s", "relative", "versions", "out", *MEASURED}


def test_half_finished_grid_ends_as_the_finished_one(old, run):
    half, finished = old / "grid-half", old / "grid"
    done = objects(half / CELLS[0])
    program, argv = again(old, "grid-half")

    run(program, *argv)

    assert objects(half / CELLS[0]) == done
    require_same_training(half / CELLS[1], finished / CELLS[1])
    for cell in CELLS:
        require_close(read_json(half / cell / "cell.json"), read_json(finished / cell / "cell.json"), {"settings", *MEASURED})
    require_close(read_json(half / "grid.json"), read_json(finished / "grid.json"), SPEEDS)


def test_finished_grid_gives_its_tables_again(old, run):
    before = objects(old / "grid")
    program, argv = again(old, "grid")

    run(program, *argv)

    after = lasting(old / "grid")
    # Speeds that don't say of which machine they are are measured again.
    changed = {each for each in before if after.get(each, before[each]) != before[each]}
    assert changed <= {"grid.json", "grid.md", "speed.json"}
    require_close(read_json(old / "grid/grid.json"), json.loads(before["grid.json"]), SPEEDS, 1e-9)
