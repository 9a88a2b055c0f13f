"""Tars made to break who reads them: rows or warnings, in a time that grows with the file's size, and never a refused run.

What once took a time that grew with a square is tried at sizes at which that would be hours.
"""

import tarfile
from pathlib import Path

import pytest

from storage.inputs import expand_inputs
from storage.tars import MemberRules, SourceScan, scan_source

END = bytes(2 * tarfile.BLOCKSIZE)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, target: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, target
    return info.tobuf(tarfile.GNU_FORMAT)


def member(name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    return header(name, len(data), kind) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def pax(payload: bytes) -> bytes:
    return member("PaxHeader", payload, tarfile.XHDTYPE)


def record(name: str, value: str) -> bytes:
    size = len(name) + len(value) + 3
    length = next(n for n in range(size, size + 20) if n == size + len(str(n)))
    return f"{length} {name}={value}\n".encode()


FIRST, LAST = member("first.jpg", b"one"), member("last.jpg", b"two")
ODD = member("odd.jpg", b"x")


def scan(path: Path, *parts: bytes) -> SourceScan:
    path.write_bytes(b"".join(parts) + END)
    return scan_source(expand_inputs([str(path)])[0], MemberRules())


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (pax(b"9" * 6000 + b" path=x.jpg\n") + ODD, "a member whose pax header is damaged"),
        (pax(record("size", "9" * 6000)) + ODD, "hold no valid tar header"),
        (pax(b"7 ab" * 2**20) + ODD, "a member whose pax header is damaged"),
        (pax(record("path", "n" * 2**21 + ".jpg")) + ODD, "a member whose name has more than 1048576 bytes"),
        (member("L", b"n" * 2**21 + b".jpg\0", tarfile.GNUTYPE_LONGNAME) + ODD, "a member whose name has 2097157 bytes"),
        (header("PaxHeader", 2**26 + 1, tarfile.XHDTYPE) + bytes(2**26 + 512) + ODD, "whose pax header has 67108865 bytes"),
    ],
    ids=["digits", "size-digits", "no-records", "pax-name", "gnu-name", "pax-bytes"],
)
def test_member_whose_header_makes_no_sense_is_a_row_and_its_neighbours_are_good(between, why, tmp_path):
    rows = scan(tmp_path / "a.tar", FIRST, between, LAST).rows.to_pylist()

    assert [row["key"] for row in rows if row["problem"] is None] == ["first", "last"]
    assert len(rows) == 3
    assert why in rows[1]["problem"]


@pytest.mark.parametrize(
    "huge", [header("odd.jpg", 10**18) + bytes(512), pax(record("size", str(10**18))) + ODD], ids=["ustar", "pax"]
)
def test_size_beyond_all_disks_is_a_tar_that_was_cut_short(huge, tmp_path):
    scanned = scan(tmp_path / "a.tar", FIRST, huge)

    first, odd = scanned.rows.to_pylist()
    assert (first["problem"], odd["key"], odd["size"]) == (None, "odd", 10**18)
    assert "the tar is cut short" in odd["problem"]
    assert scanned.problems


def test_pax_header_of_many_megabytes_is_read_to_its_end(tmp_path):
    attributes = record("SCHILY.xattr.user.x", "v" * 2**22) + record("LIBARCHIVE.x", "") * 2**17

    rows = scan(tmp_path / "a.tar", pax(attributes + record("path", "named.jpg")), ODD).rows.to_pylist()

    assert [(row["key"], row["problem"]) for row in rows] == [("named", None)]


@pytest.mark.parametrize("name", ["n/" * 2**18, "n/" * 2**18 + ".jpg", "n." * 2**18 + "/x.jpg", "." * 2**19, "\n/" * 2**18 + "x"])
def test_name_of_many_folders_costs_no_more_than_its_length(name, tmp_path):
    scanned = scan(tmp_path / "a.tar", member("L", name.encode() + b"\0", tarfile.GNUTYPE_LONGNAME), ODD, LAST)

    assert scanned.rows["key"].to_pylist()[-1] == "last"
    assert all(len(example) < 1000 for each in scanned.left_out.values() for example in each.examples)


def test_damaged_first_header_costs_the_first_member(tmp_path):
    damaged = bytearray(member("odd.jpg", b"x" * 5000))
    damaged[3] ^= 0xFF

    rows = scan(tmp_path / "a.tar", bytes(damaged), FIRST, LAST).rows.to_pylist()

    assert [(row["key"], row["problem"]) for row in rows[1:]] == [("first", None), ("last", None)]
    assert rows[0]["key"] == f"a.tar@0-{len(damaged)}"


def test_magic_words_without_headers_are_damage(tmp_path):
    rows = scan(tmp_path / "a.tar", FIRST, b"ustar" * 2**20 + bytes(-5 * 2**20 % 512), LAST).rows.to_pylist()

    assert [row["key"] for row in rows if row["problem"] is None] == ["first", "last"]


def test_many_links_to_members_of_one_name_are_followed_to_the_one_before(tmp_path):
    n = 3_000
    parts = [member("t.jpg", b"x") + header(f"{i}.jpg", 0, tarfile.LNKTYPE, "t.jpg") for i in range(n)]

    rows = scan(tmp_path / "a.tar", *parts).rows

    assert rows["offset"].to_pylist() == [offset for i in range(n) for offset in (1536 * i + 512,) * 2]


def test_links_that_go_on_and_on_lead_nowhere(tmp_path):
    n = 3_000
    links = [header(f"{i}.jpg", 0, tarfile.SYMTYPE, f"{i + 1}.jpg") for i in range(n)]

    scanned = scan(tmp_path / "a.tar", *links, member(f"{n}.jpg", b"x"))

    assert scanned.rows["key"].to_pylist() == [str(i) for i in range(n - 64, n + 1)]
    assert scanned.left_out["symlink to no member of this tar"].count == n - 64


def test_sparse_members_of_bsdtar_keep_their_key_and_say_what_they_are(tmp_path):
    said = pax(record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0") + record("GNU.sparse.name", "d/b.jpg"))
    rows = scan(tmp_path / "a.tar", FIRST, said, member("GNUSparseFile.0/b.jpg", b"1\n0\n1\n"), LAST).rows.to_pylist()

    assert [row["key"] for row in rows] == ["first", "d/b", "last"]
    assert rows[1]["problem"].startswith("no image: d/b.jpg is stored sparse; repack the tar")
    assert (rows[1]["member"], rows[1]["size"]) == ("", 0)
    assert [rows[0]["problem"], rows[2]["problem"]] == [None, None]


@pytest.mark.parametrize("magic", [b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0", b"BZh9"])
def test_compressed_tar_under_a_tars_name_says_what_to_do(magic, tmp_path):
    with pytest.raises(ValueError, match=r"is \w+-compressed: .* Decompress it first"):
        scan(tmp_path / "a.tar", magic + bytes(range(256)) * 4)
