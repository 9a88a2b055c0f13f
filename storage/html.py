"""What a notebook shows of an open store: what is in it, as HTML without scripts or styles of its own. Nothing is read for it."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from storage.spec import Level
from storage.words import printable

if TYPE_CHECKING:
    from storage.opened import OpenStore


def store_html(store: "OpenStore") -> str:
    """Key facts, and a table of its levels. All texts are escaped: names of models and URLs are anyone's."""
    spec, counts = store.spec, store.root.counts
    if counts is None:
        rows = f"{len(store):,}, still being written: <code>valid()</code> tells which are there"
    else:
        rows = ", ".join(
            [f"{len(store):,}", *(f"{count:,} {escape(status)}" for status, count in sorted(counts.items()) if count)]
        )
    facts = {
        "status": escape(store.status),
        "rows": rows,
        "model": _text(f"{spec.model}, {spec.weights_source} weights {spec.weights[:12]}"),
        "features": _text(f"{spec.facet}s of blocks {' '.join(map(str, spec.layers))}{', normalised' if spec.norm else ''}"),
        "input": _text(f"{spec.input_size[0]} x {spec.input_size[1]} px, {spec.geometry}, {spec.precision}"),
    }
    notes = [*store.clipped_lines(list(store.levels)), *(store.root.notes or ())]
    facts |= {"notes": "<br>".join(map(_text, notes))} if notes else {}
    head = ("level", "method", "cells (rows x columns)", "channels", "stored as", "bytes a row, raw")
    return "".join(
        [
            f"<div><strong>FeatureStore</strong> <code>{_text(store.folder.displayed)}</code>",
            "<table>",
            *(f"<tr><th>{name}</th><td>{fact}</td></tr>" for name, fact in facts.items()),
            "</table><table>",
            _row(head, "th"),
            *(_row(_level(level), "td") for level in spec.levels),
            "</table></div>",
        ]
    )


def _level(level: Level) -> Sequence[str]:
    cells = "one vector" if level.grid is None else f"{level.grid[0]} x {level.grid[1]}"
    return level.name, level.method, cells, f"{level.channels:,}", level.encoding, f"{level.row_bytes:,}"


def _row(cells: Iterable[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{_text(cell)}</{tag}>' for cell in cells)}</tr>"


def _text(text: str) -> str:
    return escape(printable(text))
