"""A store as one HTML page."""

import io
import itertools
import json
from dataclasses import dataclass

from cluster.progress import size_text, stage_shares
from operators.visual import Panel, Tile
from pipelines.config import command_of
from pipelines.extraction.config import ExtractConfig
from pipelines.showing.choice import columns_of, pick_rows
from pipelines.showing.page import data_url, page, versions_in_words
from pipelines.showing.status import RunStatus, bottleneck, clamped_lines, failures, level_rows, read_status, state_in_words
from pipelines.showing.views import similar_panel, view_panel
from storage.documents import as_object
from storage.paths import StorageError, StorageOptions
from storage.store import FeatureStore
from storage.totals import conversion_lines

STAGE_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#b07aa1")


def render_report(store: FeatureStore, *, count: int, storage_options: StorageOptions | None = None) -> str:
    """The page as text, with `count` photographs. A store without features yet has no pictures."""
    status = read_status(store)
    return page(
        "report.html.jinja",
        {"size": size_text, "picture": _picture, "bars": _bars, "bottleneck": bottleneck},
        title=status.out,
        status=status,
        state=state_in_words(status.status, status.runs),
        spec=store.spec,
        levels=level_rows(store, status),
        settings={**settings_in_words(store), **(_last_run(status.runs[-1]) if status.runs else {})},
        runs=status.runs[::-1],  # the latest first
        groups=failures(store)[:20] if status.failed else [],
        converted=list(conversion_lines(status.conversions, "" if status.is_counted else "about ")),
        clamped=list(clamped_lines(status)),
        panels=_panels(store, count, storage_options),
        attributes=json.dumps(store.attributes, indent=1),
    )


def settings_in_words(store: FeatureStore) -> dict[str, str]:
    """What made a store's features."""
    spec = store.spec
    height, width = spec.input_size
    return {
        "model": spec.model,
        "weights": f"{spec.weights_source}, sha256 {spec.weights[:16]}",
        "features": f"{spec.facet} of block {', '.join(map(str, spec.layers))}{', with the final norm' if spec.norm else ''}",
        "input": f"{width} x {height} px, {spec.geometry}, {spec.interpolation}",
        "stride": f"{spec.stride} px, position embeddings as in {spec.pos_embed}",
        "precision": spec.precision,
        "fingerprint": store.root.fingerprint[:16],
    }


def _last_run(run: RunStatus) -> dict[str, str]:
    """The command of a run, as its settings give it, and the software that it ran."""
    config, versions = (as_object(run.settings.get(name) or {}, name) for name in ("config", "versions"))
    found = {}
    if config:
        # The command's words aren't kept; settings at their defaults may have been among them, and change nothing.
        given = {name: value for name, value in config.items() if value is not None}
        found["command of the last run"] = command_of("python jobs/extract.py", given, ExtractConfig().public())
    if versions:
        found["versions"] = versions_in_words(versions)
    return found


@dataclass(frozen=True)
class _Section:
    """Pictures under a title, or a note that says why there are none."""

    title: str
    note: str
    panel: Panel | None = None


def _bars(run: RunStatus) -> list[tuple[str, float, str]]:
    """Each stage, its part of the workers' time, and a colour."""
    shares = stage_shares(run.stage_seconds)
    return list(zip(shares, shares.values(), itertools.cycle(STAGE_COLOURS), strict=False))


def _panels(store: FeatureStore, count: int, options: StorageOptions | None) -> list[_Section]:
    try:
        rows = pick_rows(store, count)
        shown, compared = columns_of([store], [rows]), columns_of([store], [rows[:4]])
    except StorageError as error:
        return [_Section("Pictures", str(error))]
    colours = view_panel(shown, storage_options=options)
    alike = similar_panel(compared, None, storage_options=options)
    return [
        _Section("Principal components as colours", colours.title, colours),
        _Section("What is similar to one point", alike.title, alike),
    ]


def _picture(tile: Tile, panel: Panel) -> str:
    """A tile as a data URL: photographs as JPEG, maps as PNG."""
    data, image = io.BytesIO(), tile.image(*panel.tile_size)
    kind = "jpeg" if tile.is_photo else "png"
    image.save(data, kind, **({"quality": 88} if tile.is_photo else {"optimize": True}))
    return data_url(data.getvalue(), kind)
