"""One image that takes everything: it's found, recorded as failed with the reason, and its neighbours are done."""

import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from operators.codecs.memory import BYTES_PER_PIXEL, DecodeMemory, decode_bytes
from operators.codecs.refusal import ImageDamaged, ImageRefused
from operators.image import Geometry, decode
from pipelines.executors import InlineExecutor, Loaded
from pipelines.extraction import sandbox as sandbox_module
from pipelines.extraction import worker as worker_module
from pipelines.extraction.config import ExtractConfig
from pipelines.extraction.decoding import DecodeStuck, DecodeThreads
from pipelines.extraction.plan import make_plan
from pipelines.extraction.prepare import prepare, resolve
from pipelines.extraction.run import extract
from pipelines.extraction.sandbox import DecoderDied, Sandbox
from pipelines.extraction.worker import ShardWorker
from storage import sample_images
from storage.ledger import image_digest
from storage.paths import Folder
from tests.conftest import jpeg, write_tar

ROOT = Path(__file__).resolve().parents[3]
SQUARE = Geometry(mode="crop", height=32, width=32)

POISONED = """
import os, pipelines.extraction.sandbox as sandbox, time
decode = sandbox.decode
def poisoned(data, *args, **options):
    if data.endswith(b"kills"):
        os.kill(os.getpid(), 11)
    if data.endswith(b"hangs"):
        time.sleep(1000)
    if data.endswith(b"fills"):
        bytearray(2**50)
    return decode(data, *args, **options)
sandbox.decode = poisoned
sandbox.serve()
"""
"""A decoding process in which some images do what no image that we know does any more."""


@pytest.fixture
def poisoned(monkeypatch) -> None:
    monkeypatch.setattr(sandbox_module, "_PROGRAM", POISONED)
    monkeypatch.setattr(sandbox_module, "DECODE_SECONDS", 3.0)


@pytest.fixture
def sandbox(poisoned):
    with Sandbox(SQUARE, max_pixels=10**6, draft=False) as found:
        yield found


# --- the process ----------------------------------------------------------------------------------------------------------


def test_pixels_placement_and_words_are_those_of_decoding_here(sandbox):
    grey = io.BytesIO()
    Image.open(io.BytesIO(jpeg(2, 50, 90))).convert("L").save(grey, "PNG")
    for data in (jpeg(1), grey.getvalue()):
        here = decode(data, SQUARE, max_pixels=10**6)

        there = sandbox.decode(data)

        np.testing.assert_array_equal(there.pixels, here.pixels)
        assert (there.width, there.height, there.placement, there.conversion) == (
            here.width,
            here.height,
            here.placement,
            here.conversion,
        )


def test_refusals_are_those_of_decoding_here(sandbox):
    cut, closed = jpeg(1)[:900], jpeg(1)[:900] + b"\xff\xd9"
    for data, kind, name in (
        (b"junk", ImageRefused, "ImageRefused"),
        (cut, ImageDamaged, "OSError"),
        (closed, ImageDamaged, "ImageDamaged"),
    ):
        with pytest.raises(ImageRefused) as here:
            decode(data, SQUARE, max_pixels=10**6)
        with pytest.raises(ImageRefused) as there:
            sandbox.decode(data)

        assert (type(there.value), str(there.value), there.value.kind) == (kind, str(here.value), name)
        assert here.value.kind == name


def test_crashes_hangs_and_greed_end_their_image_alone(sandbox):
    with pytest.raises(DecoderDied, match=r"ended its process twice \(SIGSEGV, SIGSEGV\)"):
        sandbox.decode(jpeg(1) + b"kills")
    with pytest.raises(DecoderDied, match="took more than 3 s"):
        sandbox.decode(jpeg(1) + b"hangs")
    with pytest.raises(MemoryError):
        sandbox.decode(jpeg(1) + b"fills")

    assert sandbox.decode(jpeg(1)).width == 96


# --- a run ----------------------------------------------------------------------------------------------------------------


def sixteen(folder: Path, poison: dict[int, bytes]) -> str:
    members = [(f"{n:02d}.jpg", jpeg(n) + poison.get(n, b"")) for n in range(16)]
    return str(write_tar(folder / "in/a.tar", members))


def records(config: ExtractConfig) -> list[dict[str, object]]:
    return pq.read_table(Path(config.out) / "ledger/samples").to_pylist()


@pytest.fixture
def config(tmp_path, tiny) -> Callable[..., ExtractConfig]:
    def make(poison: dict[int, bytes], **changes: object) -> ExtractConfig:
        return tiny(sixteen(tmp_path, poison), block_rows=16, actor_cpus=2, max_failed_fraction=0.5, **changes)

    return make


def test_three_poisonous_images_of_one_task_fail_and_thirteen_are_done(config, poisoned, monkeypatch):
    """In threads the first one hangs for as long as the test runs; alone, each is found by what it does."""
    ended = threading.Event()
    original = worker_module.decode

    def hang(data, geometry, **options):
        if data.endswith((b"kills", b"hangs", b"fills")):
            ended.wait()
        return original(data, geometry, **options)

    monkeypatch.setattr(worker_module, "decode", hang)
    monkeypatch.setattr(worker_module, "DECODE_SECONDS", 2.0)
    made = config({3: b"hangs", 7: b"kills", 12: b"fills"})

    summary = extract(made, InlineExecutor())
    ended.set()

    assert (summary.ok, summary.failed) == (13, 3)
    found = {row["row"]: (row["stage"], row["error"]) for row in records(made) if row["status"] == "failed"}
    assert found == {3: ("worker", "WorkerDied"), 7: ("worker", "WorkerDied"), 12: ("decode", "MemoryError")}


def test_killed_runs_condemn_no_image(config, monkeypatch):
    """Markers of earlier runs make a task suspect; what is stored of it is the same."""
    plain = config({})
    suspect = config({}, out=plain.out.replace("out", "suspect"))
    extract(plain, InlineExecutor())
    for run in range(10):
        Folder(suspect.out).write(f"runs/2025010{run}T000000-abcdef/attempts/00000000/marker", b"")

    summary = extract(suspect, InlineExecutor())

    assert (summary.ok, summary.failed) == (16, 0)
    for name in ("x1/features/c/0/0/0/0", "ledger/samples/part-00000.parquet"):
        assert (Path(suspect.out) / name).read_bytes() == (Path(plain.out) / name).read_bytes()


def test_short_memory_is_no_verdict(config, monkeypatch):
    """Decoded again, one at a time, where others had taken the memory."""
    original, seen = worker_module.decode, set()

    def short(data, geometry, **options):
        if data not in seen:
            seen.add(data)
            raise MemoryError
        return original(data, geometry, **options)

    monkeypatch.setattr(worker_module, "decode", short)

    summary = extract(config({}), InlineExecutor())

    assert (summary.ok, summary.failed, len(seen)) == (16, 0, 16)


def test_memory_that_stays_short_sends_the_task_to_run_alone(config, monkeypatch):
    def short(data, geometry, **options):
        raise MemoryError

    monkeypatch.setattr(worker_module, "decode", short)

    assert extract(config({}), InlineExecutor()).ok == 16


def test_stage_that_only_loads_hands_on_that_a_task_is_to_run_alone(config, monkeypatch):
    made, seen = config({}), []
    original = ShardWorker.run

    def apart(self, task, loaded=None):
        if not self.setup.solo:
            there = self.load(task)
            loaded = Loaded.from_notes(there.pixels, there.notes())
        report = original(self, task, loaded)
        seen.append(report.outcome == "set_aside")
        return report

    def short(*_, **__):
        raise MemoryError

    monkeypatch.setattr(ShardWorker, "run", apart)
    monkeypatch.setattr(worker_module, "decode", short)

    assert extract(made, InlineExecutor()).ok == 16
    assert seen == [True, False]


def test_large_files_fail_before_they_are_read(config, monkeypatch):
    read, original = [], sample_images.try_ranges
    monkeypatch.setattr(sample_images, "try_ranges", lambda ranges, options: read.extend(ranges) or original(ranges, options))
    made = config({4: bytes(100_000)}, max_image_bytes=50_000)

    summary = extract(made, InlineExecutor())

    assert (summary.ok, summary.failed) == (15, 1)
    assert len(read) == 15
    assert max(size for _, _, size in read) < 50_000
    assert "max_image_bytes = 50000" in records(made)[4]["message"]


def test_records_hold_the_digest_of_what_was_read(config):
    made = config({2: b"more", 9: bytes(100_000)}, max_image_bytes=50_000)

    extract(made, InlineExecutor())

    expected = [image_digest(jpeg(n) + (b"more" if n == 2 else b"")) if n != 9 else None for n in range(16)]
    assert [row["digest"] for row in records(made)] == expected


POISON_EVERYWHERE = """
import ctypes, PIL.Image
original = PIL.Image.open
def poisoned(file, *args, **options):
    if file.getvalue().endswith(b"kills"):
        # A fault of this very thread, as a decoder's is. A signal to the process is handled by another thread in Ray's workers,
        # and this one goes on meanwhile: the image may be done before the process is dead.
        ctypes.string_at(0)
    return original(file, *args, **options)
PIL.Image.open = poisoned
"""
"""What Python runs first in any process that has it on its path: the driver, Ray's workers, the decoding process."""


def run_job(config: ExtractConfig, poison: Path, *more: str) -> subprocess.CompletedProcess[str]:
    poison.mkdir(exist_ok=True)
    (poison / "sitecustomize.py").write_text(POISON_EVERYWHERE)
    path = os.pathsep.join([str(poison), str(ROOT)])
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": path}
    command = [sys.executable, "jobs/extract.py", "--data", config.data[0], "--out", config.out, "--model", config.features.model]
    command += ["--weights", "random", "--size", "64", "--precision", "fp32", "--block-rows", "16"]
    command += ["--levels", *config.features.levels]
    command += ["--max-failed-fraction", "0.5", *more]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_image_that_kills_the_driver_is_found_by_the_next_run(config, tmp_path, poisoned, monkeypatch):
    made = config({5: b"kills"})

    first = run_job(made, tmp_path / "poison", "--executor", "inline")
    monkeypatch.setattr(worker_module, "decode", lambda *_, **__: pytest.fail("decoded in the driver"))
    second = extract(made, InlineExecutor())

    assert first.returncode == -11
    assert (second.ok, second.failed) == (15, 1)
    assert [row["row"] for row in records(made) if row["status"] == "failed"] == [5]


def test_image_that_kills_workers_on_ray_is_found_in_one_run(config, tmp_path):
    made = config({5: b"kills"})

    ended = run_job(made, tmp_path / "poison", "--executor", "ray", "--ray-address", "local", "--actors", "1")

    assert ended.returncode == 0, ended.stderr[-3000:]
    found = {row["row"]: row["error"] for row in records(made) if row["status"] == "failed"}
    assert found == {5: "WorkerDied"}


# --- memory ---------------------------------------------------------------------------------------------------------------


def opened(side: int) -> Image.Image:
    data = io.BytesIO()
    Image.new("RGB", (side, side)).save(data, "PNG")
    return Image.open(data)


def test_images_decoded_at_once_stay_below_the_bound():
    memory = DecodeMemory(100 * 100)
    image, most, now = opened(60), [0], [0]
    assert 3 < memory.capacity / decode_bytes(image) < 4

    def use() -> None:
        for _ in range(50):
            with memory.hold(image):
                now[0] += 1
                most[0] = max(most[0], now[0])
                now[0] -= 1

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert 1 <= most[0] <= 3


def test_waiting_ends_when_there_is_room():
    memory, image, order = DecodeMemory(60 * 60), opened(60), []

    def second() -> None:
        with memory.hold(image):
            order.append("second")

    with memory.hold(image):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join(10)

    assert order == ["first", "second"]


def test_image_without_room_ever_is_refused():
    refused = pytest.raises(ImageRefused, match=r"200 x 200 pixels of PNG take about 480,000 bytes to decode, more than")
    with refused, DecodeMemory(100 * 100).hold(opened(200)):
        pass


MEASURED = """
import io
from PIL import Image
from operators.codecs.memory import DecodeMemory
from operators.image import Geometry, decode, limit_pillow
from pipelines.costs.process import high_water
from pipelines.extraction.decoding import DecodeThreads
out = io.BytesIO()
Image.new("RGB", (5000, 5000), (1, 2, 3)).save(out, "PNG")
limit_pillow(25_000_000)
memory, small = DecodeMemory(25_000_000), Geometry(mode="crop", height=32, width=32)
before = high_water()
work = lambda data: decode(data, small, max_pixels=25_000_000, memory=memory).width
assert DecodeThreads(8).map(work, [out.getvalue()] * 8, 100) == [5000] * 8
print(high_water() - before, memory.capacity)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no high-water mark of memory here")
def test_large_images_in_many_threads_take_no_more_than_the_bound():
    """Eight at once would take 800 MB."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", MEASURED], env=environment, capture_output=True, text=True, check=True)

    taken, bound = map(int, ended.stdout.split())

    assert 0 < taken < bound == 400_000_000


def test_plan_counts_input_and_decoding(config):
    made = config({4: bytes(3_000_000)})
    plain = make_plan(prepare(resolve(made), InlineExecutor()))
    bounded = config({4: bytes(3_000_000)}, max_image_bytes=2_000_000, max_image_pixels=10**6)
    small = make_plan(prepare(resolve(bounded), InlineExecutor()))

    assert plain.decode_bytes == 89_478_485 * BYTES_PER_PIXEL
    assert small.decode_bytes == 10**6 * BYTES_PER_PIXEL
    assert plain.host_bytes - plain.decode_bytes - (small.host_bytes - small.decode_bytes) == pytest.approx(
        4 * 3_000_000, rel=0.01
    )
    assert "to decode large images" in plain.describe()


# --- threads --------------------------------------------------------------------------------------------------------------


def test_threads_that_hang_are_left_behind_and_others_go_on():
    threads, ended = DecodeThreads(1), threading.Event()

    with pytest.raises(DecodeStuck, match=r"image 1 of 3 has been decoded for 0\.2 s"):
        threads.map(lambda item: ended.wait() if item == 1 else item, [0, 1, 2], 0.2)

    assert threads.map(lambda item: item + 1, [1, 2], 10) == [2, 3]
    ended.set()
