"""What a run that goes on with a store knows of the levels that were added to it since it was begun."""

from dataclasses import replace

from pipelines.config import ConfigError
from pipelines.features.model_bundle import ModelBundle
from storage.paths import StorageOptions
from storage.store import FeatureStore


def with_added_levels(bundle: ModelBundle, store: FeatureStore, options: StorageOptions | None, *, load: bool) -> ModelBundle:
    """The bundle with those levels, whether the run's settings name them or not; `load` their weights, too.

    Raises `ConfigError` where these aren't those that the level was made by, and what `load_upsampler` raises.
    """
    spec, learned = bundle.spec, dict(bundle.upsamplers)
    levels = {level.name: level for level in spec.levels}
    for each in store.root.added:
        stored = store.level(each.level)
        # Last, as they are in the store, and of what they are made of there.
        levels[each.level] = replace(levels.pop(each.level, stored), made_from=stored.made_from)
        if load and stored.digest and each.level not in learned:
            from pipelines.features.levels import LevelChoice  # these import torch
            from pipelines.features.upsamplers import load_upsampler

            choice = LevelChoice.parse(each.asked, stored.encoding)
            found = load_upsampler(
                choice.method, choice.url, bundle.backbone(), spec, options, force=True, settings=choice.settings
            )
            if found.digest != stored.digest:
                raise ConfigError(
                    f"level {each.level} was added to {store.folder.displayed} as {each.asked}; that isn't the same upsampler "
                    "any more: restore it, so that further rows are made alike"
                )
            learned[each.level] = found
    return replace(bundle, spec=replace(spec, levels=tuple(levels.values())), upsamplers=learned)
