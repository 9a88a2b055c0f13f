"""The store's Zarr metadata: groups, arrays, coordinates, and the conventions that other tools read."""

import functools
import warnings
from collections.abc import Mapping

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.buffer import Buffer
from zarr.abc.codec import BytesBytesCodec, Codec
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec
from zarr.storage import MemoryStore

from storage.documents import JsonObject, JsonValue
from storage.sample_arrays import create_sample_arrays
from storage.shards import IndexLocation
from storage.spec import SIDE_GROUPS, Compression, FeatureSpec, Layout, Level

_MULTISCALES = {
    "schema_url": "https://raw.githubusercontent.com/zarr-conventions/multiscales/refs/tags/v1/schema.json",
    "spec_url": "https://github.com/zarr-conventions/multiscales/blob/v1/README.md",
    "uuid": "d35379db-88df-4056-af3a-620245f8e347",
    "name": "multiscales",
    "description": "Multiscale layout of zarr datasets",
}


def zarr_documents(
    spec: FeatureSpec,
    layout: Layout,
    attributes: JsonObject,
    *,
    index_location: IndexLocation,
    sample_arrays: bool,
    consolidated: bool,
) -> dict[str, bytes]:
    """Every metadata document and coordinate chunk of a store, by object name. Made by zarr-python in memory.

    `attributes` are Raylift's own, at the root. `sample_arrays`: those of `storage.sample_arrays` are among them.
    """
    store = MemoryStore()
    root = zarr.create_group(store, attributes=_root_attributes(spec, attributes))
    store._store_dict.update(_side_documents())
    for level in spec.levels:
        store._store_dict.update(_level_documents(level, spec.model, spec.layers, layout, index_location))
    if sample_arrays:
        create_sample_arrays(root, layout.n_rows)
    if consolidated:
        with warnings.catch_warnings():
            # Consolidated metadata is not in the v3 spec yet; every reader we know takes it or ignores it.
            warnings.simplefilter("ignore")
            zarr.consolidate_metadata(store, zarr_format=3)
    return {name: value.to_bytes() for name, value in store._store_dict.items()}


@functools.cache
def _side_documents() -> Mapping[str, Buffer]:
    """Real (empty) groups, so that listing the store warns about nothing."""
    store = MemoryStore()
    for name in SIDE_GROUPS:
        zarr.create_group(store, path=name)
    return {name: value for name, value in store._store_dict.items() if name != "zarr.json"}


@functools.lru_cache(maxsize=64)  # a run asks for a store's documents four times, of which the root's alone change
def _level_documents(
    level: Level, model: str, layers: tuple[int, ...], layout: Layout, index_location: IndexLocation
) -> Mapping[str, Buffer]:
    """A level's metadata and coordinates, by object name."""
    store = MemoryStore()
    _create_level(zarr.create_group(store, path=level.name), level, model, layers, layout, index_location)
    return {name: value for name, value in store._store_dict.items() if name.startswith(f"{level.name}/")}


def _create_level(
    group: zarr.Group, level: Level, model: str, layers: tuple[int, ...], layout: Layout, index_location: IndexLocation
) -> None:
    attributes: dict[str, JsonValue] = {
        "long_name": f"{'dense' if level.grid else 'pooled'} features of {model}",
        "method": level.method,
        "layers": list(layers),
    }
    if level.dtype == "int8":
        # What plots and summaries of other tools show: the numbers alone look like features, and aren't.
        name = attributes["long_name"]
        attributes["long_name"] = f"int8 codes of {name}: multiply by scale[sample, channel] beside them"
        attributes["scale"] = "features * scale, per row and channel; a row without scale (NaN) holds no features"
        _create_vectors(group, "scale", level.channels, "float32", {}, layout)
    if level.grid is None:
        _create_vectors(group, "features", level.channels, level.dtype, attributes, layout, level.compression)
        return
    _create_maps(group, level, attributes, layout, index_location)
    assert level.start
    assert level.step
    for name, count, start, step in zip("yx", level.grid, level.start, level.step, strict=True):
        _create_coordinate(group, name, start + np.arange(count) * step)


def _bytes_codec(compression: Compression) -> BytesBytesCodec:
    return ZstdCodec(level=1, checksum=True) if compression == "zstd" else Crc32cCodec()


def _create_maps(
    group: zarr.Group, level: Level, attributes: dict[str, JsonValue], layout: Layout, index_location: IndexLocation
) -> None:
    """One inner chunk per row, so that one image's map is one ranged read; many of them in a shard, which is one object."""
    inner: list[Codec] = [BytesCodec(endian="little"), _bytes_codec(level.compression)]
    group.create_array(
        "features",
        shape=(layout.n_rows, *level.row_shape),
        chunks=(layout.shard_rows(level), *level.row_shape),
        dtype=level.dtype,
        fill_value=0 if level.dtype == "int8" else np.nan,
        dimension_names=["sample", "y", "x", "channel"],
        serializer=ShardingCodec(chunk_shape=(1, *level.row_shape), codecs=inner, index_location=index_location),
        compressors=None,
        filters=None,
        attributes=attributes,
    )


def _create_coordinate(group: zarr.Group, name: str, centres: NDArray[np.floating]) -> None:
    """Cell centres as a coordinate variable, by which xarray and others label the axis of its name."""
    coordinate = group.create_array(
        name,
        shape=centres.shape,
        chunks=centres.shape,
        dtype="float32",
        fill_value=np.nan,
        dimension_names=[name],
        compressors=None,
        filters=None,
        attributes={"units": "px", "long_name": f"cell centres along {name}, in pixels of the model's input"},
    )
    coordinate[:] = centres.astype(np.float32)


def _create_vectors(
    group: zarr.Group,
    name: str,
    channels: int,
    dtype: str,
    attributes: dict[str, JsonValue],
    layout: Layout,
    compression: Compression = "zstd",
) -> None:
    """One chunk per block: a chunk per row would be all overhead."""
    group.create_array(
        name,
        shape=(layout.n_rows, channels),
        chunks=(layout.block_rows, channels),
        dtype=dtype,
        fill_value=np.nan,
        dimension_names=["sample", "channel"],
        compressors=_bytes_codec(compression),
        filters=None,
        attributes=attributes,
    )


def _root_attributes(spec: FeatureSpec, own: JsonObject) -> dict[str, JsonValue]:
    maps = [level for level in spec.levels if level.grid]
    if not maps:
        return {"raylift": own}
    multiscales = {"layout": [_multiscale(level, maps[0]) for level in maps]}
    return {"raylift": own, "zarr_conventions": [_MULTISCALES], "multiscales": multiscales}


def _multiscale(level: Level, first: Level) -> dict[str, JsonValue]:
    """A `multiscales` entry: placement relative to the first level's cells, along the axes (sample, y, x, channel)."""
    asset = f"{level.name}/features"
    if level is first:
        return {"asset": asset, "transform": {"scale": [1.0, 1.0, 1.0, 1.0]}}
    assert level.step
    assert level.start
    assert first.step
    assert first.start
    scale = [level.step[i] / first.step[i] for i in (0, 1)]
    move = [(level.start[i] - first.start[i]) / first.step[i] for i in (0, 1)]
    return {
        "asset": asset,
        "transform": {"scale": [1.0, *scale, 1.0], "translation": [0.0, *move, 0.0]},
        "derived_from": f"{first.name}/features",
        "resampling_method": level.method,
    }
