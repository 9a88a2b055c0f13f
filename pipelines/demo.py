"""The first run: features of photographs that are already on the machine, and a picture."""

from collections.abc import Iterator

from pipelines.extraction import start as extraction
from pipelines.extraction.config import ExtractConfig
from pipelines.features.weights import WeightsUnavailable
from pipelines.showing.choice import columns_of, pick_rows
from pipelines.showing.views import view_panel
from storage.store import FeatureStore


def main(config: ExtractConfig) -> Iterator[str]:
    """Features of the photographs, a picture of them, and what to try next; where there are no weights, of random ones."""
    try:
        yield from extraction.main(config)
    except WeightsUnavailable as error:
        yield f"\nNo pretrained weights: {error}"
        yield "The demo goes on with RANDOM weights, and the store says so: the picture shows that the pipeline works,"
        yield "not what good features look like.\n"
        config = config.changed(weights="random", out=f"{config.out.removesuffix('.zarr')}-random.zarr")
        yield from extraction.main(config)
    if config.plan:
        return
    store, picture = FeatureStore.open(config.out), f"{config.out.removesuffix('.zarr')}.png"
    view_panel(columns_of([store], [pick_rows(store, len(store))])).draw().save(picture)
    yield f"\npicture    {picture}"
    yield f"store      {config.out}"
    yield f"try next   python -c \"import zarr; print(zarr.open_group('{config.out}', mode='r').tree())\""
    yield "           python jobs/extract.py --data <folder of images or tars> --out feats.zarr --plan"
