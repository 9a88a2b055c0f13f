"""The one base of all errors that say what a person can do about them."""

from typing import ClassVar


class RayliftError(Exception):
    """What is wrong with settings, data or weights, or why work ended early.

    Programs show the message alone, without a traceback; anything else that reaches them is a bug, and shown with one.
    Derived classes are also a `ValueError` or the like where callers of Python's own kind expect it.
    """

    exit_code: ClassVar[int] = 2
    "of a program that ends with it: 2 for wrong settings or data, 1 for work that began and failed"


class StorageError(RayliftError):
    """Base of what this package raises on purpose."""
