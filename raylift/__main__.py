"""One command for the programs of jobs/: `raylift extract ...`, or `python -m raylift extract ...`.

    raylift extract     features of images into a store
    raylift show        look at stores and at training runs
    raylift train       upsamplers, and readouts of features
    raylift evaluate    by published protocols
    raylift tables      papers' tables, or a grid
    raylift benchmark   engineering figures
    raylift --version

Each has --help. Reading and `show` need no extra; `extract` needs raylift[extract], `train` raylift[train], `evaluate`
raylift[eval], the others raylift[all]; and all but --executor inline raylift[cluster].
"""

import importlib
import sys
from collections.abc import Sequence

from jobs import program
from pipelines.config import ConfigError
from pipelines.provenance import full_version

PROGRAMS = ("extract", "show", "train", "evaluate", "tables", "benchmark")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program that the first word of `argv` names, by default of the command line; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["--version"]:
        print(full_version())
        return 0
    try:
        word = program.pick_word(args, PROGRAMS, "no program")
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return error.exit_code
    if word is None:
        print(__doc__)
        return 0 if {"--help", "-h"} & set(args) else 2
    try:
        # Each by itself: to look at a store takes neither torch nor the seconds that importing it does.
        module = importlib.import_module(f"{program.__package__}.{word}")
    except ModuleNotFoundError as error:
        print(program.what_lacks(error), file=sys.stderr)
        return ConfigError.exit_code
    code: int = module.run(args)
    return code


if __name__ == "__main__":
    sys.exit(main())
