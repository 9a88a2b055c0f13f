"""timm comes without torch's compiler, and whoever wants the compiler has it all the same: each in a process of its own."""

import subprocess
import sys


def run(program: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_an_extraction_has_no_compiler_and_its_workers_nothing_for_servers_and_metadata():
    there = "[name for name in ({}) if name in sys.modules]"
    servers, compiler = there.format("'aiohttp', 'botocore', 'zarr'"), there.format("'torch._dynamo', 'torch._inductor', 'sympy'")
    said = run(
        f"import sys, pipelines.extraction.worker; print({servers})\n"
        f"import jobs.extract, pipelines.extraction.run; print({compiler})"
    )
    assert said == ["[]", "[]"]


def test_the_compiler_and_what_torchvision_asks_of_it_are_there():
    said = run(
        "import sys, torch\n"
        "from operators.lean_timm import timm\n"
        "import torchvision.ops\n"
        "print('torch._dynamo' in sys.modules, sys.modules['torchvision.ops.roi_align'].is_compile_supported('cpu'))\n"
        "print(torch.compile(torch.neg, backend='eager')(torch.ones(1)).item())\n"
        "print(torch._dynamo.utils.is_compile_supported('cpu'), timm.layers._fx.has_fx_feature_extraction)\n"
    )
    assert said == ["False", "True", "-1.0", "True", "True"]


def test_what_nothing_stands_for_is_taken_from_the_compiler():
    said = run(
        "import sys\n"
        "from operators import lean_timm\n"
        "with lean_timm._without_compiler():\n"
        "    from torch._dynamo.utils import counters\n"
        "print(type(counters).__name__, type(sys.modules['torch._dynamo']).__name__)\n"
    )
    assert said == ["defaultdict", "module"]
