"""Pictures of what a store holds: PCA colours and similarity maps, beside the photographs. No torch, no Ray.

Colours are fitted once on a sample of the store and saved in it (`views/`), so that they agree between images, levels and
runs. Maps are drawn as squares, one per cell: what is smooth in the picture is smooth in the store.
"""

import json
import logging
from collections.abc import Sequence

import numpy as np

from operators.visual import Panel, RgbProjection, Tile, cosine_map, heat
from pipelines.features.photos import read_photos
from pipelines.showing.choice import Shown, base_level, cells, pick_rows, shortened
from storage.documents import Document, MissingObject
from storage.paths import StorageError, StorageOptions
from storage.pixels import bilinear, cell_centres, to_cells
from storage.spec import FeatureSpec, Level, Use
from storage.store import FeatureStore, OutsideImage

logger = logging.getLogger(__name__)

SAMPLE_ROWS = 64
"""Images that the colours of a store are fitted on."""

TILE_PX = 224
"""The longer side of a picture in a panel."""


# --- colours ----------------------------------------------------------------------------------------------------------


def colours_for(
    store: FeatureStore, level: Level, *, foreground: bool = False, refit: bool = False, colours_from: FeatureStore | None = None
) -> RgbProjection:
    """The colours of maps with as many channels as `level`: those saved in the store (or in `colours_from`), else fitted.

    New ones are fitted on the base level of SAMPLE_ROWS rows, and saved if the store can be written. Raises `StorageError` for
    another store of other features, whose components mean nothing here.
    """
    home = colours_from or store
    if different := home.spec.differences(store.spec, FeatureSpec.names(Use.LEARNED)):
        raise StorageError(
            f"the colours of {home.folder.displayed} are components of other features than {store.folder.displayed} holds:\n"
            f"{different.text('there', 'here')}\nLeave --colours-from out, so that this store has colours of its own"
        )
    name = f"views/rgb-{level.channels}{'-foreground' if foreground else ''}.json"
    if not refit:
        saved = Document(home.folder, name, "remove it, or have the colours fitted anew")
        try:
            return _parse_colours(saved, level)
        except MissingObject:
            if colours_from:
                raise StorageError(
                    f"{home.folder.displayed} has no saved colours for {level.channels} channels; view it first"
                ) from None
    base = base_level(store)
    fitted_on = base if base.channels == level.channels else level
    rows = pick_rows(store, SAMPLE_ROWS)
    projection = RgbProjection.fit(list(store.read(rows, fitted_on.name)), foreground=foreground)
    document = {"level": fitted_on.name, "rows": rows.tolist(), **projection.to_json()}
    try:
        store.folder.write(name, json.dumps(document).encode())
        if store.status == "complete":
            store.folder.remove_partial()
    except (OSError, StorageError) as error:
        logger.warning("colours were not saved in %s (%s); they may differ next time", store.folder.displayed, error)
    return projection


def _parse_colours(document: Document, level: Level) -> RgbProjection:
    """Raises `MissingObject` and `DamagedObject`."""
    found = document.json()
    with document.parsing():
        colours = RgbProjection.from_json(found)
        if colours.mean.shape != (level.channels,) or colours.components.shape != (3, level.channels):
            raise ValueError(f"they are of {colours.components.shape[-1]} channels, not {level.channels}")
    return colours


def view_panel(
    columns: Sequence[Shown],
    *,
    foreground: bool = False,
    refit: bool = False,
    colours_from: FeatureStore | None = None,
    storage_options: StorageOptions | None = None,
) -> Panel:
    """One line per image: the photograph as the model saw it, and the PCA colours of every column's map. All have one store's
    colours, so that they compare."""
    store, rows = columns[0].store, columns[0].rows
    palettes = {
        channels: colours_for(column.store, column.level, foreground=foreground, refit=refit, colours_from=colours_from)
        for channels, column in {each.level.channels: each for each in reversed(columns)}.items()
    }
    photos = read_photos(store, rows, storage_options)
    coloured = [[palettes[column.level.channels](each) for each in column.maps()] for column in columns]
    tiles = [[Tile(pixels=photo, is_photo=True), *(Tile(pixels=maps[i]) for maps in coloured)] for i, photo in enumerate(photos)]
    return Panel(
        tiles=tiles,
        columns=["photo", *(column.title for column in columns)],
        rows=row_titles(store, rows),
        title=store_title(store),
        tile_size=tile_size(store),
    )


# --- similarity -------------------------------------------------------------------------------------------------------


def similar_panel(
    columns: Sequence[Shown], point_xy: tuple[float, float] | None, *, storage_options: StorageOptions | None = None
) -> Panel:
    """Cosine similarity of one pixel's feature of the first image with all cells of all images, per column.

    Beside maps finer than the backbone's: that one brought bilinearly to the same grid, which they have to
    beat (LiFT, arXiv 2403.14625, Figs. 5 and 6). `point_xy` is in pixels of the original image; default: what lies at the
    middle of the model's input. Raises `OutsideImage` for points outside the image or its crop.
    """
    store, rows = columns[0].store, columns[0].rows
    pixels = store.pixels(int(rows[0]))
    height, width = store.spec.input_size
    if point_xy is None:
        middle = pixels.to_original(np.array([width / 2, height / 2]))
        x, y = np.clip(middle, 0, [pixels.width, pixels.height]).tolist()
        point_xy = x, y
    found = similarities(columns, point_xy)
    # One scale for all maps of an image, so that they compare; each image its own, since others are less alike.
    scales = [
        (min(np.percentile(values[i], 2) for _, values in found), max(values[i].max() for _, values in found))
        for i in range(len(rows))
    ]
    placed = pixels.to_input(np.array(point_xy)) / [width, height]
    marks = [(placed[0], placed[1]), *[None] * (len(rows) - 1)]
    tiles = [
        [
            Tile(pixels=photo, is_photo=True, mark=marks[i]),
            *(Tile(pixels=heat(values[i], *scales[i]), mark=marks[i]) for _, values in found),
        ]
        for i, photo in enumerate(read_photos(store, rows, storage_options))
    ]
    titles = row_titles(store, rows)
    return Panel(
        tiles=tiles,
        columns=["photo", *(title for title, _ in found)],
        rows=[f"{title}\n{low:.2f} to {high:.2f}" for title, (low, high) in zip(titles, scales, strict=True)],
        title=f"cosine with pixel ({point_xy[0]:.0f}, {point_xy[1]:.0f}) of {titles[0]}, ringed; {store_title(store)}",
        tile_size=tile_size(store),
        scale=("lowest cosine beside the row", "highest"),
    )


def similarities(columns: Sequence[Shown], point_xy: tuple[float, float]) -> list[tuple[str, np.ndarray]]:
    """Columns of a similarity panel: title, and maps [images, h, w] of cosines with the feature at the point."""
    store, rows = columns[0].store, columns[0].rows
    base = base_level(store)
    base_query = store.sample(int(rows[0]), [point_xy], base.name)[0]
    if np.isnan(base_query).any():
        raise OutsideImage(f"the crop cut {point_xy} of row {rows[0]} away; choose a point nearer to the middle")
    base_maps = store.read(rows, base.name)
    assert base.grid
    # Of each finer grid, where no column is bilinear itself.
    lacking = {column.grid for column in columns if column.grid > base.grid} - {
        column.grid for column in columns if column.level.method == "bilinear"
    }
    found = []
    for column in columns:
        level = column.level
        if column.grid in lacking:
            lacking.remove(column.grid)
            finer = np.stack([enlarged(m, base, level) for m in base_maps])
            found.append((f"{base.name} bilinear\n{cells(level)}", cosine_map(base_query, finer)))
        if column.store is store and level == base:
            query, maps = base_query, base_maps
        else:
            query, maps = column.store.sample(int(column.rows[0]), [point_xy], level.name)[0], column.maps()
        found.append((column.title, cosine_map(query, maps)))
    return found


def enlarged(values: np.ndarray, of: Level, to: Level) -> np.ndarray:
    """A map [h, w, C] of the level `of`, brought bilinearly to the grid of the level `to`."""
    assert to.grid
    return bilinear(values, to_cells(of, cell_centres(to)).reshape(-1, 2)).reshape(*to.grid, -1)


# --- words and sizes --------------------------------------------------------------------------------------------------


def store_title(store: FeatureStore) -> str:
    """What made a store's features, for a picture's title."""
    spec = store.spec
    weights = "RANDOM WEIGHTS, " if spec.weights_source == "random" else ""
    blocks = ", ".join(map(str, spec.layers))
    return f"{spec.model}, {weights}{spec.facet} of block {blocks}, {spec.input_size[1]} x {spec.input_size[0]} px"


def row_titles(store: FeatureStore, rows: np.ndarray) -> list[str]:
    """Keys, as long as a picture has room for."""
    keys = store.index.take(rows, ["key"])["key"].to_pylist()
    return [shortened(key, 23) for key in keys]


def tile_size(store: FeatureStore) -> tuple[int, int]:
    """(width, height) in pixels of a picture's tiles."""
    height, width = store.spec.input_size
    scale = TILE_PX / max(height, width)
    return max(32, round(width * scale)), max(32, round(height * scale))
