"""Held-out images that are trained on, too: found by their bytes, refused unless they are asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.config import ConfigError
from pipelines.training.data import ExampleSource, ImageSource
from storage.datasets.content import UNREADABLE
from storage.identity import same_images


@dataclass(frozen=True, kw_only=True)
class Same:
    """A held-out image and one with its bytes that is trained on, by the names that people know them by."""

    held_out: str
    trained: str


def same_rows(trained: ImageSource, n_rows: int, held_out: ImageSource, rows: Sequence[int]) -> dict[int, Same]:
    """Those of the held-out `rows` whose bytes are those of one of the first `n_rows` that are trained on."""
    found = same_images(trained.index, trained.urls, n_rows, held_out.index, held_out.urls, rows, trained.options)
    names, others = held_out.index.names(list(found)), trained.index.names(list(found.values()))
    return {row: Same(held_out=name, trained=other) for row, name, other in zip(found, names, others, strict=True)}


def same_contents(trained: Sequence[tuple[str, str]], held_out: Sequence[tuple[str, str]]) -> dict[int, Same]:
    """The same of images whose digests are known, as `content_digests` has them: (digest, name) of each."""
    first = dict(reversed(trained))
    return {
        row: Same(held_out=name, trained=first[content])
        for row, (content, name) in enumerate(held_out)
        if content in first and content != UNREADABLE
    }


def require_apart(same: Mapping[int, Same], held_out: ExampleSource, of: int, *, allowed: bool, instead: str) -> int:
    """How many of the `of` held-out images are trained on, too. What can't be read is neither. Raises `ConfigError` unless
    that is `allowed`; `instead` says what to do."""
    seen = [each for row, each in same.items() if not held_out.load([row], None).failed]
    if seen and not allowed:
        many, first = "is" if len(seen) == 1 else "are", seen[0]
        raise ConfigError(
            f"{len(seen)} of the {of} held-out images {many} among those to train on, byte for byte: {first.held_out} is "
            f"{first.trained}. Scores on them say nothing of other images. {instead}; or give --overlap, and the results say it."
        )
    return len(seen)
