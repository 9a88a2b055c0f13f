"""Programs in forks of a process that has imported everything, so that a whole run takes a fraction of a second.

A fork can be killed, or held, before any single storage operation: on local disk each open for writing, rename, link, removal
and new folder below one place, as the interpreter reports them; on S3 each request that changes something.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS: Mapping[str, Sequence[str]] = {"extract": ("--batch=1",), "train": ("lift", "--batch=1")}
"""Of jobs/, and words that each understands."""
LATER = (
    *("s3fs", "tensorboardX", "torch._dynamo", "fsspec.implementations.chained"),
    *("storage.metadata", "pipelines.extraction.run", "pipelines.extraction.worker"),
)
"""What programs import once they need it: up to two seconds in each fork."""
CHANGES = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


@dataclass(frozen=True, kw_only=True)
class Fork:
    """What a fork does: a program, and what becomes of it before its `number`-th operation from 0 below `place`."""

    program: str
    "of jobs/, or `module:function` of the arguments, which returns an exit code"
    argv: Sequence[str]
    place: str
    "a folder, or s3://"
    log: str
    """What it prints; `<log>.operations` is how many there were, `<log>.held` what it's held before until `<log>.go` is there,
    `<log>.images` how many images went into the model, a batch each line, also of forks that were killed."""
    cwd: str = str(ROOT)
    number: int = -1
    held: bool = False
    "held instead of killed"
    at: float = 0.0
    "when it begins, by time.time()"
    pause: float = 0.0
    "seconds that it sleeps before each operation, for others to look meanwhile"
    constants: Mapping[str, int] = field(default_factory=dict)
    "module.NAME: what it is in the fork"


class Forks:
    """The parent of forks, itself a process of its own: pytest's has threads by now, which forks don't survive."""

    def __init__(self) -> None:
        # Without git: the checkout's commit, which a store's root names, may change while the forks run.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GIT_DIR": os.devnull}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, fork: Fork) -> int:
        """Begin; returns a process id."""
        return self._ask({"start": asdict(fork)})

    def wait(self, pid: int) -> int:
        """The exit code, negative for a signal."""
        return self._ask({"wait": pid})

    def run(self, fork: Fork) -> int:
        return self.wait(self.start(fork))

    def _ask(self, request: dict[str, Any]) -> int:
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=30)


@contextlib.contextmanager
def forks() -> Iterator[Forks]:
    parent = Forks()
    try:
        yield parent
    finally:
        parent.close()


def operations(fork: Fork) -> int:
    """How many storage operations a finished fork has done."""
    return int(Path(f"{fork.log}.operations").read_text())


def images_computed(fork: Fork) -> int:
    """How many images the forks with this log gave to the model."""
    log = Path(f"{fork.log}.images")
    return sum(map(int, log.read_text().split())) if log.exists() else 0


# --- in the parent process of forks -----------------------------------------------------------------------------------


def main() -> None:
    import torch
    from PIL import Image

    torch.set_num_threads(1)
    os.fsync = lambda file: None  # no power is cut
    for name in (*(f"jobs.{name}" for name in PROGRAMS), *LATER):
        importlib.import_module(name)
    for name, words in PROGRAMS.items():
        importlib.import_module(f"jobs.{name}").program.parse(words)  # tyro keeps what it read in the settings' sources
    Image.init()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                _run(Fork(**request["start"]))
        print(answer, flush=True)
    os._exit(0)  # taking all that was imported apart takes seconds


def _run(fork: Fork) -> None:
    """A fork's life; doesn't return."""
    code = 70
    try:
        log = os.open(fork.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdin.close()
        os.chdir(fork.cwd)
        counter = _Counter(fork)
        for name, value in fork.constants.items():
            module, _, constant = name.rpartition(".")
            setattr(importlib.import_module(module), constant, value)
        _count_images(Path(f"{fork.log}.images"))
        (_watch_s3 if fork.place.startswith("s3://") else _watch_disk)(fork.place, counter)
        time.sleep(max(0.0, fork.at - time.time()))
        module, _, name = fork.program.partition(":")
        code = getattr(importlib.import_module(module if name else f"jobs.{module}"), name or "run")(fork.argv)
        Path(f"{fork.log}.operations").write_text(str(counter.count))
    except BaseException:  # noqa: BLE001 - the fork's end: its parent's loop must not go on in it
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Counter:
    """Counts operations; before the chosen one the process is killed, or held."""

    def __init__(self, fork: Fork):
        self.fork, self.count = fork, 0

    def __call__(self, what: str) -> None:
        if self.count == self.fork.number:
            if not self.fork.held:
                os.kill(os.getpid(), signal.SIGKILL)
            partial = Path(f"{self.fork.log}.holding")
            partial.write_text(what)
            partial.rename(f"{self.fork.log}.held")
            while not Path(f"{self.fork.log}.go").exists():
                time.sleep(0.002)
        self.count += 1
        time.sleep(self.fork.pause)


def _count_images(log: Path) -> None:
    from pipelines.extraction.host import ModelDevice

    original = ModelDevice.begin

    def begin(self: Any, images: Any, batch: int) -> Any:
        with log.open("a") as lines:  # what isn't an image of this task is zeros
            lines.write(f"{int(images.reshape(len(images), -1).any(axis=1).sum())}\n")
        return original(self, images, batch)

    ModelDevice.begin = begin  # type: ignore[method-assign]


def _watch_disk(place: str, count: Callable[[str], None]) -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" and event not in CHANGES:
            return
        paths = [os.fspath(each) for each in arguments[:2] if isinstance(each, str | os.PathLike)]
        if not any(path == place or path.startswith(f"{place}/") for path in paths):
            return
        if event == "open":
            changes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        else:
            # A removal of what isn't there, and a folder that is, change nothing.
            changes = os.path.lexists(paths[0]) != (event == "os.mkdir")
        if changes:
            count(f"{event} {paths[-1]}")

    sys.addaudithook(hook)


def _watch_s3(_: str, count: Callable[[str], None]) -> None:
    import s3fs

    original = s3fs.S3FileSystem._call_s3

    async def call(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        if not method.startswith(("get_", "head_", "list_")):
            count(f"{method} {kwargs.get('Key', '')}")
        return await original(self, method, *args, **kwargs)

    s3fs.S3FileSystem._call_s3 = call


if __name__ == "__main__":
    main()
