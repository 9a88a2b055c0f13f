"""The input: WebDataset's naming, damaged and hostile archives, folders, web servers, and an index that is kept."""

import gzip
import io
import os
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator

from pipelines.indexing import RunInput
from storage import samples
from storage.inputs import expand_inputs
from storage.paths import Folder, InputError, StorageError
from storage.ranges import read_ranges
from storage.sample_images import read_images, try_images
from storage.samples import DuplicateKeys, SampleIndex, write_index
from storage.scans import collect_index
from storage.tars import MemberRules, SourceScan, scan_source, split_name
from tests.conftest import run_input, unreadable, write_tar

AWKWARD_NAMES = [
    *("a.jpg", "a.JPG", "a.B.Jpg", "a.rgb.png", "a..jpg", "a.", "a", "-.jpg", " .jpg", "a b.jpg", "", "."),
    *(".hidden", ".hidden.jpg", "d/.jpg", "d/.a.jpg", "d.x/a.jpg", "d.x/a", "./a.jpg", "d/a.b/c.d.e", "d//a.jpg", "a.jpg/"),
    *("../a.jpg", "../../etc/passwd", "../../etc/passwd.jpg", "/abs/a.jpg", "//a.jpg", "d/../a.jpg", "C:\\a.jpg"),
    *("ünï/ß.png", "写真/猫.jpg", "🐈.jpg", "e\u0301.jpg", "x" * 300 + ".jpg", "d" * 200 + "/" + "n" * 200 + ".webp"),
    *("__meta__", "__meta__.json", "__a__/b.jpg", "d/__a__.jpg", "__a.jpg", "a\tb.jpg", "a\nb.jpg", "a.j\npg"),
]


@pytest.mark.parametrize("name", AWKWARD_NAMES)
def test_names_split_as_webdataset_splits_them(name):
    key, extension = base_plus_ext(name)

    assert split_name(name) == (None if key is None else (key, extension.lower()))


@given(st.text(alphabet="ab./_ \n\\ÜA-", max_size=12))
def test_any_name_splits_as_webdataset_splits_it(name):
    key, extension = base_plus_ext(name)

    assert split_name(name) == (None if key is None else (key, extension.lower()))


# --- grouping -----------------------------------------------------------------------------------------------------------


def scan(path: Path | str, rules: MemberRules | None = None) -> SourceScan:
    return scan_source(expand_inputs([str(path)])[0], rules or MemberRules())


def rows_of(path: Path | str, rules: MemberRules | None = None) -> list[dict]:
    return scan(path, rules).rows.to_pylist()


def index_of(folder: Path | str, *patterns: Path | str, rules: MemberRules | None = None, limit: int | None = None):
    """The index of `patterns`, kept under `folder`, and the URLs to read with."""
    files = expand_inputs([str(pattern) for pattern in patterns])
    index = run_input(files, rules, limit).index_in_use(Folder(str(folder)))
    return index, [file.url for file in files]


def images_of(folder: Path | str, *patterns: Path | str) -> dict[str, bytes | None]:
    """Image bytes by key, read through an index."""
    index, urls = index_of(folder, *patterns)
    rows = index.read(0, index.n_rows)
    return dict(zip(rows["key"].to_pylist(), read_images(rows, urls), strict=True))


def webdataset_samples(path: Path) -> list[dict]:
    with path.open("rb") as file:
        members = [{**member, "__url__": str(path)} for member in tar_file_iterator(file)]
    return list(group_by_keys(members))


@pytest.mark.parametrize("dialect", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_those_that_webdataset_finds(tmp_path, dialect):
    names = [name for name in AWKWARD_NAMES if name and not name.endswith("/")]
    with tarfile.open(tmp_path / "a.tar", "w", format=dialect) as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for i, name in enumerate(names):
            key, _ = base_plus_ext(name)
            for extension in () if key is None else ("cls", "extra.txt"):
                tar.addfile(_info(f"{key}.{extension}", 1), io.BytesIO(b"7"))
            tar.addfile(_info(name, 3), io.BytesIO(b"%03d" % i))
            tar.addfile(_info(f"between-{i}.png", 1), io.BytesIO(b"|"))
        link = tarfile.TarInfo("linked.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    expected = webdataset_samples(tmp_path / "a.tar")

    rows = rows_of(tmp_path / "a.tar")

    assert [row["key"] for row in rows] == [sample["__key__"] for sample in expected]
    data = (tmp_path / "a.tar").read_bytes()
    found = [data[row["offset"] :][: row["size"]] if row["member"] else None for row in rows]
    assert found == [next((s[e] for e in ("jpg", "png", "webp") if e in s), None) for s in expected]


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    return info


@pytest.mark.parametrize("dialect", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("key", ["k" * 300, "日本語の写真/" + "猫" * 100, "ünïcödé", "d" * 120 + "/" + "n" * 160])
def test_long_and_unicode_names_survive_both_tar_dialects(tmp_path, dialect, key):
    with tarfile.open(tmp_path / "a.tar", "w", format=dialect) as tar:
        tar.addfile(_info(f"{key}.jpg", 5), io.BytesIO(b"first"))
        tar.addfile(_info("next.jpg", 6), io.BytesIO(b"second"))

    assert images_of(tmp_path / "out", tmp_path / "a.tar") == {key: b"first", "next": b"second"}


def test_names_that_are_not_utf8_stay_different_keys(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        tar.addfile(_info("caf\xe9.jpg", 1), io.BytesIO(b"1"))
        tar.addfile(_info("caf\xe8.jpg", 1), io.BytesIO(b"2"))

    assert images_of(tmp_path / "out", tmp_path / "a.tar") == {"caf\\xe9": b"1", "caf\\xe8": b"2"}


def test_names_that_climb_out_of_the_folder_are_labels(tmp_path):
    members = [("../climb.jpg", b"one"), ("/absolute/path.jpg", b"two"), ("a/../../b.jpg", b"three")]
    write_tar(tmp_path / "in/a.tar", members)

    images = images_of(tmp_path / "out", tmp_path / "in/a.tar")

    assert images == {"../climb": b"one", "/absolute/path": b"two", "a/../../b": b"three"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize(
    ("members", "image", "expected"),
    [
        (["jpg", "png"], None, "jpg"),
        (["png", "jpg"], None, "jpg"),
        (["cls", "webp"], None, "webp"),
        (["TIFF"], None, "tiff"),
        (["jpg", "rgb.png", "depth.png"], "rgb.png", "rgb.png"),
        (["jpg", "mask.png"], ".MASK.png", "mask.png"),
        (["rgb.png"], None, ""),
        (["jpg"], "png", ""),
    ],
)
def test_image_is_the_first_known_extension_or_the_named_one(tmp_path, members, image, expected):
    write_tar(tmp_path / "a.tar", [(f"k.{extension}", b"x") for extension in members])

    (row,) = rows_of(tmp_path / "a.tar", MemberRules(image=image))

    assert row["member"] == expected
    assert (row["problem"] is None) == bool(expected)


def test_sample_without_image_says_what_it_has(tmp_path):
    write_tar(tmp_path / "a.tar", [("k.json", b"{}"), ("k.cls", b"1")])

    assert rows_of(tmp_path / "a.tar")[0]["problem"] == "no image member (has .cls, .json)"


def test_carried_members_become_columns(tmp_path):
    members = [("1.jpg", b"x"), ("1.cls", b"7"), ("1.JSON", '{"a": "ü"}'.encode()), ("2.jpg", b"y"), ("2.txt", b"left alone")]
    write_tar(tmp_path / "a.tar", members)

    index, _ = index_of(tmp_path / "out", tmp_path / "a.tar", rules=MemberRules(carry=("cls", "json")))

    rows = index.read(0, 2)
    assert rows["cls"].to_pylist() == ["7", None]
    assert rows["json"].to_pylist() == ['{"a": "ü"}', None]
    assert "txt" not in rows.column_names


def test_carried_extension_may_be_written_with_its_dot(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("1.cls", b"7")])

    assert rows_of(tmp_path / "a.tar", MemberRules(carry=(".CLS",)))[0]["cls"] == "7"


def test_carried_member_with_the_name_of_a_column_is_refused():
    with pytest.raises(InputError, match=r"--carry size: the index has a column of that name"):
        MemberRules(carry=("cls", "size"))


@pytest.mark.parametrize(
    ("text", "why"),
    [(b"\x93NUMPY\xff\xfe", "member to carry that is no UTF-8 text"), (b"t" * (2**20 + 1), "member to carry of more than 1 MiB")],
)
def test_carried_member_that_is_no_text_or_large_is_null_and_counted(text, why, tmp_path):
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("1.txt", text), ("2.jpg", b"y"), ("2.txt", b"good")])

    scanned = scan(tmp_path / "a.tar", MemberRules(carry=("txt",)))

    assert [(row["problem"], row["txt"]) for row in scanned.rows.to_pylist()] == [(None, None), (None, "good")]
    assert [(reason, each.count, each.is_usual) for reason, each in scanned.left_out.items()] == [(why, 1, False)]


# --- damage -------------------------------------------------------------------------------------------------------------

# Four samples of one image each: header at 0, 1536, 3072, 4608; data of 700 bytes after each (two blocks).
HEADERS = (0, 1536, 3072, 4608)


@pytest.fixture
def four(tmp_path) -> Path:
    return write_tar(tmp_path / "four.tar", [(f"{i}.jpg", bytes([65 + i]) * 700) for i in range(4)])


def cut(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


def test_tar_cut_inside_an_image_fails_that_sample_only(four):
    scanned = scan(cut(four, 3072 + 512 + 100))

    assert [(r["key"], r["problem"]) for r in scanned.rows.to_pylist()] == [
        ("0", None),
        ("1", None),
        ("2", "the tar is cut short: the last 600 of 700 bytes of the image are missing"),
    ]
    assert scanned.problems == ["no end-of-archive marker: the tar may have been cut short"]


def test_tar_cut_inside_a_header_has_one_row_for_what_is_lost(four):
    scanned = scan(cut(four, 3072 + 100))

    assert [(r["key"], r["problem"]) for r in scanned.rows.to_pylist()] == [
        ("0", None),
        ("1", None),
        ("four.tar@3072-3172", "damaged tar: bytes 3072 to 3172 are not a whole tar header"),
    ]
    assert scanned.problems == ["no end-of-archive marker: the tar may have been cut short"]


def test_tar_cut_between_samples_is_noticed_by_the_missing_end(four):
    scanned = scan(cut(four, 3072))

    assert [(r["key"], r["problem"]) for r in scanned.rows.to_pylist()] == [("0", None), ("1", None)]
    assert scanned.problems == ["no end-of-archive marker: the tar may have been cut short"]


def test_whole_tar_has_no_problems(four):
    assert scan(four).problems == []


def test_tar_cut_inside_a_carried_member_fails_the_sample(tmp_path):
    tar = cut(write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("1.txt", b"t" * 700)]), 1024 + 512 + 100)

    (row,) = rows_of(tar, MemberRules(carry=("txt",)))

    assert row["problem"] == "the tar is cut short: the last 600 of 700 bytes of .txt are missing"
    assert row["txt"] is None


@pytest.mark.parametrize("fill", [b"\xff", b"\x00"], ids=["noise", "zeros"])
def test_samples_after_a_broken_header_are_found(four, fill):
    data = bytearray(four.read_bytes())
    data[HEADERS[1] + 100 : HEADERS[1] + 200] = fill * 100  # mode, owner, size, checksum
    four.write_bytes(data)

    scanned = scan(four)

    assert [(r["key"], r["problem"]) for r in scanned.rows.to_pylist()] == [
        ("0", None),
        ("four.tar@1536-3072", "damaged tar: bytes 1536 to 3072 hold no valid tar header"),
        ("2", None),
        ("3", None),
    ]
    assert scanned.problems == []


def test_sample_whose_label_is_damaged_keeps_its_image_and_its_later_members(tmp_path):
    members = [("1.jpg", b"x"), ("1.cls", b"1"), ("1.txt", b"t"), ("2.jpg", b"y")]
    tar = write_tar(tmp_path / "a.tar", members)
    data = bytearray(tar.read_bytes())
    data[1024 + 148 : 1024 + 156] = b"\xff" * 8
    tar.write_bytes(data)

    rows = rows_of(tar, MemberRules(carry=("txt",)))

    assert [(r["key"], r["problem"] is None, r["txt"]) for r in rows] == [
        ("1", True, "t"),
        ("a.tar@1024-2048", False, None),
        ("2", True, None),
    ]


def test_name_of_a_damaged_member_is_not_given_to_the_next_one(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(_info("0.jpg", 1), io.BytesIO(b"0"))
        tar.addfile(_info("k" * 300 + ".jpg", 1), io.BytesIO(b"1"))
        tar.addfile(_info("2.jpg", 1), io.BytesIO(b"2"))
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[2048 + 148 : 2048 + 156] = b"\xff" * 8  # the header that the long name belongs to
    (tmp_path / "a.tar").write_bytes(data)

    assert [r["key"] for r in rows_of(tmp_path / "a.tar")] == ["0", "a.tar@2048-3072", "2"]


def test_zeros_inside_a_damaged_stretch_are_not_its_end(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [("0.jpg", b"A"), ("1.bmp", bytes(5000)), ("2.jpg", b"C")])
    data = bytearray(tar.read_bytes())
    data[1024 + 148 : 1024 + 156] = b"\xff" * 8  # the checksum of 1.bmp
    tar.write_bytes(data)

    scanned = scan(tar)

    assert [r["key"] for r in scanned.rows.to_pylist()] == ["0", "a.tar@1024-6656", "2"]
    assert scanned.problems == []


def test_damage_up_to_the_end_marker_is_one_row(four):
    data = bytearray(four.read_bytes())
    data[HEADERS[3] : HEADERS[3] + 512] = b"\xff" * 512
    four.write_bytes(data)

    scanned = scan(four)

    assert [r["key"] for r in scanned.rows.to_pylist()] == ["0", "1", "2", "four.tar@4608-6144"]
    assert scanned.problems == []


def _with_header(path: Path, at: int, **fields: bytes) -> None:
    """Overwrite header fields and make the checksum right again."""
    places = {"size": slice(124, 136), "type": slice(156, 157)}
    data = bytearray(path.read_bytes())
    header = data[at : at + 512]
    for name, value in fields.items():
        header[places[name]] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[at : at + 512] = header
    path.write_bytes(data)


@pytest.mark.parametrize("size", [b"\xff" * 12, b"\x80" + b"\x7f" * 11], ids=["negative", "beyond int64"])
def test_hostile_sizes_are_damage_and_not_an_endless_loop(four, size):
    _with_header(four, HEADERS[1], size=size)

    assert [r["key"] for r in rows_of(four)] == ["0", "four.tar@1536-3072", "2", "3"]


@pytest.mark.parametrize("size", ["-512", "9" * 30, "many"])
def test_hostile_sizes_in_a_pax_header_are_damage(tmp_path, size):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = _info("1.jpg", 1)
        info.pax_headers = {"size": size}
        tar.addfile(info, io.BytesIO(b"A"))
        tar.addfile(_info("2.jpg", 1), io.BytesIO(b"B"))

    rows = rows_of(tmp_path / "a.tar")

    assert [(r["key"], r["problem"] is None) for r in rows] == [("a.tar@1024-2048", False), ("2", True)]


def test_sizes_of_links_are_no_data_as_in_tarfile(four):
    _with_header(four, HEADERS[1], type=tarfile.LNKTYPE)
    data = four.read_bytes()
    four.write_bytes(data[:2048] + data[3072:])  # the link keeps its size field, its data goes

    assert [r["key"] for r in rows_of(four)] == ["0", "2", "3"]
    with tarfile.open(four) as tar:
        assert tar.getnames() == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]


def test_sparse_member_is_named_as_unreadable(four):
    _with_header(four, HEADERS[1], type=tarfile.GNUTYPE_SPARSE)

    rows = rows_of(four)

    assert [r["key"] for r in rows if r["problem"] is None] == ["0", "2", "3"]
    assert "1.jpg is stored sparse" in rows[1]["problem"]


def test_member_of_zero_bytes_is_a_row_with_zero_bytes(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.jpg", b""), ("2.jpg", b"x")])

    assert images_of(tmp_path / "out", tmp_path / "a.tar") == {"1": b"", "2": b"x"}


def test_two_members_of_one_name_fail_the_sample(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("1.jpg", b"y"), ("2.jpg", b"z")])

    assert [r["problem"] for r in rows_of(tmp_path / "a.tar")] == ["the sample has two members named .jpg", None]


# --- refused before anything runs -----------------------------------------------------------------------------------------


def test_compressed_tar_is_refused_with_the_remedy(tmp_path, four):
    (tmp_path / "z.tar").write_bytes(gzip.compress(four.read_bytes()))

    with pytest.raises(InputError, match=r"z\.tar is gzip-compressed: .* Decompress it first \(gunzip\)"):
        scan(tmp_path / "z.tar")


def test_file_that_is_no_tar_is_refused(tmp_path):
    (tmp_path / "a.tar").write_text("not a tar at all. " * 100)

    with pytest.raises(InputError, match=r"a\.tar is not a tar archive"):
        scan(tmp_path / "a.tar")


def test_pattern_that_matches_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"nothing/\*\.tar matches no tar and no image .* check the path"):
        expand_inputs([f"{tmp_path}/nothing/*.tar"])


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="matches no tar and no image"):
        expand_inputs([str(tmp_path)])


def test_no_pattern_at_all_is_refused():
    with pytest.raises(InputError, match="give --data one or more URLs"):
        expand_inputs([])


def test_brace_pattern_names_the_files_that_are_missing(tmp_path, four):
    pattern = f"{tmp_path}/{{four,five,six}}.tar"

    with pytest.raises(InputError, match=r"2 of 3 do not exist: \S+/five\.tar, \S+/six\.tar"):
        expand_inputs([pattern])


@pytest.mark.parametrize("braces", ["{0..9999999999}", "{0..9999}/{99999..0}", "{1..99999999999999999999}"])
def test_braces_that_stand_for_endless_names_are_refused(tmp_path, braces):
    with pytest.raises(InputError, match="its braces stand for more than 10,000,000 names"):
        expand_inputs([f"{tmp_path}/{braces}.tar"])


def test_unbalanced_braces_are_refused(tmp_path):
    with pytest.raises(InputError, match="unbalanced braces"):
        expand_inputs([f"{tmp_path}/{{000..003.tar"])


@pytest.mark.parametrize("url", ["pipe:cat /etc/passwd", "simplecache::s3://b/a.tar", "nonsense://a.tar"])
def test_pipes_chains_and_unknown_schemes_are_refused(url):
    with pytest.raises(InputError):
        expand_inputs([url])


@pytest.mark.parametrize(
    ("members", "why"),
    [([("1.cls", b"1"), ("2.cls", b"2")], r"no image member \(has \.cls\)"), ([], "it has no samples")],
    ids=["labels only", "empty"],
)
def test_tar_without_images_is_refused_also_beside_others(tmp_path, four, members, why):
    write_tar(tmp_path / "b.tar", members)

    with pytest.raises(InputError, match=rf"b\.tar holds no images: {why}"):
        index_of(tmp_path / "out", four, tmp_path / "b.tar")
    assert not (tmp_path / "out").exists()


def test_file_of_zero_bytes_is_refused_by_name(tmp_path, four):
    (tmp_path / "b.tar").write_bytes(b"")

    with pytest.raises(InputError, match=r"b\.tar holds no images: it has no samples"):
        index_of(tmp_path / "out", four, tmp_path / "b.tar")


def test_one_key_twice_in_a_tar_names_key_and_places(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("2.jpg", b"y"), ("1.jpg", b"z")])

    with pytest.raises(DuplicateKeys, match=r"1 keys belong.*\n  '1': \S+a\.tar \.jpg at byte 512, \S+a\.tar \.jpg at byte 2560"):
        index_of(tmp_path / "out", tmp_path / "a.tar")


def test_members_of_a_sample_that_do_not_follow_each_other_are_named(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("2.jpg", b"y"), ("1.cls", b"z")])

    with pytest.raises(DuplicateKeys, match="members of a sample must follow each other in the tar"):
        index_of(tmp_path / "out", tmp_path / "a.tar")


def test_one_key_in_two_tars_names_both(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("2.jpg", b"y")])
    write_tar(tmp_path / "b.tar", [("2.jpg", b"y"), ("3.jpg", b"x")])

    with pytest.raises(DuplicateKeys, match=r"'2': \S+a\.tar \.jpg at byte 1536, \S+b\.tar \.jpg at byte 512"):
        index_of(tmp_path / "out", tmp_path / "{a,b}.tar")


# --- where inputs lie -----------------------------------------------------------------------------------------------------


@pytest.fixture
def nested(tmp_path) -> Path:
    for name in ("b.jpg", "sub/a.JPEG", "sub/deep/c.v2.png", "notes.txt", ".cache/d.jpg", "sub/.thumb.jpg"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "photos"


def test_folder_of_images_is_read_below_with_paths_as_keys(tmp_path, nested):
    images = images_of(tmp_path / "out", nested)

    assert images == {"b": b"b.jpg", "sub/a": b"sub/a.JPEG", "sub/deep/c": b"sub/deep/c.v2.png"}


def test_folder_that_is_named_with_a_dot_gives_the_same_keys(tmp_path, nested, monkeypatch):
    monkeypatch.chdir(nested)

    assert sorted(images_of(tmp_path / "out", ".")) == ["b", "sub/a", "sub/deep/c"]


def test_folder_of_tars_stands_for_its_tars(tmp_path):
    write_tar(tmp_path / "in/b.tar", [("2.jpg", b"two")])
    write_tar(tmp_path / "in/a.tar", [("1.jpg", b"one")])
    (tmp_path / "in/readme.txt").write_text("hello")

    assert list(images_of(tmp_path / "out", tmp_path / "in").items()) == [("1", b"one"), ("2", b"two")]


def test_globs_are_sorted_and_lists_keep_their_order(tmp_path):
    for name in ("t-10", "t-2", "u-1"):
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.jpg", b"x")])

    files = expand_inputs([f"{tmp_path}/u-*.tar", f"{tmp_path}/t-*.tar"])

    assert [file.url.rsplit("/", 1)[1] for file in files] == ["u-1.tar", "t-10.tar", "t-2.tar"]


def test_memory_urls_are_read_like_files(four):
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/inputs/four.tar", four.read_bytes())

    images = images_of("memory://outputs/indexed", "memory://inputs/*.tar")

    assert images == {"0": b"A" * 700, "1": b"B" * 700, "2": b"C" * 700, "3": b"D" * 700}
    fs.rm("/inputs", recursive=True)
    fs.rm("/outputs", recursive=True)


class _Plain(SimpleHTTPRequestHandler):
    """Python's own web server: no Range support."""

    sent: list[int]

    def log_message(self, *_: object) -> None:
        pass


class _Ranged(_Plain):
    """The same with Range support; notes how many bytes each answer had."""

    def do_GET(self) -> None:
        data = Path(self.translate_path(self.path)).read_bytes()
        status, wanted = 200, self.headers.get("Range")
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            status, data = 206, data[int(first) : int(last) + 1]
        self.sent.append(len(data))
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def serve(tmp_path):
    """Serve tmp_path; call with a handler class, get (base URL, sizes of answers)."""
    servers = []

    def start(handler: type) -> tuple[str, list[int]]:
        sent: list[int] = []
        handler = type("Handler", (handler,), {"sent": sent})
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", sent

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("handler", [_Plain, _Ranged])
def test_web_servers_with_and_without_ranges_give_the_same_images(tmp_path, four, serve, handler):
    base, _ = serve(handler)

    images = images_of(tmp_path / "out", f"{base}/four.tar?X-Amz-Signature=abcdef")

    assert images == {"0": b"A" * 700, "1": b"B" * 700, "2": b"C" * 700, "3": b"D" * 700}


def test_web_server_with_ranges_sends_only_what_is_asked(tmp_path, four, serve):
    base, sent = serve(_Ranged)
    index, urls = index_of(tmp_path / "out", f"{base}/four.tar")
    sent.clear()

    assert read_images(index.read(1, 3), urls) == [b"B" * 700, b"C" * 700]

    assert sent == [700 + 836 + 700]  # two neighbours in one request, with the padding and header between


def test_signature_of_a_web_url_is_not_kept(tmp_path, four, serve):
    base, _ = serve(_Ranged)

    index_of(tmp_path / "out", f"{base}/four.tar?X-Amz-Signature=abcdef&X-Amz-Credential=AKID")

    assert [source.url for source in SampleIndex(Folder(str(tmp_path / "out"))).sources] == [f"{base}/four.tar"]


def test_missing_web_file_is_named_without_its_signature(serve):
    base, _ = serve(_Plain)

    with pytest.raises(InputError, match=r"1 of 1 do not exist: \S+/none\.tar\?X-Amz-Signature=\*\*\*") as caught:
        expand_inputs([f"{base}/none.tar?X-Amz-Signature=abcdef"])

    assert "abcdef" not in str(caught.value)


def test_web_file_that_may_not_be_read_is_an_error_without_its_signature(four, serve):
    class Forbidden(_Plain):
        def do_GET(self) -> None:
            self.send_error(403)

    base, _ = serve(Forbidden)

    with pytest.raises(StorageError, match=r"four\.tar can't be reached: .*403") as caught:
        scan(f"{base}/four.tar?X-Amz-Signature=abcdef")

    assert "abcdef" not in str(caught.value)


# --- the index is kept ------------------------------------------------------------------------------------------------------


def test_kept_index_is_not_made_again(tmp_path, four, monkeypatch):
    first, _ = index_of(tmp_path / "out", four)
    monkeypatch.setattr(RunInput, "scan", lambda *_: pytest.fail("scanned again"))

    again, _ = index_of(tmp_path / "out", four)

    assert again.digest == first.digest
    assert again.read(0, 4) == first.read(0, 4)


def test_source_that_was_touched_but_is_equal_is_checked_once_and_accepted(tmp_path, four, caplog, monkeypatch):
    first, _ = index_of(tmp_path / "out", four)
    os.utime(four, (1, 1))

    again, _ = index_of(tmp_path / "out", four)

    assert "changed since it was indexed" in caplog.text
    assert again.digest == first.digest
    monkeypatch.setattr(RunInput, "scan", lambda *_: pytest.fail("scanned again"))
    index_of(tmp_path / "out", four)


def test_source_that_moved_with_equal_content_is_accepted(tmp_path, four):
    first, _ = index_of(tmp_path / "out", four)
    four.rename(tmp_path / "moved.tar")

    again, _ = index_of(tmp_path / "out", tmp_path / "moved.tar")

    assert again.digest == first.digest
    assert again.sources[0].url.endswith("/moved.tar")


def test_source_that_changed_is_refused_with_what_changed(tmp_path, four):
    index_of(tmp_path / "out", four)
    write_tar(four, [(f"{i}.jpg", b"Z" * 2000) for i in range(4)])

    with pytest.raises(
        InputError, match=r"made from other input:\n.*four\.tar: 10240 bytes when indexed, 20480 now\nUse a new --out"
    ):
        index_of(tmp_path / "out", four)


def test_source_that_was_added_is_refused(tmp_path, four):
    index_of(tmp_path / "out", tmp_path / "*.tar")
    write_tar(tmp_path / "more.tar", [("9.jpg", b"x")])

    with pytest.raises(InputError, match=r"more\.tar is new"):
        index_of(tmp_path / "out", tmp_path / "*.tar")


def test_limit_scans_no_more_sources_than_it_needs(tmp_path, four):
    write_tar(tmp_path / "gone-bad.tar", [("x.cls", b"1")])

    index, _ = index_of(tmp_path / "out", four, tmp_path / "gone-bad.tar", limit=3)

    assert index.n_rows == 3
    assert index.read(0, 3)["key"].to_pylist() == ["0", "1", "2"]


@pytest.mark.parametrize("limit", [None, 4, 2])
def test_index_of_another_limit_is_refused(tmp_path, four, limit):
    index_of(tmp_path / "out", four, limit=3)

    with pytest.raises(InputError, match=r"--limit.*\n?.*[Uu]se a new --out"):
        index_of(tmp_path / "out", four, limit=limit)


def test_larger_limit_that_takes_another_source_is_refused(tmp_path, four):
    write_tar(tmp_path / "more.tar", [("9.jpg", b"x")])
    index_of(tmp_path / "out", four, tmp_path / "more.tar", limit=4)

    with pytest.raises(InputError, match=r"holds the first 4 samples only \(--limit\)"):
        index_of(tmp_path / "out", four, tmp_path / "more.tar", limit=5)


def test_index_made_with_another_image_member_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("1.png", b"y")])
    index_of(tmp_path / "out", tmp_path / "a.tar")

    with pytest.raises(InputError, match="--image-member not given .* this run has --image-member png"):
        index_of(tmp_path / "out", tmp_path / "a.tar", rules=MemberRules(image="png"))


def test_naming_the_image_member_that_was_found_anyway_is_no_change(tmp_path, four):
    first, _ = index_of(tmp_path / "out", four)

    assert index_of(tmp_path / "out", four, rules=MemberRules(image="jpg"))[0].digest == first.digest


def test_limit_beyond_the_input_is_the_whole_input(tmp_path, four):
    first, _ = index_of(tmp_path / "out", four, limit=100)

    assert index_of(tmp_path / "out", four)[0].n_rows == first.n_rows == 4


def test_rows_read_across_row_groups_and_parts_are_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "ROW_GROUP_ROWS", 4)
    monkeypatch.setattr(samples, "PART_ROWS", 16)
    for t in range(3):
        write_tar(tmp_path / f"{t}.tar", [(f"{t}-{i:02d}.jpg", b"x" * (i + 1)) for i in range(13)])
    files = expand_inputs([f"{tmp_path}/{{0..2}}.tar"])
    rows, sources = collect_index((file, scan_source(file, MemberRules())) for file in files)

    index = write_index(Folder(str(tmp_path / "out")), rows, sources)

    assert sorted(p.name for p in (tmp_path / "out/index/samples").iterdir()) == [f"part-{i:05d}.parquet" for i in range(3)]
    assert pa.concat_tables([index.read(n, min(n + 8, 39)) for n in range(0, 39, 8)]) == rows.table()
    assert index.read(38, 39)["key"].to_pylist() == ["2-12"]
    assert index.read(14, 16)["source"].to_pylist() == [1, 1]


def test_rows_of_row_groups_that_are_kept_are_the_same_and_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "ROW_GROUP_ROWS", 4)
    monkeypatch.setattr(samples, "PART_ROWS", 16)
    write_tar(tmp_path / "one.tar", [(f"{i:02d}.jpg", b"x" * (i + 1)) for i in range(39)])
    index, _ = index_of(tmp_path / "out", tmp_path / "one.tar")
    keeping = SampleIndex(index.folder, kept_bytes=2**20)
    asked: list[tuple[int, int]] = []
    read_groups = samples.Parts.read_groups
    monkeypatch.setattr(
        samples.Parts,
        "read_groups",
        lambda self, part, groups, columns=None: (
            asked.extend((part, group) for group in groups),
            read_groups(self, part, groups, columns),
        )[1],
    )
    wanted = [np.array(rows) for rows in ([38, 2, 17, 2], [1, 37, 33, 16, 5], [7, 0, 3])]

    found = [keeping.take(rows, ["key", "size"]) for rows in wanted]

    assert sorted(asked) == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]
    assert [table["key"].to_pylist() for table in found] == [[f"{row:02d}" for row in rows] for rows in wanted]
    assert [table["size"].to_pylist() for table in found] == [[row + 1 for row in rows] for rows in wanted]
    assert keeping.take(np.array([38, 2])).equals(index.take(np.array([38, 2])))


# --- names ---------------------------------------------------------------------------------------------------------------


ODD_NAMES = ("a::b", "a#b", "a?b", "a%20b", "a*b", "a[1]b", "a{1,2}b", "~b", "a b", "s3:b", "zip::b", "a\\b")


@pytest.mark.parametrize("odd", ODD_NAMES)
def test_names_that_urls_and_globs_give_a_meaning_are_read_as_they_are(odd, tmp_path):
    below = tmp_path / f"folder {odd}"
    below.mkdir()
    (below / f"{odd}.jpg").write_bytes(b"this")
    (tmp_path / "folder a1b").mkdir()
    (tmp_path / "folder a1b/other.jpg").write_bytes(b"that")
    for pattern in (str(tmp_path), f"file://{tmp_path}"):
        files = [file for file in expand_inputs([pattern]) if file.name != "folder a1b/other.jpg"]
        assert [file.name for file in files] == [f"folder {odd}/{odd}.jpg"]
        assert read_ranges([(files[0].url, 0, 4)], None) == [b"this"]


@pytest.mark.parametrize("odd", [odd for odd in ODD_NAMES if "*" not in odd and "?" not in odd and "\\" not in odd])
def test_name_that_is_given_and_is_there_is_no_pattern(odd, tmp_path):
    below = tmp_path / f"folder {odd}"
    below.mkdir()
    (below / f"{odd}.jpg").write_bytes(b"this")
    for pattern in (below, below / f"{odd}.jpg"):
        assert [file.url for file in expand_inputs([str(pattern)])] == [f"file://{below}/{odd}.jpg"]
    if "{" not in odd:
        assert [file.url for file in expand_inputs([f"{below}/*.jpg"])] == [f"file://{below}/{odd}.jpg"]


@pytest.mark.parametrize("chained", ["zip://a.jpg::file:///a.zip", "simplecache::s3://bucket/a.tar", "filecache::/a.tar"])
def test_chained_urls_are_refused(chained):
    with pytest.raises(InputError, match="chained URLs are not opened"):
        expand_inputs([chained])


def folder_rows(folder: Path) -> tuple[pa.Table, list[str]]:
    files = expand_inputs([str(folder)])
    rows, _ = collect_index((file, scan_source(file, MemberRules())) for file in files)
    return rows.table(), [file.url for file in files]


def test_image_that_cannot_be_read_among_others_says_why(tmp_path, monkeypatch):
    for name in "abcd":
        (tmp_path / f"{name}.jpg").write_bytes(name.encode())
    table, urls = folder_rows(tmp_path)
    unreadable(monkeypatch, "/b.jpg")
    (tmp_path / "c.jpg").unlink()
    (tmp_path / "d.jpg").unlink()
    (tmp_path / "d.jpg").mkdir()
    found = try_images(table, urls)
    assert found[0] == b"a"
    assert [each.error for each in found[1:]] == ["PermissionError", "FileNotFoundError", "IsADirectoryError"]
    assert "Permission denied" in found[1].message


def test_images_of_which_none_can_be_read_are_a_fault_of_the_storage_unless_other_sources_answer(tmp_path, monkeypatch):
    for name in "abcd":
        (tmp_path / f"{name}.jpg").write_bytes(name.encode())
    table, urls = folder_rows(tmp_path)
    unreadable(monkeypatch, "/a.jpg", "/b.jpg")
    assert [each.error for each in try_images(table.slice(0, 2), urls)] == ["PermissionError"] * 2
    unreadable(monkeypatch, ".jpg")
    with pytest.raises(PermissionError):
        try_images(table.slice(0, 2), urls)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (TimeoutError("timed out"), StorageError),
        (OSError(16, "SlowDown"), OSError),
        (ConnectionResetError(104, "reset"), StorageError),
    ],
)
def test_storage_that_gives_no_answer_costs_no_image(error, raised, tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(name.encode())
    table, urls = folder_rows(tmp_path)
    unreadable(monkeypatch, "b.jpg", error=error)
    with pytest.raises(raised):
        try_images(table, urls)


def test_bad_sector_of_a_tar_costs_the_image_that_lies_there(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", [("1.jpg", b"one"), ("2.jpg", b"two"), ("3.jpg", b"three")])
    table, urls = folder_rows(tmp_path)
    real = LocalFileSystem.cat_file

    def cat_file(fs: LocalFileSystem, path: str, start: int, end: int) -> bytes:
        if start <= table["offset"][1].as_py() < end:
            raise OSError(5, "Input/output error")
        return real(fs, path, start=start, end=end)

    monkeypatch.setattr(LocalFileSystem, "cat_file", cat_file)
    one, two, three = try_images(table, urls)
    assert (one, two.error, three) == (b"one", "OSError", b"three")
