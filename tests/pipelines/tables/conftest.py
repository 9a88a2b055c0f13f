"""What tests of papers' tables share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import tables as job


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Iterator[Path]:
    """The working directory of `tables.py lift debug` and `deap debug`."""
    root = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        job.write_debug()
        yield root
