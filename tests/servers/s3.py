"""moto's S3 server, which looks for its services once: by itself it does so twice a request, in more than a hundred folders."""

import sys

import moto.backends
from moto.server import main


def look_once() -> None:
    """In this process, from here on."""
    services = tuple(moto.backends.list_of_moto_modules())
    moto.backends.list_of_moto_modules = lambda: services


if __name__ == "__main__":
    look_once()
    main(sys.argv[1:])
