"""Tars to their last byte: what is no end doesn't end the scan, what lies behind the end is named, links lead to data.

Expected members are those of `tarfile` with ignore_zeros, of GNU tar, and of what the archives were made from.
"""

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.inputs import expand_inputs
from storage.tar_members import Gap, TarWalk
from storage.tars import MemberRules, SourceScan, scan_source
from tests.conftest import write_tar


def scan(path: Path, rules: MemberRules | None = None) -> SourceScan:
    return scan_source(expand_inputs([str(path)])[0], rules or MemberRules())


def rows(scanned: SourceScan) -> list[tuple[str, str | None]]:
    return [(row["key"], row["problem"]) for row in scanned.rows.to_pylist()]


def images(path: Path) -> dict[str, bytes]:
    """Image bytes by key, of the rows that have an image."""
    data = path.read_bytes()
    found = scan(path).rows.to_pylist()
    return {r["key"]: data[r["offset"] : r["offset"] + r["size"]] for r in found if r["problem"] is None}


def loud(scanned: SourceScan) -> dict[str, int]:
    """Counts of what deserves a warning."""
    return {reason: each.count for reason, each in scanned.left_out.items() if not each.is_usual}


def archive(keys: str, size: int = 700) -> bytes:
    """A tar of one image for each letter, by `tarfile`: 512 bytes of header and `size`, padded, for each."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for key in keys:
            info = tarfile.TarInfo(f"{key}.jpg")
            info.size = size
            tar.addfile(info, io.BytesIO(key.encode() * size))
    return out.getvalue()


@pytest.fixture
def save(tmp_path):
    def write(data: bytes) -> Path:
        (tmp_path / "x.tar").write_bytes(data)
        return tmp_path / "x.tar"

    return write


A, B = archive("abcd"), archive("efgh")
UNEXPLAINED = "stretch of zeros that no end of an archive explains (a hole, or an unfinished download)"
BEHIND = "stretch of bytes behind a tar's end"


# --- what is no end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        A + B,
        A + B + archive("ijkl", 5000),
        A[:6144] + B,
        A[: 6144 + 512] + B,
        A[: 6144 + 1024] + B,
        A[:1536] + bytes(512) + A[1536:],
        A[:3072] + bytes(1024) + A[3072:],
        A[:3072] + bytes(40 * 512) + A[3072:],
        bytes(512) + A,
    ],
    ids=["two", "three", "no end", "half an end", "no padding", "one block", "end marker", "long zeros", "zeros first"],
)
def test_zeros_and_ends_between_members_lose_none(save, data):
    path = save(data)
    with tarfile.open(path, ignore_zeros=True) as tar:
        expected = {member.name[0]: tar.extractfile(member).read() for member in tar}

    assert images(path) == expected
    assert scan(path).problems == []
    assert all(problem is None for _, problem in rows(scan(path)))


def test_joined_archives_are_no_reason_for_a_warning(save):
    scanned = scan(save(A + B + archive("ijkl")))

    assert loud(scanned) == {}
    (joined,) = scanned.left_out.values()
    assert (joined.count, joined.examples) == (2, ("x.tar: bytes 6144 to 10240", "x.tar: bytes 16384 to 20480"))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    parts=st.lists(
        st.tuples(st.text("abcdefghij", min_size=1, max_size=5), st.sampled_from([0, 1, 511, 512, 700]), st.booleans()),
        min_size=1,
        max_size=5,
    ),
    zeros=st.lists(st.integers(0, 45), min_size=1, max_size=9),
)
def test_no_member_is_lost_to_zeros_or_joins(save, parts, zeros):
    """Archives with their ends kept or cut, joined, with any number of zero blocks before each member."""
    data, n, expected = b"", 0, []
    for part, (letters, size, has_end) in enumerate(parts):
        length = 512 + -(-size // 512) * 512
        made = archive(letters, size)
        for i in range(len(letters)):
            member = made[i * length : (i + 1) * length]
            data += bytes(512 * zeros[n % len(zeros)]) + member
            expected.append((letters[i], size))
            n += 1
        data += made[len(letters) * length :] if has_end or part == len(parts) - 1 else b""
    path = save(data)

    found = scan(path).rows.to_pylist()

    with tarfile.open(path, ignore_zeros=True) as tar:
        members = [(member.name.removesuffix(".jpg"), member.offset_data, member.size) for member in tar]
    assert [(key, size) for key, _, size in members] == expected
    # Neighbours of one key are one sample, and there the last one counts.
    last = [each for each, after in zip(members, [*members[1:], None], strict=True) if not after or after[0] != each[0]]
    assert [(r["key"], r["offset"], r["size"]) for r in found] == last


@pytest.mark.parametrize("wiped", [512, 1024])
def test_zeroed_header_is_a_row_that_says_so_and_the_next_samples_are_found(save, wiped):
    scanned = scan(save(A[:1536] + bytes(wiped) + A[1536 + wiped :]))

    assert rows(scanned) == [
        ("a", None),
        ("x.tar@1536-3072", "damaged tar: bytes 1536 to 3072 hold no valid tar header"),
        ("c", None),
        ("d", None),
    ]


def test_zeroed_header_of_the_last_image_is_not_the_end(save):
    scanned = scan(save(A[:4608] + bytes(512) + A[5120:]))

    assert [key for key, _ in rows(scanned)] == ["a", "b", "c", "x.tar@4608-6144"]
    assert scanned.problems == []


def test_zeroed_first_header_is_a_row(save):
    assert [key for key, _ in rows(scan(save(bytes(512) + A[512:])))] == ["x.tar@0-1536", "b", "c", "d"]


def test_hole_over_whole_members_is_named(save):
    scanned = scan(save(A[:1536] + bytes(1536) + A[3072:]))

    assert rows(scanned) == [("a", None), ("c", None), ("d", None)]
    assert scanned.left_out[UNEXPLAINED].examples == ("x.tar: bytes 1536 to 3072",)


@pytest.mark.parametrize("kept", [24_576, 24_576 + 700, 24_576 + 3000], ids=["between", "in a header", "in an image"])
def test_preallocated_download_is_named_with_its_zeros(save, kept):
    whole = archive("abcdefghijklmnopqrst", 5632)  # 6144 bytes a member

    scanned = scan(save(whole[:kept] + bytes(len(whole) - kept)))

    at_least = ["a", "b", "c", "d"]
    assert [key for key, _ in rows(scanned)][:4] == at_least
    assert all(key in "abcde" for key, _ in rows(scanned))
    first = 24_576 if kept == 24_576 else 30_720
    assert scanned.left_out[UNEXPLAINED].examples == (f"x.tar: bytes {first} to {len(whole)}",)


def test_long_zeros_are_read_in_large_pieces(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(A)
    os.truncate(path, 64 * 2**20)
    reads = []

    class Counting(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            reads.append(size)
            return super().read(size)

    with Counting(path) as stream:
        members = list(TarWalk(stream, expand_inputs([str(path)])[0]))

    assert len(members) == 5
    assert len(reads) < 100  # not one for each of 131,072 blocks


def test_damage_in_many_places_is_not_read_over_and_over(save, tmp_path):
    """Each search begins small: a thousand broken headers in 1.5 MB don't cost a mebibyte each."""
    data = bytearray(b"".join(archive(key)[:1536] for key in "abcdefghij" * 100) + bytes(1024))
    for at in range(1536, len(data) - 1536, 2 * 1536):
        data[at + 148 : at + 156] = b"\xff" * 8
    path = save(bytes(data))
    read = 0

    class Counting(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            nonlocal read
            out = super().read(size)
            read += len(out)
            return out

    with Counting(path) as stream:
        gaps = [part for part in TarWalk(stream, expand_inputs([str(path)])[0]) if isinstance(part, Gap)]

    assert len(gaps) == 500
    assert read < 4 * len(data)


# --- the end, and what is behind it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 8, 20, 64, 2048])
def test_padding_of_gnu_tar_is_no_hole(tmp_path, factor):
    (tmp_path / "a.jpg").write_bytes(b"A" * 700)
    for name in ("1.tar", "2.tar"):
        subprocess.run(["tar", "-b", str(factor), "-cf", name, "a.jpg"], cwd=tmp_path, check=True)

    assert scan(tmp_path / "1.tar").left_out == {}
    assert images(tmp_path / "1.tar") == {"a": b"A" * 700}


@pytest.mark.parametrize("tail", [b"junk", b"junk" * 500, b"\xff" * 512, b"-----BEGIN PGP SIGNATURE-----\n" * 9])
def test_bytes_behind_the_end_are_named_and_refuse_nothing(save, tail):
    scanned = scan(save(A + tail))

    assert rows(scanned) == [("a", None), ("b", None), ("c", None), ("d", None)]
    assert scanned.problems == []
    assert scanned.left_out[BEHIND].examples == (f"x.tar: bytes 10240 to {10240 + len(tail)}",)


@pytest.mark.parametrize("between", [b"junk" * 128, b"x" * 1001], ids=["whole block", "not a whole block"])
def test_archive_behind_other_bytes_is_found(save, between):
    path = save(A + between + B)

    assert images(path) == {key: key.encode() * 700 for key in "abcdefgh"}
    assert loud(scan(path)) == {BEHIND: 1}


def test_bytes_lost_in_an_image_cost_that_image_and_the_next_alone(save):
    """Everything behind is then at another place within its block."""
    path = save(A[:600] + A[603:])

    found = rows(scan(path))

    assert [key for key, _ in found] == ["a", "x.tar@1536-3069", "c", "d"]
    assert images(path)["d"] == b"d" * 700


def test_one_block_of_zeros_ends_a_tar(save):
    scanned = scan(save(A[: 6144 + 512]))

    assert (scanned.problems, scanned.left_out) == ([], {})


@pytest.mark.parametrize("size", [512, 1024, 10_240, 2**20, 2**20 + 512])
def test_tar_of_zeros_alone_is_named(save, size):
    """Among others it would be a shard without images, and without a word."""
    scanned = scan(save(bytes(size)))

    assert rows(scanned) == []
    assert loud(scanned) == {"tar of zeros alone (an empty one, or a download that never began)": 1}


def test_end_marker_cut_short_is_said(save):
    scanned = scan(save(A[: 6144 + 100]))

    assert [key for key, _ in rows(scanned)] == ["a", "b", "c", "d"]
    assert scanned.problems == ["no end-of-archive marker: the tar may have been cut short"]


def test_tar_inside_a_tar_is_not_entered(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("1.jpg", b"x"), ("1.tar", A), ("2.jpg", b"y")])

    assert images(path) == {"1": b"x", "2": b"y"}


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["gnu", "pax", "ustar", "v7"])
@pytest.mark.parametrize("order", [("a", "links"), ("links", "a")], ids=["before", "behind"])
def test_links_of_gnu_tar_are_samples_with_the_data_that_tar_extracts(tmp_path, dialect, order):
    (tmp_path / "in/a/deep").mkdir(parents=True)
    (tmp_path / "in/links").mkdir()
    for name in ("a/one", "a/deep/two"):
        (tmp_path / f"in/{name}.jpg").write_bytes(name.encode() * 100)
    (tmp_path / "in/links/hard.jpg").hardlink_to(tmp_path / "in/a/one.jpg")
    (tmp_path / "in/links/soft.jpg").symlink_to("../a/deep/two.jpg")
    (tmp_path / "in/links/chain.png").symlink_to("./soft.jpg")
    (tmp_path / "in/a/deep/up.jpg").symlink_to("../../links/hard.jpg")
    command = ["tar", f"--format={dialect}", "-cf", "../x.tar", *(f"./{name}" for name in order)]
    subprocess.run(command, cwd=tmp_path / "in", check=True)
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-xf", "../x.tar"], cwd=tmp_path / "out", check=True)
    extracted = {
        f"./{path.relative_to(tmp_path / 'out').with_suffix('')}": path.read_bytes() for path in (tmp_path / "out").rglob("*.*")
    }

    assert images(tmp_path / "x.tar") == extracted
    assert len(extracted) == 6
    assert loud(scan(tmp_path / "x.tar")) == {}


def linked(path: Path, *links: tuple[str, bytes, str], data: tuple[str, ...] = ("a.jpg",)) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in data:
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
        for name, kind, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    return path


@pytest.mark.parametrize(
    ("kind", "target", "reason"),
    [
        (tarfile.SYMTYPE, "/etc/passwd", "symlink to no member of this tar"),
        (tarfile.SYMTYPE, "../../../../etc/passwd", "symlink to no member of this tar"),
        (tarfile.SYMTYPE, "b.jpg", "symlink to no member of this tar"),
        (tarfile.LNKTYPE, "/etc/passwd", "hard link to no member of this tar"),
        (tarfile.LNKTYPE, "nothing.jpg", "hard link to no member of this tar"),
        (tarfile.LNKTYPE, "", "hard link to no member of this tar"),
    ],
)
def test_link_that_leads_out_of_the_tar_is_counted_and_named(tmp_path, kind, target, reason):
    path = linked(tmp_path / "x.tar", ("b.jpg", kind, target))

    assert images(path) == {"a": b"abc"}
    assert loud(scan(path)) == {reason: 1}
    assert scan(path).left_out[reason].examples == (f"x.tar: b.jpg -> {target}",)


def test_links_in_a_circle_end(tmp_path):
    path = linked(tmp_path / "x.tar", ("b.jpg", tarfile.SYMTYPE, "c.jpg"), ("c.jpg", tarfile.SYMTYPE, "b.jpg"))

    assert images(path) == {"a": b"abc"}
    assert loud(scan(path)) == {"symlink to no member of this tar": 2}


def test_sample_whose_image_is_a_broken_link_fails_with_the_reason(tmp_path):
    links = [("b.jpg", tarfile.SYMTYPE, "/data/b.jpg")]
    path = linked(tmp_path / "x.tar", *links, data=("a.jpg", "b.png", "b.cls"))

    assert rows(scan(path)) == [
        ("a", None),
        ("b", "no image: .jpg is a symlink to '/data/b.jpg', which is no member of this tar"),
    ]


def test_carried_label_may_be_a_link(tmp_path):
    path = linked(tmp_path / "x.tar", ("b.cls", tarfile.LNKTYPE, "a.cls"), data=("a.jpg", "a.cls", "b.jpg"))

    found = scan(path, MemberRules(carry=("cls",))).rows.to_pylist()

    assert [(row["key"], row["cls"], row["problem"]) for row in found] == [("a", "abc", None), ("b", "abc", None)]


def test_hard_link_with_data_of_its_own_does_not_derail_the_scan(tmp_path):
    """As pax and cpio may write them."""
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"A" * 700), ("b.jpg", b"B" * 700), ("c.jpg", b"C" * 700)])
    data = bytearray(path.read_bytes())
    header = data[1536:2048]
    header[156:157] = tarfile.LNKTYPE
    header[157:162] = b"a.jpg"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[1536:2048] = header
    path.write_bytes(data)

    assert images(path) == {"a": b"A" * 700, "b": b"A" * 700, "c": b"C" * 700}
    assert rows(scan(path))[1:] == [("b", None), ("c", None)]


# --- members of other kinds -------------------------------------------------------------------------------------------


def test_members_that_are_no_sample_are_counted_by_reason(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in [
            ("d", tarfile.DIRTYPE),
            ("fifo.jpg", tarfile.FIFOTYPE),
            ("null.jpg", tarfile.CHRTYPE),
            ("README", tarfile.REGTYPE),
            ("d/._1.jpg", tarfile.REGTYPE),
            ("__MACOSX/d/._1.jpg", tarfile.REGTYPE),
            ("__meta__", tarfile.REGTYPE),
            ("d/1.jpg", tarfile.REGTYPE),
            ("d/1.json", tarfile.REGTYPE),
            ("d/1.mask.png", tarfile.REGTYPE),
            ("d/1.png", tarfile.REGTYPE),
            ("d/1.cls", tarfile.REGTYPE),
            ("d/2.jpg", tarfile.CONTTYPE),
            ("d/3.jpg", b"Q"),
        ]:
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)

    scanned = scan(tmp_path / "x.tar", MemberRules(carry=("cls",)))

    assert rows(scanned) == [("d/1", None), ("d/2", None), ("d/3", None)]
    assert loud(scanned) == {"FIFO in a tar": 1, "device in a tar": 1, "member without an extension": 1}
    assert {reason: each.count for reason, each in scanned.left_out.items() if each.is_usual} == {
        "folder in a tar": 1,
        "side file of macOS": 2,
        "member named __...__, which is no sample": 1,
        "other member of a sample (.json)": 1,
        "other member of a sample (.png)": 1,
        "further image of a sample (.png)": 1,
    }


def test_images_of_all_formats_are_members_and_photographs_go_before_masks(tmp_path):
    members = [("1.pgm", b"mask"), ("1.jpg", b"photo"), ("2.avif", b"avif"), ("3.jp2", b"jp2"), ("4.JFIF", b"jfif")]
    path = write_tar(tmp_path / "x.tar", members)

    assert images(path) == {"1": b"photo", "2": b"avif", "3": b"jp2", "4": b"jfif"}
    assert "further image of a sample (.pgm)" in scan(path).left_out


def test_names_in_incremental_dumps_are_those_that_tar_lists(tmp_path):
    """Their headers hold times where others have the first part of a long name."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.jpg").write_bytes(b"A" * 700)
    (tmp_path / "d/b.jpg").hardlink_to(tmp_path / "d/a.jpg")
    subprocess.run(["tar", "-g", "snapshot", "-cf", "x.tar", "d"], cwd=tmp_path, check=True)
    listed = subprocess.run(["tar", "-tf", "x.tar"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    assert sorted(f"{key}.jpg" for key in images(tmp_path / "x.tar")) == sorted(listed.split()[1:])
    assert set(images(tmp_path / "x.tar").values()) == {b"A" * 700}
    assert loud(scan(tmp_path / "x.tar")) == {"dump folder of GNU tar": 1}


_KINDS = [tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE]
_NAMES = [f"{folder}{name}" for folder in ("", "d/", "__m__/") for name in ("a.jpg", "a.cls", "a.x.png", "b", "._c.png")]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    members=st.lists(
        st.tuples(st.sampled_from(_NAMES), st.sampled_from(_KINDS), st.sampled_from(_NAMES)), unique_by=lambda m: m[0]
    )
)
def test_every_member_is_the_image_of_a_row_or_is_counted(tmp_path, members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind, target in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, 5 * (kind in tarfile.REGULAR_TYPES), target
            tar.addfile(info, io.BytesIO(b"12345"))
    (tmp_path / "x.tar").write_bytes(out.getvalue() if members else A)
    with tarfile.open(tmp_path / "x.tar") as tar:
        listed = len(tar.getnames())

    scanned = scan(tmp_path / "x.tar")

    with_image = sum(row["member"] != "" for row in scanned.rows.to_pylist())
    assert with_image + sum(each.count for each in scanned.left_out.values()) == listed


@pytest.mark.parametrize("dialect", ["oldgnu", "pax"])
def test_sparse_members_are_one_row_that_says_so(tmp_path, dialect):
    (tmp_path / "a.jpg").write_bytes(b"A" * 700)
    with (tmp_path / "b.bmp").open("wb") as file:
        for n in range(40):
            file.seek(n * 2**17)
            file.write(b"B" * 512)
    (tmp_path / "c.jpg").write_bytes(b"C" * 700)
    command = ["tar", f"--format={dialect}", "--sparse", "-cf", "x.tar", "a.jpg", "b.bmp", "c.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True)

    found = rows(scan(tmp_path / "x.tar"))

    assert [key for key, problem in found if problem is None] == ["a", "c"]
    assert len(found) == 3
    assert "b.bmp is stored sparse" in found[1][1]
