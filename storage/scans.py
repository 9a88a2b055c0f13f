"""Scans of sources joined into the rows of one input, each of a key of its own."""

from collections.abc import Iterable, Sequence

import pyarrow as pa

from storage.gathered import GatheredRows
from storage.inputs import InputFile
from storage.left_out import left_out_json, left_out_lines, parse_left_out
from storage.paths import InputError
from storage.redaction import query_free
from storage.sources import Source
from storage.tars import EMPTY, SKIP, SourceScan
from storage.videos import TAKES_FRAMES


class DuplicateKeys(InputError):
    """Two samples of the input have the same key."""


def collect_index(scans: Iterable[tuple[InputFile, SourceScan]], limit: int | None = None) -> tuple[GatheredRows, list[Source]]:
    """Gather the rows of scans, in the order of the sources; stops once `limit` rows are there.

    Raises `DuplicateKeys`, and `InputError` for a tar without images or an input without rows.
    """
    rows = GatheredRows()
    sources: list[Source] = []
    for file, scan in scans:
        found, source = taken(file, scan, len(sources))
        rows.append(found if limit is None else found.slice(0, limit - len(rows)))
        sources.append(source)
        if limit is not None and len(rows) >= limit:
            break
    if not len(rows):
        skipped = [line for source in sources for line in left_out_lines(parse_left_out(source.left_out))]
        raise InputError("\n  ".join(["the input holds no samples", *skipped[:5]]))
    refuse_duplicates(rows, sources)
    return rows, sources


def taken(file: InputFile, scan: SourceScan, number: int) -> tuple[pa.Table, Source]:
    """The rows of source `number` of an index, and what that knows of it. Raises `InputError` for a tar without images."""
    url = query_free(file.url)
    if scan.why_empty and EMPTY not in scan.left_out:
        videos = "jobs/extract.py --fps 2 takes frames of its videos. " if TAKES_FRAMES in " ".join(scan.left_out) else ""
        raise InputError(
            f"{url} holds no images: {scan.why_empty}. {videos}Name the image member with --image-member, or drop the tar; {SKIP}"
        )
    # A scan, which may run in any process, doesn't know its source's number; it is column 1 of `SCHEMA`.
    rows = scan.rows.set_column(1, "source", pa.array([number] * len(scan.rows), pa.int32()))
    left_out, problems = left_out_json(scan.left_out), "; ".join(scan.problems)
    return rows, Source(url=url, size=file.size, etag=file.etag, digest=scan.digest, problems=problems, left_out=left_out)


def refuse_duplicates(rows: GatheredRows, sources: Sequence[Source]) -> None:
    """Raise `DuplicateKeys` where two rows of an index have one key."""
    count, examples = rows.repeated()
    if not count:
        return
    lines = []
    for numbers in examples:
        found = rows.take(numbers).to_pylist()
        places = ", ".join(f"{sources[r['source']].url} .{r['member']} at byte {r['offset']}" for r in found)
        lines.append(f"  {found[0]['key']!r}: {places}")
    raise DuplicateKeys(
        f"{count} keys belong to more than one sample (members of a sample must follow each other in the tar):\n"
        + "\n".join(lines)
        + "\nRename them, drop one source, or name the image with --image-member where one key has two images; or give "
        "--duplicate-keys rename, which puts the shard's name before each key, and takes whole names of image files for keys, "
        "not only what is before the first dot."
    )
