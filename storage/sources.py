"""The sources of an index, and which of a run's files they are.

A source is known by its URL, and its content by size and stamp: the ETag of an object, the times of a file.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from storage.inputs import InputFile
from storage.paths import query_free


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input file as the index knows it."""

    url: str
    "without credentials"
    size: int
    etag: str
    "its stamp; see `InputFile.etag`"
    digest: str
    "sha256 of its rows"
    problems: str = ""


def same_stamp(before: str, now: str) -> bool | None:
    """Whether two stamps are of the same content; None where one of them says nothing.

    Of the times of a file (`mtime:<ns>,ctime:<ns>`) those are compared that both have: earlier versions kept `mtime` alone.
    """
    if not before or not now:
        return None
    if before.startswith("mtime:") and now.startswith("mtime:"):
        old, new = (dict(part.split(":", 1) for part in stamp.split(",")) for stamp in (before, now))
        return all(old[name] == new[name] for name in old.keys() & new.keys())
    return before == now


def is_unchanged(source: Source, file: InputFile) -> bool:
    """Whether size and stamp say that `file` holds what was indexed."""
    return source.size == file.size and same_stamp(source.etag, file.etag) is True


def pair(sources: Sequence[Source], files: Sequence[InputFile]) -> tuple[list[InputFile | None], list[InputFile]]:
    """The file of each source by its URL, None for those that are gone; and the files that are new.

    URLs are compared as they are stored, without the query: of several that differ in that only, those of equal size and
    stamp are one, the others are taken in order.
    """
    by_url: dict[str, list[InputFile]] = defaultdict(list)
    for file in files:
        by_url[query_free(file.url)].append(file)
    paired: list[InputFile | None] = [None] * len(sources)
    for sure in (True, False):
        for i, source in enumerate(sources):
            candidates = by_url[source.url] if paired[i] is None else []
            file = next((file for file in candidates if not sure or is_unchanged(source, file)), None)
            if file is not None:
                paired[i] = file
                candidates.remove(file)
    return paired, [file for left in by_url.values() for file in left]


def describe_change(source: Source, file: InputFile) -> str | None:
    """In words, how a file differs from the source that was indexed; None where nothing tells."""
    if source.size != file.size:
        return f"{source.url}: {source.size} bytes when indexed, {file.size} now"
    if same_stamp(source.etag, file.etag) is False:
        return f"{source.url}: changed since it was indexed (ETag or time {source.etag} then, {file.etag} now)"
    return None
