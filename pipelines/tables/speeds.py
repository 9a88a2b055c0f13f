"""How fast a grid's backbones are, measured once its cells are done; kept in `speed.json`."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import torch

from pipelines.costs.speed import Speed, SpeedProtocol, TimedBackbone, speeds_on
from pipelines.executors import Executor
from pipelines.tables.grid_cells import Cell, CellResult, GridConfig
from storage.documents import JsonObject, as_object, decode, parse_json

SPEEDS = "speed.json"


def measure_speeds(
    config: GridConfig, cells: Sequence[Cell], results: Sequence[CellResult], executor: Executor
) -> dict[str, Speed]:
    """Of each backbone that has a result, by name; measured one after another on one machine, or read from an earlier start
    that measured on such a device. All are of one machine: where some were measured on another, they are measured again. Where
    nothing else needs a cluster, those of an earlier start stand on any device that the settings leave open.

    The grid's own cells must be done. Raises `BackboneError`.
    """
    models = {cell.backbone.name: cell.backbone.model for cell in cells}
    wanted = {}
    for each in results:
        height, width = each.input_size or (0, 1)
        if not each.error and height == width:
            wanted[each.backbone] = TimedBackbone(models[each.backbone], height, each.model_args)
    needs_none = not config.is_inline and all(result.train_seconds is None for result in results)
    if needs_none and _are_all(kept := _of_wanted(_read_speeds(config, None), wanted), wanted):
        return kept  # without asking for workers
    pool = executor.pool(config.worker_request(1, None))  # a whole GPU
    protocol = {**asdict(config.speeds), "device": pool.device, "threads": pool.cpus if pool.device == "cpu" else None}
    known = _read_speeds(config, protocol)
    kept = _of_wanted(known, wanted)
    if _are_all(kept, wanted):
        return kept
    worker = functools.partial(_speed_worker, config.speeds, pool.device, None if config.is_inline else pool.cpus)
    (found,) = executor.pieces(
        worker, [{name: (of, kept.get(name)) for name, of in wanted.items()}], pool, restarts=config.max_failures
    )
    document = {"protocol": protocol, "found": {name: asdict(speed) for name, speed in {**known, **found}.items()}}
    config.folder.write(SPEEDS, json.dumps(document, indent=1).encode())
    return {name: found[name] for name in wanted}


def _of_wanted(known: Mapping[str, Speed], wanted: Mapping[str, TimedBackbone]) -> dict[str, Speed]:
    """Those of the speeds that are of what is wanted, as it is now."""
    return {name: known[name] for name, of in wanted.items() if name in known and known[name].of == of.saved}


def _are_all(kept: Mapping[str, Speed], wanted: Mapping[str, TimedBackbone]) -> bool:
    """Whether there is nothing to measure: of all that is wanted, on one machine."""
    return len(kept) == len(wanted) and len({(speed.device, speed.cpu) for speed in kept.values()}) == 1


def _read_speeds(config: GridConfig, protocol: JsonObject | None) -> dict[str, Speed]:
    """Those of an earlier start that were measured in the same way; a damaged file counts as none. Without a protocol: on any
    device, and with any number of threads, that the settings leave open."""
    try:
        document = parse_json(config.folder.read(SPEEDS))
        there = as_object(document["protocol"])
        if protocol is None:
            asked = {"device": config.cluster.device, "threads": config.cell_cpus}
            protocol = {**asdict(config.speeds), **{n: there[n] if v in (None, "auto") else v for n, v in asked.items()}}
        if there != protocol:
            return {}
        return {name: decode(Speed, each, name) for name, each in as_object(document["found"]).items()}
    except (FileNotFoundError, ValueError, KeyError):
        return {}


def _speed_worker(
    protocol: SpeedProtocol, device: str, threads: int | None
) -> Callable[[Mapping[str, tuple[TimedBackbone, Speed | None]]], dict[str, Speed]]:
    """Measures the speeds of some backbones, by name; those that are known of this very machine are as they are."""
    if threads:
        torch.set_num_threads(threads)
    return lambda backbones: dict(speeds_on(protocol, torch.device(device), backbones))
