"""The first run: photographs that are already on the machine, their features, and a picture."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

from pipelines.extraction import run as extraction
from pipelines.extraction.config import ExtractConfig
from pipelines.features.weights import WeightsUnavailable
from pipelines.showing.views import pick_rows, view_panel
from storage.store import FeatureStore

PHOTOS = (
    "astronaut", "chelsea", "coffee", "rocket", "camera", "coins",
    "moon", "motorcycle_left", "grass", "gravel", "brick", "hubble_deep_field",
)  # fmt: skip
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


def main(config: ExtractConfig) -> Iterator[str]:
    """Features of the photographs, a picture of them, and what to try next; where there are no weights, of random ones."""
    try:
        yield from extraction.main(config)
    except WeightsUnavailable as error:
        yield f"\nNo pretrained weights: {error}"
        yield "The demo goes on with RANDOM weights, and the store says so: the picture shows that the pipeline works,"
        yield "not what good features look like.\n"
        config = config.changed(weights="random", out=config.out.replace(".zarr", "-random.zarr"))
        yield from extraction.main(config)
    if config.plan:
        return
    store, picture = FeatureStore.open(config.out), config.out.replace(".zarr", ".png")
    view_panel(store, pick_rows(store, len(store))).draw().save(picture)
    yield f"\npicture    {picture}"
    yield f"store      {config.out}"
    yield f"try next   python -c \"import zarr; print(zarr.open_group('{config.out}', mode='r').tree())\""
    yield "           python jobs/extract.py --data <folder of images or tars> --out feats.zarr --plan"
