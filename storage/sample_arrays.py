"""Keys of the samples, and which have features, as Zarr arrays beside the levels: `index/key` and `index/valid`.

For tools that read Zarr and no Parquet: xarray selects rows by key and masks those that failed, viewers show names. Raylift
itself reads neither; index and ledger are the truth. They are written when a store is finished, from the merged ledger, and
their metadata is there in complete stores only.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numcodecs.vlen import VLenUTF8

from storage.documents import JsonValue
from storage.gathered import cut
from storage.shards import compress

if TYPE_CHECKING:  # workers write no metadata
    import zarr

CHUNK_ROWS = 2**16
"""Rows of a chunk, in a store of any size, since further images may come to it. 10^8 rows are 1526 objects an array."""

KEY, VALID = "index/key", "index/valid"

SAMPLE_DOCUMENTS = (f"{KEY}/zarr.json", f"{VALID}/zarr.json")
"""The arrays' metadata."""

_VLEN_UTF8 = VLenUTF8()


def create_sample_arrays(root: "zarr.Group", n_rows: int) -> None:
    """Both arrays, without chunks.

    `string` with the codec `vlen-utf8` is what zarr-python, xarray and zarrita have in common: fixed-length strings are
    UTF-32 in zarr-python (`fixed_length_utf32`), which zarrita doesn't know.
    """
    from zarr.codecs import ZstdCodec

    zstd = ZstdCodec(level=1, checksum=True)
    # `coordinates` is CF's, by which xarray makes the keys a coordinate: one that is read only when it is asked for.
    about_key: dict[str, JsonValue] = {"long_name": "keys of the images"}
    about_valid: dict[str, JsonValue] = {"long_name": "whether the row has features: its image didn't fail", "coordinates": "key"}
    for name, dtype, fill, attributes in ((KEY, "string", "", about_key), (VALID, "bool", False, about_valid)):
        root.create_array(
            name,
            shape=(n_rows,),
            chunks=(CHUNK_ROWS,),
            dtype=dtype,
            fill_value=fill,
            dimension_names=["sample"],
            compressors=zstd,
            filters=None,
            attributes=attributes,
        )


def sample_chunks(first: int, ledger: Iterable[pa.Table]) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of the chunks that hold rows `first`, the first of a chunk, and following: those of `ledger`, in order,
    up to the array's end or a chunk's."""
    columns = (table.select(["key", "status"]) for table in ledger)
    for chunk, rows in enumerate(cut(columns, CHUNK_ROWS), first // CHUNK_ROWS):
        keys = np.full(CHUNK_ROWS, "", object)
        keys[: len(rows)] = rows["key"].to_numpy(zero_copy_only=False)
        valid = np.zeros(CHUNK_ROWS, bool)
        valid[: len(rows)] = pc.equal(rows["status"], "ok").to_numpy(zero_copy_only=False)
        yield f"{KEY}/c/{chunk}", compress(np.frombuffer(_VLEN_UTF8.encode(keys), np.uint8))
        yield f"{VALID}/c/{chunk}", compress(valid)
