"""Actors of Ray that do items one after another or a few at once, and how items are dealt out to them.

An actor is told what it does with each item, so that it may be started before anybody can say what that will be.
"""

import functools
import gc
import importlib
import logging
import logging.handlers
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import numpy as np

from storage.errors import RayliftError
from storage.lean_arrow import forget_pandas

if TYPE_CHECKING:
    import ray
    from ray.actor import ActorHandle

Item = TypeVar("Item")
Result = TypeVar("Result")

Make: TypeAlias = Callable[[], Callable[[Item], Result]]
"""What travels to a worker, and makes there what does its items."""

Shared: TypeAlias = "tuple[ray.ObjectRef[Make[Item, Result]]]"
"""A `Make` in the object store, so that it crosses the network once per node. What is in a tuple is fetched by the actor."""

STARTS = 3
"""How often an actor is started again that dies before it can do anything."""


@contextmanager
def importing() -> Iterator[None]:
    """For imports of much: Python looks for cycles after them only. While torch and timm are imported it would look again and
    again at what stays, which takes a sixth of their time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class WorkersLost(RayliftError):
    """Workers were lost again and again."""

    exit_code = 1


class _Heard(logging.handlers.QueueHandler):
    """Keeps what is logged, as it can travel."""

    def __init__(self) -> None:
        super().__init__(self)
        self.records: list[logging.LogRecord] = []

    def enqueue(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def _heard(level: int) -> Iterator[list[logging.LogRecord]]:
    """What is logged and warned of within it, from `level` on."""
    handler, root = _Heard(), logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(True)
    try:
        yield handler.records
    finally:
        logging.captureWarnings(False)
        root.setLevel(before)
        root.removeHandler(handler)


class _Actor(Generic[Item, Result]):
    """Does items. What does them is made when it's first asked for, so that an error of that is raised as any other; and again
    after the actor was started anew."""

    def __init__(self) -> None:
        forget_pandas()
        self._lock = threading.Lock()
        self._do: Callable[[Item], Result] | None = None

    def load(self, module: str) -> None:
        """Import a module that what the actor will do needs."""
        with self._lock, importing():
            importlib.import_module(module)

    def call(self, do: Callable[[], Result], level: int) -> tuple[Result, list[logging.LogRecord]]:
        """What `do` gives, and what it logs from `level` on."""
        with self._lock, _heard(level) as records:
            return do(), records

    def start(self, make: "Shared[Item, Result]") -> None:
        """What can be waited for until the actor is up, and has what it needs."""
        self._made(make)

    def do(self, make: "Shared[Item, Result]", item: Item) -> Result:
        return self._made(make)(item)

    def _made(self, make: "Shared[Item, Result]") -> Callable[[Item], Result]:
        import ray

        with self._lock:
            if self._do is None:
                made: Make[Item, Result] = ray.get(make[0])
                self._do = made()
            return self._do


def start_actors(count: int, options: Mapping[str, Any]) -> "list[ActorHandle[Any]]":
    """So many actors with these options of Ray; they come up in their own time."""
    import ray

    cls = ray.remote(**options)(_Actor)
    return [cls.remote() for _ in range(count)]


def end_actors(actors: "Sequence[ActorHandle[Any]]") -> None:
    """End them, whatever they do."""
    import ray

    for actor in actors:
        ray.kill(actor)


def asked(actor: "ActorHandle[Any]", do: Callable[[], Result]) -> Result:
    """What `do` gives in an actor; what it logs there is logged here. Raises what it raises, and `WorkersLost`."""
    level = logging.getLogger().getEffectiveLevel()
    result, records = fetched(actor.call.options(max_task_retries=STARTS).remote(do, level))
    for record in records:
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)
    return result


@contextmanager
def actors_for(count: int, options: Mapping[str, Any]) -> "Iterator[list[ActorHandle[Any]]]":
    """`start_actors`, which end with the block."""
    actors = start_actors(count, options)
    try:
        yield actors
    finally:
        end_actors(actors)


class Stored(Mapping[str, np.ndarray]):
    """Arrays in Ray's object store: looked at there, not to be written to, and sent as a reference to them."""

    def __init__(self, reference: "ray.ObjectRef[dict[str, np.ndarray]]"):
        self._reference = reference

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> "Stored":
        import ray

        return cls(ray.put(dict(arrays)))

    @functools.cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        import ray

        return ray.get(self._reference)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __reduce__(self) -> "tuple[type[Stored], tuple[ray.ObjectRef[dict[str, np.ndarray]]]]":
        return Stored, (self._reference,)


def shared(make: Make[Item, Result]) -> "Shared[Item, Result]":
    """`make` as actors are given it."""
    import ray

    return (ray.put(make),)


def dealt(
    actors: "Sequence[ActorHandle[Any]]",
    make: Make[Item, Result],
    items: Sequence[Item],
    *,
    calls: int = 1,
    patience_s: float | None = None,
) -> "Iterator[tuple[Item, ray.ObjectRef[Result]]]":
    """Items with references to what came of them, as they end, in any order; each actor has up to `calls` of them at once.

    An actor gets work once it is up: one that there is no room for keeps nobody waiting. Raises what making raises, and
    `WorkersLost` where that fails with its process again and again, or where nothing ends for `patience_s`.
    """
    import ray

    waiting, make_shared = deque(items), shared(make)
    starting = {each.start.options(max_task_retries=STARTS).remote(make_shared): each for each in actors}
    running: dict[ray.ObjectRef[Result], tuple[ActorHandle[Any], Item]] = {}
    while waiting or running:
        ready, _ = ray.wait([*running, *starting], num_returns=1, timeout=patience_s)
        if not ready:
            what = "something hangs, or no worker can be started"
            raise WorkersLost(f"no task has ended for {patience_s:g} s: {what}. The same command goes on")
        (done,) = ready
        ended: tuple[Item, ray.ObjectRef[Result]] | None = None
        if done in starting:
            fetched(done)
            # Of few items each actor has one, before any has several.
            free, places = starting.pop(done), max(1, min(calls, len(waiting) - len(starting)))
        else:
            (free, item), places = running.pop(done), 1
            ended = item, done
        for _ in range(min(places, len(waiting))):
            following = waiting.popleft()
            running[free.do.remote(make_shared, following)] = free, following
        if ended is not None:
            yield ended


def fetched(reference: "ray.ObjectRef[Result]") -> Result:  # type: ignore[type-var]  # references have no types
    """A result; the error that a user's code raised, as it would be raised here; `WorkersLost` for any other."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise WorkersLost(f"a worker was lost and started again too often: {error}. The same command goes on") from None
