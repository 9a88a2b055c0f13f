"""Commit records as objects: one for each task, and in a finished store one for 256 of them.

The finish packs the records of each whole stretch of tasks into one object, as a shard holds its chunks; once the root says that
there are packs, the objects that they stand for are removed. A store that is being written takes a record that lies alone for
the later one; in a finished one packs are the truth.
"""

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal

import numpy as np

from storage.documents import Document, MissingObject
from storage.paths import Folder
from storage.samples import PART_ROWS
from storage.shards import DamagedChunk, decode_index, encode_shard, index_bytes
from storage.spec import Layout

PACK_BLOCKS = 256
"""Tasks whose records are packed together, if those have no more rows than a part of the ledger."""

WHOLE_SHARE = 16
"""A pack is read in one piece where one of so many of its records is wanted."""

_AGAIN = "remove it, and the same extraction does its task again"
_ALL_AGAIN = "restore it from a copy; or remove it, and the same extraction does its tasks again"

Packs = Literal["none", "some", "all"]
"""`some`: there may be packs, and records that lie alone count before them. `all`: of whole stretches, packs alone count."""

Held = dict[str, tuple[Document, bytes]]
"""Records that were read, by the names that they have alone, and the object that each was in."""

Put = Callable[[str, bytes], None]
"""Writes an object of the store."""


class Commits:
    """The records below one folder of a store."""

    def __init__(self, folder: Folder, prefix: str, layout: Layout, packs: Packs):
        self.folder, self.prefix, self.layout, self.packs = folder, prefix, layout, packs
        self.per_pack = min(PACK_BLOCKS, PART_ROWS // layout.block_rows)
        # Stretches that can't grow any more: so a pack stays as it is.
        whole = layout.n_rows // (layout.block_rows * self.per_pack)
        self.n_packs = whole if packs != "none" and self.per_pack > 1 else 0

    @property
    def n_packed(self) -> int:
        """Tasks of whole stretches, which are the first ones."""
        return self.n_packs * self.per_pack

    def name(self, block: int) -> str:
        """Of the record of a task that lies alone."""
        return f"{self.prefix}/{block:08d}.parquet"

    def document(self, block: int) -> Document:
        """The object of that name, and what to do where it's damaged."""
        return Document(self.folder, self.name(block), _AGAIN)

    def _pack_name(self, number: int) -> str:
        return f"{self.prefix}/packed/{number:06d}"

    def _pack(self, number: int) -> Document:
        return Document(self.folder, self._pack_name(number), _ALL_AGAIN)

    # --- what is there ------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Of what lies beside the packs: a request for each thousand."""
        return self.folder.names(self.prefix)

    def listed(self, names: Collection[str] | None = None) -> set[int]:
        """Blocks with a record. Of a finished store no pack is looked at. `names` as `names` has them, where somebody asked."""
        alone = self.alone(names)
        if self.packs == "all":
            return alone | set(range(self.n_packed))
        # In this order: a record is removed only once its pack is there.
        return alone | self._in_packs()

    def alone(self, names: Collection[str] | None = None) -> set[int]:
        """Blocks with a record under its own name that counts."""
        names = self.names() if names is None else names
        first = self.n_packed if self.packs == "all" else 0
        return {block for name in names if (block := self._block_of(name)) is not None and block >= first}

    def strangers(self, names: Collection[str]) -> list[str]:
        """Those names that are of no record of this store: copies, notes of file managers. Nothing reads them."""
        return sorted(name for name in names if name and self._block_of(name) is None)

    def _block_of(self, name: str) -> int | None:
        match = re.fullmatch(r"(\d{8,18})\.parquet", name)
        block = int(match[1]) if match else -1
        # `000000001.parquet`, with a zero too many, must not be a second name of block 1.
        if not 0 <= block < self.layout.n_blocks or self.name(block) != f"{self.prefix}/{name}":
            return None
        return block

    def _numbers(self) -> list[int]:
        """Of the packs that are there."""
        if not self.n_packs:
            return []
        found = (int(name) for name in self.folder.names(f"{self.prefix}/packed") if re.fullmatch(r"\d{6}", name))
        return sorted(number for number in found if number < self.n_packs)

    def _in_packs(self) -> set[int]:
        """Blocks whose record lies in a pack. Raises `DamagedObject`."""
        numbers = self._numbers()
        ends = (
            self.folder.read_ends([self._pack_name(number) for number in numbers], index_bytes(self.per_pack)) if numbers else []
        )
        found: set[int] = set()
        for number, end in zip(numbers, ends, strict=True):
            if end is not None:
                found.update((number * self.per_pack + np.flatnonzero(self._index(number, end)[:, 1])).tolist())
        return found

    def _index(self, number: int, end: bytes) -> np.ndarray:
        """Where each record of a pack lies, int64 [per_pack, 2], of the pack's end or all of it. Raises `DamagedObject`."""
        try:
            return decode_index(end, self.per_pack, "end")
        except DamagedChunk as error:
            raise self._pack(number).damaged(f"is damaged: {error}") from None

    # --- reading ------------------------------------------------------------------------------------------------------

    def read(self, block: int, held: Held) -> tuple[Document, bytes]:
        """The object that a block's record lies in, and the record, which is `held` from then on. Raises `MissingObject`, and
        `DamagedObject` for a pack that can't be read."""
        alone, number = self.document(block), block // self.per_pack
        if alone.name in held:
            return held[alone.name]
        in_pack = number < self.n_packs
        if not in_pack or self.packs == "some":
            try:
                return held.setdefault(alone.name, (alone, alone.bytes()))
            except MissingObject:
                if not in_pack:
                    raise
        held.update(self._of_pack(number, [block]))
        if alone.name not in held:
            raise (alone if self.packs == "some" else self._pack(number)).missing()
        return held[alone.name]

    def known_alone(self) -> set[int] | None:
        """Blocks with a record that lies alone, where there are packs, too; None where there is none."""
        return self.alone() if self.packs == "all" or self._numbers() else None

    def packed(self, blocks: Iterable[int], alone: AbstractSet[int] | None) -> Held:
        """The records of blocks, in order, that don't lie alone, of packs that are worth to be read whole. `alone`:
        `known_alone`."""
        held: Held = {}
        if alone is None:
            return held
        for number, some in self._by_pack(blocks):
            wanted = [block for block in some if block not in alone]
            if number < self.n_packs and self._is_read_whole(wanted):
                held |= self._of_pack(number, wanted)
        return held

    def _by_pack(self, blocks: Iterable[int]) -> Iterator[tuple[int, list[int]]]:
        """Blocks in order, those of each pack, with its number."""
        return ((number, list(some)) for number, some in itertools.groupby(blocks, lambda block: block // self.per_pack))

    def _is_read_whole(self, blocks: Sequence[int]) -> bool:
        return len(blocks) * WHOLE_SHARE >= self.per_pack

    def _of_pack(self, number: int, blocks: Sequence[int]) -> Held:
        """Records in a pack, by their names."""
        name, pack, whole = self._pack_name(number), self._pack(number), b""
        if self._is_read_whole(blocks):
            end = whole = self._whole(number) or b""
        else:
            end = self.folder.read_ends([name], index_bytes(self.per_pack))[0] or b""
        if not end:
            return {}
        first, index = number * self.per_pack, self._index(number, end)
        spans = {block: index[block - first].tolist() for block in blocks if index[block - first, 1]}
        if whole:
            return {self.name(block): (pack, whole[start:stop]) for block, (start, stop) in spans.items()}
        parts = self.folder.read_ranges([(name, start, stop - start) for start, stop in spans.values()])
        return {self.name(block): (pack, data) for block, data in zip(spans, parts, strict=True) if data is not None}

    def _whole(self, number: int) -> bytes | None:
        try:
            return self.folder.read(self._pack_name(number))
        except FileNotFoundError:
            return None

    # --- writing ------------------------------------------------------------------------------------------------------

    def pack(self, number: int, held: Held, put: Put) -> None:
        """Put the records of a stretch that are `held` into one object; where they lie alone, they stay there until
        `remove_packed`."""
        first = number * self.per_pack
        found = [held.get(self.name(block)) for block in range(first, first + self.per_pack)]
        if any(found):
            put(self._pack_name(number), encode_shard([each and each[1] for each in found]))

    def remove_packed(self, look: Callable[[], None]) -> None:
        """Remove the objects that packs stand for, of a finished store. `look` raises where it isn't this store any more."""
        found = (self._block_of(name) for name in self.folder.names(self.prefix))
        stale = sorted(block for block in found if block is not None and block < self.n_packed)
        for start in range(0, len(stale), 1000):
            look()
            self.folder.remove_many([self.name(block) for block in stale[start : start + 1000]])

    def revoke(self, blocks: Iterable[int], put: Put) -> None:
        """Remove the records of tasks. A pack that holds some is written anew without them."""
        blocks = sorted(blocks)
        for number, some in self._by_pack(blocks):
            if number < self.n_packs and (whole := self._whole(number)):
                index, first = self._index(number, whole), number * self.per_pack
                index[[block - first for block in some]] = 0
                records = [whole[start:stop] if stop else None for start, stop in index.tolist()]
                if any(records):
                    put(self._pack_name(number), encode_shard(records))
                else:
                    self.folder.remove([self._pack_name(number)])
        self.folder.remove_many([self.name(block) for block in blocks])


@dataclass(frozen=True)
class Packing:
    """The records of a stretch of tasks as they were read, of a store's ledger and of those of levels that came later."""

    number: int
    commits: Sequence[Commits]
    alone: Sequence[AbstractSet[int] | None]
    "`known_alone` of each"
    held: Held

    def put(self, put: Put) -> None:
        """Pack them where the stretch is whole and isn't packed like this already."""
        for commits, alone in zip(self.commits, self.alone, strict=True):
            first = self.number * commits.per_pack
            if self.number < commits.n_packs and (alone is None or not alone.isdisjoint(range(first, first + commits.per_pack))):
                commits.pack(self.number, self.held, put)
