"""Data from strangers: every sample ends in the ledger, as ok or failed with a reason a person understands."""

import io
import math
import os
import pickle
import re
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import zarr
from PIL import Image

from jobs.extract import run
from operators.timm_models import create_model
from tests.conftest import jpeg, write_tar


def photo(width: int = 80, height: int = 60) -> Image.Image:
    return Image.open(io.BytesIO(jpeg(1, width, height)))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_bomb(side: int) -> bytes:
    """A valid PNG header of side x side pixels and a little data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(side))) + chunk(b"IEND", b"")


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photo(), "JPEG", exif=exif)


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("touch unpickled-by-raylift",)


GREY16 = Image.fromarray(np.linspace(0, 65535, 4800).reshape(60, 80).astype(np.uint16))
PALETTE = photo().convert("P")
ANIMATION = [photo(), photo(80, 60).rotate(180)]

# member name, bytes, conversion if it is ok
GOOD: list[tuple[str, bytes, str | None]] = [
    ("plain.jpg", jpeg(2), None),
    ("cmyk.jpg", encoded(photo().convert("CMYK"), "JPEG"), "cmyk->rgb"),
    ("deep.png", encoded(GREY16, "PNG"), "grey16->rgb"),
    ("palette.png", encoded(PALETTE, "PNG", transparency=3), "p+alpha->rgb on white"),
    ("turned.jpg", rotated(), "exif-rotate"),
    ("grey.jpg", encoded(photo().convert("L"), "JPEG"), "grey->rgb"),
    ("moving.gif", encoded(ANIMATION[0], "GIF", save_all=True, append_images=ANIMATION[1:]), "first-frame"),
    ("moving-too.webp", encoded(ANIMATION[0], "WEBP", save_all=True, append_images=ANIMATION[1:]), "first-frame"),
    ("dot.png", encoded(Image.new("RGB", (1, 1), (9, 99, 199)), "PNG"), None),
    ("thread.png", encoded(photo().resize((3, 4000)), "PNG"), None),
    ("../escape.jpg", jpeg(3), None),
    ("/absolute.jpg", jpeg(4), None),
    ("unicode-Привет-日本.jpg", jpeg(5), None),
    ("k" * 300 + ".jpg", jpeg(6), None),
    ("withpickle.jpg", jpeg(7), None),
    ("withpickle.pkl", pickle.dumps(Evil()), None),
]

BAD: list[tuple[str, bytes, str]] = [
    ("empty.jpg", b"", "0 bytes"),
    ("text.jpg", b"hello, I am a text", "not an image"),
    ("program.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "not an image"),
    ("cut.jpg", jpeg(8)[:700], "truncated"),
    ("bomb.png", png_bomb(50_000), "2500000000 pixels are more than max_image_pixels"),
    ("largish.png", png_bomb(10_000), "100000000 pixels are more than max_image_pixels = 89478485"),
    ("noimage.txt", b"only text", "no image member (has .txt)"),
]


@pytest.fixture
def awkward(tmp_path) -> Path:
    folder = tmp_path / "in"
    write_tar(folder / "a.tar", [(name, data) for name, data, _ in [*GOOD, *BAD]])
    # A header in the middle is overwritten: that sample is lost, the later ones are not.
    path = write_tar(folder / "broken-member.tar", [(f"b{i}.jpg", jpeg(20 + i)) for i in range(3)])
    with tarfile.open(path) as tar:
        at = tar.getmembers()[1].offset
    data = bytearray(path.read_bytes())
    data[at : at + 512] = b"\xff" * 512
    path.write_bytes(data)
    # The last image is cut in its middle.
    path = write_tar(folder / "truncated.tar", [(f"t{i}.jpg", jpeg(30 + i)) for i in range(3)])
    with tarfile.open(path) as tar:
        last = tar.getmembers()[2]
    path.write_bytes(path.read_bytes()[: last.offset_data + last.size // 2])
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    model = [
        "--model",
        "test_vit.r160_in1k",
        "--weights",
        "random",
        "--size",
        "64",
        "--precision",
        "fp32",
        "--executor",
        "inline",
    ]
    return ["--data", str(folder), "--out", str(folder.parent / "out.zarr"), *model, *more]


def test_every_sample_is_accounted_for_with_a_reason(awkward, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {path for path in tmp_path.rglob("*") if "out.zarr" not in path.parts}

    code = run(arguments(awkward, "--max-failed-fraction", "0.5"))

    assert code == 0
    ledger = {row["key"]: row for row in pq.read_table(tmp_path / "out.zarr/ledger/samples").to_pylist()}
    for name, _, conversion in GOOD:
        if name.endswith(".pkl"):
            continue
        row = ledger[name.rsplit(".", 1)[0]]
        assert (row["status"], row["message"]) == ("ok", None), name
        assert (row["conversion"] or "").startswith(conversion or ""), name
        assert conversion or not row["conversion"], name
    for name, _, reason in BAD:
        row = ledger[name.rsplit(".", 1)[0]]
        assert row["status"] == "failed", name
        assert reason in row["message"], (name, row["message"])
    assert (ledger["turned"]["width"], ledger["turned"]["height"]) == (60, 80)
    assert [ledger[k]["status"] for k in ("b0", "b2", "t0", "t1", "t2")] == ["ok", "ok", "ok", "ok", "failed"]
    assert "of the image are missing" in ledger["t2"]["message"]
    lost = [row for key, row in ledger.items() if key.startswith("broken-member.tar@")]
    assert [row["stage"] for row in lost] == ["index"]
    assert "no valid tar header" in lost[0]["message"]
    assert len(ledger) == len(GOOD) - 1 + len(BAD) + 3 + 3
    # Nothing outside the output was written, and the pickle's command did not run.
    assert {path for path in tmp_path.rglob("*") if "out.zarr" not in path.parts} == before
    assert not Path("/absolute.jpg").exists()
    assert not list(tmp_path.parent.glob("escape*"))
    features = zarr.open_group(str(tmp_path / "out.zarr"), mode="r")["x1/features"][:]
    failed = np.array([row["status"] == "failed" for row in sorted(ledger.values(), key=lambda row: row["row"])])
    assert (np.isnan(features).all(axis=(1, 2, 3)) == failed).all()


def test_beyond_the_budget_the_exit_code_is_1_and_reasons_are_shown(awkward, capfd):
    assert run(arguments(awkward, "--max-failed-fraction", "0.05")) == 1

    displayed = capfd.readouterr().err
    assert "more than the budget of 5.00%" in displayed
    assert "not an image" in displayed


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_images_for_which_the_model_gives_no_numbers_fail(tmp_path, value):
    write_tar(tmp_path / "in/a.tar", [("1.jpg", jpeg(1)), ("2.jpg", jpeg(2))])
    weights = create_model("test_vit.r160_in1k", (64, 64), None, 0).state_dict()
    weights["norm.bias"][5] = value
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")

    code = run([*arguments(tmp_path / "in", "--max-failed-fraction", "1"), "--weights", str(tmp_path / "w.safetensors")])

    assert code == 0
    messages = pq.read_table(tmp_path / "out.zarr/ledger/samples")["message"].to_pylist()
    assert messages == ["the model gave NaN or infinity in fp32; try --precision fp32"] * 2
    assert np.isnan(zarr.open_group(str(tmp_path / "out.zarr"), mode="r")["x1/features"][:]).all()


# --- settings that can't be meant -------------------------------------------------------------------------------------

PROGRAM = ["--model", "test_vit.r160_in1k", "--weights", "random", "--executor", "inline"]


@pytest.mark.parametrize(
    ("data", "out", "others", "message"),
    [
        (["{photos}", ""], "s.zarr", [], "--data '.*photos.tar' '': one is empty, as of a variable that isn't set"),
        (["{folder}"], "{folder}", [], "--out .*/images is also the input"),
        (["{photos}"], "s.zarr", ["--weights", "random:one"], "--weights random:one: the seed is a whole number, as in random:1"),
        (["{photos}"], "s.zarr", ["--weights", f"random:{2**63}"], f"--weights random:{2**63}: the seed is a whole number"),
        (["{photos}"], "s.zarr", ["--levels", "0x8"], "--levels 0x8: a map has at least one row and one column"),
        (["{photos}"], " ", [], "no output: give --out a path or URL for the Zarr store"),
        (["{photos}"], "//", [], "--out // is the disk's root, as with a variable that isn't set"),
        (["{store}"], "s.zarr", [], "store.zarr is a Zarr store, not images; name the tars or folder that it was made of"),
    ],
)
def test_settings_that_cant_be_meant_end_in_one_sentence(data, out, others, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "photos.tar", [("a.jpg", jpeg(1, 64, 48))])
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(jpeg(1, 64, 48))
    zarr.create_group(tmp_path / "store.zarr")
    places = {"photos": tmp_path / "photos.tar", "folder": tmp_path / "images", "store": tmp_path / "store.zarr"}

    code = run(["--data", *(each.format(**places) for each in data), "--out", out.format(**places), *PROGRAM, *others])

    said = capsys.readouterr()
    assert code == 2
    assert re.search(message, said.out + said.err)


def test_members_to_carry_that_no_sample_has_are_said(tmp_path, caplog):
    write_tar(tmp_path / "photos.tar", [("a.jpg", jpeg(1, 64, 48)), ("a.txt", b"a")])

    code = run(["--data", str(tmp_path / "photos.tar"), "--out", str(tmp_path / "s.zarr"), "--carry", "txt", "cls", *PROGRAM])

    assert code == 0
    assert "--carry cls: not one of the 1 samples has a member .cls" in caplog.text
    assert "--carry txt" not in caplog.text
