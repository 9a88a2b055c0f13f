"""Whole objects below a URL: atomic, create-only where asked, the same on every kind of storage."""

import contextlib
import functools
import os
import pickle
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
import requests
from fsspec.implementations.memory import MemoryFileSystem

from pipelines.config import absolute
from storage.inputs import expand_inputs
from storage.local_files import PARTIAL
from storage.paths import (
    Folder,
    InputError,
    ServerFailed,
    StorageError,
    _number_prefixes,
    filesystem,
    opened,
    reaching,
    read_file,
)
from storage.reachable import speaks_http2, why_endpoint_unreachable, why_unreachable


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    """An empty folder on local disk and in memory."""
    if request.param == "local":
        yield Folder(str(tmp_path / "root"))
        return
    url = f"memory://{tmp_path.name}"
    yield Folder(url)
    fs = fsspec.filesystem("memory")
    if fs.exists(url):
        fs.rm(url, recursive=True)


def test_written_object_is_read_back_whole(folder):
    folder.write("a/b/c.bin", b"\0\1\2" * 1000)

    assert folder.read("a/b/c.bin") == b"\0\1\2" * 1000
    assert folder.size("a/b/c.bin") == 3000
    assert folder.open("a/b/c.bin").read(2) == b"\0\1"


NUMBERED = {0: 3, 7: 1, 10: 0, 123: 5, 4095: 2, 15_000: 4}
"""Sizes by number."""


def require_numbered(folder: Folder, count: int) -> None:
    for number, size in NUMBERED.items():
        folder.write(f"x/c/{number}/0/0", b"a" * size)
    for other in ("x/c/7/0/1", "x/c/9/0", "x/c/007/0/0", "x/c/8/0/0_$folder$", "x/c/11", "x/cc/6/0/0"):
        folder.write(other, b"a stranger")

    sizes = folder.sizes_by_number("x/c", "0/0", count)

    assert len(sizes) == count
    assert {number: sizes[number] for number in (sizes >= 0).nonzero()[0]} == {n: s for n, s in NUMBERED.items() if n < count}
    assert (folder.sizes_by_number("y/c", "0/0", 5) == -1).all()


def test_sizes_of_numbered_objects_are_those_of_their_own_names(folder):
    require_numbered(folder, 4096)


def test_many_numbered_objects_of_s3_are_listed_by_how_their_names_begin(s3_options):
    require_numbered(Folder(f"s3://{s3_options['bucket']}/root", s3_options["options"]), 20_000)
    for number in range(20_000):
        assert sum(f"{number}/".startswith(prefix) for prefix in _number_prefixes(20_000)) == 1


def test_names_in_a_folder_are_those_of_its_objects(folder):
    for name in ("a/x", "a/y.parquet", "a/below/z"):
        folder.write(name, b"1")

    assert sorted(folder.names("a")) == ["x", "y.parquet"]
    assert folder.names("b") == []


def test_write_replaces_an_older_object(folder):
    folder.write("a", b"long and old")
    folder.write("a", b"new")

    assert folder.read("a") == b"new"


def test_write_new_never_replaces(folder):
    assert folder.write_new("x/a", b"first")
    assert not folder.write_new("x/a", b"second")

    assert folder.read("x/a") == b"first"


def test_of_sixteen_threads_exactly_one_creates(folder):
    for attempt in range(20):
        barrier = threading.Barrier(16)

        def create(n: int, attempt: int = attempt, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return folder.write_new(f"commits/{attempt}", b"%02d" % n)

        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(create, range(16)))

        assert won.count(True) == 1
        assert folder.read(f"commits/{attempt}") == b"%02d" % won.index(True)


def test_missing_object_is_named_by_its_full_url(folder):
    folder.write("a", b"")

    with pytest.raises(FileNotFoundError, match=r"none/b\.json does not exist") as caught:
        folder.read("none/b.json")

    assert folder.url in str(caught.value)
    assert folder.size("none/b.json") is None
    assert not folder.exists("none/b.json")


def test_object_below_an_object_does_not_exist(folder):
    folder.write("a", b"")

    with pytest.raises(FileNotFoundError):
        folder.read("a/b")
    assert folder.sizes("a/b") == {}
    assert folder.size("a/b") is None


def test_sizes_lists_the_objects_directly_inside(folder):
    for name, size in [("d/one", 1), ("d/three", 3), ("d/sub/two", 2), ("e", 5)]:
        folder.write(name, bytes(size))

    assert folder.sizes("d") == {"one": 1, "three": 3}
    assert folder.sizes("none") == {}


def test_folders_lists_the_folders_directly_inside_sorted(folder):
    for name in ("d/b/x", "d/a/y/z", "d/file"):
        folder.write(name, b"")

    assert folder.folders("d") == ["a", "b"]
    assert folder.folders("none") == []


def test_listing_sees_what_another_folder_object_wrote(folder):
    folder.write("d/a", b"")
    assert folder.sizes("d") == {"a": 0}

    Folder(folder.url).write("d/b", b"1")

    assert folder.sizes("d") == {"a": 0, "b": 1}


def test_several_objects_are_read_in_the_order_asked(folder):
    for n in range(50):
        folder.write(f"{n}", b"%d" % n)

    assert folder.read_many([str(n) for n in range(49, -1, -1)]) == [b"%d" % n for n in range(49, -1, -1)]
    assert folder.read_many([]) == []


NAMES = ["long", "none", "short", "empty"]
ENDS = [b"6789", None, b"ab", b""]


def write_ends(folder: Folder) -> None:
    for name, data in {"long": b"0123456789", "short": b"ab", "empty": b""}.items():
        folder.write(name, data)


def test_ends_of_objects_are_read_in_the_order_asked(folder):
    write_ends(folder)

    assert folder.read_ends(NAMES, 4) == ENDS
    assert folder.read_ends([], 4) == []


def test_storage_that_cannot_be_asked_for_ends_is_asked_for_sizes(tmp_path, monkeypatch):
    """As Azure's. What it would make of a negative start isn't tried."""

    class Ranges(MemoryFileSystem):
        protocol = "abfs"

        def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: object) -> bytes:
            assert start is not None
            assert 0 <= start < end
            return super().cat_file(path, start=start, end=end)

    monkeypatch.setattr("storage.paths.filesystem", lambda url, options=None: (Ranges(), f"/{tmp_path.name}"))
    folder = Folder("abfs://container")
    write_ends(folder)

    assert folder.read_ends(NAMES, 4) == ENDS


def test_s3_gives_ends_in_one_request(s3_options):
    folder = Folder(f"s3://{s3_options['bucket']}/ends", s3_options["options"])
    write_ends(folder)

    assert folder.read_ends(NAMES, 4) == ENDS


class _Plain(SimpleHTTPRequestHandler):
    """Python's own web server: whoever asks for a range gets the whole file."""

    def log_message(self, *_: object) -> None:
        pass


class _Ranges(_Plain):
    """One with ranges: by how they are counted it answers with `suffix`, or 416."""

    suffix = True

    def do_GET(self) -> None:
        if not Path(self.translate_path(self.path)).exists():
            self.send_error(404)
            return
        data = Path(self.translate_path(self.path)).read_bytes()
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        if not first and not self.suffix:
            self.send_error(416)
            return
        data = data[-int(last) :] if not first else data[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class _NoSuffixes(_Ranges):
    suffix = False


class _Crashes(_Ranges):
    """What a server's own fault at a suffix looks like: the connection ends without an answer."""

    def do_GET(self) -> None:
        if not self.headers["Range"].startswith("bytes=-"):
            super().do_GET()
        self.close_connection = True


@pytest.mark.parametrize("handler", [_Plain, _Ranges, _NoSuffixes, _Crashes])
def test_web_servers_of_any_kind_give_the_ends(tmp_path, handler):
    write_ends(Folder(str(tmp_path)))
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        folder = Folder(f"http://127.0.0.1:{server.server_port}")

        assert folder.read_ends(["long", "none", "short"], 4) == ENDS[:3]
    finally:
        server.shutdown()
        server.server_close()


def test_removing_twice_is_fine(folder):
    folder.write("a", b"1")
    folder.write("b", b"2")

    folder.remove(["a", "never-there"])
    folder.remove(["a"])

    assert not folder.exists("a")
    assert folder.read("b") == b"2"


def test_storage_that_creates_exclusively_is_accepted_and_left_clean(folder):
    folder.check_create_only("runs/.probe")

    assert folder.sizes("runs") == {}


def test_what_a_killed_process_left_of_its_try_is_not_taken_for_ones_own(folder):
    for name in ("runs/.probe", "runs/.probe-1"):
        folder.write(name, b"1")

    folder.check_create_only("runs/.probe")

    assert set(folder.sizes("runs")) == {".probe", ".probe-1"}


def test_storage_that_ignores_create_only_is_refused(tmp_path, monkeypatch):
    """What some S3 look-alikes do with If-None-Match."""

    class Careless(MemoryFileSystem):
        protocol = "careless"

        def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: object) -> None:
            super().pipe_file(path, value, mode="overwrite", **kwargs)

    fsspec.register_implementation("careless", Careless, clobber=True)
    folder = Folder("careless://bucket")

    with pytest.raises(StorageError, match="ignores create-only writes .*use S3, Ceph RGW, MinIO"):
        folder.check_create_only(".probe")

    assert folder.sizes("") == {}


def test_pickled_folder_reads_the_same_objects(folder):
    folder.write("a", b"1")

    again = pickle.loads(pickle.dumps(folder))

    assert (again.url, again.options) == (folder.url, folder.options)
    assert again.read("a") == b"1"


# --- local disk -----------------------------------------------------------------------------------------------------------


def test_reader_sees_the_old_object_or_the_new_one_never_a_part(tmp_path):
    folder, path = Folder(str(tmp_path)), tmp_path / "a"
    versions = [bytes([n]) * 200_000 for n in range(40)]
    folder.write("a", versions[0])
    writer = threading.Thread(target=lambda: [folder.write("a", data) for data in versions])
    seen = set()

    writer.start()
    while writer.is_alive():
        seen.add(path.read_bytes())
    writer.join()

    assert seen <= set(versions)


def test_write_that_fails_leaves_the_old_object_and_nothing_else(tmp_path, monkeypatch):
    folder = Folder(str(tmp_path))
    folder.write("a", b"old")

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("storage.paths.os.fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        folder.write("a", b"new")
    with pytest.raises(OSError, match="No space left"):
        Folder(str(tmp_path / "begun")).write("a", b"first")

    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_killed_writers_left_is_dropped(tmp_path):
    folder = Folder(str(tmp_path))
    folder.write("a", b"1")
    (tmp_path / f"{PARTIAL}left-behind").write_bytes(b"half")
    (tmp_path / ".partial").mkdir()  # of earlier versions
    (tmp_path / ".partial/left-behind").write_bytes(b"half")

    folder.remove_partial()

    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_relative_path_means_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    Folder("out").write("a", b"1")

    assert (tmp_path / "out/a").read_bytes() == b"1"
    assert read_file("out/a") == b"1"


def test_single_file_is_read_by_path_and_by_url(tmp_path, monkeypatch):
    (tmp_path / "w.bin").write_bytes(b"data")
    monkeypatch.chdir(tmp_path)

    assert read_file("w.bin") == read_file(str(tmp_path / "w.bin")) == read_file(f"file://{tmp_path}/w.bin") == b"data"
    with pytest.raises(FileNotFoundError, match=r"none\.bin does not exist"):
        read_file(str(tmp_path / "none.bin"))


# --- options ----------------------------------------------------------------------------------------------------------------


def test_options_may_be_given_by_scheme(tmp_path):
    options = {"s3": {"key": "AKID", "secret": "abcd"}, "memory": {}}

    assert filesystem(f"{tmp_path}/a", options)[1] == f"{tmp_path}/a"
    assert filesystem("s3://bucket/a", options)[0].key == "AKID"


def test_options_that_do_not_fit_are_an_error_without_their_values():
    with pytest.raises(InputError, match=r"cannot open s3://b/x") as caught:
        filesystem("s3://b/x", {"key": "AKIDEXAMPLE", "secret": "hunter2", "config_kwargs": "hunter2-too"})

    assert "hunter2" not in str(caught.value)
    assert "AKIDEXAMPLE" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"endpoint_url": 5},
        {"endpoint_url": "nonsense"},
        {"endpoint_url": "http://127.0.0.1:99999"},
        {"client_kwargs": 5},
        {"client_kwargs": {"hunter": 2}},
        {"config_kwargs": {"retries": "many"}},
        {"hunter": "hunter2"},
    ],
)
def test_options_that_only_a_connection_shows_to_be_wrong_are_an_error(options):
    with pytest.raises(InputError, match="^cannot open s3://b/x: .*; check the URL, and --storage-options$") as caught:
        Folder("s3://b/x", {"key": "AKIDEXAMPLE", "secret": "hunter2", **options}).read("a")

    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["s3://", "s3:///x", "s3:/b/x", "s3:x", "https://", "gs:///x"])
def test_url_without_a_bucket_or_host_is_no_folder_here(url):
    for make in (lambda: Folder(url).exists("a"), lambda: expand_inputs([url]), lambda: absolute(url)):
        with pytest.raises(InputError, match="is no whole URL, as of a variable that isn't set; write .*://PLACE/PATH"):
            make()


@pytest.mark.parametrize("url", ["", " "])
def test_an_empty_path_is_not_the_working_folder(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for make in (lambda: Folder(url).exists("a"), lambda: Folder(url).write("a", b""), lambda: absolute(url)):
        with pytest.raises(InputError, match="an empty path, as of a variable that isn't set; this folder is called ."):
            make()
    assert not [*tmp_path.iterdir()]


def test_what_a_server_of_any_kind_says_is_one_sentence():
    class Refused(requests.exceptions.ConnectionError):
        """As a filesystem's library has it."""

    for error in (Refused("no hunter2 there"), ConnectionResetError(104, "reset"), TimeoutError("timed out")):
        with pytest.raises(StorageError, match=f"^gs://b/x can't be reached: {type(error).__name__}: "), reaching("gs://b/x"):
            raise error
    with pytest.raises(ValueError, match="bug"), reaching("gs://b/x"):
        raise ValueError("bug")


def test_folder_is_shown_without_credentials():
    folder = Folder("s3://AKIA:hunter2@bucket/x", {"secret": "other-secret"})

    assert repr(folder) == "Folder('s3://***@bucket/x')"
    assert folder.displayed == "s3://***@bucket/x"


@pytest.mark.parametrize("write", ["write", "write_new"])
def test_file_that_another_run_swept_away_half_written_is_written_again(tmp_path, monkeypatch, write):
    folder, original, swept = Folder(str(tmp_path / "out")), os.fsync, []

    def fsync(file: int) -> None:
        original(file)
        if not swept:
            swept.append(file)
            folder.remove_partial()

    monkeypatch.setattr(os, "fsync", fsync)
    getattr(folder, write)("a/b", b"data")

    assert swept
    assert folder.read("a/b") == b"data"


def test_folder_that_is_removed_while_a_file_is_written_is_not_begun_anew(tmp_path, monkeypatch):
    folder = Folder(str(tmp_path / "out"))
    monkeypatch.setattr(os, "fsync", lambda file: shutil.rmtree(tmp_path / "out"))

    with pytest.raises(FileNotFoundError):
        folder.write("a/b", b"data")

    assert not (tmp_path / "out").exists()


def test_folder_where_a_file_must_be_is_named(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)

    with pytest.raises(StorageError, match="a/b is a folder where a file must be; remove it"):
        Folder(str(tmp_path)).write("a/b", b"data")


def test_bucket_that_is_not_there_is_named(s3_server):
    folder = Folder("s3://no-such-bucket/out.zarr", {"key": "a", "secret": "bbbb", "endpoint_url": s3_server})

    for reach in (lambda: folder.read("zarr.json"), lambda: folder.write("a", b""), lambda: folder.check_create_only("runs/.p")):
        with pytest.raises(StorageError, match="^s3://no-such-bucket/out.zarr: there is no such bucket; create it"):
            reach()


@pytest.mark.parametrize("url", ["s3://bucket/x", "http://127.0.0.1:{port}/x"])
def test_endpoint_that_is_not_there_is_named_with_what_was_tried(url, monkeypatch, caplog):
    monkeypatch.setattr("storage.reachable.PATIENCE_S", 0.0)
    caplog.set_level("INFO")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    options = {"s3": {"key": "a", "secret": "bbbb", "endpoint_url": f"http://127.0.0.1:{port}"}}

    said = f"127.0.0.1:{port} was tried once in 0 s: Connection refused; check the URL"
    with pytest.raises(StorageError, match=said):
        Folder(url.format(port=port), options).read("a")
    with pytest.raises(StorageError, match=said):
        expand_inputs([f"{url.format(port=port)}/a.tar"], options)
    assert "waiting for 127.0.0.1" in caplog.text


class Answers(SimpleHTTPRequestHandler):
    """Answers all questions alike; `silent` with nothing."""

    def do_GET(self) -> None:
        kind = self.path.strip("/").partition("/")[0]
        if kind == "silent":
            time.sleep(3)
            return
        body = b"<Error><Code>InvalidAccessKeyId</Code><Message>no such key</Message></Error>" if kind == "403" else b""
        self.send_response(int(kind))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def answers():
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_what_a_store_refuses_or_fails_to_do_names_the_place(answers):
    """As one object's own fault, where it may be that."""
    options = {"key": "a", "secret": "bbbb", "endpoint_url": answers, "config_kwargs": {"retries": {"max_attempts": 1}}}

    refused, failed = Folder("s3://403/x", options), Folder("s3://500/x", options)

    with pytest.raises(PermissionError, match=r"^s3://403/x: access is refused \(no such key\); check the credentials"):
        refused.read("a")
    with pytest.raises(PermissionError, match="^s3://403/x: access is refused"):
        refused.read_many(["a", "b"])
    with pytest.raises(ServerFailed, match="^s3://500/x: the server answers with an error, again and again: .*500|Internal"):
        failed.read("a")


@pytest.mark.parametrize(("kind", "said"), [("500", "500"), ("403", "403"), ("silent", "Timeout")])
def test_a_web_server_that_fails_does_not_say_that_nothing_is_there(kind, said, answers, monkeypatch):
    with monkeypatch.context() as patch:
        if kind == "silent":
            patch.setattr("storage.inputs._FIRST_ANSWER_S", 1.0)
        with pytest.raises(StorageError, match=f"/{kind}/a.tar can't be reached: .*{said}"):
            expand_inputs([f"{answers}/{kind}/a.tar"])
    with pytest.raises(InputError, match="do not exist"):
        expand_inputs([f"{answers}/404/a.tar"])


def test_a_server_that_is_not_there_is_waited_for_once_for_all_threads(monkeypatch):
    asked, begun = [], threading.Barrier(4)
    monkeypatch.setattr("storage.reachable.why_unreachable", lambda *place: asked.append(place[:2]) or time.sleep(0.5) or "no")

    def ask(_: int) -> str:
        begun.wait()
        return why_endpoint_unreachable("http://not-there.invalid:9")

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == ["no"] * 4
    assert asked == [("not-there.invalid", 9)]
    assert why_endpoint_unreachable("http://not-there.invalid:9") == "no"
    assert len(asked) == 2  # it may be up by now


def test_server_that_accepts_and_says_nothing_it_should_speaks_no_http2(monkeypatch):
    monkeypatch.setattr("storage.reachable.PATIENCE_S", 0.0)
    monkeypatch.setattr("storage.reachable._CONNECT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        assert why_unreachable("127.0.0.1", port) == ""
        assert "timed out" in why_unreachable("127.0.0.1", port, speaks_http2)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_endpoint_that_accepts_and_says_nothing_is_told_within_seconds(scheme, monkeypatch):
    """botocore alone would wait for minutes: its own time limit, again and again."""
    monkeypatch.setattr("storage.reachable._ANSWER_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        options = {"key": "a", "secret": "bbbb", "endpoint_url": f"{scheme}://127.0.0.1:{port}"}

        with pytest.raises(
            StorageError, match="^s3://bucket/x can't be reached: .* it accepts connections, and answers nothing; "
        ):
            opened("s3://bucket/x", options)


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 403 Forbidden\r\n\r\n", b"HTTP/1.1 503 Slow Down\r\n\r\n", b""], ids=["403", "503", "none"]
)
def test_endpoint_that_answers_anything_is_left_to_who_asks_for_something(scheme, answer, caplog):
    caplog.set_level("INFO")

    def serve(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection, _ = server.accept()
            with connection:
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, args=(server,), daemon=True).start()

        assert why_endpoint_unreachable(f"{scheme}://127.0.0.1:{server.getsockname()[1]}") == ""
    assert ("127.0.0.1 answers 503; what it's asked is tried again" in caplog.text) == (b"503" in answer and scheme == "http")
