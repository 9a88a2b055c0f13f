"""Made the folders in written.tar.gz by the command lines of jobs/; tests/test_edition1.py reads and continues them.

    PYTHONPATH=<checkout of the code that is to write them> python tests/data/edition1/make.py OUT

Those in the archive were written by commit ffdbfeb, the last one before the packages were rearranged, in
/tmp/raylift-edition1. That they are old is their use: never write them anew. README.md lists what there is.

Every command runs in OUT with relative paths, in a fork of this process. Half-finished folders come of commands that ended by
`os._exit` as they were about to give a certain file its name. All files get one modification time, since that of inputs is
part of what stores say of them. `commands.json`, written here, is what was run; OUT.tar.gz is all of it.
"""

import gzip
import importlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "GIT_DIR": os.devnull}

import numpy as np
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

MODIFIED_S = 1_700_000_000
PROGRAMS = ("extract", "train", "evaluate", "grid")

FEATURES = "--model test_vit.r160_in1k --weights backbone --precision fp32 --executor inline --device cpu"
TARS = "--data s-{0..1}.tar"
VOC_IMAGES = "voc/VOCdevkit/VOC2012/JPEGImages"

STORE = (
    f"{FEATURES} {TARS} --size 32 --levels x1 x2=bilinear@int8 pooled --carry cls --block-rows 2 --actor-cpus 1 "
    "--max-failed-fraction 0.2"
)
STEPS = "--log-every 1 --checkpoint-every 2 --validate-every 4"
IMAGES = f"{FEATURES} {TARS} --val-rows 2 --batch 2 --epochs 2 --max-failed-fraction 0.5 {STEPS}"
LIFT = f"lift --wide --size 64 --schedule cosine --warmup-steps 2 {IMAGES}"
VIT_UP = (
    "vit-up --size 64 --teacher-sizes 16 32 64 --hidden-size 32 --query-size 64 --hidden-states 0 2 --rank 2 "
    f"--net-precision fp32 --warmup-steps 2 {IMAGES}"
)
READOUT = f"--data voc --placement squash --side 64 --size {{}} --batch 3 --epochs 3 --lr 1e-2 {FEATURES} {STEPS}"
PROBE = f"probe --data voc --readouts deap linear {FEATURES} --pictures 0"
SIMILARITY = f"similarity --data {VOC_IMAGES} --stores images.zarr --limit 4 --executor inline --device cpu --pictures 0"
CORRESPONDENCE = (
    f"correspondence --data spair --sizes 32 64 --levels x1 x2=lift:lift --facet key --pairs-per-category 6 {FEATURES} "
    "--pictures 0"
)
GRID = (
    "--backbones test_vit.r160_in1k@64 --tasks voc --methods linear --seeds 0 1 --data voc=voc --weights backbone "
    "--max-steps 4 --cell.side 64 --cell.batch 3 --cell.lr 1e-2 --cell.precision fp32 --cell.checkpoint-every 2 "
    "--cell.validate-every 4 --cell.log-every 1 --speed-reference test_vit.r160_in1k --speed-reference-size 32 "
    "--speed-batch 1 --speed-batches 2 --executor inline --device cpu"
)


@dataclass(frozen=True)
class Command:
    """A command line, and the file before which it ended, as a pattern of its path; empty: it went to its end."""

    program: str
    line: str
    out: str
    ended_before: str = ""

    @property
    def argv(self) -> list[str]:
        return [*shlex.split(self.line), "--out", self.out]


COMMANDS = (
    Command("extract", STORE, "finished.zarr"),
    Command("extract", STORE, "half.zarr", r"half\.zarr/ledger/commits/00000003\.parquet$"),
    Command("train", LIFT, "lift"),
    Command("train", LIFT, "lift-half", r"steps/00000004/model\.safetensors$"),
    Command("train", f"jbu --radius 1 --size 64 {IMAGES}", "jbu"),
    Command("train", VIT_UP, "vit-up"),
    Command("train", VIT_UP, "vit-up-half", r"steps/00000004/model\.safetensors$"),
    Command(
        "extract",
        f"{FEATURES} --data {VOC_IMAGES} --size 32 --geometry squash --facet key --block-rows 8 "
        "--actor-cpus 1 --levels x1 x2=lift:lift 8x8=jbu:jbu 4x8=bilinear pooled",
        "images.zarr",
    ),
    Command("train", f"deap --dim 8 --width 8 {READOUT.format(64)}", "deap"),
    Command("train", f"deap --dim 8 --width 8 {READOUT.format(64)}", "deap-half", r"steps/00000004/model\.safetensors$"),
    Command("train", f"linear {READOUT.format(64)}", "linear"),
    Command("train", f"linear {READOUT.format(32)} --store images.zarr --level x2", "linear-stored"),
    Command(
        "train",
        f"linear {READOUT.format(32)} --store images.zarr --level x2",
        "linear-stored-half",
        r"steps/00000004/model\.safetensors$",
    ),
    Command("evaluate", CORRESPONDENCE, "correspondence"),
    Command("evaluate", CORRESPONDENCE, "correspondence-half", r"parts/64-00000\.jsonl$"),
    Command("evaluate", SIMILARITY, "similarity"),
    Command("evaluate", SIMILARITY, "similarity-half", r"parts/00002\.jsonl$"),
    Command("evaluate", PROBE, "probe"),
    Command("evaluate", PROBE, "probe-half", r"parts/0000000\.jsonl$"),
    Command("grid", GRID, "grid"),
    Command("grid", GRID, "grid-half", r"grid-half/test_vit.r160_in1k-64-voc-linear-1/steps/00000004/model"),
)


# --- inputs -----------------------------------------------------------------------------------------------------------


def jpeg(seed: int, width: int, height: int) -> bytes:
    """A smooth random picture."""
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (5, 6, 3), np.uint8))
    out = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=85)
    return out.getvalue()


def write_inputs(root: Path) -> None:
    """A backbone of 8 channels, two tars of nine samples (one isn't an image), and small data sets."""
    torch.manual_seed(0)
    network = {"embed_dim": 8, "depth": 2, "num_heads": 1, "patch_size": 8}
    model = timm.create_model("test_vit", num_classes=0, **network)
    save_for_hf(model, str(root / "backbone"), safe_serialization=True, model_args=network)
    (root / "backbone/pytorch_model.bin").unlink(missing_ok=True)
    for number, rows in enumerate((range(5), range(5, 9))):
        with tarfile.open(root / f"s-{number}.tar", "w") as tar:
            for row in rows:
                picture = b"not an image" if row == 5 else jpeg(row, 48, 40)
                for name, data in ((f"{row:05d}.jpg", picture), (f"{row:05d}.cls", str(row % 3).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    importlib.import_module("pipelines.evaluation.demo").write_demo(str(root / "sets"))
    for name, there in (("VOC2012", "voc"), ("SPair-71k", "spair")):
        (root / "sets" / name).rename(root / there)
    shutil.rmtree(root / "sets")
    for path in root.rglob("*"):
        os.utime(path, (MODIFIED_S, MODIFIED_S))


# --- commands ---------------------------------------------------------------------------------------------------------


def run(command: Command) -> None:
    """In a fork. Raises `RuntimeError` where it ends otherwise than it should."""
    pid = os.fork()
    if not pid:
        if command.ended_before:
            sys.addaudithook(ender(command.ended_before))
        os._exit(importlib.import_module(f"jobs.{command.program}").run(command.argv))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code != (9 if command.ended_before else 0):
        raise RuntimeError(f"{command} ended with {code}")


def ender(pattern: str):
    """An audit hook that ends the process as a file is about to get its name."""

    def hook(event: str, arguments: tuple) -> None:
        if event in ("os.rename", "os.link") and re.search(pattern, os.fspath(arguments[1])):
            os._exit(9)

    return hook


def slim(root: Path) -> None:
    """Without pictures and event files, which nothing reads, and without this machine's name."""
    for pattern in ("*/pictures", "*/tensorboard", "*/*/pictures", "*/*/tensorboard"):
        for folder in root.glob(pattern):
            shutil.rmtree(folder)
    for picture in root.glob("grid*/*.png"):
        picture.unlink()
    for path in root.glob("*.zarr/runs/*/run.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "host": "somewhere"}, indent=1))


def pack(root: Path, archive: Path) -> None:
    """All files, with one modification time and nobody's name."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        for path in sorted(root.rglob("*")):
            info = tar.gettarinfo(path, str(path.relative_to(root)))
            info.uid = info.gid = 0
            info.uname = info.gname = ""
            info.mtime = MODIFIED_S
            with path.open("rb") if path.is_file() else io.BytesIO() as data:
                tar.addfile(info, data)
    archive.write_bytes(gzip.compress(plain.getvalue(), mtime=0))


def main() -> None:
    root = Path(sys.argv[1]).resolve()
    root.mkdir(parents=True)
    os.chdir(root)
    torch.set_num_threads(1)
    for name in PROGRAMS:
        importlib.import_module(f"jobs.{name}")
    write_inputs(Path())
    for command in COMMANDS:
        run(command)
    slim(Path())
    Path("commands.json").write_text(json.dumps([asdict(command) for command in COMMANDS], indent=1) + "\n")
    pack(root, root.with_name(f"{root.name}.tar.gz"))


if __name__ == "__main__":
    main()
