"""What the demo needs: photographs that are already on the machine."""

import io
import tarfile
from pathlib import Path

PHOTOS = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "camera",
    "coins",
    "moon",
    "motorcycle_left",
    "grass",
    "gravel",
    "brick",
    "hubble_deep_field",
)
"""Photographs inside the scikit-image wheel."""


def write_photos(folder: str) -> None:
    """Write `photos-000.tar` and `photos-001.tar` into `folder`; the same bytes every time."""
    import skimage

    Path(folder).mkdir(parents=True, exist_ok=True)
    source = Path(skimage.__file__).parent / "data"
    for shard in (0, 1):
        path = Path(folder) / f"photos-{shard:03d}.tar"
        if path.exists():
            continue
        partial = path.with_suffix(".partial")
        with tarfile.open(partial, "w") as tar:
            for name in PHOTOS[shard::2]:
                file = next(p for p in source.glob(f"{name}.*") if p.suffix in (".png", ".jpg"))
                for member, data in ((f"{name}{file.suffix}", file.read_bytes()), (f"{name}.txt", name.encode())):
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        partial.rename(path)
