"""The sources of an index, which of a run's files they are, and how files and settings differ from those that were indexed.

A source is known by its URL, and its content by size and stamp: the ETag of an object, the times of a file.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from storage.inputs import InputFile
from storage.left_out import LeftOut, merge_left_out, parse_left_out
from storage.paths import InputError
from storage.redaction import query_free
from storage.tars import MemberRules

if TYPE_CHECKING:
    from storage.samples import SampleIndex

LIMIT = "--limit"
"""The flag that says how many samples are taken, where no other one does."""

RESTORE = "Use a new --out, or restore what changed."
"""What to do about input that isn't what something was made from."""

BY_PLACE = "--duplicate-keys rename"
"""How an index says that keys begin with places of files."""


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
    left_out: str = ""
    "what is in it and in no row, as JSON (storage/left_out.py)"


def sources_left_out(sources: Sequence[Source]) -> dict[str, LeftOut]:
    """What is in the sources and in no row."""
    return merge_left_out(*(parse_left_out(source.left_out) for source in sources if source.left_out))


def sources_digest(sources: Sequence[Source]) -> str:
    """sha256 of where sources lie and how they are stamped: of two drivers, whether they read the same files."""
    return hashlib.sha256(repr([(source.url, source.size, source.etag) for source in sources]).encode()).hexdigest()


def same_stamp(before: str, now: str) -> bool | None:
    """Whether two stamps are of the same content; None where one of them says nothing.

    Of the times of a file (`mtime:<ns>,ctime:<ns>`) those are compared that both have: earlier versions kept `mtime` alone.
    """
    if not before or not now:
        return None
    if before.startswith("mtime:") and now.startswith("mtime:"):
        old, new = _times(before), _times(now)
        return all(old[name] == new[name] for name in old.keys() & new.keys())
    return before == now


def _times(stamp: str) -> dict[str, str]:
    return dict(part.split(":", 1) for part in stamp.split(","))


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
    # Sure pairs first: otherwise a changed file might take the source that an unchanged one of the same URL belongs to.
    for sure in (True, False):
        for i, source in enumerate(sources):
            candidates = by_url[source.url] if paired[i] is None else []
            found = next((file for file in candidates if not sure or is_unchanged(source, file)), None)
            if found is not None:
                paired[i] = found
                candidates.remove(found)
    return paired, [file for left in by_url.values() for file in left]


def describe_change(source: Source, file: InputFile) -> str | None:
    """In words, how a file differs from the source that was indexed; None where nothing tells."""
    if source.size != file.size:
        return f"{source.url}: {source.size} bytes when indexed, {file.size} now"
    if same_stamp(source.etag, file.etag) is False:
        return f"{source.url}: changed since it was indexed ({_describe_stamps(source.etag, file.etag)})"
    return None


def _describe_stamps(before: str, now: str) -> str:
    if not (before.startswith("mtime:") and now.startswith("mtime:")):
        return f"ETag {before} then, {now} now"
    old, new = _times(before), _times(now)
    # The second differs alone where a file keeps its old time.
    name = "mtime" if old["mtime"] != new["mtime"] else "ctime"
    then, today = (f"{datetime.fromtimestamp(int(each[name]) / 1e9, UTC):%Y-%m-%d %H:%M:%S.%f}" for each in (old, new))
    return f"{name} {then} then, {today} now"


def gone_and_new(sources: Sequence[Source], paired: Sequence[InputFile | None], new: Sequence[InputFile] = ()) -> list[str]:
    """In words, the sources that no file is `paired` with, and the files that are no source."""
    gone = [f"{each.url} is gone from the input" for each, file in zip(sources, paired, strict=True) if file is None]
    return gone + [f"{query_free(file.url)} is new" for file in new]


def other_input(index: "SampleIndex", lines: Sequence[str], advice: str = RESTORE) -> InputError:
    """The error for input that isn't what something was made from; `lines` say what differs."""
    listed = "\n  ".join([*lines[:10], *([f"and {len(lines) - 10} more"] if len(lines) > 10 else [])])
    return InputError(f"{index.displayed} was made from other input:\n  {listed}\n{advice}")


def changes_of(
    index: "SampleIndex", files: Sequence[InputFile], limit: int | None, rules: MemberRules | None, limited_by: str = LIMIT
) -> list[str]:
    """In words, how files and settings differ from those that were indexed (URL, size, stamp); empty if they don't.

    What lies behind a limit that cut the index doesn't count.
    """
    paired, new = pair(index.sources, files)
    changes = gone_and_new(index.sources, paired, () if index.is_cut else new)
    changes += [
        text
        for source, file in zip(index.sources, paired, strict=True)
        if file is not None and (text := describe_change(source, file))
    ]
    return sorted(changes) + settings_changes(index, limit, rules, limited_by)


def settings_changes(index: "SampleIndex", limit: int | None, rules: MemberRules | None, limited_by: str = LIMIT) -> list[str]:
    """In words, how the settings of an index differ from these."""
    changes = limit_changes(index, limit, limited_by)
    if index.rules != rules_text(rules):
        changes.append(f"it was indexed with {index.rules}, this run has {rules_text(rules)}")
    return changes


def limit_changes(index: "SampleIndex", limit: int | None, limited_by: str = LIMIT) -> list[str]:
    """In words, how the limit that an index was made with differs from this one."""
    if index.n_rows > (limit or index.n_rows):
        return [f"its index holds {index.n_rows} samples, this run asks for {limited_by} {limit}"]
    if index.is_cut and limit != index.n_rows:
        return [f"its index holds the first {index.n_rows} samples only ({limited_by})"]
    return []


def is_of_input(index: "SampleIndex", files: Sequence[InputFile], limit: int | None, rules: MemberRules | None) -> bool:
    """Whether an index is what would be made of these files now."""
    as_given = [source.url for source in index.sources] == [query_free(f.url) for f in files[: len(index.sources)]]
    return as_given and not changes_of(index, files, limit, rules)


def rules_text(rules: MemberRules | None) -> str:
    """Which members of a sample are taken, as an index keeps it and a message says it."""
    rules = rules or MemberRules()
    text = f"--image-member {rules.image or 'not given'} and --carry {' '.join(rules.carry) or 'not given'}"
    # Named only where given: indexes of earlier versions don't know them.
    text += " and --empty-shards skip" if rules.skip_empty else ""
    text += f" and --fps {rules.frames}" if rules.frames else ""
    return text + (f" and {BY_PLACE}" if rules.by_place else "")
