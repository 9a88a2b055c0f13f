"""--jpeg-decoder nvjpeg: a store that is made by it, and where it's refused. Its decoder runs on the CPU here, by torchcodec."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.extract import run
from pipelines.executors import InlineExecutor
from pipelines.extraction import prepare as prepare_module
from pipelines.extraction.run import extract
from storage.paths import Folder
from storage.spec import FingerprintMismatch
from storage.store import FeatureStore
from tests.conftest import jpeg, write_tar
from tests.operators.test_nvjpeg import FOR_CPU, turned


@pytest.fixture
def as_if_there_was_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(prepare_module, "require_decoder", lambda *_: None)


def mixed(folder: Path) -> str:
    members = [(f"{n:02d}.jpg", jpeg(n)) for n in range(4)]
    members += [("04.jpg", FOR_CPU["damaged"]), ("05.jpg", turned(6)), ("06.jpg", FOR_CPU["CMYK"]), ("07.png", FOR_CPU["PNG"])]
    return str(write_tar(folder / "in/a.tar", members))


def rows(out: str) -> list[dict[str, object]]:
    return pq.read_table(Path(out) / "ledger/samples").to_pylist()


def test_store_of_mixed_images(tmp_path, tiny, as_if_there_was_a_gpu):
    data = mixed(tmp_path)
    plain = tiny(data, block_rows=8, max_failed_fraction=0.5)
    other = plain.changed(out=plain.out + "-gpu", jpeg_decoder="nvjpeg")

    extract(plain, InlineExecutor())
    summary = extract(other, InlineExecutor())

    assert (summary.ok, summary.failed) == (7, 1)
    found = rows(other.out)
    assert [row["conversion"] for row in found] == [*["nvjpeg"] * 4, None, "exif-rotate, nvjpeg", "cmyk->rgb", None]
    assert [row["status"] for row in found] == ["ok"] * 4 + ["failed"] + ["ok"] * 3
    for before, after in zip(rows(plain.out), found, strict=True):
        same = before.keys() - {"conversion"}
        assert {name: before[name] for name in same} == {name: after[name] for name in same}
    stores = [FeatureStore.open(each.out) for each in (plain, other)]
    assert "jpeg_decoder" not in stores[0].spec.to_json()
    assert "jpeg_decoder" not in (stores[0].root.config or {})
    assert stores[1].spec.jpeg_decoder == (stores[1].root.config or {})["jpeg_decoder"] == "nvjpeg"
    maps = [np.asarray(store.read(np.array([0, 1, 2, 3, 5, 6, 7]), "x1"), np.float32) for store in stores]
    close = np.linalg.norm(maps[0] - maps[1], axis=-1) / np.linalg.norm(maps[0], axis=-1)
    assert 0 < close[:5].max() < 0.2
    np.testing.assert_array_equal(maps[0][5:], maps[1][5:])
    with pytest.raises(FingerprintMismatch, match="jpeg_decoder"):
        extract(other.changed(jpeg_decoder="cpu"), InlineExecutor())
    with pytest.raises(FingerprintMismatch, match="jpeg_decoder"):
        extract(plain.changed(jpeg_decoder="nvjpeg"), InlineExecutor())


def test_images_that_are_decoded_apart_have_the_same_pixels(tmp_path, tiny, as_if_there_was_a_gpu):
    """As after a worker's death: in a process of its own, by the same decoder."""
    plain = tiny(mixed(tmp_path), block_rows=8, max_failed_fraction=0.5, jpeg_decoder="nvjpeg")
    suspect = plain.changed(out=plain.out + "-suspect")
    Folder(suspect.out).write("runs/20250101T000000-abcdef/attempts/00000000/marker", b"")

    extract(plain, InlineExecutor())
    extract(suspect, InlineExecutor())

    for name in ("x1/features/c/0/0/0/0", "ledger/samples/part-00000.parquet"):
        assert (Path(suspect.out) / name).read_bytes() == (Path(plain.out) / name).read_bytes()


def test_plan_says_which_decoder(tmp_path, tiny, as_if_there_was_a_gpu):
    from pipelines.extraction.plan import MEMORY_BYTES, make_plan
    from pipelines.extraction.prepare import prepare, resolve

    config = tiny(str(write_tar(tmp_path / "in/a.tar", [("0.jpg", jpeg(0))])))
    plain, other = (
        make_plan(prepare(resolve(config.changed(jpeg_decoder=each)), InlineExecutor())) for each in ("cpu", "nvjpeg")
    )

    assert other.device_bytes - plain.device_bytes == MEMORY_BYTES
    assert "decoded and resized by nvjpeg on the GPU" in other.describe()
    assert "nvjpeg" not in plain.describe()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--device", "cpu"], "--jpeg-decoder nvjpeg would change nothing: nvJPEG runs on the GPU of the actor that computes"),
        (["--decode-on", "cluster"], "--jpeg-decoder nvjpeg would change nothing: nvJPEG runs on the GPU"),
        (["--jpeg-draft"], "--jpeg-draft would change nothing: it is used with --jpeg-decoder cpu only"),
        ([], "decodes on the GPU of the actor that computes, and these workers have none"),
    ],
    ids=["device cpu", "decode on cluster", "draft", "no GPU"],
)
@pytest.mark.parametrize("plan", [[], ["--plan"]], ids=["run", "plan"])
def test_where_no_gpu_decodes_it_is_refused(flags, words, plan, tmp_path, capsys):
    data = str(write_tar(tmp_path / "in/a.tar", [("0.jpg", jpeg(0))]))
    out = tmp_path / "out.zarr"

    code = run(["debug", "--data", data, "--out", str(out), "--jpeg-decoder", "nvjpeg", *flags, *plan])

    assert code == 2
    assert words in capsys.readouterr().err
    assert not out.exists() or not list(out.glob("zarr.json"))
