"""Listings: what can be taken is taken, the rest is counted by reason, before anything runs, in the plan and in the store."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import s3fs
from fsspec.implementations.local import LocalFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from jobs.extract import run
from operators.image import _FORMATS
from pipelines.config import InputConfig
from storage.inputs import IMAGE_EXTENSIONS, Listing, expand_inputs
from storage.left_out import FURTHER, MAX_REASONS, leave_out, left_out_json, merge_left_out, parse_left_out
from storage.paths import Folder, InputError
from storage.samples import DuplicateKeys, SampleIndex
from storage.sources import sources_left_out
from storage.tars import MemberRules, scan_source
from tests.conftest import jpeg, run_input, unreadable, write_tar


def put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def taken(*patterns: Path | str, image: str | None = None) -> list[str]:
    """Keys or tar names of what is listed."""
    return [file.name for file in expand_inputs([str(pattern) for pattern in patterns], image=image)]


def left(*patterns: Path | str) -> dict[str, int]:
    return counts(expand_inputs([str(pattern) for pattern in patterns]))


def counts(listing: Listing) -> dict[str, int]:
    return {reason: each.count for reason, each in listing.left_out.items()}


# --- formats ----------------------------------------------------------------------------------------------------------


def test_every_extension_of_the_formats_that_pillow_may_open_is_an_image(tmp_path):
    Image.init()
    extensions = {name[1:] for name, kind in Image.EXTENSION.items() if kind in _FORMATS} - {"pfm"}
    put(tmp_path, *(f"{name}.{name}" for name in extensions), *(f"upper-{name}.{name.upper()}" for name in extensions))

    assert len(taken(tmp_path)) == 2 * len(extensions)
    assert len(extensions) > 25
    assert left(tmp_path) == {}


def test_common_formats_are_the_first_choice_as_they_were():
    assert IMAGE_EXTENSIONS[:8] == ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")


def test_mask_beside_a_photograph_is_left_out_and_named(tmp_path):
    put(tmp_path, "a.jpg", "a.pgm", "b.jp2", "sub/a.avif")

    assert taken(tmp_path) == ["a.jpg", "b.jp2", "sub/a.avif"]
    assert left(tmp_path) == {"further image of one key": 1}


def test_named_image_member_chooses_among_images_of_one_key(tmp_path):
    put(tmp_path, "a.jpg", "a.png", "b.png", "c.jpg")

    assert taken(tmp_path, image="png") == ["a.png", "b.png", "c.jpg"]
    assert taken(tmp_path) == ["a.jpg", "a.png", "b.png", "c.jpg"]
    with pytest.raises(DuplicateKeys, match="--image-member"):
        run_input(expand_inputs([str(tmp_path)])).collect()


def keys(folder: Path, *patterns: str) -> list[str]:
    """Keys of the input as `--duplicate-keys rename --empty-shards skip` takes it."""
    given = InputConfig(duplicate_keys="rename", empty_shards="skip")
    files = given.files(patterns or (str(folder),), {}, None)
    return run_input(files, given.rules()).collect()[0].table()["key"].to_pylist()


def test_dotted_names_in_a_folder_are_told_apart_where_that_is_asked_for(tmp_path):
    put(tmp_path, "IMG_2021.05.01.jpg", "IMG_2021.05.02.jpg", "sub/IMG_2021.05.01.jpg", "sub/a.jpg", "sub/a.pgm")

    with pytest.raises(DuplicateKeys, match="--duplicate-keys rename"):
        run_input(expand_inputs([str(tmp_path)])).collect()
    assert keys(tmp_path) == ["IMG_2021.05.01", "IMG_2021.05.02", "sub/IMG_2021.05.01", "sub/a"]


def test_same_names_in_several_folders_are_told_apart_by_them(tmp_path):
    put(tmp_path, "one/a.jpg", "one/b.jpg", "two/a.jpg")

    assert keys(tmp_path, str(tmp_path / "one"), str(tmp_path / "two/*.jpg")) == ["one/a", "one/b", "two/a"]


def test_two_images_of_one_whole_name_stay_an_error(tmp_path):
    put(tmp_path, "a.b.jpg", "a.b.png")

    with pytest.raises(DuplicateKeys, match="--image-member"):
        keys(tmp_path)


def test_keys_that_repeat_from_shard_to_shard_are_put_behind_its_name(tmp_path):
    for name in ("x/0.tar", "x/1.tar", "y/0.tar"):
        write_tar(tmp_path / name, [("k.jpg", name.encode()), ("k.cls", b"0")])
    pattern = str(tmp_path / "*/*.tar")

    with pytest.raises(DuplicateKeys, match=r"--duplicate-keys rename, which puts the shard's name before each key"):
        run_input(expand_inputs([pattern])).collect()
    assert keys(tmp_path, pattern) == ["x/0/k", "x/1/k", "y/0/k"]
    assert keys(tmp_path, str(tmp_path / "x")) == ["0/k", "1/k"]


def test_keys_that_repeat_within_a_shard_are_numbered(tmp_path):
    write_tar(tmp_path / "s.tar", [(f"{name}.jpg", b"x") for name in ("k", "l", "k", "k#2", "k", "l")])

    assert keys(tmp_path) == ["s/k", "s/l", "s/k#2", "s/k#2#2", "s/k#3", "s/l#2"]


def test_shards_without_images_are_left_out_where_that_is_asked_for(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x")])
    write_tar(tmp_path / "b.tar", [("1.txt", b"x")])
    write_tar(tmp_path / "c.tar", [])
    (tmp_path / "d.tar").write_bytes(b"")
    (tmp_path / "e.tar").write_text("<html>404</html>")
    write_tar(tmp_path / "f.tar", [("2.jpg", b"x")])
    files = expand_inputs([str(tmp_path)])

    for i in range(1, 5):
        with pytest.raises(InputError, match=f"{'bcde'[i - 1]}.tar .*--empty-shards skip"):
            run_input(Listing(files[i : i + 1])).collect()
    rows, sources = run_input(files, MemberRules(skip_empty=True)).collect()
    table = rows.table()
    assert table["key"].to_pylist() == ["1", "2"]
    assert table["source"].to_pylist() == [0, 5]
    left = sources_left_out(sources)["shard without images"]
    assert (left.count, left.is_usual, len(sources)) == (4, False, 6)
    assert "b.tar: no image member (has .txt)" in left.examples[0]


def test_input_of_which_all_shards_are_empty_says_why(tmp_path):
    (tmp_path / "a.tar").write_text("<html>404</html>")

    with pytest.raises(InputError, match=r"no samples\n .*a\.tar is not a tar"):
        run_input(expand_inputs([str(tmp_path)]), MemberRules(skip_empty=True)).collect()


def test_shard_that_cannot_be_read_is_named_and_may_be_skipped(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x")])
    write_tar(tmp_path / "b.tar", [("2.jpg", b"x")])
    unreadable(monkeypatch, "b.tar")
    with pytest.raises(InputError, match=r"Permission denied: '\S+b\.tar'\. --empty-shards skip"):
        run_input(expand_inputs([str(tmp_path)])).collect()
    assert keys(tmp_path) == ["a/1"]


@pytest.mark.parametrize("pattern", ["*", "*.jpg", "**/*.jpg"])
def test_side_files_of_macos_are_no_images_for_a_glob_either(pattern, tmp_path):
    put(tmp_path, "p.jpg", "._p.jpg", ".DS_Store", "__MACOSX/._p.jpg")

    listing = expand_inputs([f"{tmp_path}/{pattern}"])

    assert [file.name for file in listing] == ["p.jpg"]
    assert listing.left_out["side file of macOS"].is_usual


def test_store_is_continued_with_the_choices_that_it_was_made_with(tmp_path):
    write_tar(tmp_path / "in/a.tar", [("1.jpg", jpeg(1))])
    write_tar(tmp_path / "in/b.tar", [("1.jpg", jpeg(2))])
    write_tar(tmp_path / "in/c.tar", [("1.txt", b"x")])
    given = InputConfig(duplicate_keys="rename", empty_shards="skip")
    files, folder = given.files((str(tmp_path / "in"),), {}, None), Folder(str(tmp_path / "out"))
    made = run_input(files, given.rules()).index_in_use(folder)
    assert made.first_keys == ["a/1"]
    (tmp_path / "in/b.tar").touch()

    assert run_input(files, given.rules()).index_in_use(folder).digest == made.digest
    with pytest.raises(InputError, match="--empty-shards skip|--duplicate-keys rename"):
        run_input(expand_inputs([str(tmp_path / "in")])).index_in_use(folder)


# --- what lies beside -------------------------------------------------------------------------------------------------


def test_folder_of_tars_says_what_lies_beside_them(tmp_path):
    put(tmp_path, "a.tar", "b.TAR", "c.Tar", "d.tgz", "e.tar.gz", "f.tar.zst", "photo.jpg", "sub/photo.jpg", "sub/g.tar")
    put(tmp_path, "README", "notes.txt", "a.tar.idx", ".DS_Store", ".cache/x.tar")

    assert taken(tmp_path) == ["a.tar", "b.TAR", "c.Tar"]
    assert left(tmp_path) == {
        "compressed tar (decompress it)": 3,
        "image beside tars": 2,
        "tar in a subfolder (name that folder, too)": 1,
        "file without an extension": 1,
        "neither tar nor image (.txt)": 1,
        "neither tar nor image (.idx)": 1,
        "side file of macOS": 1,
        "hidden folder": 1,
    }


def test_folder_of_images_says_what_lies_between_them(tmp_path):
    put(tmp_path, "a.jpg", "sub/b.jpg", "sub/labels.csv", "c.heic", "sub/c.tar", "d.tgz", "__MACOSX/._a.jpg", "._a.jpg")

    assert taken(tmp_path) == ["a.jpg", "sub/b.jpg"]
    assert left(tmp_path) == {
        "neither tar nor image (.csv)": 1,
        "neither tar nor image (.heic)": 1,
        "tar in a subfolder (name that folder, too)": 1,
        "compressed tar (decompress it)": 1,
        "side file of macOS": 2,
    }


_PATHS = [
    f"{folder}{name}"
    for folder in ("", "d/", "d/e.x/", ".h/", "d/__MACOSX/")
    for name in ("a.jpg", "a.png", "a.mask.png", "b.JPEG", "c.avif", "c", "._d.jpg", "x.tar", "y.TGZ", "z.txt")
]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.sets(st.sampled_from(_PATHS)))
def test_every_file_that_find_lists_is_taken_or_counted(tmp_path, names):
    shutil.rmtree(tmp_path)
    put(tmp_path, "sure.jpg", *names)
    find = f"find {tmp_path} -mindepth 1 -name .h -prune -print -o -name __MACOSX -prune -print -o -type f -print"
    found = subprocess.run(find.split(), check=True, capture_output=True, text=True).stdout.split()

    listing = expand_inputs([str(tmp_path)])

    assert len(listing) + sum(counts(listing).values()) == len(found)


def test_nothing_taken_is_an_error_that_says_what_there_is(tmp_path):
    put(tmp_path, "a.tgz", "sub/b.tar")

    with pytest.raises(InputError, match=r"matches no tar and no image(.|\n)*1 x compressed tar .*a\.tgz") as caught:
        expand_inputs([str(tmp_path)])
    assert "sub/b.tar" in str(caught.value)


def test_compressed_tar_that_is_named_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tgz", "w:gz"):
        pass

    for pattern in (tmp_path / "a.tgz", tmp_path / "*.tgz"):
        with pytest.raises(InputError, match=r"a\.tgz is gzip-compressed"):
            scan_source(expand_inputs([str(pattern)])[0], MemberRules())


def test_glob_counts_folders_and_files_that_are_no_input(tmp_path):
    put(tmp_path, "in/a.jpg", "in/b.TIF", "in/notes.txt", "in/sub/c.jpg", "other/d.txt")

    assert taken(tmp_path / "in/*") == ["a.jpg", "b.TIF"]
    assert left(tmp_path / "in/*") == {
        "neither tar nor image (.txt)": 1,
        "folder that a glob matches (name the folder itself)": 1,
    }
    assert left(tmp_path / "*/*.jpg") == {}


def test_glob_of_folders_alone_says_so_and_what_to_give(tmp_path):
    put(tmp_path, "in/one/a.jpg", "in/two/b.tar")

    with pytest.raises(InputError) as error:
        expand_inputs([str(tmp_path / "in/*")])

    asked = tmp_path / "in/*"
    assert f"{asked} matches 2 folders, and no tar and no image" in str(error.value)
    assert f"name the folder above, for images {asked}/*.jpg, for tars {asked}/*.tar" in str(error.value)
    assert taken(tmp_path / "in/*/*.jpg") == ["a.jpg"]


@pytest.mark.parametrize("where", ["local", "memory://brackets"])
def test_brackets_of_a_folder_are_no_wildcards_and_a_missing_file_in_it_is_missed(where, tmp_path):
    root = str(tmp_path) if where == "local" else where
    folder = Folder(f"{root}/set[1]")
    folder.write("x.png", b"x")

    for pattern in ("set[1]", "set[1]/x.png", "set[1]/*.png", "set[1]/[xyz].png", "{set[1],set[1]}/*"):
        assert {file.url.rpartition("/")[2] for file in expand_inputs([f"{root}/{pattern}"])} == {"x.png"}
    with pytest.raises(InputError, match=r"1 of 2 do not exist: .*y\.png"):
        expand_inputs([f"{root}/set[1]/{{x,y}}.png"])
    with pytest.raises(InputError, match=r"\[ \] stands for one of the characters"):
        expand_inputs([f"{root}/set[2]/x.png"])


def test_glob_of_names_that_say_nothing_takes_tars(tmp_path):
    put(tmp_path, "shards/part-1", "shards/part-0", "shards/x.wds")

    assert taken(tmp_path / "shards/part-*") == ["part-0", "part-1"]
    assert taken(tmp_path / "shards/*") == ["part-0", "part-1", "x.wds"]


def test_name_in_another_encoding_is_counted(tmp_path):
    put(tmp_path, "a.jpg")
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")

    assert taken(tmp_path) == ["a.jpg"]
    assert left(tmp_path) == {"name that is no UTF-8": 1}


# --- symlinks ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path) -> Path:
    """A hub's cache: files are links to blobs without an extension."""
    snapshot = tmp_path / "hub/snapshots/0a1b"
    snapshot.mkdir(parents=True)
    for i in range(3):
        write_tar(tmp_path / f"hub/blobs/{i}{'f' * 38}", [(f"{i}.jpg", b"x" * (i + 1))])
        (snapshot / f"{i}.tar").symlink_to(f"../../blobs/{i}{'f' * 38}")
    (tmp_path / "hub/snapshots/main").symlink_to("0a1b")
    return snapshot


@pytest.mark.parametrize("pattern", ["", "*.tar", "?.tar", "{0,1,2}.tar", "../*/*.tar", "../main", "../main/*", "../m*/*.tar"])
def test_shards_of_a_hub_cache_are_taken_with_the_size_of_their_data(hub, pattern):
    files = expand_inputs([f"{hub}/{pattern}"])

    assert [file.name for file in files] == ["0.tar", "1.tar", "2.tar"]
    assert [file.size for file in files] == [10240] * 3
    assert [scan_source(file, MemberRules()).rows["size"].to_pylist() for file in files] == [[1], [2], [3]]


def test_mark_of_a_link_is_that_of_its_data(hub):
    for pattern in (hub, f"{hub}/*.tar", f"{hub}/0.tar"):
        before = expand_inputs([str(pattern)])[0].etag
        os.utime(hub / "0.tar", (9, 9), follow_symlinks=False)
        assert expand_inputs([str(pattern)])[0].etag == before
    os.utime(hub / "0.tar", (9, 9))
    [etag] = {expand_inputs([str(pattern)])[0].etag for pattern in (hub, f"{hub}/*.tar", f"{hub}/0.tar")}
    assert etag.startswith("mtime:9000000000,ctime:")


def test_symlinked_images_and_folders_are_samples(tmp_path):
    put(tmp_path / "far", "x.jpg", "deep/y.png", "z.txt")
    put(tmp_path / "in", "a.jpg")
    (tmp_path / "in/b.jpg").symlink_to(tmp_path / "far/x.jpg")
    (tmp_path / "in/folder").symlink_to(tmp_path / "far")
    (tmp_path / "root").symlink_to("in")

    for root in (tmp_path / "in", tmp_path / "root"):
        assert taken(root) == ["a.jpg", "b.jpg", "folder/deep/y.png", "folder/x.jpg"]
        assert left(root) == {"neither tar nor image (.txt)": 1}
    assert taken(tmp_path / "in/*/*.jpg") == ["x.jpg"]
    assert taken(tmp_path / "in/**/*.png") == ["y.png"]


def test_symlink_to_a_shard_that_is_listed_is_no_second_one(tmp_path):
    put(tmp_path, "t-0.tar", "t-1.tar")
    (tmp_path / "t-latest.tar").symlink_to("t-1.tar")

    for pattern in (tmp_path, tmp_path / "t-*.tar"):
        assert taken(pattern) == ["t-0.tar", "t-1.tar"]
        assert left(pattern) == {"symlink to a file that is listed itself": 1}


def test_symlinks_that_lead_nowhere_are_counted(tmp_path):
    put(tmp_path / "in", "a.jpg")
    (tmp_path / "in/gone.jpg").symlink_to("nothing.jpg")
    (tmp_path / "in/self.jpg").symlink_to("self.jpg")
    (tmp_path / "in/text").symlink_to("/no/such/folder")

    assert taken(tmp_path / "in") == ["a.jpg"]
    assert left(tmp_path / "in") == {"symlink that leads nowhere": 3}
    assert left(tmp_path / "in/*.jpg") == {"symlink that leads nowhere": 2}
    for name in ("gone", "self"):
        with pytest.raises(InputError, match="do not exist"):
            expand_inputs([f"{tmp_path}/in/{name}.jpg"])


def test_folders_that_link_in_circles_end(tmp_path):
    put(tmp_path / "in", "a/1.jpg", "b/2.jpg", "c/3.jpg")
    for here in "abc":
        (tmp_path / f"in/{here}/up").symlink_to("..")
        for there in "abc":
            (tmp_path / f"in/{here}/to-{there}").symlink_to(f"../{there}")

    listed = taken(tmp_path / "in")

    assert {"a/1.jpg", "b/2.jpg", "c/3.jpg"} <= set(listed)
    assert len(listed) <= 6
    assert left(tmp_path / "in")["symlink to a folder that is listed already"] >= 6


def test_pipes_and_sockets_are_counted_and_never_opened(tmp_path):
    put(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.tar"))

        assert taken(tmp_path) == ["a.jpg"]
        assert left(tmp_path / "*") == left(tmp_path) == {"neither a file nor a folder": 2}
    with pytest.raises(InputError, match=r"pipe\.jpg is neither a file nor a folder"):
        expand_inputs([str(tmp_path / "pipe.jpg")])


# --- folders without permission ---------------------------------------------------------------------------------------


@pytest.fixture
def forbidden(tmp_path, monkeypatch) -> Path:
    """A folder of which a part may not be read; also where the tests run as root."""
    put(tmp_path / "in", "a.jpg", "secret/b.jpg", "open/c.jpg")
    ls = LocalFileSystem.ls

    def refuse(self, path, *args, **kwargs):
        if path.endswith("/secret"):
            raise PermissionError(13, "Permission denied", path)
        return ls(self, path, *args, **kwargs)

    monkeypatch.setattr(LocalFileSystem, "ls", refuse)
    return tmp_path / "in"


def test_folder_that_may_not_be_read_is_counted_and_named(forbidden):
    listing = expand_inputs([str(forbidden)])

    assert [file.name for file in listing] == ["a.jpg", "open/c.jpg"]
    (reason,) = listing.left_out
    assert reason == "folder that can't be read (Permission denied)"
    assert listing.left_out[reason].examples == (f"{forbidden}/secret",)
    assert list(expand_inputs([f"{forbidden}/*/*.jpg"]).left_out) == [reason]
    assert left(forbidden / "*.jpg") == {}
    with pytest.raises(InputError, match="1 x folder that can't be read"):
        expand_inputs([f"{forbidden}/secret"])


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root, to be somebody else")
def test_another_user_is_told_of_folders_that_are_closed_to_him(tmp_path_factory):
    root = Path("/tmp") / tmp_path_factory.mktemp("closed").name
    put(root, "a.jpg", "secret/b.jpg")
    (root / "secret").chmod(0o700)
    program = f"from storage.inputs import expand_inputs as e; l = e(['{root}']); print(len(l), list(l.left_out))"
    try:
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    finally:
        shutil.rmtree(root)
    if "Permission denied" in done.stderr or "No module named" in done.stderr:
        pytest.skip("another user can't run this checkout")
    assert done.stdout.strip() == '1 ["folder that can\'t be read (Permission denied)"]'


# --- object storage ---------------------------------------------------------------------------------------------------


def test_bucket_is_listed_by_the_same_rules(s3_options):
    fs = s3fs.S3FileSystem(**s3_options["options"])
    bucket = f"{s3_options['bucket']}/left"
    for name in ("a.TAR", "b.tgz", "c.jpg", "sub/d.tar", ".hidden/e.tar", "f.txt"):
        fs.pipe_file(f"{bucket}/{name}", b"x")
    fs.pipe_file(f"{bucket}/", b"")
    options = {"s3": s3_options["options"]}

    listing = expand_inputs([f"s3://{bucket}"], options)

    assert [file.name for file in listing] == ["a.TAR"]
    assert counts(listing) == {
        "hidden file": 1,
        "compressed tar (decompress it)": 1,
        "image beside tars": 1,
        "tar in a subfolder (name that folder, too)": 1,
        "neither tar nor image (.txt)": 1,
    }
    globbed = expand_inputs([f"s3://{bucket}/*"], options)
    assert [file.name for file in globbed] == ["a.TAR", "c.jpg"]
    assert globbed.left_out["folder that a glob matches (name the folder itself)"].count >= 1


# --- counting ---------------------------------------------------------------------------------------------------------


def test_counts_and_examples_are_bounded_and_survive_json():
    left_out = {}
    for i in range(10_000):
        leave_out(left_out, f"kind {i % 1000}", f"name {i}\x1b[31m")

    assert sum(each.count for each in left_out.values()) == 10_000
    assert len(left_out) == MAX_REASONS + 1
    assert left_out[FURTHER].count == 9500
    assert left_out["kind 0"].examples == (r"'name 0\x1b[31m'", r"'name 1000\x1b[31m'", r"'name 2000\x1b[31m'")
    assert parse_left_out(left_out_json(left_out)) == left_out
    twice = merge_left_out(left_out, left_out)
    assert twice["kind 0"].count == 20
    assert twice["kind 0"].examples == left_out["kind 0"].examples


# --- plan, last lines, store ------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path, tiny):
    """A folder of two tars and other things; returns the settings."""
    write_tar(tmp_path / "in/a.tar", [(f"{i}.jpg", jpeg(i)) for i in range(3)] + [("0-readme", b"x"), ("3.jpg", jpeg(3))])
    write_tar(tmp_path / "in/b.tar", [("4.jpg", jpeg(4)), ("4.json", b"{}"), ("5.jpg", jpeg(5))])
    with tarfile.open(tmp_path / "in/b.tar", "a") as tar:
        link = tarfile.TarInfo("6.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/data/6.jpg"
        tar.addfile(link)
    (tmp_path / "in/c.tgz").write_bytes(b"x")
    return tiny(str(tmp_path / "in"))


EXPECTED = {
    "compressed tar (decompress it)": 1,
    "member without an extension": 1,
    "other member of a sample (.json)": 1,
    "symlink to no member of this tar": 1,
}


def command_line(config, *flags: str) -> list[str]:
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in (("out", config.out), ("model", config.features.model))]
    settings += [f"--size={config.features.size}", "--weights=random", "--executor=inline", "--precision=fp32"]
    return ["--data", *config.data, *settings, *flags]


def test_left_out_is_in_the_log_the_plan_the_last_lines_and_the_store(mixed, capsys, caplog):
    assert run(command_line(mixed, "--plan")) == 0
    plan = capsys.readouterr().out
    assert "left out   1 x compressed tar (decompress it) (" in plan
    assert "left out   1 x symlink to no member of this tar (b.tar: 6.jpg -> /data/6.jpg)" in plan
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and "left out" in r.getMessage()]
    assert len(warned) == 3
    assert run(command_line(mixed, "--plan", "--json")) == 0
    document = json.loads(capsys.readouterr().out)
    assert {reason: each["count"] for reason, each in document["left_out"].items()} == EXPECTED

    assert run(command_line(mixed)) == 0
    last = capsys.readouterr().out
    assert "6 images ok, 0 failed" in last
    assert "  left out of the input: 1 x compressed tar (decompress it) (" in last
    assert "  left out of the input: 1 x other member of a sample (.json) (b.tar: 4.json)" in last

    from jobs.show import run as show

    assert show(["status", mixed.out]) == 0
    assert "left out 1 x member without an extension (a.tar: 0-readme)" in capsys.readouterr().out
    saved = pq.read_schema(Path(mixed.out) / "index/sources.parquet").metadata[b"left_out"]
    assert {reason: each["count"] for reason, each in json.loads(saved).items()} == EXPECTED


def test_index_from_before_it_was_counted_reads_as_nothing(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("readme", b"y")])
    files = expand_inputs([str(tmp_path / "a.tar")])
    folder = Folder(str(tmp_path / "out"))
    index = run_input(files).index_in_use(folder)
    assert [each.count for each in index.left_out.values()] == [1]
    path = tmp_path / "out/index/sources.parquet"
    table = pq.read_table(path).drop_columns(["left_out"])
    meta = {name: value for name, value in table.schema.metadata.items() if name != b"left_out"}
    pq.write_table(table.replace_schema_metadata(meta), path)

    assert SampleIndex(folder).left_out == {}
    assert run_input(files).index_in_use(folder).n_rows == 1
