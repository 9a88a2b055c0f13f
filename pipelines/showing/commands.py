"""The commands of `jobs/show.py`: the settings of each, and the lines that it prints."""

import functools
import io
import json
import sys
import webbrowser
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import tyro
from PIL import Image

from pipelines.config import ConfigError, absolute, parse_options, require_at_least
from pipelines.showing.card import push_lines, render_card
from pipelines.showing.choice import (
    base_level,
    columns_of,
    dense_levels,
    named_rows,
    named_together,
    picked_together,
    require_alike,
)
from pipelines.showing.compare import compare, comparison_lines
from pipelines.showing.curves import curves_png
from pipelines.showing.hub import SCHEME, HubPlace
from pipelines.showing.nearest import Query, nearest_cells, nearest_lines, nearest_panel
from pipelines.showing.regions import Annotations, export_regions
from pipelines.showing.report import render_report
from pipelines.showing.search import CellIndex
from pipelines.showing.status import failure_lines, failures, read_status, row_lines, status_lines
from pipelines.showing.training import run_names, training_lines
from pipelines.showing.training_page import render_training
from pipelines.showing.views import similar_panel, view_panel
from storage.copies import CARD, FolderPlace
from storage.datasets.frames import LabelFrame
from storage.export import export_vectors
from storage.paths import Folder, StorageOptions, extension, folder_of
from storage.redaction import redact
from storage.store import FeatureStore
from storage.words import printable


@dataclass(frozen=True, kw_only=True)
class Show:
    """Which store, and how to reach it."""

    store: tyro.conf.Positional[str]
    """The store's path or fsspec URL."""
    storage_options: str = ""
    """JSON for the filesystem, as for jobs/extract.py; also used to read the photographs."""

    @property
    def options(self) -> StorageOptions:
        return parse_options(self.storage_options)

    def open(self, url: str | None = None) -> FeatureStore:
        """The store, or another one reached in the same way."""
        return FeatureStore.open(self.store if url is None else url, self.options)


@dataclass(frozen=True, kw_only=True)
class Status(Show):
    """Counts, rates, stage times, and the bottleneck in words."""

    json: bool = False
    """All of it as JSON."""

    def lines(self) -> Iterator[str]:
        found = read_status(self.open())
        if self.json:
            yield json.dumps(found.to_json(), indent=1)
        else:
            yield from status_lines(found)


@dataclass(frozen=True, kw_only=True)
class Failures(Show):
    """Failed images by reason."""

    json: bool = False
    """Every failed row, a JSON object a line."""

    def lines(self) -> Iterator[str]:
        store = self.open()
        if self.json:
            yield from map(json.dumps, store.failures().to_pylist())
        else:
            yield from failure_lines(failures(store), len(store))


@dataclass(frozen=True, kw_only=True)
class Rows(Show):
    """What a row is, how large, and the first rows."""

    first: int = 10
    """How many rows to list."""

    def lines(self) -> Iterator[str]:
        require_at_least(0, self, "first")
        store = self.open()
        yield from row_lines(store, read_status(store), self.first)


@dataclass(frozen=True, kw_only=True)
class ShowMaps:
    """Which stores' maps, and how to reach them."""

    stores: tyro.conf.Positional[tuple[str, ...]]
    """The store's path or fsspec URL. Further ones are shown beside it: stores of the same features by other methods, matched by
    key and image; maps that all have are shown once."""
    levels: tuple[str, ...] = ()
    """Levels to show; default: all maps."""
    storage_options: str = ""
    """JSON for the filesystem, as for jobs/extract.py; also used to read the photographs."""

    @property
    def options(self) -> StorageOptions:
        return parse_options(self.storage_options)

    def open(self) -> list[FeatureStore]:
        """Raises `ConfigError` where they don't go together."""
        if not self.stores:
            raise ConfigError("no store: give a store's path or URL, or those of several")
        stores = [FeatureStore.open(url, self.options) for url in self.stores]
        require_alike(stores)
        return stores


@dataclass(frozen=True, kw_only=True)
class View(ShowMaps):
    """Photographs beside the PCA colours of every level; of several stores, the levels of all."""

    out: str = "view.png"
    """The picture to write."""
    rows: tuple[str, ...] = ()
    """Keys or row numbers, those of the first store; default: some, spread over the store."""
    count: int = 6
    """How many, where --rows names none."""
    foreground: bool = False
    """Only the objects: cells above Otsu's threshold on the first component, coloured by a PCA of their own."""
    colours_from: str = ""
    """Another store of the same features (model, weights, layers, facet, norm) whose saved colours to use, so that pictures of
    both compare."""
    refit: bool = False
    """Fit colours anew on the first store, and save them in it in the place of those that it has."""

    def lines(self) -> Iterator[str]:
        if self.colours_from and self.refit:
            raise ConfigError("--refit fits this store's own colours, and --colours-from takes another store's; give one of them")
        if self.rows and self.count != type(self).count:
            raise ConfigError(f"--count {self.count}: --rows names the {len(self.rows)} that are shown; give one of them")
        if self.count < 1:
            raise ConfigError(f"--count {self.count}: a picture has at least one row")
        stores, kind = self.open(), _picture_format(self.out)
        rows = named_together(stores, self.rows) if self.rows else picked_together(stores, self.count)
        picture = view_panel(
            columns_of(stores, rows, self.levels),
            foreground=self.foreground,
            refit=self.refit,
            colours_from=FeatureStore.open(self.colours_from, self.options) if self.colours_from else None,
            storage_options=self.options,
        )
        yield _saved(picture.draw(), self.out, kind, self.options)


@dataclass(frozen=True, kw_only=True)
class Similar(ShowMaps):
    """Cosine similarity of one pixel with its own and other images, per level, beside the bilinear map; of several stores, the
    levels of all."""

    key: str
    """Key or row number of the image, in the first store."""
    point: tuple[float, float] | None = None
    """x y in pixels of the original photograph; default: the middle."""
    to: tuple[str, ...] = ()
    """Keys or row numbers of other images; default: three, spread over the store."""
    out: str = "similar.png"
    """The picture to write."""

    def lines(self) -> Iterator[str]:
        stores, kind = self.open(), _picture_format(self.out)
        own = named_together(stores, [self.key])
        others = named_together(stores, self.to) if self.to else picked_together(stores, 4)
        if not self.to:
            other = np.flatnonzero(others[0] != own[0])[:3]
            others = [each[other] for each in others]
        rows = [np.concatenate(each) for each in zip(own, others, strict=True)]
        picture = similar_panel(columns_of(stores, rows, self.levels), self.point, storage_options=self.options)
        yield _saved(picture.draw(), self.out, kind, self.options)


@dataclass(frozen=True, kw_only=True)
class Nearest(Show):
    """The cells of the whole store that are most like a point of an image, by cosine: exact, in one pass; or among those that an
    index finds."""

    key: str
    """Key or row number of the image."""
    point: tuple[float, float]
    """x y in pixels of the original photograph."""
    level: str = ""
    """Default: the backbone's own."""
    count: int = 10
    """How many to find."""
    per_image: bool = False
    """Of each image its best cell alone."""
    others: bool = False
    """Not in the image itself."""
    index: bool = False
    """Compare only what the level's index finds near, which is a small part of the cells; `index` builds it, and says how many of
    the nearest it finds. Cosines are exact all the same."""
    out: str = ""
    """A picture to write: the photographs, with the cells ringed."""

    def lines(self) -> Iterator[str]:
        if self.count < 1:
            raise ConfigError(f"--count {self.count}: at least 1 is needed")
        kind = _picture_format(self.out) if self.out else ""
        store = self.open()
        level = dense_levels(store, [self.level])[0] if self.level else base_level(store)
        among = CellIndex.open(store, level) if self.index else None
        query = Query.at(store, int(named_rows(store, [self.key])[0]), self.point, level)
        without = [query.row] if self.others else []
        search = among.nearest if among else functools.partial(nearest_cells, store, level=level)
        found = search(query.vector_C, count=self.count, per_image=self.per_image, without=without)
        yield from nearest_lines(store, level, found)
        if among:
            yield among.said()
        yield from store.clipped_lines([level.name])
        if self.out:
            picture = nearest_panel(store, level, query, found, storage_options=self.options)
            yield _saved(picture.draw(), self.out, kind, self.options)


@dataclass(frozen=True, kw_only=True)
class Compare(Show):
    """Cosine per row between two stores, or two levels of one."""

    other: tyro.conf.Positional[str]
    """The second store; may be the first one again."""
    level: str = "x1"
    """Level of the first store."""
    other_level: str = ""
    """Level of the second; default: of the same name."""
    limit: int | None = None
    """Only the first N rows."""
    other_images: bool = False
    """Compare also rows whose images aren't the same bytes, as of copies that were encoded anew: by key alone."""
    worst: int = 5
    """How many of the least similar rows to list."""

    def lines(self) -> Iterator[str]:
        require_at_least(1, self, "limit")
        require_at_least(0, self, "worst")
        a, b = self.open(), self.open(self.other)
        other = self.other_level or self.level
        result = compare(a, b, self.level, other, self.limit, other_images=self.other_images)
        yield from comparison_lines(result, self.worst)
        yield from dict.fromkeys([*a.clipped_lines([self.level]), *b.clipped_lines([other])])


@dataclass(frozen=True, kw_only=True)
class Export(Show):
    """One vector per image, with key, source and carried columns, as Parquet; with --regions one per annotated object."""

    out: str
    """The folder to write, a path or fsspec URL; must hold no Parquet yet."""
    level: str = ""
    """Vectors of this level; default: pooled, or with --regions the backbone's own. A map is averaged over its cells, or over
    those of the object, by the area that it covers of each."""
    regions: str = ""
    """COCO annotations (JSON): a vector for each, with the ids of annotation, image and category. Images are found by file name
    and size."""
    boxes: bool = False
    """Of each annotation the box, instead of its mask."""
    label_frame: LabelFrame | None = None
    """Whether annotations are of images as stored or as seen, where EXIF turns an image and sizes don't tell."""

    def lines(self) -> Iterator[str]:
        store = self.open()
        if not self.regions:
            if self.boxes or self.label_frame:
                raise ConfigError("--boxes and --label-frame are about annotations; name these with --regions FILE.json")
            yield from self._image_lines(store)
            return
        level = dense_levels(store, [self.level])[0] if self.level else base_level(store)
        folder, name = folder_of(self.regions, self.options)
        if folder.size(name) is None:
            raise ConfigError(f"--regions {redact(self.regions, self.options)}: there is no such file; check the path")
        notes = Annotations(folder=folder, name=name, boxes=self.boxes, frame=self.label_frame)
        done = export_regions(store, level, notes, self.out, self.options)
        yield f"{self.out}: {done.rows:,} vectors of {level.channels} from {level.name} in {done.files} files"
        yield from (f"{count:,} annotations left out: {reason}" for reason, count in done.left_out.items())
        yield from store.clipped_lines([level.name])

    def _image_lines(self, store: FeatureStore) -> Iterator[str]:
        level = self.level or "pooled"
        done = export_vectors(store, level, self.out, self.options)
        left_out = f"; {done.left_out:,} rows without features left out" if done.left_out else ""
        yield f"{self.out}: {done.rows:,} vectors of {store.level(level).channels} in {done.files} files{left_out}"
        yield from store.clipped_lines([level])


@dataclass(frozen=True, kw_only=True)
class Report(Show):
    """One self-contained HTML page: settings, counts, failures, times, sizes, pictures."""

    out: str = "report.html"
    """The page to write."""
    count: int = 6
    """Photographs to show."""

    def lines(self) -> Iterator[str]:
        require_at_least(0, self, "count")
        if extension(self.out) not in ("html", "htm"):
            raise ConfigError(f"--out {self.out}: a report is a page; end the name in .html")
        yield _written(render_report(self.open(), count=self.count, storage_options=self.options), self.out, self.options)


@dataclass(frozen=True, kw_only=True)
class Card(Show):
    """A README for the store, as the Hugging Face hub shows it of data sets: what it holds, what made it, how it is read, what
    failed, pictures. Put into the store itself, where `push` finds it; edit it there."""

    out: str = ""
    """Another folder to write README.md and views/card.png to."""
    url: str = ""
    """Where the store will lie, for the code that reads it; default: where it is."""
    license: str = ""
    """The features' own licence, as the hub calls it (cc-by-4.0, ...); default: not stated. The weights' is looked up in timm."""
    count: int = 6
    """Photographs to show; 0 for none, where they aren't to be shared."""
    replace: bool = False
    """Write it anew where there is one."""

    def lines(self) -> Iterator[str]:
        if self.count < 0:
            raise ConfigError(f"--count {self.count}: give 0 for no picture, or more")
        store = self.open()
        folder = Folder(self.out, self.options) if self.out else store.folder
        if not self.replace and folder.exists(CARD):
            raise ConfigError(f"{folder.displayed} has a {CARD}; --replace writes it anew, and drops what was edited in it")
        card = render_card(store, url=self.url, license_name=self.license, count=self.count, storage_options=self.options)
        for name, data in card.files().items():
            folder.write(name, data)
        folder.remove_partial()
        yield f"{folder.displayed}/{CARD}: {' and '.join(card.files())}, {sum(map(len, card.files().values())) / 1e6:.1f} MB"


@dataclass(frozen=True, kw_only=True)
class Push(Show):
    """Copy the store with its card to another place. What is there already, by size and digest, isn't sent again; the root
    document goes last, so that a copy that isn't whole is no store. The same command goes on."""

    to: tyro.conf.Positional[str]
    """An fsspec URL (s3://, a path, ...) or hf://datasets/USER/NAME, a data set of the Hugging Face hub, which is made where
    there is none. Credentials by `hf auth login`, HF_TOKEN, AWS_*, or --storage-options by scheme."""
    unfinished: bool = False
    """Also a store that isn't complete; its copy can be continued as it can."""
    runs: bool = False
    """Also runs/, notes on the runs that made it: they name hosts, paths and times."""
    public: bool = False
    """A repository that is made on the hub is open to everyone; default: private."""

    def lines(self) -> Iterator[str]:
        on_hub = self.to.startswith(SCHEME)
        if self.public and not on_hub:
            raise ConfigError(f"--public is about repositories that are made on the hub (hf://); {redact(self.to)} is none")
        store = self.open()
        source, target = absolute(self.store).rstrip("/"), absolute(self.to).rstrip("/")
        if f"{target}/".startswith(f"{source}/") or f"{source}/".startswith(f"{target}/"):
            raise ConfigError(f"{redact(self.to)} lies in the store, or is it; give the copy a place of its own")
        if store.status != "complete" and not self.unfinished:
            raise ConfigError(f"{store.folder.displayed} is unfinished; finish it, or push it as it is with --unfinished")
        place = HubPlace(self.to, self.options, public=self.public) if on_hub else FolderPlace(Folder(self.to, self.options))
        yield from push_lines(store, place, url=self.to, runs=self.runs, storage_options=self.options)


@dataclass(frozen=True, kw_only=True)
class Browse(Show):
    """The store in a web browser: photographs and PCA colours at any level, what is similar to a click, nearest cells, failures,
    search. For this machine alone: the address that is printed holds a token, without which nothing is answered."""

    port: int = 0
    """Of 127.0.0.1; default: one that is free."""
    open_browser: bool = False
    """Open the address in this machine's browser, too."""

    def lines(self) -> Iterator[str]:
        from pipelines.showing.browse import BrowseServer  # a web server, which no other command needs

        server = BrowseServer(self.open(), self.options, self.port)
        yield f"{server.address}\nOpen it in a browser of this machine; Ctrl-C ends it."
        sys.stdout.flush()  # what reads it through a pipe has to know it now
        if self.open_browser:
            webbrowser.open(server.address)
        server.run()


@dataclass(frozen=True, kw_only=True)
class Training:
    """What training runs measured on their held-out images, side by side: untrained, at the best checkpoint, and last; and their
    curves, as a picture or on a page."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """The runs' folders, paths or fsspec URLs."""
    out: str = ""
    """What to write: a picture of losses and scores against steps (.png, .jpg, ...), or a self-contained page (.html) of scores,
    curves, pictures, commands and settings. TensorBoard reads the same curves from RUN/tensorboard."""
    storage_options: str = ""
    """JSON for the filesystem, as for jobs/extract.py."""

    def lines(self) -> Iterator[str]:
        if not self.runs:
            raise ConfigError("no run: give the folder of a training run, or those of several")
        as_page = extension(self.out) in ("html", "htm")
        kind = _picture_format(self.out, "or .html for a page") if self.out and not as_page else ""
        options = parse_options(self.storage_options)
        folders = [*{folder.url.rstrip("/"): folder for folder in (Folder(url, options) for url in self.runs)}.values()]
        yield from training_lines(folders)
        if not self.out:
            yield (
                "- Curves: --out curves.png draws them, and --out page.html tells all of the runs; TensorBoard's files are in "
                "tensorboard/ of each."
            )
            return
        if as_page:
            yield _written(render_training(folders), self.out, options)
            return
        with Image.open(io.BytesIO(curves_png(dict(zip(run_names(folders), folders, strict=True))))) as picture:
            yield _saved(picture.convert("RGB"), self.out, kind, options)


def _picture_format(out: str, otherwise: str = "") -> str:
    """Pillow's name for what a picture's name ends in. Raises `ConfigError`, before anything is drawn."""
    formats = Image.registered_extensions()
    found = formats.get(f".{extension(out)}", "")
    if found not in Image.SAVE:
        raise ConfigError(
            f"--out {out}: the name must say what kind of picture it is; end it in .png, .jpg, .webp or .tif"
            + (f", {otherwise}" if otherwise else "")
        )
    return found


def _saved(picture: Image.Image, out: str, kind: str, options: StorageOptions) -> str:
    data = io.BytesIO()
    picture.save(data, kind)
    folder, name = folder_of(out, options)
    folder.write(name, data.getvalue())
    return out


def _written(page: str, out: str, options: StorageOptions) -> str:
    data = printable(page).encode()
    folder, name = folder_of(out, options)
    folder.write(name, data)
    return f"{out}: {len(data) / 1e6:.1f} MB, opens without a network"
