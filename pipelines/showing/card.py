"""A store's README: a data set card as the Hugging Face hub reads it, which is plain Markdown anywhere else."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from cluster.progress import size_text
from pipelines.config import command_of
from pipelines.extraction.config import ExtractConfig
from pipelines.results import png_bytes
from pipelines.showing.choice import columns_of, dense_levels, pick_rows
from pipelines.showing.page import versions_in_words
from pipelines.showing.report import settings_in_words
from pipelines.showing.status import clamped_lines, failures, level_rows, read_status
from pipelines.showing.views import view_panel
from storage.copies import CARD, Copied, Place, copy_store, left_out_names
from storage.left_out import left_out_lines
from storage.paths import StorageError, StorageOptions
from storage.redaction import redact
from storage.store import FeatureStore
from storage.totals import conversion_lines
from storage.words import printable_name

PICTURE = "views/card.png"
"""The card's picture, below the folder that the card is in."""

_MARK = "raylift-card"

_REASONS = 20
"""Reasons of failures that are told."""

_CATEGORIES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
    (math.inf, "1B<n<10B"),
)
"""What the hub calls numbers of rows, below each."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """The README and what it shows."""

    text: str
    pictures: dict[str, bytes] = field(default_factory=dict)
    "by name, as the text has it"

    def files(self) -> dict[str, bytes]:
        """All of it, by name."""
        return {CARD: self.text.encode(), **self.pictures}


def render_card(
    store: FeatureStore, *, url: str = "", license_name: str = "", count: int = 6, storage_options: StorageOptions | None = None
) -> Card:
    """The card of a store in the state that it is in. `url`: where it will lie, for the code that reads it; `license_name`: the
    features', as the hub calls it; `count`: photographs in the picture, 0 for none."""
    status, spec = read_status(store), store.spec
    about = "about " if status.is_sampled else ""
    pictures, caption = _pictures(store, count, storage_options) if count else ({}, "")
    groups = failures(store) if status.failed else []
    config = store.root.config
    where = redact(url or store.folder.displayed, storage_options)
    notes = [
        *(f"left out of the input: {line}" for line in left_out_lines(status.left_out)),
        *(f"converted: {line}" for line in conversion_lines(status.conversions, "" if status.is_counted else "about ")),
        *clamped_lines(status),
        *status.notes,
    ]
    text = _template(storage_options).render(
        title=where.rstrip("/").rsplit("/", 1)[-1],
        url=where,
        license=license_name,
        status=status,
        spec=spec,
        about=about,
        levels=list(zip(spec.levels, level_rows(store, status), strict=True)),
        settings=settings_in_words(store),
        fingerprint=store.root.fingerprint,
        weights_license=_license_of_weights(store, storage_options),
        versions=versions_in_words(store.root.versions) if store.root.versions else "",
        command=_command(config) if config else "",
        first=_first_level(store),
        has_int8=any(level.dtype == "int8" for level in spec.levels),
        groups=groups[:_REASONS],
        more_groups=len(groups[_REASONS:]),
        notes=notes,
        picture=PICTURE if pictures else "",
        caption=caption,
        size_category=next(name for limit, name in _CATEGORIES if status.rows < limit),
        mark=_mark(store),
    )
    return Card(text=redact(text, storage_options), pictures=pictures)


def push_lines(
    store: FeatureStore, place: Place, *, url: str, runs: bool = False, storage_options: StorageOptions | None = None
) -> Iterator[str]:
    """Copy a store and its card to `place`, at `url`; what was sent, a line for each part.

    The card is the one in the store, else one that is made here, unless one is at the place."""
    beside: dict[str, bytes] = {}
    if store.folder.exists(CARD):
        _require_current(store.folder.read(CARD).decode(errors="replace"), store)
    elif place.has(CARD):
        yield f"{CARD}: the one at {place.displayed} stays; `jobs/show.py card` makes a new one in the store, which is sent then"
    else:
        beside = render_card(store, url=url, storage_options=storage_options).files()
    done = Copied(part="in all")
    for copied in copy_store(store, place, runs=runs, beside=beside):
        done += copied
        if copied.sent or copied.there:
            yield f"{copied.part:<14} {_sent(copied)}"
    yield f"{place.displayed}: {_sent(done)}"
    if left := left_out_names(store, runs=runs):
        yield f"left where it is: {', '.join(map(printable_name, left))}" + (
            "" if runs else " (--runs copies the notes on runs, too)"
        )


def _sent(copied: Copied) -> str:
    there = f", {copied.there:,} were there" if copied.there else ""
    return f"{copied.sent:,} objects sent, {size_text(copied.sent_bytes)}{there}"


def _require_current(card: str, store: FeatureStore) -> None:
    """Raise `StorageError` where a card says of itself that it is another state's. One without such a line is its author's."""
    if _MARK in card and _mark(store) not in card:
        raise StorageError(
            f"{CARD} in {store.folder.displayed} tells of the store as it was before; write it anew (jobs/show.py card "
            "--replace), or remove its last line where you keep it right yourself"
        )


def _mark(store: FeatureStore) -> str:
    """The last line of a card: what it is of."""
    counts = store.root.counts or {}
    return f"<!-- {_MARK} {store.root.fingerprint} {counts.get('ok', 'unfinished')} {counts.get('failed', 0)} -->"


def _template(options: StorageOptions | None) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # it's Markdown; `md` escapes
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "count": "{:,}".format,
        "size": size_text,
        "yaml": json.dumps,  # which YAML reads, whatever is in it
        "string_literal": json.dumps,
        "line": printable_name,
        "md": lambda text: markdown(redact(str(text), options)),
    }
    return environment.get_template("card.md.jinja")


def markdown(text: str) -> str:
    """Text in a line of Markdown that stands for itself: names and messages out of data sets make no links, tables or tags."""
    return re.sub(r"([\\`*_{}\[\]<>#+!|~$&@^]|:(?=//))", r"\\\1", printable_name(text))


def _command(config: object) -> str:
    assert isinstance(config, dict)
    usual = ExtractConfig().public()
    given = {name: value for name, value in config.items() if value is not None}
    return command_of("python jobs/extract.py --data IMAGES --out STORE", given, usual)


def _first_level(store: FeatureStore) -> str:
    try:
        return dense_levels(store)[0].name
    except StorageError:
        return store.spec.levels[0].name


def _license_of_weights(store: FeatureStore, options: StorageOptions | None) -> str:
    """As timm's config states it: timm's own for weights of the hub, the config.json beside the file for others."""
    spec, config = store.spec, store.root.config or {}
    if spec.weights_source == "random":
        return "none: they are random"
    try:
        from pipelines.features.weights import WeightsChoice, stated_license  # timm and torch, which nothing else here needs
    except ModuleNotFoundError as error:
        return f"not looked up: {error.name} isn't installed here"
    weights = WeightsChoice.parse(str(config.get("weights") or "pretrained"))
    return stated_license(spec.model, weights, options) or "not stated"


def _pictures(store: FeatureStore, count: int, options: StorageOptions | None) -> tuple[dict[str, bytes], str]:
    """The picture as PNG by its name, and what it shows; none of a store without maps."""
    try:
        panel = view_panel(columns_of([store], [pick_rows(store, count)]), storage_options=options)
    except StorageError:
        return {}, ""
    return {PICTURE: png_bytes(panel.draw())}, panel.title
