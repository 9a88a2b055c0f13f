"""pyarrow without pandas, for processes that are Raylift's own.

Before pyarrow makes an array of a list, or an empty table, it imports pandas where that is installed, to see whether what it was
given is of pandas: 0.27 s of CPU time and 54 MB in every process (pyarrow 26). It keeps what it found, and asks again when a data
frame is asked for: those are still made.
"""

import sys

import pyarrow as pa


class _NoPandas:
    """A finder of modules by which Python's import finds no pandas."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def forget_pandas() -> None:
    """Have pyarrow find no pandas in this process, until it makes a data frame. Does nothing where it's imported already."""
    if "pandas" in sys.modules:
        return
    sys.meta_path.insert(0, _NoPandas)
    try:
        pa.array([])
    finally:
        sys.meta_path.remove(_NoPandas)
