"""Cells in which nothing is learned or judged: how fast backbones are, and how many parameters readouts learn.

Their results.json is as an evaluation's (pipelines/results.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch

from pipelines.config import parse_options
from pipelines.costs.readouts import published_counts
from pipelines.costs.speed import Speed, SpeedProtocol, TimedBackbone, speeds_on
from pipelines.results import Cell, Findings, Items, Line, Table, write_results
from storage.documents import JsonObject, JsonValue, as_object, decode, parse_json
from storage.paths import Folder


def measure_speeds(settings: Mapping[str, JsonValue]) -> None:
    """Speeds of `backbones`, each with timm's name and the side of its input, by a `protocol`, relative to its reference. All on
    this machine: what an earlier start kept counts if it was measured here. Raises `BackboneError`."""
    folder, device = _folder(settings), torch.device(str(settings["device"]))
    protocol = decode(SpeedProtocol, settings["protocol"], "protocol")
    backbones: dict[str, TimedBackbone] = {}
    for name, each in as_object(settings["backbones"]).items():
        model, size = decode(tuple[str, int], each, name)
        backbones[name] = TimedBackbone(model=model, size=size)
    found = {}
    for name, speed in speeds_on(protocol, device, {name: (each, _kept(folder, name)) for name, each in backbones.items()}):
        found[name] = speed
        folder.write(_part(name), json.dumps(asdict(speed)).encode())
    lines = [
        _line(name, [speed.relative, speed.images_per_s, speed.where], str(backbones[name].size)) for name, speed in found.items()
    ]
    table = Table(
        title=f"Images per second of backbones alone, relative to {protocol.reference} at {protocol.reference_size} px",
        columns=("relative", "images/s", "on"),
        lines=tuple(lines),
    )
    batches = (
        f"{protocol.batches} batches of {protocol.batch}, {protocol.precision}, random weights, each beside one of the reference"
    )
    findings = Findings(tables=(table,), items=Items(scored={"backbones": len(found)}), choices={"protocol": batches})
    write_results(folder, "speed", _public(settings), {}, findings)


def _part(name: str) -> str:
    return f"parts/{name}.json"


def _kept(folder: Folder, name: str) -> Speed | None:
    """What an earlier start measured; a damaged file counts as none."""
    try:
        return decode(Speed, parse_json(folder.read(_part(name))), name)
    except (FileNotFoundError, ValueError):
        return None


def count_readouts(settings: Mapping[str, JsonValue]) -> None:
    """Learned parameters of DeAP as built here, for the backbones and tasks of which its paper prints them."""
    counts = published_counts()
    tasks = list(dict.fromkeys(each.task for each in counts))
    rows: dict[str, list[int]] = {}
    for each in counts:
        rows.setdefault(each.backbones, []).append(each.ours)
    table = Table(
        title="Learned parameters of DeAP by task",
        columns=tuple(tasks),
        lines=tuple(_line(name, values) for name, values in rows.items()),
    )
    choices = {"counted": "all that learn, the normalisation that the release makes and doesn't use included; no classifier"}
    findings = Findings(tables=(table,), items=Items(scored={"readouts": len(counts)}), choices=choices)
    write_results(_folder(settings), "counts", _public(settings), {}, findings)


def _folder(settings: Mapping[str, JsonValue]) -> Folder:
    options = settings["storage_options"]
    return Folder(str(settings["out"]), parse_options(str(options) if options else None))


def _public(settings: Mapping[str, JsonValue]) -> JsonObject:
    """What isn't where and how."""
    return {name: value for name, value in settings.items() if name not in ("out", "executor", "device", "storage_options")}


def _line(name: str, values: Sequence[Cell], px: str = "") -> Line:
    return Line(features=name, input_px=px, stride=None, grid="", values=tuple(values))
