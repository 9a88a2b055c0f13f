"""`jobs/show.py browse`: who is answered, and that what is answered is what the store holds. Its page: test_browse_page.py."""

import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.show import run
from operators.visual import cosine_map
from pipelines.executors import InlineExecutor
from pipelines.extraction.run import extract
from pipelines.showing import nearest
from pipelines.showing.browse import HEADERS, BrowseServer
from pipelines.showing.choice import columns_of
from pipelines.showing.nearest import nearest_cells
from pipelines.showing.open_store import OpenStore, Wanted
from pipelines.showing.views import view_panel
from storage.paths import StorageOptions
from storage.store import FeatureStore
from tests.browsed import answer, ask, browsing
from tests.conftest import jpeg, tiny_config, write_tar
from tests.stops import dying_at_task

ROOT = Path(__file__).resolve().parents[2]

PATHS = ["/", "/browse.js", "/browse.css", "/store", "/status", "/heat", "/cards", "/failures", "/photos", "/colours", "/similar",
         "/nearest", "/../pyproject.toml", "/none"]  # fmt: skip

HOSTILE = [
    "<script>alert(1)</script>",
    "../../etc/passwd",
    "\"quotes\" & 'more'",
    "Ünïcödé-日本-\u202egnp",
    "long-" * 120,
    "a\nb",
]
"""Keys that a tar may hold."""

BROKEN = [1, 8]
"""Rows without features of the store below."""


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FeatureStore:
    """Twelve images, two of them broken, at three levels."""
    path = tmp_path_factory.mktemp("browse")
    members = [(f"{i:02d}.jpg", b"" if i in BROKEN else jpeg(i)) for i in range(12)]
    config = tiny_config(
        path,
        str(write_tar(path / "in.tar", members)),
        levels=("x1", "x2", "sharp:x2=bicubic", "x4=bicubic@int8", "pooled"),
        max_failed_fraction=1.0,
    )
    extract(config, InlineExecutor())
    return FeatureStore.open(config.out)


@pytest.fixture(scope="module")
def server(store):
    with browsing(store) as serving:
        yield serving


def maps(found: dict, dtype: str, *shape: int) -> np.ndarray:
    """The rows' maps of a packed answer."""
    return np.frombuffer(found["body"], dtype).reshape(len(found["rows"]), *found["grid"], *shape)


def cosines(found: dict) -> np.ndarray:
    return (maps(found, "<u2").astype(np.float64) - 1) / 65534 * 2 - 1


# --- who is answered --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_without_the_token_nothing_is_answered(server, path):
    cookie = f"raylift-browse-{server.port}"
    for headers in ({}, {"Cookie": f"{cookie}={server.token[:-1]}"}, {"Cookie": f"other={server.token}"}):
        assert answer(server, path, headers)[0] == 403
    for wrong in ("", server.token[:-1], server.token + "x", "ü"):
        assert answer(server, path, token=wrong)[0] == 403


def test_the_page_keeps_the_token_as_a_cookie_that_other_sites_do_not_send(server):
    status, headers, body = answer(server, "/", token=server.token)
    cookie = headers["Set-Cookie"]

    assert status == 200
    assert server.token not in body.decode()
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
    assert "Domain" not in cookie
    assert answer(server, "/store", {"Cookie": cookie.split(";")[0]})[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "0.0.0.0", "", "[", "[::1]"])
def test_a_name_that_leads_here_from_elsewhere_is_refused(server, host):
    assert answer(server, "/store", {"Host": host}, token=server.token)[0] == 403


@pytest.mark.parametrize("host", ["localhost:9000", "127.0.0.1", "LOCALHOST"])
def test_a_forwarded_port_of_this_machine_is_not(server, host):
    assert answer(server, "/store", {"Host": host}, token=server.token)[0] == 200


def test_only_this_machine_reaches_it(server):
    assert server.socket.getsockname() == ("127.0.0.1", server.port)


@pytest.mark.parametrize(
    ("path", "status"), [("/", 200), ("/none", 404), ("/store", 200), ("/cards?rows=x", 400), ("/heat", 403)]
)
def test_every_answer_says_what_the_page_may_do(server, path, status):
    token = {} if status == 403 else {"Cookie": f"raylift-browse-{server.port}={server.token}"}
    found, headers, _ = answer(server, path, token)

    assert found == status
    assert {name: headers[name] for name in HEADERS} == HEADERS
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert "Server" not in headers


def test_it_is_only_read(server):
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert answer(server, "/cards", {"Cookie": f"raylift-browse-{server.port}={server.token}"}, method)[0] == 405


@pytest.mark.parametrize(
    "path", ["/../pyproject.toml", "/browse.py", "/%2e%2e/browse.py", "//etc/passwd", "/browse.js/../browse.py"]
)
def test_no_other_file_is_given(server, path):
    assert answer(server, path, token=server.token)[0] == 404


def test_the_page_names_no_other_address():
    for name in ("browse.html", "browse.css", "browse.js"):
        text = (ROOT / "pipelines/showing" / name).read_text()
        assert not re.search(r"https?:|//\w+\.|@import|\burl\(", text)
        assert "innerHTML" not in text


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("/cards", {"rows": "1,x"}),
        ("/cards", {"rows": "-1"}),
        ("/cards", {"rows": ",".join(["1"] * 201)}),
        ("/cards", {"from": "1e3"}),
        ("/cards", {"from": "²"}),
        ("/cards", {"count": "9" * 30}),
        ("/photos", {}),
        ("/similar", {"row": 0, "x": "a", "y": 1, "level": "x1", "rows": 0}),
        ("/nearest", {"x": 1, "y": 1, "level": "x1"}),
    ],
)
def test_what_the_page_never_asks_is_refused(server, path, query):
    assert answer(server, path, token=server.token, **query)[0] == 400


@pytest.mark.parametrize(
    ("path", "query", "said"),
    [
        ("/cards", {"rows": "99"}, "there is no row 99"),
        ("/photos", {"rows": "12"}, "there is no row 12"),
        ("/colours", {"rows": 0, "level": "../x1"}, "has no level '../x1'"),
        ("/colours", {"rows": 0, "level": "pooled"}, "no map to colour"),
        ("/similar", {"row": 0, "x": 1000, "y": 0, "level": "x1", "rows": 0}, r"lies outside"),
        ("/similar", {"row": 0, "x": "nan", "y": 0, "level": "x1", "rows": 0}, r"lies outside"),
        ("/similar", {"row": 1, "x": 0, "y": 0, "level": "x1", "rows": 0}, "which failed: decode"),
        ("/nearest", {"row": 1, "x": 0, "y": 0, "level": "x1"}, "which failed: decode"),
    ],
)
def test_what_a_person_can_act_on_is_said_to_the_page(server, path, query, said):
    assert re.search(said, ask(server, path, **query)["problem"])


# --- what is answered -------------------------------------------------------------------------------------------------


def test_cards_are_what_the_ledger_says(server, store):
    found = ask(server, "/cards", count=12)
    records = store.records(slice(None)).to_pylist()

    assert (found["total"], found["has_more"]) == (12, False)
    assert [card["key"] for card in found["cards"]] == [record["key"] for record in records]
    assert [card["status"] for card in found["cards"]] == [record["status"] for record in records]
    assert [card["row"] for card in found["cards"] if card["reason"]] == BROKEN
    assert found["cards"][1]["reason"] == "decode: ImageRefused: the image has 0 bytes"
    for card, record in zip(found["cards"], records, strict=True):
        assert all(card[name] == record[name] for name in ("width", "height", "x_scale", "y_offset"))


def test_cards_come_in_pages_by_search_and_by_failure(server):
    def rows(**query: object) -> list[int]:
        return [card["row"] for card in ask(server, "/cards", **query)["cards"]]

    assert rows(**{"from": 10}) == [10, 11]
    assert rows(**{"from": 12}) == []
    assert rows(**{"from": 3, "count": 2}) == [3, 4]
    assert rows(find="1") == [1, 10, 11]  # no key is called so: first the row of that number
    assert rows(find="10") == [10]
    assert rows(find="nowhere") == []
    assert rows(only="failed") == BROKEN
    assert rows(only="failed", find="08") == [8]
    assert rows(rows="7,2") == [7, 2]


def test_a_key_that_looks_like_a_number_comes_before_the_row_of_that_number(tmp_path):
    members = [(f"{name}.jpg", jpeg(i)) for i, name in enumerate(["7", "a1", "1", "B1"])]
    config = tiny_config(tmp_path, str(write_tar(tmp_path / "in.tar", members)), levels=("x1",))
    extract(config, InlineExecutor())
    opened = OpenStore(FeatureStore.open(config.out), {})

    def rows(text: str) -> list[object]:
        return [card["row"] for card in opened.cards(Wanted(text=text), threading.Event())["cards"]]

    assert rows("1") == [2, 1, 3]
    assert rows("b") == [3]  # whatever the case
    assert rows("3") == [3]
    assert rows(".*") == []  # text, not an expression


def test_a_search_gives_a_bounded_number_of_rows(store, monkeypatch):
    monkeypatch.setattr("pipelines.showing.open_store.MOST_FOUND", 4)

    found = OpenStore(store, {}).cards(Wanted(text="0"), threading.Event())

    assert (found["total"], found["has_more"]) == (4, True)


@pytest.mark.parametrize("level", ["x1", "sharp", "x4"])
def test_pictures_are_those_of_view(server, store, level):
    rows = np.array([0, 5, 11])
    panel = view_panel(columns_of([store], [rows], [level]))

    photos, coloured = ask(server, "/photos", rows="0,5,11"), ask(server, "/colours", rows="0,1,5,11", level=level)

    assert coloured["rows"] == rows.tolist()  # one has no features
    np.testing.assert_array_equal(maps(coloured, "u1", 3), [line[1].pixels for line in panel.tiles])
    at = 0
    for photo, line in zip(photos["photos"], panel.tiles, strict=True):
        with Image.open(io.BytesIO(photos["body"][at : at + photo["bytes"]])) as image:
            assert np.abs(np.asarray(image, np.float32) - line[0].pixels).mean() < 6
        at += photo["bytes"]
    assert at == len(photos["body"])


@pytest.mark.parametrize("level", ["x1", "x2", "x4", "pooled"])
def test_similarity_is_the_cosine_with_the_feature_at_the_point(server, store, level):
    query = store.sample(3, [(40.5, 30.0)], level)[0] if level != "pooled" else store.read(3, level)

    for _ in range(2):  # read, and then kept
        found = ask(server, "/similar", row=3, x=40.5, y=30, level=level, rows="0,1,3,11")

        expected = cosine_map(query, store.read([0, 3, 11], level)).reshape(3, *found["grid"])
        assert found["rows"] == [0, 3, 11]
        np.testing.assert_allclose(cosines(found), expected, atol=1 / 65534)


@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("level", ["x2", "pooled"])
def test_nearest_cells_are_those_of_the_command(server, store, level, per_image):
    query = store.sample(3, [(40.0, 30.0)], level)[0] if level != "pooled" else store.read(3, level)
    expected = nearest_cells(store, query, store.level(level), 7, per_image=per_image)

    found = ask(server, "/nearest", row=3, x=40, y=30, level=level, count=7, **({"per_image": 1} if per_image else {}))["cells"]

    assert [(each["row"], *each["cell"]) for each in found] == [(each.row, *each.cell) for each in expected]
    np.testing.assert_allclose([each["cosine"] for each in found], [each.cosine for each in expected])
    assert [each["key"] for each in found] == [f"{each.row:02d}" for each in expected]


def test_a_search_for_cells_says_how_far_it_is_and_ends_with_its_page(store, monkeypatch):
    """With a page that goes away before it has heard of the first half."""
    monkeypatch.setattr(nearest, "CHUNK_BYTES", 1)
    monkeypatch.setattr("pipelines.showing.browse.TOLD_EVERY_S", 0.01)
    told, asked, read, in_thread = threading.Event(), [], FeatureStore.read_present, BrowseServer._in_thread

    def read_present(self, rows, level):
        asked.append(int(rows[0]))
        if rows[0] >= 5:
            told.wait(30)
        return read(self, rows, level)

    async def then_told(self, *args):
        # The rows go on when the search has been told that nobody waits, however long the server takes to see it.
        try:
            return await in_thread(self, *args)
        finally:
            told.set()

    with browsing(store) as server:
        monkeypatch.setattr(FeatureStore, "read_present", read_present)
        monkeypatch.setattr(BrowseServer, "_in_thread", then_told)
        with socket.create_connection(("127.0.0.1", server.port)) as page:
            query = f"/nearest?row=3&x=40&y=30&level=x1&token={server.token}"
            page.sendall(f"GET {query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            said = b""
            while b'"looked_at": 5' not in said:
                said += page.recv(4096)
        ask(server, "/nearest", row=3, x=40, y=30, level="x1")  # one at a time: the other has ended by now

    assert b'"of": 12' in said
    assert asked.count(11) == 1


def test_failures_are_grouped_with_rows_to_look_at(server):
    found = ask(server, "/failures")

    assert (found["failed"], found["rows"]) == (2, 12)
    assert found["groups"] == [
        {
            "count": 2,
            "reason": "decode: ImageRefused: the image has 0 bytes",
            "examples": [{"row": 1, "key": "01"}, {"row": 8, "key": "08"}],
        }
    ]


def test_heat_is_256_colours(server):
    found = ask(server, "/heat")

    assert np.array(found).shape == (256, 3)
    assert found[0] != found[255]


def test_what_the_store_is_and_how_far(server, store):
    said = ask(server, "/store")

    assert [level["name"] for level in said["levels"]] == ["x1", "x2", "sharp", "x4", "pooled"]
    assert said["levels"][0]["grid"] == [4, 4]
    assert "grid" not in said["levels"][4]
    assert (said["rows"], said["input"], said["is_random"]) == (12, [64, 64], True)
    assert ask(server, "/status") == {
        "is_complete": True, "state": "complete", "rows": 12, "finished": 12, "failed": 2, "fingerprint": store.root.fingerprint,
    }  # fmt: skip


# --- stores of all kinds ----------------------------------------------------------------------------------------------


def test_keys_that_are_no_friends_of_pages_are_data(tmp_path):
    members = [(f"{key}.jpg", jpeg(i) if i else b"") for i, key in enumerate(HOSTILE)]
    config = tiny_config(tmp_path, str(write_tar(tmp_path / "in.tar", members)), levels=("x1",), max_failed_fraction=1.0)
    extract(config, InlineExecutor())
    store = FeatureStore.open(config.out)

    with browsing(store) as server:
        cards = ask(server, "/cards")["cards"]
        found = {key: [card["row"] for card in ask(server, "/cards", find=key)["cards"]] for key in HOSTILE}
        status, headers, _ = answer(server, "/cards", token=server.token)

    assert status == 200
    assert headers["Content-Type"].startswith("application/json")
    shown = {card["row"]: card["key"] for card in cards}
    for key, rows in found.items():
        assert store.row(key) in rows
    assert shown[store.row("a\nb")] == r"a\nb"
    assert not any("\u202e" in key for key in shown.values())


def test_images_that_are_gone_or_replaced_are_shown_by_their_features(tmp_path):
    tar = write_tar(tmp_path / "in.tar", [(f"{i}.jpg", jpeg(i)) for i in range(4)])
    config = tiny_config(tmp_path, str(tar), levels=("x1",))
    extract(config, InlineExecutor())
    kept = shutil.move(tar, tmp_path / "kept.tar")

    with browsing(FeatureStore.open(config.out)) as server:
        gone, coloured = ask(server, "/photos", rows="0,1"), ask(server, "/colours", rows="0,1", level="x1")
        write_tar(tar, [(f"{i}.jpg", jpeg(i + 10)) for i in range(4)])
        replaced = ask(server, "/photos", rows="0,1")
        shutil.move(kept, tar)
        back = ask(server, "/photos", rows="0,1")

    assert [photo["bytes"] for photo in gone["photos"]] == [0, 0]
    assert all("FileNotFoundError" in photo["reason"] for photo in gone["photos"])
    assert coloured["rows"] == [0, 1]
    assert all("another image than the one that was extracted" in photo["reason"] for photo in replaced["photos"])
    assert all(photo["bytes"] for photo in back["photos"])


def test_a_store_of_vectors_alone(tmp_path):
    tar = write_tar(tmp_path / "in.tar", [(f"{i}.jpg", jpeg(i)) for i in range(4)])
    config = tiny_config(tmp_path, str(tar), levels=("pooled",))
    extract(config, InlineExecutor())

    with browsing(FeatureStore.open(config.out)) as server:
        assert [level["name"] for level in ask(server, "/store")["levels"]] == ["pooled"]
        found = ask(server, "/similar", row=2, x=1, y=1, level="pooled", rows="0,1,2,3")
        near = ask(server, "/nearest", row=2, x=1, y=1, level="pooled", per_image=1)["cells"]

    assert cosines(found)[2, 0, 0] == pytest.approx(1, abs=1e-4)
    assert near[0]["row"] == 2
    assert len(near) == 4


def test_a_store_is_followed_while_it_is_written(make_tars, tiny):
    config = tiny(make_tars(), levels=("x1",))
    with dying_at_task(2):
        extract(config, InlineExecutor())

    with browsing(FeatureStore.open(config.out)) as server:
        before = ask(server, "/status")
        cards = ask(server, "/cards", count=20)["cards"]
        assert ask(server, "/colours", rows="0,19", level="x1")["rows"] == [0]
        assert [photo["bytes"] > 0 for photo in ask(server, "/photos", rows="0,19")["photos"]] == [True, True]
        extract(config, InlineExecutor())
        after = ask(server, "/status")

        assert ask(server, "/colours", rows="0,19", level="x1")["rows"] == [0, 19]
        assert {card["status"] for card in ask(server, "/cards", count=20)["cards"]} == {"ok"}
    assert [card["status"] for card in cards] == ["ok"] * 8 + ["pending"] * 12
    assert (before["finished"], before["is_complete"]) == (8, False)
    assert "run" in before["state"]
    assert (after["finished"], after["is_complete"], after["state"]) == (20, True, "complete")


def test_failures_of_a_store_that_is_being_written_are_counted_on(tmp_path, tiny):
    members = [(f"{i:02d}.jpg", b"" if i in (1, 6) else jpeg(i)) for i in range(12)]
    config = tiny(str(write_tar(tmp_path / "in.tar", members)), levels=("x1",), max_failed_fraction=1.0)
    with dying_at_task(1):
        extract(config, InlineExecutor())
    opened = OpenStore(FeatureStore.open(config.out), {})

    first = opened.status()
    with dying_at_task(2):
        extract(config, InlineExecutor())
    second, failed = opened.status(), opened.cards(Wanted(failed=True), threading.Event())

    assert (first["finished"], first["failed"]) == (4, 1)
    assert (second["finished"], second["failed"]) == (8, 2)
    assert [card["key"] for card in failed["cards"]] == ["01", "06"]


def test_a_store_that_grows_has_further_rows(tmp_path, make_tars, tiny):
    """Also while the rows that came are computed: the block that was the last is done anew."""
    both = make_tars(2, 6)
    config = tiny(str(tmp_path / "in" / "s-000.tar"), levels=("x1",))
    extract(config, InlineExecutor())

    with browsing(FeatureStore.open(config.out)) as server:
        before = ask(server, "/status"), ask(server, "/colours", rows="0,5", level="x1")
        with dying_at_task(1):
            extract(tiny(both, levels=("x1",)), InlineExecutor())
        while_written = ask(server, "/status")
        assert ask(server, "/cards", count=20)["total"] == 12
        extract(tiny(both, levels=("x1",)), InlineExecutor())
        after = ask(server, "/status"), ask(server, "/colours", rows="0,5", level="x1")

        assert ask(server, "/colours", rows="6,11", level="x1")["rows"] == [6, 11]
        assert {card["status"] for card in ask(server, "/cards", count=20)["cards"]} == {"ok"}
    assert (before[0]["rows"], before[0]["finished"]) == (6, 6)
    assert (while_written["rows"], while_written["finished"], while_written["is_complete"]) == (12, 4, False)
    assert (after[0]["rows"], after[0]["finished"], after[0]["is_complete"]) == (12, 12, True)
    assert after[1] == before[1]
    assert len({before[0]["fingerprint"], after[0]["fingerprint"]}) == 2


def test_another_store_in_its_place_is_shown_as_that(make_tars, tiny):
    config = tiny(make_tars(1, 8), levels=("x1",))
    extract(config, InlineExecutor())

    with browsing(FeatureStore.open(config.out)) as server:
        before = ask(server, "/status")["fingerprint"]
        shutil.rmtree(config.out)
        assert "is gone since it was opened" in ask(server, "/status")["problem"]
        other = tiny(make_tars(1, 4, "other"), levels=("x1", "x2"))
        extract(other, InlineExecutor())

        assert ask(server, "/status")["fingerprint"] != before
        assert ask(server, "/store")["rows"] == 4


def test_on_s3_no_secret_is_said(make_tars, tiny, s3_options):
    url, options = f"s3://{s3_options['bucket']}/f.zarr", s3_options["options"]
    config = tiny(make_tars(1, 8), out=url, storage_options=json.dumps(options))
    extract(config, InlineExecutor())
    shutil.rmtree(Path(config.data[0]).parent)

    with browsing(FeatureStore.open(url, options), options) as server:
        found = [
            answer(server, path, token=server.token, **query)[2]
            for path, query in (
                ("/store", {}),
                ("/status", {}),
                ("/cards", {}),
                ("/photos", {"rows": "0,1"}),
                ("/colours", {"rows": "0,1", "level": "x2"}),
                ("/similar", {"rows": "0,1", "level": "x1", "row": 0, "x": 40, "y": 30}),
                ("/nearest", {"level": "x1", "row": 0, "x": 40, "y": 30}),
            )
        ]

    assert b"FileNotFoundError" in found[3]
    assert b'"rows": [0, 1]' in found[4]
    assert b'"cells"' in found[6]
    assert options["secret"].encode() not in b"".join(found)


# --- the program ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_the_program_prints_its_address_and_ends_quietly(store, number, code):
    command = [sys.executable, "jobs/show.py", "browse", store.folder.url]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        try:
            address = program.stdout.readline()
            port, token = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\?token=([\w-]{40,})\n", address).groups()
            with socket.create_connection(("127.0.0.1", int(port))) as page:
                page.sendall(f"GET /store?token={token} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
                assert page.recv(4096).startswith(b"HTTP/1.1 200 OK")
            program.send_signal(number)
            _, errors = program.communicate(timeout=60)
        finally:
            program.kill()

    assert program.returncode == code
    assert errors in ("", "stopped\n")


def test_a_port_that_can_not_be_had_is_said(store, server, capsys):
    assert run(["browse", store.folder.url, "--port", str(server.port)]) == 2
    assert run(["browse", store.folder.url, "--port", "70000"]) == 2

    said = capsys.readouterr().err
    assert re.search(rf"--port {server.port}: Address already in use; choose another one", said)
    assert "--port 70000: ports are 1 to 65535" in said


def test_storage_options_are_handed_on(store):
    options: StorageOptions = {"auto_mkdir": False}
    with browsing(FeatureStore.open(store.folder.url, options), options) as server:
        assert ask(server, "/cards")["total"] == 12
