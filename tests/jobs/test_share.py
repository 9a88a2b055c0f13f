"""`jobs/show.py card` and `push`: what a card says, and copies that are whole or no store, on disks, S3 and a hub."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from jobs.show import run
from pipelines.executors import InlineExecutor
from pipelines.extraction.run import extract
from pipelines.features.weights import WeightsChoice, stated_license
from pipelines.showing.card import markdown, render_card
from storage.copies import MARK
from storage.paths import Folder
from storage.store import FeatureStore, NotAStore
from tests.conftest import jpeg, tiny_config, write_tar
from tests.servers.hub import Hub, running_hub
from tests.stops import dying_at_task

ROOT = Path(__file__).resolve().parents[2]

HOSTILE = "a|b<script>`x`"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Ten images, one of which fails, with a name that Markdown would take for its own."""
    path = tmp_path_factory.mktemp("share")
    members = [(f"{i:02d}.jpg", jpeg(i)) for i in range(9)] + [(f"{HOSTILE}.jpg", b"none")]
    tar = str(write_tar(path / "in.tar", members))
    config = tiny_config(path, tar, levels=("x1", "x2@int8", "pooled"), max_failed_fraction=1.0)
    extract(config, InlineExecutor())
    return Path(config.out)


@pytest.fixture
def store(made, tmp_path) -> FeatureStore:
    """A copy of its own."""
    return FeatureStore.open(str(shutil.copytree(made, tmp_path / "feats.zarr")))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def show(*args: object) -> None:
    assert run([str(arg) for arg in args]) == 0


# --- the card ---------------------------------------------------------------------------------------------------------


def test_a_card_says_what_it_is_and_its_code_runs(store, capsys):
    show("card", store.folder.url, "--license", "cc-by-4.0", "--count", "2")

    text = Path(store.folder.url, "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["license"] == "cc-by-4.0"
    assert metadata["size_categories"] == ["n<1K"]
    assert metadata["viewer"] is False
    assert "test_vit.r160_in1k" in metadata["tags"]
    for said in ("The weights are random", "9 ok, 1 failed, 10 in all", store.root.fingerprint, "| x2 | 8 x 8 | 64 | int8 |",
                 "--model test_vit.r160_in1k", "python 3", "licence of the weights | none: they are random"):  # fmt: skip
        assert said in body
    assert r"a\|b\<script\>\`x\`" in body  # and neither a cell's end nor a tag
    with Image.open(Path(store.folder.url, "views/card.png")) as picture:
        assert picture.height > 300
    assert "![" in body

    code = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    assert len(code) == 2
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(code)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "(4, 4, 64)" in done.stdout
    assert "(2, 4, 4, 64) 9" in done.stdout


def test_a_card_is_not_written_over_unless_asked(store, capsys):
    show("card", store.folder.url, "--count", "0")
    card = Path(store.folder.url, "README.md")
    card.write_text("mine")

    assert run(["card", store.folder.url]) == 2
    assert "--replace" in capsys.readouterr().err
    assert card.read_text() == "mine"
    show("card", store.folder.url, "--replace", "--count", "0")
    assert "viewer: false" in card.read_text()
    assert not Path(store.folder.url, "views/card.png").exists()


def test_the_licence_of_weights_is_as_their_config_states_it(tmp_path):
    hub = WeightsChoice.parse("pretrained")
    assert stated_license("vit_small_patch16_224.dino", hub, None) == "apache-2.0"
    assert "dinov3" in stated_license("vit_small_patch16_dinov3.lvd1689m", hub, None)

    beside = WeightsChoice.parse(str(tmp_path / "model.safetensors"))
    assert stated_license("vit_tiny_patch16_224", beside, None) == ""
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"license": "cc-by-nc-4.0"}}))
    assert stated_license("vit_tiny_patch16_224", beside, None) == "cc-by-nc-4.0"
    assert stated_license("vit_tiny_patch16_224", WeightsChoice.parse(str(tmp_path)), None) == "cc-by-nc-4.0"


def test_no_secret_is_in_a_card(store, monkeypatch):
    secret = "s3cr3t-key"
    url = f"s3://user:{secret}@bkt/feats.zarr?token={secret}"

    card = render_card(store, url=url, count=0, storage_options={"secret": secret})

    assert secret not in card.text
    assert "s3://\\*\\*\\*@bkt" not in card.text
    assert "s3://***@bkt/feats.zarr?token=***" in card.text
    assert secret not in markdown("plain")


# --- copies -----------------------------------------------------------------------------------------------------------


def test_a_copy_has_the_stores_bytes_and_a_card(store, tmp_path, capsys):
    Path(store.folder.url, "notes.txt").write_text("private")

    show("push", store.folder.url, tmp_path / "copy")

    here, there = files(Path(store.folder.url)), files(tmp_path / "copy")
    assert {name: data for name, data in there.items() if name not in ("README.md", "views/card.png")} == {
        name: data for name, data in here.items() if not name.startswith(("runs/2", "notes"))
    }
    said = capsys.readouterr().out
    assert "left where it is: notes.txt, runs/" in said
    assert f'FeatureStore.open("{tmp_path / "copy"}")' in there["README.md"].decode()
    copy = FeatureStore.open(str(tmp_path / "copy"))
    np.testing.assert_array_equal(copy.read("03", "x1"), store.read("03", "x1"))

    show("push", store.folder.url, tmp_path / "copy", "--runs")
    assert any(name.startswith("runs/2") for name in files(tmp_path / "copy"))
    assert "0 objects sent" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("x1"))


class _Stops(Exception):
    pass


def test_a_copy_that_stopped_is_no_store_and_goes_on(store, tmp_path, monkeypatch, capsys):
    real, target, stop_at = Folder.write, tmp_path / "copy", 0
    written: list[str] = []

    def write(self: Folder, name: str, data: bytes, **kwargs: object) -> None:
        if self.url == str(target):
            if len(written) == stop_at:
                raise _Stops
            written.append(name)
        real(self, name, data, **kwargs)

    monkeypatch.setattr(Folder, "write", write)
    monkeypatch.setattr("storage.copies._THREADS", 1)
    sent: list[str] = []
    for limit in (1, 9, 20, 5):
        written, stop_at = [], limit
        with pytest.raises(_Stops):
            run(["push", store.folder.url, str(target)])
        sent += [name for name in written if name != MARK]
        with pytest.raises(NotAStore):
            FeatureStore.open(str(target))
    written, stop_at = [], 10**9
    show("push", store.folder.url, target)

    sent += written
    assert len(sent) == len(set(sent))  # nothing twice
    assert sent[-1] == "zarr.json"
    assert MARK not in files(target)
    assert FeatureStore.open(str(target)).status == "complete"


def test_what_changed_in_the_store_takes_the_copys_root_away_first(store, tmp_path, monkeypatch):
    target = tmp_path / "copy"
    show("push", store.folder.url, target)
    name = "x1/features/c/0/0/0/0"
    (target / name).write_bytes(b"damaged")
    real = Folder.write

    def write(self: Folder, each: str, data: bytes, **kwargs: object) -> None:
        if each == name:
            assert not (target / "zarr.json").exists()
        real(self, each, data, **kwargs)

    monkeypatch.setattr(Folder, "write", write)
    show("push", store.folder.url, target)

    assert (target / name).read_bytes() == Path(store.folder.url, name).read_bytes()
    assert (target / "zarr.json").exists()


def test_a_card_of_another_state_is_not_pushed(store, tmp_path, capsys):
    show("card", store.folder.url, "--count", "0")
    card = Path(store.folder.url, "README.md")
    edited = card.read_text() + "\nBy hand.\n"
    card.write_text(edited)
    show("push", store.folder.url, tmp_path / "copy")
    assert (tmp_path / "copy/README.md").read_text() == edited

    card.write_text(edited.replace(store.root.fingerprint, "0" * 64))

    assert run(["push", store.folder.url, str(tmp_path / "copy")]) == 2
    assert "tells of the store as it was before" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prepare", "flags", "said"),
    [
        (lambda target: (target / "photo.jpg").write_bytes(b"1"), [], "holds other files (photo.jpg)"),
        (lambda target: (target / "zarr.json").write_text("{}"), [], "holds another store, or a part of one (fingerprint none"),
        (lambda target: (target / MARK).write_text("f" * 64), [], "(fingerprint ffffffffffff, and not"),
        (lambda target: None, ["--public"], "about repositories that are made on the hub"),
    ],
)
def test_a_place_that_is_taken_is_refused(store, tmp_path, capsys, prepare, flags, said):
    target = tmp_path / "copy"
    target.mkdir()
    prepare(target)
    before = files(target)

    assert run(["push", store.folder.url, str(target), *flags]) == 2

    assert said in capsys.readouterr().err
    assert files(target) == before


def test_a_place_inside_the_store_is_refused(store, capsys):
    assert run(["push", store.folder.url, f"{store.folder.url}/copy"]) == 2
    assert "a place of its own" in capsys.readouterr().err


def test_a_store_that_lacks_objects_is_not_pushed(store, tmp_path, capsys):
    Path(store.folder.url, "x1/features/c/0/0/0/0").unlink()

    assert run(["push", store.folder.url, str(tmp_path / "copy")]) == 2

    assert "lacks 1 objects of x1, the first is x1/features/c/0/0/0/0" in capsys.readouterr().err
    assert not (tmp_path / "copy/zarr.json").exists()


def test_an_unfinished_store_is_pushed_when_asked_and_goes_on_there(make_tars, tiny, tmp_path, capsys):
    config = tiny(make_tars())
    with dying_at_task(3):
        extract(config, InlineExecutor())

    assert run(["push", config.out, str(tmp_path / "copy")]) == 2
    assert "--unfinished" in capsys.readouterr().err
    show("push", config.out, tmp_path / "copy", "--unfinished")
    assert "The store is unfinished: 8 of its images are pending" in (tmp_path / "copy/README.md").read_text()

    extract(config.changed(out=str(tmp_path / "copy")), InlineExecutor())
    assert FeatureStore.open(str(tmp_path / "copy")).status == "complete"
    extract(config, InlineExecutor())
    assert not (different := {
        name
        for name, data in files(tmp_path / "copy").items()
        if not name.startswith(("runs/", "views/", "README")) and files(Path(config.out)).get(name) != data
    }), different  # fmt: skip


def test_to_s3_by_its_digests(store, s3_options, tmp_path, capsys, monkeypatch):
    s3_options, bucket = s3_options["options"], s3_options["bucket"]
    url, options = f"s3://{bucket}/feats.zarr", json.dumps(s3_options)
    show("push", store.folder.url, url, "--storage-options", options)
    capsys.readouterr()
    read: list[str] = []
    real = Folder.read

    def read_from(self: Folder, name: str) -> bytes:
        if self.url == url:
            read.append(name)
        return real(self, name)

    monkeypatch.setattr(Folder, "read", read_from)
    show("push", store.folder.url, url, "--storage-options", options)

    assert "0 objects sent" in capsys.readouterr().out.splitlines()[-2]
    assert read == ["zarr.json"]  # whose store it is; nothing is downloaded to be compared
    np.testing.assert_array_equal(FeatureStore.open(url, s3_options).read(2, "x1"), store.read(2, "x1"))
    card = Folder(url, s3_options).read("README.md").decode()
    assert s3_options["secret"] not in card


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch) -> "Hub":
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with running_hub() as hub:
        yield hub


def options(hub: Hub, **changes: str) -> dict[str, object]:
    return {"hf": {"endpoint": hub.url, "token": hub.token, **changes}}


def push(store: FeatureStore, url: str, options: dict[str, object], *flags: str) -> int:
    return run(["push", store.folder.url, url, "--storage-options", json.dumps(options), *flags])


@pytest.mark.parametrize("url", ["hf://datasets/me/feats", "hf://datasets/me/feats/of/x1.zarr"])
def test_to_the_hub_and_read_from_there(store, hub, url, capsys):
    assert push(store, url, options(hub)) == 0

    repository, folder = hub.repositories["me/feats"], url.removeprefix("hf://datasets/me/feats").lstrip("/")
    prefix = f"{folder}/" if folder else ""
    there = {name.removeprefix(prefix): data for name, data in repository.files.items() if name.startswith(prefix)}
    here = files(Path(store.folder.url))
    assert {name: data for name, data in there.items() if name not in ("README.md", "views/card.png", ".gitattributes")} == {
        name: data for name, data in here.items() if not name.startswith("runs/2")
    }
    assert repository.private
    assert repository.commits[-2:] == [[f"{prefix}zarr.json"], [f"-{prefix}{MARK}"]]
    assert url in there["README.md"].decode()
    assert "/features/c/" in "".join(repository.large)  # and not as text
    copy = FeatureStore.open(url, options(hub))
    np.testing.assert_array_equal(copy.read("03", "x1"), store.read("03", "x1"))

    hub.asked.clear()
    assert push(store, url, options(hub)) == 0
    assert not hub.asked["commit"]
    assert not hub.asked["upload"]


def test_to_the_hub_it_goes_on_where_it_stopped(store, hub, capsys, monkeypatch):
    monkeypatch.setattr("storage.copies._BATCH_OBJECTS", 2)
    hub.uploads_left = 5

    assert push(store, "hf://datasets/me/feats", options(hub)) == 2

    assert "the same command goes on" in capsys.readouterr().err
    assert "zarr.json" not in hub.repositories["me/feats"].files
    uploaded = {oid: hub.asked[oid] for oid in hub.objects}
    assert len(uploaded) == 5
    hub.uploads_left = 10**9
    assert push(store, "hf://datasets/me/feats", options(hub), "--public") == 0
    assert {oid: hub.asked[oid] for oid in uploaded} == uploaded  # none again
    assert FeatureStore.open("hf://datasets/me/feats", options(hub)).status == "complete"


def test_to_the_hub_large_files_go_by_its_own_protocol(store, monkeypatch):
    """As huggingface_hub does it where hf_xet is installed, and only with what it is given as bytes."""
    sent: dict[str, bytes] = {}
    with running_hub() as hub:

        def by_xet(*, additions, **_):
            for each in additions:
                assert isinstance(each.path_or_fileobj, bytes)
                each.upload_info.sha256 = hashlib.sha256(each.path_or_fileobj).digest()
                hub.objects[each.upload_info.sha256.hex()] = sent[each.path_in_repo] = each.path_or_fileobj

        monkeypatch.setattr("huggingface_hub._commit_api._upload_xet_files", by_xet)
        assert push(store, "hf://datasets/me/feats", options(hub)) == 0

        repository = hub.repositories["me/feats"]
        assert sent == {name: repository.files[name] for name in repository.large}
        assert "x1/features/c/0/0/0/0" in sent
        assert not hub.asked["upload"]


@pytest.mark.parametrize(
    ("url", "changes", "said"),
    [
        ("hf://datasets/me/feats", {"token": "hf_wrong"}, "hf auth login"),
        ("hf://me/feats", {}, "a place on the hub is hf://datasets/USER/NAME"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence_without_the_token(store, hub, capsys, url, changes, said):
    assert push(store, url, options(hub, **changes)) == 2

    error = capsys.readouterr().err
    assert said in error
    assert hub.token not in error
    assert "hf_wrong" not in error
