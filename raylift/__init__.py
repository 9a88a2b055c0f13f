"""Raylift, where it is installed: `raylift.storage`, `raylift.pipelines` and so on, the repository's folders (setup.py)."""

from storage import __version__

__all__ = ["__version__"]
