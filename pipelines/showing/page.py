"""HTML pages that can be sent to someone: no scripts, no links, no network, every picture inside."""

import base64
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import jinja2

from storage.documents import JsonObject


def page(template: str, filters: Mapping[str, Callable[..., object]], *, title: str, **values: object) -> str:
    """A template of this folder, filled in; it is to extend page.html.jinja."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": "{:,}".format, **filters}
    written = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return environment.get_template(template).render(title=title, written=written, **values)


def data_url(picture: bytes, kind: str) -> str:
    """What an `img` shows without a file; `kind` as media types call it: png, jpeg."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def versions_in_words(versions: JsonObject) -> str:
    """Software as results record it."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())
