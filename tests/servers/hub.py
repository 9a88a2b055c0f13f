"""Enough of the Hugging Face hub's HTTP API, on the loopback, for huggingface_hub to make, list, write and read data sets.

Written from what the client asks for and expects; files of a megabyte and more, and those that are no text, are LFS files.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    "names of LFS files"
    commits: list[list[str]] = field(default_factory=list)
    "names that each wrote or deleted (`-name`)"


@dataclass
class Hub:
    """Its state, what it was asked for, and when it is to fail."""

    url: str = ""
    token: str = "hf_secret"
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    "LFS content by sha256"
    asked: Counter[str] = field(default_factory=Counter)
    "by what, and uploads that succeeded by sha256"
    uploads_left: int = 10**9
    "LFS uploads until it answers 500"

    def tree(self, name: str, folder: str) -> list[dict[str, object]]:
        repository = self.repositories[name]
        return [
            _entry(path, data, path in repository.large) for path, data in repository.files.items() if path.startswith(folder)
        ]


def _entry(path: str, data: bytes, is_large: bool) -> dict[str, object]:
    sha256 = hashlib.sha256(data).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
    blob = pointer if is_large else data
    found = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()}
    return found | ({"lfs": {"oid": sha256, "size": len(data), "pointerSize": len(pointer)}} if is_large else {})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, status: int, body: object = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}" and not path.startswith("/lfs/"):
            self._answer(401, {"error": "Invalid username or password."})
            return
        for pattern, answer in _ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                self.hub.asked[answer.__name__] += 1
                answer(self, body, **found.groupdict())
                return
        self._answer(404, {"error": f"no route for {self.command} {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def _repository(self, name: str) -> Repository | None:
        found = self.hub.repositories.get(name)
        if found is None:
            self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return found

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        self.hub.repositories[name] = Repository(
            private=asked.get("private", asked.get("visibility") == "private"), files={".gitattributes": b"*.bin filter=lfs\n"}
        )
        self._answer(200, {"url": f"{self.hub.url}/datasets/{name}", "id": name})

    def info(self, body: bytes, name: str) -> None:
        if self._repository(name):
            self._answer(200, {"id": name, "sha": "0" * 40, "siblings": [], "private": True})

    def tree(self, body: bytes, name: str, folder: str) -> None:
        if not self._repository(name):
            return
        entries = self.hub.tree(name, f"{folder}/" if folder else "")
        if folder and not entries:
            self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        else:
            self._answer(200, entries)

    def paths(self, body: bytes, name: str) -> None:
        asked = json.loads(body)["paths"] if body[:1] == b"{" else urllib.parse.parse_qs(body.decode()).get("paths", [])
        if repository := self._repository(name):
            files = [_entry(path, repository.files[path], path in repository.large) for path in asked if path in repository.files]
            folders = {path for path in asked if any(each.startswith(f"{path}/") for each in repository.files)}
            self._answer(200, files + [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders])

    def yaml(self, body: bytes) -> None:
        import yaml

        head = json.loads(body)["content"].split("---\n")[1]
        assert yaml.safe_load(head)["pretty_name"]
        self._answer(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str) -> None:
        asked = json.loads(body)["files"]
        modes = ["lfs" if each["size"] > 2**20 or b"\0" in base64.b64decode(each["sample"]) else "regular" for each in asked]
        files = [{"path": f["path"], "uploadMode": mode, "shouldIgnore": False} for f, mode in zip(asked, modes, strict=True)]
        self._answer(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        objects = []
        for each in json.loads(body)["objects"]:
            new = each["oid"] not in self.hub.objects
            objects.append(each | ({"actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}} if new else {}))
        self._answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> None:
        if self.hub.uploads_left <= 0:
            self._answer(400, {"error": "the disk is full"})
            return
        self.hub.uploads_left -= 1
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self.hub.asked[oid] += 1
        self._answer(200)

    def commit(self, body: bytes, name: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        written = []
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
                repository.large.discard(value["path"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.objects[value["oid"]]
                repository.large.add(value["path"])
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
            if line["key"] != "header":
                written.append(f"{'-' if line['key'] == 'deletedFile' else ''}{value['path']}")
        repository.commits.append(written)
        self._answer(200, {"commitUrl": f"{self.hub.url}/datasets/{name}/commit/0", "commitOid": "0" * 40})

    def resolve(self, body: bytes, name: str, file: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        data = repository.files.get(file)
        if data is None:
            self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            return
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": "0" * 40, "Accept_Ranges": "bytes"}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
            self._answer(206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}", **headers)
        else:
            self._answer(200, data, **headers)


_NAME = r"(?P<name>[^/]+/[^/]+)"

_ROUTES = [
    (r"POST /api/repos/create", _Handler.create),
    (rf"GET /api/datasets/{_NAME}(/revision/main)?", _Handler.info),
    (rf"GET /api/datasets/{_NAME}/tree/main/?(?P<folder>.*)", _Handler.tree),
    (rf"POST /api/datasets/{_NAME}/paths-info/main", _Handler.paths),
    (r"POST /api/validate-yaml", _Handler.yaml),
    (rf"POST /api/datasets/{_NAME}/preupload/main", _Handler.preupload),
    (rf"POST /datasets/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /lfs/(?P<oid>\w+)", _Handler.upload),
    (rf"POST /api/datasets/{_NAME}/commit/main", _Handler.commit),
    (rf"(GET|HEAD) /datasets/{_NAME}/resolve/main/(?P<file>.+)", _Handler.resolve),
]


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub for as long as the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
