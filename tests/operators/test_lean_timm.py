"""timm comes without torch's compiler, and whoever wants the compiler has it all the same: each in a process of its own."""

import json
import subprocess
import sys

import pytest

THERE = "[name for name in ({}) if name in sys.modules]"

SERVERS = THERE.format("'aiohttp', 'botocore', 'pandas', 'zarr'")
COMPILER = THERE.format("'torch._dynamo', 'torch._inductor', 'sympy'")

PROGRAMS = {
    "extraction": f"""
from pipelines.actors import _Actor
import pyarrow
_Actor().load("pipelines.extraction.worker"); pyarrow.array([1]); print({SERVERS})
import jobs.extract, pipelines.extraction.run
from pipelines.features.descriptions import _other_than_default
print(_other_than_default("test_vit", {{"global_pool": "avg", "depth": 2}})["depth"]); print({COMPILER})
""",
    "compiler": """
from operators.lean_timm import timm
import torchvision.ops
print('torch._dynamo' in sys.modules, sys.modules['torchvision.ops.roi_align'].is_compile_supported('cpu'))
print(torch.compile(torch.neg, backend='eager')(torch.ones(1)).item())
print(torch._dynamo.utils.is_compile_supported('cpu'), timm.layers._fx.has_fx_feature_extraction)
""",
    "beyond": """
from operators import lean_timm
with lean_timm._without_compiler():
    from torch._dynamo.utils import counters
print(type(counters).__name__, type(sys.modules['torch._dynamo']).__name__)
""",
}

IN_FORKS = """
import contextlib, io, json, os, sys, torch
said = {}
for name, program in json.loads(sys.argv[1]).items():
    reader, writer = os.pipe()
    if not (child := os.fork()):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(program)
        os.write(writer, out.getvalue().encode())
        os._exit(0)
    os.close(writer)
    said[name] = os.fdopen(reader).read().split()
    os.waitpid(child, 0)
print(json.dumps(said))
"""
"""Each program in a process that has imported torch, and nothing else."""


@pytest.fixture(scope="module")
def said() -> dict[str, list[str]]:
    command = [sys.executable, "-c", IN_FORKS, json.dumps(PROGRAMS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_an_extraction_has_no_compiler_and_its_workers_nothing_for_servers_and_metadata(said):
    """Nor where the weights come with a description, which is compared with timm's own network."""
    assert said["extraction"] == ["[]", "2", "[]"]


def test_the_compiler_and_what_torchvision_asks_of_it_are_there(said):
    assert said["compiler"] == ["False", "True", "-1.0", "True", "True"]


def test_what_nothing_stands_for_is_taken_from_the_compiler(said):
    assert said["beyond"] == ["defaultdict", "module"]
