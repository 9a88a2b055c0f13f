"""What Ray does to work, without Ray, whose every process imports torch anew: values travel, and processes train together.

Ray itself does the same work in tests/contracts/test_executor.py, tests/pipelines/evaluation/test_faults.py and
tests/pipelines/training/test_lift.py.
"""

import itertools
import pickle
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from cluster.resources import WorkerPool
from pipelines.actors import Make
from pipelines.executors import InlineExecutor, Item, Result
from pipelines.training import featup
from pipelines.training.config import TrainConfig
from pipelines.training.loop import Group, Trainer
from pipelines.training.run import TrainSummary, summarise
from tests.forks import Fork, Forks
from tests.readout_runs import prepared


def travelled(value: Any) -> Any:
    """A value as a worker has it: unpickled, and with arrays that can't be written to, as Ray's object store has them."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[bytes(each.raw()) for each in buffers])


class Travelling(InlineExecutor):
    """This process does all; what goes to workers and comes back is `travelled`. Pieces are dealt out to two workers."""

    loads_here = False

    def map(
        self, do: Callable[[Item], Result], items: Iterable[Item], *, loaders: int | None = None
    ) -> Generator[Result, None, None]:
        there = travelled(do)
        yield from super().map(lambda item: travelled(there(travelled(item))), items, loaders=loaders)

    def pieces(self, make_worker: Make[Item, Result], pieces: Sequence[Item], pool: WorkerPool, **_: object) -> Iterator[Result]:
        workers = itertools.cycle([travelled(make_worker)() for _ in range(2)])
        for piece in pieces:
            yield travelled(next(workers)(travelled(piece)))


def train_in_processes(parent: Forks, config: TrainConfig, folder: Path, world: int = 2) -> TrainSummary:
    """Train in so many processes of a group of torch.distributed's, as Ray Train's workers do."""
    setup = prepared(config)
    folder.mkdir()
    (folder / "setup").write_bytes(pickle.dumps(setup))
    forks = [
        Fork(
            program="tests.as_on_ray:_train_worker",
            argv=[str(folder), str(rank), str(world)],
            place=str(folder),
            log=str(folder / f"{rank}.log"),
            constants={"pipelines.training.featup.SAMPLED": featup.SAMPLED},
        )
        for rank in range(world)
    ]
    pids = [parent.start(each) for each in forks]
    codes = [parent.wait(pid) for pid in pids]
    assert codes == [0] * world, [Path(each.log).read_text() for each in forks]
    return summarise(setup.folder)


def _train_worker(argv: Sequence[str]) -> int:
    """Ray Train's function, in a fork."""
    folder, rank, world = Path(argv[0]), int(argv[1]), int(argv[2])
    meeting = f"file://{folder / 'meeting'}"
    # Who waits for one that has died is told so.
    torch.distributed.init_process_group("gloo", meeting, timedelta(seconds=120), rank=rank, world_size=world)
    setup = pickle.loads((folder / "setup").read_bytes())
    Trainer(setup, Group(rank=rank, world=world), torch.device("cpu")).run(Travelling())
    torch.distributed.destroy_process_group()
    return 0
