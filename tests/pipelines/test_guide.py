"""pipelines/GUIDE.md is true: its Python blocks run, as one script, in a folder with nothing but images."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import jpeg

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_script_goes_from_a_folder_to_a_probe_and_an_upsampler(tmp_path):
    for n in range(32):
        photo = tmp_path / "photos" / ["cats", "dogs"][n % 2] / f"{n:02d}.jpg"
        photo.parent.mkdir(parents=True, exist_ok=True)
        photo.write_bytes(jpeg(n))
    script = "\n".join(re.findall(r"^```python\n(.*?)^```", (ROOT / "pipelines/GUIDE.md").read_text(), re.DOTALL | re.MULTILINE))
    # As `python script.py`: workers of a DataLoader or of Ray may import it.
    (tmp_path / "script.py").write_text(script)

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert "32 images ok, 0 failed" in done.stdout
    assert re.search(r"^\d of 8 held-out images$", done.stdout, re.MULTILINE)
    assert "| linear probe" in done.stdout
    assert "FeatureStore('shared/feats.zarr', 32 rows, complete: x1" in done.stdout
    assert "(4, 4) -> (2, 64, 8, 8)" in done.stdout
