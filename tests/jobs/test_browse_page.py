"""The page of `jobs/show.py browse` in Chromium: every control, by mouse and by keys, on stores of all kinds."""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.executors import InlineExecutor
from pipelines.extraction.run import extract
from pipelines.showing.browse import BrowseServer
from storage.ledger import SampleRecord
from storage.paths import Folder
from storage.samples import write_index
from storage.sources import Source
from storage.spec import Layout
from storage.store import FeatureStore
from storage.tars import SCHEMA
from tests.browsed import browsing
from tests.browser import OVERFLOWING
from tests.conftest import jpeg, tiny_config, write_tar
from tests.stops import dying_at_task

HOSTILE = ["<script>alert(1)</script>", "../../etc/passwd", "<img src=x onerror=alert(2)>", "\"quotes\" & 'more'",
           "日本\u202egnp", "long-" * 150]  # fmt: skip
FAILED = "03"

DRAWN = "() => document.querySelectorAll('.tile canvas:not([hidden])').length"
PHOTOS = "() => [...document.querySelectorAll('.tile img')].filter(image => image.naturalWidth).length"
KEYS = "() => [...document.querySelectorAll('#cards .key')].map(key => key.textContent)"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FeatureStore:
    """Thirty images, one of them broken, six of names that want to be more; x1 of 4 x 4 cells to x4."""
    path = tmp_path_factory.mktemp("page")
    members = [(f"{i:02d}.jpg", b"" if f"{i:02d}" == FAILED else jpeg(i)) for i in range(24)]
    members += [(f"{key}.jpg", jpeg(i)) for i, key in enumerate(HOSTILE)]
    config = tiny_config(
        path, str(write_tar(path / "in.tar", members)), levels=("x1", "x2", "x4=bicubic", "pooled"), max_failed_fraction=1.0
    )
    extract(config, InlineExecutor())
    return FeatureStore.open(config.out)


@pytest.fixture(scope="module")
def server(store):
    with browsing(store) as serving:
        yield serving


@pytest.fixture(scope="module")
def browser(chromium):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def opened(browser: Any, server: BrowseServer, width: int = 1280, hash_: str = "") -> Iterator[Any]:
    """The page in a window so wide; holds at the end that nothing was complained about, asked elsewhere, or cut off."""
    context = browser.new_context(viewport={"width": width, "height": 900})
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.address + hash_)
    yield page
    cut_off = page.evaluate(OVERFLOWING)
    context.close()
    assert said == []
    assert cut_off == []
    here = f"http://127.0.0.1:{server.port}/"
    assert [url for url in asked if not url.startswith((here, f"blob:{here}", "data:"))] == []
    assert server.token in asked[0]
    assert not any(server.token in url for url in asked[1:])


def until(page: Any, expression: str, holds: Callable[[Any], bool]) -> Any:
    """What the page says of itself, once it holds; a page that may not evaluate texts can't be asked to wait."""
    end = time.monotonic() + 40
    while not holds(found := page.evaluate(expression)):
        assert time.monotonic() < end, f"{expression} stays {found!r}"
        time.sleep(0.02)
    return found


def drawn(page: Any, maps: int, photos: int) -> None:
    until(page, DRAWN, lambda found: found == maps)
    until(page, PHOTOS, lambda found: found == photos)


def at(page: Any, selector: str, n: int = 0, x: float = 0.5, y: float = 0.5) -> tuple[Any, dict[str, float]]:
    """One of some elements, and a place in it; where it is out of sight, the mouse scrolls there."""
    found = page.locator(selector).nth(n)
    box = found.bounding_box()
    return found, {"x": x * box["width"], "y": y * box["height"]}


def hover(page: Any, *where: Any) -> None:
    found, position = at(page, *where)
    found.hover(position=position)


def click(page: Any, *where: Any) -> None:
    found, position = at(page, *where)
    found.click(position=position)


def text(page: Any, selector: str) -> str:
    return page.locator(selector).inner_text()


def says(page: Any, selector: str, pattern: str) -> str:
    return until(page, f"() => document.querySelector('{selector}').innerText", lambda found: re.search(pattern, found))


# --- every control ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1280, 390])
def test_mouse(browser, server, width):
    with opened(browser, server, width) as page:
        drawn(page, 23, 23)  # of 24 images, one has failed
        assert server.token not in page.url
        assert "the image has 0 bytes" in text(page, "#cards li:nth-child(4)")
        says(page, "#state", "^complete, 30 images$")
        assert text(page, "#range") == "1–24 of 30"

        # The slider.
        assert page.locator(".tile.map canvas").first.evaluate("canvas => canvas.width") == 4
        page.locator("#level").fill("2")
        until(page, "() => document.querySelector('.tile.map canvas').width", lambda cells: cells == 16)
        assert text(page, "#level-name") == "x4 · bicubic · 16 × 16 cells"
        assert page.url.endswith("#level=x4")

        # The pointer: cells of both pictures.
        hover(page, ".tile.map", 0, 0.96, 0.04)
        says(page, "#readout", r"x4 row 0, column 15 · pixel \d+, \d+ · 00")
        assert page.locator(".cell").count() == 2

        # A click: all levels side by side, of all images.
        click(page, ".tile.map", 1, 0.3, 0.6)
        drawn(page, 3 * 23, 23)
        assert re.search(r"row=1&x=\d+(\.\d)?&y=\d+(\.\d)?$", page.url)
        assert [each.split()[0] for each in page.locator("li.query figcaption").all_inner_texts()] == [
            "photograph",
            "x1",
            "x2",
            "x4",
        ]
        assert page.locator(".ring").count() == 4
        assert page.evaluate(KEYS)[0] == "01"
        assert -1 <= float(text(page, "#low")) < float(text(page, "#high")) <= 1
        says(page, "li.query .vectors", r"pooled 1\.000")
        hover(page, "li.query .tile.map", 2, 0.3, 0.6)
        cosine = float(says(page, "#readout", r"^cosine .* · x4 row 9, column 4 · pixel .* · 01").split()[1])
        assert cosine > 0.9
        page.locator("#own").check()
        says(page, "#low", "^lowest of the image$")
        says(page, "li.query .vectors", r"^-?0\.\d\d to \d\.\d\d, pooled 1\.000$")
        page.locator("#own").uncheck()
        says(page, "#low", r"^-?\d\.\d\d$")

        # The best cells of the whole store.
        page.click("#nearest")
        until(page, "() => document.querySelectorAll('.cell.fixed').length", lambda found: found == 24)
        assert page.evaluate(KEYS)[0] == "01"
        told = [float(each.split()[1]) for each in page.locator(".vectors").all_inner_texts()]
        assert told == sorted(told, reverse=True)
        assert len(set(page.evaluate(KEYS))) == 24
        page.locator("#each").uncheck()
        until(page, "() => [...document.querySelectorAll('.key')].filter(key => key.textContent == '01').length", lambda n: n > 1)
        page.click("#maps")
        drawn(page, 3 * 23, 23)
        page.click("#back")
        drawn(page, 23, 23)

        # Failures, and their images.
        page.click("#to-failures")
        says(page, "#failures", "1 of 30 images failed")
        page.get_by_role("button", name="Show the failed images").click()
        until(page, KEYS, lambda keys: keys == [FAILED])
        page.locator("#only").uncheck()
        until(page, KEYS, lambda keys: len(keys) == 24)
        page.click("#to-failures")
        page.get_by_role("button", name=FAILED, exact=True).click()
        until(page, KEYS, lambda keys: FAILED in keys)

        # Search and pages.
        page.fill("#find", "long")
        until(page, KEYS, lambda keys: keys == [HOSTILE[-1]])
        page.fill("#find", "")
        until(page, KEYS, lambda keys: len(keys) == 24)
        page.click("#next")
        until(page, KEYS, lambda keys: len(keys) == 6)
        assert page.locator("#next").is_disabled()
        page.click("#first")
        page.click("#last")
        page.click("#previous")
        until(page, KEYS, lambda keys: keys[0] == "00")
        page.select_option("#count", "12")
        until(page, KEYS, lambda keys: len(keys) == 12)


def test_keyboard(browser, server):
    with opened(browser, server) as page:
        drawn(page, 23, 23)
        page.locator(".pictures").nth(2).focus()
        page.keyboard.press("ArrowRight")
        says(page, "#readout", "^x1 row 2, column 2 · pixel .* · 02")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowUp")
        says(page, "#readout", "^x1 row 1, column 3")
        for _ in range(5):
            page.keyboard.press("ArrowRight")
        says(page, "#readout", "^x1 row 1, column 3")  # the last one
        page.keyboard.press("Enter")
        drawn(page, 3 * 23, 23)
        assert page.evaluate(KEYS)[0] == "02"
        page.keyboard.press("]")
        says(page, "#nearest", "x2$")
        page.keyboard.press("[")
        says(page, "#nearest", "x1$")
        page.keyboard.press("Escape")
        drawn(page, 23, 23)
        page.keyboard.press("n")
        until(page, KEYS, lambda keys: len(keys) == 6)
        page.keyboard.press("p")
        until(page, KEYS, lambda keys: len(keys) == 24)
        page.keyboard.press("/")
        page.keyboard.type("07")
        until(page, KEYS, lambda keys: keys == ["07"])
        page.keyboard.press("Escape")
        until(page, KEYS, lambda keys: len(keys) == 24)
        page.locator("#level").focus()
        page.keyboard.press("ArrowRight")
        until(page, "() => document.querySelector('.tile.map canvas').width", lambda cells: cells == 8)


def test_every_view_has_a_link(browser, server):
    with opened(browser, server, hash_="#level=x2&row=5&x=40&y=30&find=0") as page:
        says(page, "#point-text", r"^Cosine with pixel \(40, 30\) of 05$")
        assert page.input_value("#find") == "0"
        assert text(page, "#level-name").startswith("x2")
        page.click("#nearest")
        until(page, "() => document.querySelectorAll('.cell.fixed').length", lambda found: found == 24)
        other = page.context.new_page()
        other.goto(page.url)
        says(other, "#point-text", r"most like pixel \(40, 30\) of 05, by cosine, x2$")
        until(other, KEYS, lambda keys: len(keys) == 24)
        other.close()
        page.go_back()
        says(page, "#point-text", "^Cosine")
        page.go_forward()
        says(page, "#point-text", "most like")
    stranger = browser.new_context().new_page()
    assert stranger.goto(f"http://127.0.0.1:{server.port}/#row=5&x=40&y=30").status == 403
    assert "open the address that jobs/show.py browse printed" in stranger.content()
    stranger.context.close()


@pytest.mark.parametrize(
    "hash_",
    [
        "#find=%3Cscript%3Ealert(1)%3C/script%3E&level=%3Cimg%20src=x%20onerror=alert(1)%3E&count=1e9&from=-1",
        "#show=constructor&level=__proto__&row=1e3&x=NaN&y=&only=%22&each=x",
        "#row=999999&x=1&y=1",
        "#row=0&x=99999&y=1",
        "#show=nearest&row=3&x=1&y=1",
        "#from=999999",
        "#%E0%A4%A",
    ],
)
def test_an_address_that_says_nonsense_is_harmless(browser, server, hash_):
    with opened(browser, server, hash_=hash_) as page:
        until(
            page, "() => document.querySelectorAll('#cards li').length || document.querySelector('#problem').innerText "
            "|| document.querySelector('#nothing').innerText", bool,
        )  # fmt: skip
        assert page.locator("script").count() == 1


def test_keys_that_are_no_friends_of_pages_are_text(browser, server):
    with opened(browser, server, 390, "#from=24") as page:
        drawn(page, 6, 6)
        keys = page.evaluate(KEYS)
        assert {key for key in HOSTILE if "\u202e" not in key} < set(keys)
        assert not any("\u202e" in key for key in keys)
        for i in range(6):
            page.locator("#cards .pictures").nth(i).click()
            drawn(page, 18, 6)
            page.keyboard.press("Escape")
            drawn(page, 6, 6)
        page.fill("#find", HOSTILE[0])
        until(page, KEYS, lambda found: found == [HOSTILE[0]])
        assert page.locator("#cards script, #cards [onerror]").count() == 0


# --- stores of all kinds ----------------------------------------------------------------------------------------------


def test_images_that_are_gone_leave_their_features(browser, tmp_path):
    tar = write_tar(tmp_path / "in.tar", [(f"{i}.jpg", jpeg(i)) for i in range(4)])
    config = tiny_config(tmp_path, str(tar), levels=("x1", "x2"))
    extract(config, InlineExecutor())
    tar.unlink()

    with browsing(FeatureStore.open(config.out)) as server, opened(browser, server, 390) as page:
        drawn(page, 4, 0)
        says(page, ".tile.photo .note", "^no photograph: FileNotFoundError")
        click(page, ".tile.photo")
        drawn(page, 8, 0)


def test_a_store_of_vectors_alone(browser, tmp_path):
    tar = write_tar(tmp_path / "in.tar", [(f"{i}.jpg", jpeg(i)) for i in range(4)])
    config = tiny_config(tmp_path, str(tar), levels=("pooled",))
    extract(config, InlineExecutor())

    with browsing(FeatureStore.open(config.out)) as server, opened(browser, server) as page:
        drawn(page, 0, 4)
        assert page.locator("#level").is_hidden()
        page.locator(".pictures").nth(2).click()
        says(page, "li.query .vectors", r"pooled 1\.000")
        says(page, "#point-text", "^Cosine with 2$")
        page.click("#nearest")
        until(page, KEYS, lambda keys: len(keys) == 4 and keys[0] == "2")


def test_a_store_is_followed_while_it_is_written(browser, make_tars, tiny):
    config = tiny(make_tars(), levels=("x1",))
    with dying_at_task(2):
        extract(config, InlineExecutor())

    with browsing(FeatureStore.open(config.out)) as server, opened(browser, server) as page:
        drawn(page, 8, 20)
        says(page, "#state", "^8 of 20 images")
        says(page, "#cards li:last-child .tile.map .note", "not written yet")
        extract(config, InlineExecutor())
        drawn(page, 20, 20)
        says(page, "#state", "^complete, 20 images$")


def test_on_s3(browser, make_tars, tiny, s3_options):
    url, options = f"s3://{s3_options['bucket']}/f.zarr", s3_options["options"]
    config = tiny(make_tars(), out=url, storage_options=json.dumps(options))
    extract(config, InlineExecutor())

    with browsing(FeatureStore.open(url, options), options) as server, opened(browser, server) as page:
        drawn(page, 20, 20)
        click(page, ".tile.photo", 3)
        drawn(page, 40, 20)
        page.click("#nearest")
        until(page, "() => document.querySelectorAll('.cell.fixed').length", lambda found: found == 20)
        assert options["secret"] not in page.content()


def test_a_server_that_was_stopped_is_said(browser, store):
    with browsing(store) as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(server.address)
        drawn(page, 23, 23)
    page.locator("#level").fill("1")
    says(page, "#problem", "^The server doesn't answer")
    context.close()


def test_a_hundred_thousand_rows(browser, store, tmp_path):
    """Of which the first and the last tasks are done."""
    rows, block = 100_000, 256
    folder, image = Folder(str(tmp_path / "large.zarr")), jpeg(0)
    (tmp_path / "photo.jpg").write_bytes(image)
    table = pa.table(
        {
            "key": [f"folder-{row % 7}/image-{row}" for row in range(rows)],
            "source": np.zeros(rows, np.int32),
            "member": pa.repeat("jpg", rows),
            "offset": np.zeros(rows, np.int64),
            "size": np.full(rows, len(image)),
            "problem": pa.nulls(rows, pa.string()),
        },
        schema=SCHEMA,
    )
    index = write_index(folder, table, [Source(url=str(tmp_path / "photo.jpg"), size=len(image), etag="e", digest="d")])
    layout = Layout(n_rows=rows, block_rows=block, index=index.digest)
    large = FeatureStore.create(folder.url, store.spec, layout, provenance={})
    values = {level.name: store.read(0, level.name) for level in store.spec.levels}
    for task in (layout.task(0), layout.task(layout.n_blocks - 1)):
        writer = large.writer(task)
        records = []
        for row in range(task.first, task.last):
            for level in store.spec.levels:
                writer.put(level, row - task.first, np.asarray(values[level.name], np.float32))
            place = {"width": 96, "height": 72, "x_scale": 1.0, "x_offset": 0.0, "y_scale": 1.0, "y_offset": 0.0}
            records.append(SampleRecord(row=row, key=table["key"][row].as_py(), source="", member="", offset=0, size=0, **place))
        writer.commit(records, writer.write())

    with browsing(FeatureStore.open(folder.url)) as server, opened(browser, server) as page:
        drawn(page, 24, 24)
        assert text(page, "#range") == "1–24 of 100,000"
        page.click("#last")
        until(page, KEYS, lambda keys: keys[-1] == "folder-4/image-99999")
        drawn(page, 16, 16)
        page.fill("#find", "image-9999")
        until(page, KEYS, lambda keys: len(keys) == 11)
        page.fill("#find", "e-77")
        says(page, "#range", "^1–24 of 1,111$")
        page.fill("#find", "IMAGE")
        says(page, "#range", "^1–24 of 2,000 or more$")
        page.fill("#find", "99998")
        until(page, KEYS, lambda keys: keys == ["folder-3/image-99998"])


def test_the_page_is_whole_where_it_is_installed():
    folder = Path(__file__).resolve().parents[2] / "pipelines/showing"
    assert all((folder / f"browse.{kind}").is_file() for kind in ("html", "css", "js"))
