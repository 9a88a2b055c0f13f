"""Fixtures shared by all tests: real photographs in tars, tiny configs, an S3 server, a local Ray."""

import functools
import gc
import io
import multiprocessing
import os
import re
import shutil
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before anything imports ray: loopback only.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
# Before anything imports torch or NumPy: of two processes on two cores, each with two threads, half of the time is spent waiting.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from pipelines.executors import InlineExecutor
from pipelines.extraction.config import ExtractConfig
from pipelines.indexing import RunInput
from storage.inputs import Listing
from storage.tars import MemberRules
from tests.goldens import SHARED

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext

    from tests.forks import Forks


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The project's data packs beside the checkout; tests that want them skip where they are missing."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data is not here")
    return folder


LONGEST = (
    "tests/test_continued_settings.py", "training/test_lift.py", "training/test_objectives.py",
    "tests/test_continued_inputs.py", "extraction/test_ray.py", "storage/test_every_kill.py", "jobs/test_benchmark.py",
    "extraction/test_faults.py", "contracts/test_executor.py", "evaluation/test_faults.py", "jobs/test_browse_page.py",
    "tests/test_distribution.py", "storage/test_growth.py", "upsamplers/test_featup.py", "storage/test_input_identity.py",
    "extraction/test_sandbox.py", "pipelines/test_feature_datasets.py", "tables/test_grid.py",
    "extraction/test_reference_program.py", "extraction/test_s3.py", "cluster/test_resources.py",
    "storage/test_growing_readers.py", "jobs/test_evaluate.py", "jobs/test_search_index.py", "costs/test_runtime.py",
    "evaluation/test_navi.py", "evaluation/test_evaluation.py", "tests/test_readme.py", "training/test_readout.py",
    "tables/test_papers.py", "storage/test_packs.py", "evaluation/test_detection.py", "jobs/test_show.py",
    "evaluation/test_readouts.py", "cluster/test_session.py", "operators/test_lean_timm.py", "storage/test_tampered.py",
    "training/test_vitdet.py", "jobs/test_share.py", "training/test_vit_up.py", "benchmarks/test_upsamplers.py",
    "features/test_learned.py", "benchmarks/test_scale.py", "extraction/test_start.py", "features/test_level_names.py",
    "extraction/test_add_level.py", "storage/test_one_store.py", "pipelines/test_guide.py", "upsamplers/test_loftup.py",
    "benchmarks/test_gpu.py", "jobs/test_program.py",
)  # fmt: skip
"""Files that take longer than about seven seconds, the longest first."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of several processes (`make test`), none is left with a long file at the end; others follow by their number of tests."""
    if hasattr(config, "workerinput"):
        counts = Counter(item.path for item in items)
        places = {path: _place_of(path.as_posix()) for path in counts}
        items.sort(key=lambda item: (places[item.path], -counts[item.path]))


def _place_of(path: str) -> int:
    """Where in `LONGEST` a file is; behind it, if it isn't there."""
    return next((n for n, name in enumerate(LONGEST) if path.endswith(name)), len(LONGEST))


def pytest_collection_finish() -> None:
    """What is there now stays to the end: the collector needn't look at it time and again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


PILLOWS_LIMIT = Image.MAX_IMAGE_PIXELS


@pytest.fixture(autouse=True)
def as_it_was() -> None:
    """What runs set for their process: sums in one order, also after a test of something that takes more threads for itself;
    images of the usual sizes, also after a run with a small `--max-image-pixels`."""
    Image.MAX_IMAGE_PIXELS = PILLOWS_LIMIT
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def unsynced() -> Iterator[None]:
    """No test cuts the power, and what the kernel was given outlives every process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def made_once() -> Iterator[None]:
    """Small networks are made once, and copied then; help is read once from the settings' sources; trainings' pictures are
    small."""
    with pytest.MonkeyPatch.context() as patch:
        if timm := sys.modules.get("timm"):
            from tests.kept_models import kept

            patch.setattr(timm, "create_model", kept(timm.create_model))
        if watch := sys.modules.get("pipelines.training.watch"):
            patch.setattr(watch, "_TILE", 24)
        if docstrings := sys.modules.get("tyro._docstrings"):
            patch.setattr(docstrings, "get_field_docstring", functools.cache(docstrings.get_field_docstring))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_seeds_for_gpus() -> Iterator[None]:
    """Where there is no GPU, PyTorch keeps each seed for it, with all lines of the stack: of pytest's, a millisecond."""
    with pytest.MonkeyPatch.context() as patch:
        if (torch := sys.modules.get("torch")) and not torch.cuda.is_available() and not torch.xpu.is_available():
            for kind in (torch.cuda, torch.xpu):
                patch.setattr(kind, "manual_seed_all", lambda seed: None)
        yield


def squeezed(text: str) -> str:
    """A table's text without what pads its cells."""
    return re.sub(" +", " ", text)


def jpeg(seed: int, width: int = 96, height: int = 72) -> bytes:
    """A smooth random photograph-like JPEG."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8))
    out = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=92)
    return out.getvalue()


def loud_weights(path: Path, scale: float = 1e5) -> Path:
    """Weights for test_vit at 64 px, whose final norm's outputs are `scale` times as large: beyond float16 for about half."""
    import safetensors.torch

    from operators.timm_models import create_model

    weights = create_model("test_vit.r160_in1k", (64, 64), None, 0).state_dict()
    weights["norm.weight"] *= scale
    safetensors.torch.save_file(weights, path)
    return path


def unreadable(monkeypatch: pytest.MonkeyPatch, *names: str, error: OSError | None = None) -> None:
    """Files whose names end so can't be opened: by default as without read permission (tests may run as root)."""
    real = LocalFileSystem._open

    def open_(fs: LocalFileSystem, path: str, *args: object, **kwargs: object) -> object:
        if path.endswith(names):
            raise error or PermissionError(13, "Permission denied", path)
        return real(fs, path, *args, **kwargs)

    monkeypatch.setattr(LocalFileSystem, "_open", open_)


def run_input(files: Listing, rules: MemberRules | None = None, limit: int | None = None) -> RunInput:
    """The input of a run in this process."""
    return RunInput(files=files, rules=rules or MemberRules(), limit=limit, options={}, executor=InlineExecutor())


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar of `members` in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def make_tars(tmp_path: Path) -> Callable[..., str]:
    """Write `count` tars of `each` images; returns their brace pattern."""

    def make(count: int = 2, each: int = 10, folder: str = "in") -> str:
        for t in range(count):
            members = []
            for i in range(each):
                n = t * each + i
                members += [(f"{n:05d}.jpg", jpeg(n)), (f"{n:05d}.cls", str(n % 7).encode())]
            write_tar(tmp_path / folder / f"s-{t:03d}.tar", members)
        return str(tmp_path / folder / f"s-{{000..{count - 1:03d}}}.tar")

    return make


def tiny_config(folder: Path, data: str | tuple[str, ...], **changes: object) -> ExtractConfig:
    """A config that runs in a second: timm's test_vit with random weights at 64 px, inline, to `folder`/out.zarr."""
    settings: dict[str, object] = {
        "data": (data,) if isinstance(data, str) else data,
        "out": str(folder / "out.zarr"),
        "model": "test_vit.r160_in1k",
        "weights": "random",
        "size": "64",
        "levels": ("x1", "x2", "pooled"),
        "precision": "fp32",
        "executor": "inline",
        "block_rows": 4,
    }
    return ExtractConfig.of(**{**settings, **changes})


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., ExtractConfig]:
    """`tiny_config` in the test's own folder."""
    return functools.partial(tiny_config, tmp_path)


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The labelled sets that readouts and evaluations are tried on, in their official layouts; not to be changed."""
    from tests.readout_runs import write_sets

    return write_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def narrow() -> Iterator[None]:
    """JAFARs that are trained from the beginning have 32 channels in place of 128, and FeatUp's random field 100 pixels in place
    of 1,000: a fraction of the time."""
    from operators.upsamplers.jafar import JafarSettings

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(JafarSettings.__init__.__kwdefaults__, "qk_dim", 32)
        assert JafarSettings(channels=1, patch=16).qk_dim == 32
        patch.setattr("pipelines.training.featup.SAMPLED", 100)
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What runs are begun on that are asked for again (tests/second_runs.py). Who changes what is in it puts that back."""
    from tests.second_runs import write_world

    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def chromium() -> str:
    """A browser's program: $RAYLIFT_CHROMIUM, or one that is installed."""
    names = (os.environ.get("RAYLIFT_CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium here; make test-browser installs it")
    return found


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """A moto S3 server on loopback with the bucket `bkt`; yields its endpoint."""
    from moto.server import ThreadedMotoServer

    from tests.servers.s3 import look_once

    look_once()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_options(s3_server: str, tmp_path: Path) -> dict[str, object]:
    """Storage options of an S3 server with an empty bucket of this test's own, `bkt-<n>`, named in options["bucket"]."""
    import s3fs

    options = {"key": "test-access", "secret": "test-secret-value", "endpoint_url": s3_server}
    bucket = f"bkt-{abs(hash(str(tmp_path))) % 10**9}"
    s3fs.S3FileSystem(**options).mkdir(bucket)
    return {"bucket": bucket, "options": options}


class Calls(list[str]):
    """S3 requests as `operation key [range]` or `operation prefix`, and the bytes that came back in bodies."""

    bytes = 0

    def clear(self) -> None:
        super().clear()
        self.bytes = 0


@pytest.fixture
def api_calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Every S3 request of this process from here on; a retry would not be counted, and there is none here."""
    made = Calls()
    from aiobotocore.client import AioBaseClient

    original = AioBaseClient._make_api_call

    async def counted(self: object, operation: str, parameters: dict[str, Any]) -> Any:
        made.append(
            " ".join([operation, parameters.get("Key", parameters.get("Prefix", "")), parameters.get("Range", "")]).strip()
        )
        answer = await original(self, operation, parameters)
        made.bytes += answer.get("ContentLength", 0) if operation == "GetObject" else 0
        return answer

    monkeypatch.setattr(AioBaseClient, "_make_api_call", counted)
    return made


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray with two CPUs for all tests that want one."""
    from cluster.session import connect

    with connect("local", num_cpus=2, num_gpus=0):
        yield


@pytest.fixture(scope="session")
def forking() -> "ForkServerContext":
    """New processes are forks of one that has imported what benchmarks measure."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    return context


@pytest.fixture
def forked_benchmarks(forking: "ForkServerContext", monkeypatch: pytest.MonkeyPatch) -> None:
    """What benchmarks measure in new processes needn't import torch anew in each."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent.parent))
    for module in ("processes", "extract", "feeding"):
        monkeypatch.setattr(f"pipelines.benchmarks.{module}.SPAWN", forking)


@pytest.fixture(scope="session")
def parent() -> Iterator["Forks"]:
    """A process that has imported everything, and whose forks run programs until they are killed."""
    from tests.forks import forks

    with forks() as started:
        yield started
