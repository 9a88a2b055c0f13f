"""Scans of sources joined into the rows of one input, each of a key of its own."""

from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from storage.inputs import InputFile
from storage.left_out import left_out_json, left_out_lines, parse_left_out
from storage.paths import InputError
from storage.redaction import query_free
from storage.sources import Source
from storage.tars import EMPTY, SKIP, SourceScan


class DuplicateKeys(InputError):
    """Two samples of the input have the same key."""


def collect_index(scans: Iterable[tuple[InputFile, SourceScan]], limit: int | None = None) -> tuple[pa.Table, list[Source]]:
    """Join scans, in the order of the sources, into one table; stops once `limit` rows are there.

    Raises `DuplicateKeys`, and `InputError` for a tar without images or an input without rows.
    """
    tables: list[pa.Table] = []
    sources: list[Source] = []
    count = 0
    for file, scan in scans:
        rows, source = taken(file, scan, len(sources))
        tables.append(rows)
        sources.append(source)
        count += len(rows)
        if limit is not None and count >= limit:
            break
    if not count:
        skipped = [line for source in sources for line in left_out_lines(parse_left_out(source.left_out))]
        raise InputError("\n  ".join(["the input holds no samples", *skipped[:5]]))
    table = pa.concat_tables(tables)
    if limit is not None:
        table = table.slice(0, limit)
    refuse_duplicates(table, sources)
    return table, sources


def taken(file: InputFile, scan: SourceScan, number: int) -> tuple[pa.Table, Source]:
    """The rows of source `number` of an index, and what that knows of it. Raises `InputError` for a tar without images."""
    url = query_free(file.url)
    if scan.why_empty and EMPTY not in scan.left_out:
        raise InputError(
            f"{url} holds no images: {scan.why_empty}. Name the image member with --image-member, or drop the tar; {SKIP}"
        )
    # A scan, which may run in any process, doesn't know its source's number; it is column 1 of `SCHEMA`.
    rows = scan.rows.set_column(1, "source", pa.array([number] * len(scan.rows), pa.int32()))
    left_out, problems = left_out_json(scan.left_out), "; ".join(scan.problems)
    return rows, Source(url=url, size=file.size, etag=file.etag, digest=scan.digest, problems=problems, left_out=left_out)


def refuse_duplicates(table: pa.Table, sources: Sequence[Source]) -> None:
    """Raise `DuplicateKeys` where two rows of an index have one key."""
    counts = pc.value_counts(table["key"])
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if not len(repeated):
        return
    lines = []
    for key in repeated.field("values").slice(0, 5).to_pylist():
        rows = table.filter(pc.equal(table["key"], key)).slice(0, 4).to_pylist()
        places = ", ".join(f"{sources[r['source']].url} .{r['member']} at byte {r['offset']}" for r in rows)
        lines.append(f"  {key!r}: {places}")
    raise DuplicateKeys(
        f"{len(repeated)} keys belong to more than one sample (members of a sample must follow each other in the tar):\n"
        + "\n".join(lines)
        + "\nRename them, drop one source, or name the image with --image-member where one key has two images; or give "
        "--duplicate-keys rename, which puts the shard's name before each key, and takes whole names of image files for keys, "
        "not only what is before the first dot."
    )
