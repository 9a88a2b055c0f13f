"""Where work runs: in this process, or on Ray. All that pipelines know of Ray Data and of actors is here.

Both executors give the same bytes (tests/pipelines/extraction/test_ray.py). Ray settings were found by experiment with 2.60; each
has its reason beside it. Processes that train together are Ray Train's (pipelines/training/run.py).
"""

import functools
import gc
import itertools
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar

import numpy as np

from cluster.metrics import TaskReport, WorkerMetrics
from cluster.resources import Growth, WorkerPool, WorkerRequest, choose_pool, present_nodes, size_pool, this_machine
from cluster.session import ClusterError, connect, is_own, starts_one
from pipelines.actors import Make, Stored, WorkersLost, actors_for, asked, dealt, end_actors, fetched, shared, start_actors
from pipelines.config import JobConfig
from storage.begun import Begun
from storage.errors import RayliftError
from storage.ledger import SampleRecord
from storage.spec import ShardTask

if TYPE_CHECKING:
    import ray
    import ray.data
    from ray.actor import ActorHandle

logger = logging.getLogger(__name__)

WINDOW_TASKS = 20_000
"""Tasks of one Ray Dataset: its driver spends about 1 ms on each before the first one starts."""

NO_PROGRESS_S = 900
"""A run in which no task ends for this long is stuck (a node that can't start, storage that hangs) and is ended."""

AHEAD = 2
"""Items that each loader of `Executor.map` is given before their results are asked for: it does one while another is fetched."""

Item = TypeVar("Item")
Result = TypeVar("Result")
Reference = TypeVar("Reference")


How: TypeAlias = Literal["actor", "cluster", "solo"]
"""Where tasks' images are loaded: by the actors that compute, or by further processes anywhere. `solo` is by the actors, too,
one task at a time in one worker."""


class WorkerBroken(RayliftError):
    """Nothing can be done any more in this process, though it is there; in another one it can. Its tasks run again."""

    exit_code = 1


# --- what crosses between driver and workers --------------------------------------------------------------------------


@dataclass
class Loaded:
    """A task's images: `pixels` uint8 [rows, H, W, 3], zero where `records` say `failed`, and in the first rows, which the writer
    has, where the task was done in part."""

    pixels: np.ndarray
    records: list[SampleRecord]
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_read: int = 0
    begun: int = 0
    "rows that were done before the store grew, and aren't computed again"
    kept: Begun | None = None
    "those rows as they are stored, where they were read already; they don't travel"
    maps: np.ndarray | None = None
    "stored maps [rows, h, w, C], where levels are made of them; they don't travel"
    aside: bool = False
    "nothing was loaded: the task is to run again, alone"

    def took(self, stage: str, seconds: float) -> None:
        """Add to what a stage took so far."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def notes(self) -> str:
        """All but the pixels, as JSON."""
        stays = dict.fromkeys(("pixels", "kept", "maps"))
        return json.dumps({**vars(self), **stays, "records": [asdict(record) for record in self.records]})

    @classmethod
    def set_aside(cls) -> "Loaded":
        return cls(np.empty(0, np.uint8), [], aside=True)

    @classmethod
    def from_notes(cls, pixels: np.ndarray, notes: str) -> "Loaded":
        found = json.loads(notes)
        records = [SampleRecord(**record) for record in found["records"]]
        return cls(**{**found, "pixels": pixels, "records": records})


class Worker(Protocol):
    """What does tasks; made once per actor."""

    def load(self, task: ShardTask) -> Loaded:
        """A task's images and what is known of them, for `run` in another process."""

    def run(self, task: ShardTask, loaded: Loaded | None = None) -> TaskReport:
        """Do a task, loading it first where it comes without its images."""


class MakeWorker(Protocol):
    """What travels to where workers are made."""

    def __call__(self, *, model: bool = True) -> Worker:
        """`model`: whether the worker is to compute, and not only to load."""


class Executor(Protocol):
    """Where work runs. All of it may be done again after a fault, so that it must come to the same."""

    @property
    def loads_here(self) -> bool:
        """Whether `map` with `loaders` runs them in this process."""

    def cpus(self) -> int:
        """CPUs that are there now."""

    def pool(self, request: WorkerRequest) -> WorkerPool:
        """The workers that are asked for. Raises `ClusterError` for what the cluster can't meet."""

    def ask(self, do: Callable[[], Result]) -> Result:
        """What `do` gives, and raises, of a worker that was started ahead, so that this process needs nothing of what `do`
        imports; without one, done in this process."""

    def share(self, arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """The same arrays, where workers on this machine look at them, too."""

    def map(
        self, do: Callable[[Item], Result], items: Iterable[Item], *, loaders: int | None = None
    ) -> Generator[Result, None, None]:
        """What `do` gives of each item, in their order; some are under way before they are asked for.

        `loaders`: in so many processes that are kept and ask for no CPU of their own, for they work beside others that may
        hold all of them; else with what CPUs there are.
        """

    def stream(
        self, make_worker: MakeWorker, tasks: Sequence[ShardTask], pool: WorkerPool, how: How = "actor"
    ) -> Iterator[TaskReport]:
        """Reports of tasks as they end, in any order."""

    def pieces(
        self,
        make_worker: Make[Item, Result],
        pieces: Sequence[Item],
        pool: WorkerPool,
        *,
        restarts: int = 3,
        lost: Callable[[Item, WorkersLost], Result] | None = None,
    ) -> Iterator[Result]:
        """Results of larger pieces of work as they end, in any order.

        A piece whose worker is lost is done again, up to `restarts` times; then `lost` gives its result, and without that it is
        `WorkersLost`. Errors of workers are raised as they are.
        """


# --- in this process --------------------------------------------------------------------------------------------------


class InlineExecutor:
    """Everything in this process: `map` and, where a GPU computes, `stream` in a few threads, all else one after another."""

    loads_here = True

    def cpus(self) -> int:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def pool(self, request: WorkerRequest) -> WorkerPool:
        import torch

        device, found = request.device, torch.cuda.is_available()
        if device == "auto":
            device = "cuda" if found else "cpu"
        if device == "cuda" and not found:
            raise ClusterError("--device cuda --executor inline: this machine has no GPU that torch can use; drop --device")
        return WorkerPool(device=device, size=1, cpus=request.cpus or torch.get_num_threads(), gpus=request.gpus or 0)

    def ask(self, do: Callable[[], Result]) -> Result:
        return do()

    def share(self, arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return arrays

    def map(
        self, do: Callable[[Item], Result], items: Iterable[Item], *, loaders: int | None = None
    ) -> Generator[Result, None, None]:
        threads = loaders or 4
        pool = ThreadPoolExecutor(threads)
        try:
            yield from in_order(lambda item: pool.submit(do, item), Future.result, items, threads)
        finally:
            pool.shutdown(cancel_futures=True)

    def stream(
        self, make_worker: MakeWorker, tasks: Sequence[ShardTask], pool: WorkerPool, how: How = "actor"
    ) -> Iterator[TaskReport]:
        worker = make_worker()
        # On a CPU, whose threads the model takes all, one after another.
        if pool.device == "cpu" or how == "solo":
            yield from map(worker.run, tasks)
            return
        threads = ThreadPoolExecutor(pool.calls)
        try:
            yield from in_order(lambda task: threads.submit(worker.run, task), Future.result, tasks, pool.calls)
        finally:
            threads.shutdown(cancel_futures=True)

    def pieces(self, make_worker: Make[Item, Result], pieces: Sequence[Item], pool: WorkerPool, **_: object) -> Iterator[Result]:
        yield from map(make_worker(), pieces)


class PlanningExecutor(InlineExecutor):
    """For plans: workers as a local Ray would have them on this machine, which isn't started; else in this process."""

    def __init__(self, *, gpus: bool = True):
        self._gpus = gpus

    def pool(self, request: WorkerRequest) -> WorkerPool:
        return size_pool(request, this_machine(gpus=self._gpus), Growth)


def in_order(
    submit: Callable[[Item], Reference], result: Callable[[Reference], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """Results in the order of the items, of which up to `ahead` were submitted already."""
    pending: deque[Reference] = deque()
    for item in items:
        pending.append(submit(item))
        if len(pending) > ahead:
            yield result(pending.popleft())
    while pending:
        yield result(pending.popleft())


# --- on Ray -----------------------------------------------------------------------------------------------------------


class RayExecutor:
    """Actors for pieces, Ray tasks or actors for `map`; for tasks Ray Data over a pool of actors, and actors alone on a Ray of
    this machine's own. Needs a connected session, or `session`, which connects one (and is called each time)."""

    def __init__(self, session: Callable[[], object] = lambda: None, *, as_cluster: bool = False):
        """`as_cluster`: on a Ray of this machine's own do as on any other."""
        self._session, self._as_cluster = session, as_cluster
        self._ahead: list[ActorHandle[Any]] = []
        "actors for `stream`"
        self._ahead_pool: WorkerPool | None = None
        "that they are of"

    loads_here = False

    def cpus(self) -> int:
        self._session()
        return sum(node.count * node.cpus for node in present_nodes())

    def pool(self, request: WorkerRequest) -> WorkerPool:
        self._session()
        return choose_pool(request)

    def ask(self, do: Callable[[], Result]) -> Result:
        return asked(self._ahead[0], do) if self._ahead else do()

    def share(self, arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        self._session()
        return Stored.of(arrays)

    def start_ahead(self, size: Callable[[], WorkerPool], module: str) -> None:
        """Start actors for the next `stream`, which import `module` meanwhile, where Ray is this machine's own. `size` is asked
        for them once there is a session; `stream` may take fewer, and start more."""
        self._session()
        if self._is_alone():
            self._ahead_pool = size()
            self._ahead = start_actors(self._ahead_pool.size, _task_options(self._ahead_pool))
            for actor in self._ahead:
                actor.load.remote(module)

    def _is_alone(self) -> bool:
        """Whether nobody else uses this Ray, and no nodes will come and go."""
        return is_own() and not self._as_cluster

    def _end_ahead(self, keep: int = 0) -> "list[ActorHandle[Any]]":
        """End what was started ahead, and holds CPUs, but for some, which are the caller's from now on."""
        kept, surplus, self._ahead = self._ahead[:keep], self._ahead[keep:], []
        end_actors(surplus)
        return kept

    def map(
        self, do: Callable[[Item], Result], items: Iterable[Item], *, loaders: int | None = None
    ) -> Generator[Result, None, None]:
        self._session()
        import ray

        if loaders is None:
            self._end_ahead()
            call, function = ray.remote(num_cpus=1, max_retries=3)(_call), ray.put(do)
            yield from in_order(lambda item: call.remote(function, item), fetched, items, max(2, 2 * self.cpus()))
            return
        # Actors and not tasks, since on a node whose CPUs are all held Ray ends idle processes at once, and each task would
        # start one anew.
        options = {"num_cpus": 0, "scheduling_strategy": "SPREAD", "max_restarts": -1, "max_task_retries": -1}
        with actors_for(loaders, options) as actors:
            turns, make = itertools.cycle(actors), shared(functools.partial(_itself, do))
            yield from in_order(lambda item: next(turns).do.remote(make, item), fetched, items, AHEAD * loaders)

    def stream(
        self, make_worker: MakeWorker, tasks: Sequence[ShardTask], pool: WorkerPool, how: How = "actor"
    ) -> Iterator[TaskReport]:
        self._session()
        if how == "solo":
            pool = replace(pool, size=1, calls=1)
        if how == "cluster" or not self._is_alone():
            self._end_ahead()
            yield from _by_ray_data(make_worker, tasks, pool, how)
            return
        make = functools.partial(_does_tasks, make_worker)
        with self._task_actors(replace(pool, size=min(pool.size, len(tasks)))) as actors:
            for _, report in dealt(actors, make, tasks, calls=pool.calls, patience_s=NO_PROGRESS_S):
                yield fetched(report)

    @contextmanager
    def _task_actors(self, pool: WorkerPool) -> "Iterator[list[ActorHandle[Any]]]":
        """Those that were started ahead first."""
        ahead = self._ahead_pool
        are_alike = ahead is not None and ahead.placement == pool.placement and ahead.calls >= pool.calls
        actors = self._end_ahead(keep=pool.size if are_alike else 0)
        try:
            actors += start_actors(pool.size - len(actors), _task_options(pool))
            yield actors
        finally:
            end_actors(actors)

    def pieces(
        self,
        make_worker: Make[Item, Result],
        pieces: Sequence[Item],
        pool: WorkerPool,
        *,
        restarts: int = 3,
        lost: Callable[[Item, WorkersLost], Result] | None = None,
    ) -> Iterator[Result]:
        self._session()
        self._end_ahead()
        options = {**pool.placement, "max_restarts": -1, "max_task_retries": restarts}
        with actors_for(min(pool.size, len(pieces)), options) as actors:
            for piece, done in dealt(actors, make_worker, pieces):
                result: Result
                try:
                    result = fetched(done)
                except WorkersLost as error:
                    if lost is None:
                        raise
                    result = lost(piece, error)
                yield result


def _task_options(pool: WorkerPool) -> dict[str, Any]:
    """Options of Ray for an actor that does tasks. It is started anew as often as it must be: what keeps killing workers is
    told by tasks' markers."""
    return {**pool.placement, "max_concurrency": pool.calls, "max_restarts": -1, "max_task_retries": -1}


def _itself(do: Callable[[Item], Result]) -> Callable[[Item], Result]:
    return do


def _call(do: Callable[[Item], Result], item: Item) -> Result:
    return do(item)


def _does_tasks(make_worker: MakeWorker) -> Callable[..., TaskReport]:
    """What does a task, loading it first where it comes without its images; made once per actor."""
    worker, metrics = make_worker(), WorkerMetrics()

    def do(task: ShardTask, loaded: Loaded | None = None) -> TaskReport:
        try:
            report = worker.run(task, loaded)
        except WorkerBroken as error:
            # Ray starts an actor anew that ended so, and has its tasks run again, as if it had been killed.
            logger.error("this worker ends, and another takes its place: %s", error)
            logging.shutdown()
            os._exit(1)
        metrics.count(report)
        return report

    return do


# --- tasks on Ray Data ------------------------------------------------------------------------------------------------


def _by_ray_data(make_worker: MakeWorker, tasks: Sequence[ShardTask], pool: WorkerPool, how: How) -> Iterator[TaskReport]:
    """Reports of tasks as they end."""
    for start in range(0, len(tasks), WINDOW_TASKS):
        dataset = _dataset(make_worker, tasks[start : start + WINDOW_TASKS], pool, how)
        try:
            for row in dataset.iter_rows():
                yield TaskReport(**json.loads(row["report"]))
        finally:
            # Without this an actor that restarted keeps its GPU and starves the next Dataset (seen in 2.60).
            del dataset
            gc.collect()


def _dataset(make_worker: MakeWorker, tasks: Sequence[ShardTask], pool: WorkerPool, how: How) -> "ray.data.Dataset":
    """Reports of tasks, a row each, as they come."""
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    # One input row is one task is one block; splitting blocks would cut that. Must be set before the Dataset is made.
    context.target_max_block_size = None
    context.max_consecutive_actor_init_deaths = 3
    context.execution_no_progress_timeout_s = NO_PROGRESS_S
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    # Weights cross the network once per node, through the object store, and are shared by its actors.
    factory = ray.put(make_worker)
    items = [asdict(task) for task in tasks]
    dataset: ray.data.Dataset = ray.data.from_items(items, override_num_blocks=len(items))
    if how == "cluster":
        load = functools.partial(_load_task, factory=factory)
        dataset = dataset.map_batches(load, batch_size=1, batch_format="numpy", num_cpus=1)
    size = min(pool.size, len(tasks))
    return dataset.map_batches(
        _TaskActor,
        batch_size=1,
        batch_format="numpy",
        fn_constructor_kwargs={"factory": factory},
        **pool.placement,
        # Calls overlap in an actor: some read and write while another computes.
        compute=ray.data.ActorPoolStrategy(
            min_size=1,
            max_size=size,
            initial_size=size,
            max_concurrent_calls_per_actor=pool.calls,
            enable_true_multi_threading=True,
        ),
    )


def _task_of(batch: Mapping[str, np.ndarray]) -> ShardTask:
    return ShardTask(**{name: int(batch[name][0]) for name in ("block", "first", "last")})


_workers: "dict[ray.ObjectRef[MakeWorker], Worker]" = {}
"""Loading workers of this process, by factory: reading a store's metadata once per process, not once per task."""


def _load_task(batch: dict[str, np.ndarray], factory: "ray.ObjectRef[MakeWorker]") -> dict[str, np.ndarray | list[str]]:
    """Ray Data function of the separate decode stage: uint8 pixels and small records cross the object store."""
    import ray

    if factory not in _workers:
        _workers[factory] = ray.get(factory)(model=False)
    loaded = _workers[factory].load(_task_of(batch))
    return {**batch, "pixels": loaded.pixels[None], "notes": [loaded.notes()]}


class _TaskActor:
    """Ray Data's view of a worker: one call per task, returning one small row."""

    def __init__(self, factory: "ray.ObjectRef[MakeWorker]"):
        import ray

        self._do = _does_tasks(ray.get(factory))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        loaded = Loaded.from_notes(batch["pixels"][0], batch["notes"][0]) if "pixels" in batch else None
        return {"report": [json.dumps(asdict(self._do(_task_of(batch), loaded)))]}


# --- which of them ----------------------------------------------------------------------------------------------------


@contextmanager
def executor_for(
    config: JobConfig,
    *,
    plan: bool = False,
    meanwhile: Callable[[], None] | None = None,
    ahead: Callable[[RayExecutor], None] = lambda _: None,
) -> Iterator[Executor]:
    """The executor that settings ask for, with a Ray session round it once it needs one: of a run with nothing left to do, it
    never does. What it is first asked for raises `ClusterError`. With `plan` no local Ray is started, but a cluster is asked.

    `meanwhile`: imports that the run needs. Ray starts at once then, and they are done while it does, and while `ahead` gives it
    its first work.
    """
    if config.is_inline:
        yield InlineExecutor()
        return
    gpus = config.cluster.device != "cpu"
    if plan and starts_one(config.cluster.ray_address):
        yield PlanningExecutor(gpus=gpus)
        return
    with ExitStack() as stack:
        num_gpus = None if gpus else 0
        session = functools.cache(lambda: stack.enter_context(connect(config.cluster.ray_address, num_gpus=num_gpus)))
        executor = RayExecutor(session)
        if meanwhile is not None:

            def start() -> None:
                session()
                if not plan:
                    ahead(executor)

            side_by_side(start, meanwhile)
        yield executor


def side_by_side(session: Callable[[], object], meanwhile: Callable[[], None]) -> None:
    """Start Ray, and do imports in a thread: in that order, since Ray belongs to the thread that starts it, and signals, too."""
    with ThreadPoolExecutor(1, thread_name_prefix="imports") as thread:
        imported = thread.submit(meanwhile)
        session()
    imported.result()
