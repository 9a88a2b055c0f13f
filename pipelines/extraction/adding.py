"""Levels that are added to a finished store (`--add-level`).

A level is made of the backbone's map as it is stored where its method needs no more of the backbone; else the backbone runs
again.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial

from cluster.progress import size_text
from operators.upsamplers import find_method
from pipelines.config import ConfigError, settings_of
from pipelines.executors import Executor
from pipelines.extraction.attempts import suspects
from pipelines.extraction.config import ExtractConfig
from pipelines.extraction.first_look import open_finished
from pipelines.extraction.level_worker import LevelSetup, Way
from pipelines.extraction.prepare import require_decoder, require_precision
from pipelines.extraction.run import Run, Summary, begin_run, failing_where_replaced
from pipelines.features.agreement import AskedFeatures
from pipelines.features.bundle import load_bundle
from pipelines.features.config import FeatureConfig
from pipelines.features.levels import level_name, parse_levels
from pipelines.features.model_bundle import ModelBundle
from storage.added import LevelAddition
from storage.documents import JsonObject, decode
from storage.ledger import TornTasks
from storage.redaction import redact
from storage.sources import sources_digest
from storage.spec import FeatureSpec, Level
from storage.store import FeatureStore

logger = logging.getLogger(__name__)

_COMPARED = tuple(name for name in FeatureSpec.__dataclass_fields__ if name not in ("levels", "weights_source", "compiled"))
"""What of a spec a level has in common with those that are there."""


@dataclass(frozen=True, kw_only=True)
class Addition:
    """A level that is to be added, before anything is written."""

    config: ExtractConfig
    asked: str
    "with its encoding, without credentials"
    bundle: ModelBundle
    "of that level alone"
    patch: int
    "of the backbone, in pixels"
    way: Way
    store: LevelAddition

    @property
    def level(self) -> Level:
        return self.store.new


def lines(config: ExtractConfig, executor: Executor) -> Iterator[str]:
    """Add levels one after another, or only plan it, and what there is to say of it. Raises `ConfigError` where the store has
    another level of a name, or other features, what `load_bundle` raises, `BegunOtherwise`, and `RunFailed`."""
    parse_levels(config.add_level, config.features.encoding)
    plans = []
    makers: Makers | None = None
    for text in config.add_level:
        store = open_finished(config)
        if level_name(text) in store.levels:
            _require_same(config, text, store)
            if not config.plan:
                store.finalize()  # what a run left that was killed at its end
            logger.info("%s has level %s already", store.folder.displayed, level_name(text))
            if not config.json:
                yield f"{store.folder.displayed}: level {level_name(text)} is there already"
            continue
        makers = makers or load_makers(config, store)
        addition = prepare_addition(config, text, store, makers)
        if config.plan:
            plans.append(plan := _planned(addition))
            if not config.json:
                yield from _plan_lines(addition, plan)
            continue
        summary = run_addition(addition, executor)
        yield f"{summary.out}: level {addition.level.name} is added, made of {addition.way}"
        yield from summary.lines()
    if config.plan:
        yield json.dumps(plans, indent=1) if config.json else "nothing was run; drop --plan to start"


def _require_same(config: ExtractConfig, text: str, store: FeatureStore) -> None:
    """Raise `ConfigError` where the store's level of that name is another one."""
    asked = AskedFeatures(settings={"levels": (text,)}, options=config.options)
    if found := asked.differences(store.spec):
        raise ConfigError(
            f"--add-level {redact(text, config.options)}: {store.folder.displayed} has another level of that name:\n"
            f"{found.text('store', 'asked')}\nGive this one a name of its own, as in other:x2"
        )


@dataclass(frozen=True, kw_only=True)
class Makers:
    """What makes the levels of one command: one backbone, loaded and hashed once, and their upsamplers."""

    bundle: ModelBundle
    "of all of them"
    patch: int
    "of the backbone, in pixels"
    further: Mapping[str, frozenset[int]]
    "layers beside those of the maps that a level's upsampler asks of the backbone, by level"


def load_makers(config: ExtractConfig, store: FeatureStore) -> Makers:
    """Of the levels that the store hasn't. Raises what `load_bundle` raises."""
    texts = tuple(text for text in config.add_level if level_name(text) not in store.levels)
    bundle, model = load_bundle(replace(_features(config, store), levels=texts), config.options)
    # Without the model, which the driver doesn't keep while workers compute.
    further = {name: frozenset(each.layers) - set(bundle.spec.layers) for name, each in model.upsamplers.items()}
    return Makers(bundle=bundle, patch=model.backbone.patch, further=further)


def prepare_addition(config: ExtractConfig, text: str, store: FeatureStore, makers: Makers) -> Addition:
    """Hold what makes a level against a finished store. Nothing is written."""
    bundle = makers.bundle
    if found := store.spec.differences(bundle.spec, _COMPARED):
        raise ConfigError(
            f"--add-level: {store.folder.displayed} holds other features than these settings make:\n"
            f"{found.text('store', 'run')}\nLeave them out to have the store's"
        )
    level = next(each for each in bundle.spec.levels if each.name == level_name(text))
    way = _AGAIN if makers.further.get(level.name) else way_of(level, store.spec, config.added_from)
    if way.base is None and store.spec.compiled != (config.compile != "off"):
        with_it = "with --compile; give it, too" if store.spec.compiled else "without --compile; leave it out"
        raise ConfigError(f"--add-level: the backbone runs again, and {store.folder.displayed} was made {with_it}")
    level = replace(level, made_from=way.made_from)
    spec = replace(bundle.spec, levels=(level,), compiled=store.spec.compiled)
    learned = {name: each for name, each in bundle.upsamplers.items() if name == level.name}
    bundle = replace(bundle, spec=spec, upsamplers=learned)
    asked = text if text.endswith(f"@{level.encoding}") else f"{text}@{level.encoding}"
    addition = LevelAddition(store.folder, store.attributes, level)
    return Addition(
        config=config, asked=redact(asked, config.options), bundle=bundle, patch=makers.patch, way=way, store=addition
    )


def _features(config: ExtractConfig, store: FeatureStore) -> FeatureConfig:
    """The settings that made the store, but for those that are given."""
    known, saved = settings_of(ExtractConfig), store.root.config or {}
    names = [name for name in saved if name in known and known[name].path[0] == "features" and not config.is_given(name)]
    values = {name: decode(known[name].kind, saved[name], f"config.{name}") for name in names}
    if values.get("geometry", config.features.geometry) != "crop":
        values["crop_pct"] = 1.0
    return config.changed(**values).features


_AGAIN = Way(base=None, photographs=True, exact=True)
"""The backbone runs again."""


def way_of(level: Level, stored: FeatureSpec, wanted: str) -> Way:
    """How a level is made beside those that are `stored`: of the most precise of the backbone's maps, if one is as precise as
    float16, and unless the backbone is `wanted` or needed.

    That is exact of float32 maps, by interpolation, or where the backbone computes in float32: in half precision networks and
    means may be given half-precision maps by one run.
    """
    if level.method in ("backbone", "cls"):
        needs: frozenset[str] = frozenset({"backbone"})
    else:
        needs = frozenset({"maps"}) if level.grid is None else find_method(level.method).needs
    maps = [each for each in stored.levels if each.method == "backbone" and each.dtype != "int8"]
    if wanted == "backbone" or "backbone" in needs or not maps:
        return _AGAIN
    base = min(maps, key=lambda each: each.dtype != "float32")
    interpolated = level.grid is not None and needs == {"maps"}
    exact = base.dtype == "float32" and (interpolated or stored.precision == "fp32")
    return Way(base=base, photographs="image" in needs, exact=exact)


@failing_where_replaced()
def run_addition(addition: Addition, executor: Executor) -> Summary:
    """Do the level's pending tasks and make it part of the store."""
    config, store, way = addition.config, addition.store, addition.way
    pool = executor.pool(config.cluster.request(spare_cpu=config.decode_on == "cluster"))
    require_precision(addition.bundle.spec.precision, pool)
    if way.photographs:
        require_decoder(addition.bundle.spec, config, pool)
    store.begin(addition.asked, str(way))
    setup, pool = begin_run(
        partial(LevelSetup, way=way),
        store,
        config,
        pool,
        store.spec.row_bytes + (way.base.row_bytes if way.base else 0),
        bundle=addition.bundle,
        input_digest=sources_digest(store.index.sources),
        urls=tuple(source.url for source in store.index.sources),
    )
    done = store.ledger.done()
    if torn := store.ledger.torn(done):
        logger.warning("%s", TornTasks(store.folder, torn))
        store.revoke(torn)
        done = done - set(torn)
    pending = store.pending(done)
    setup = replace(setup, suspects=suspects(store.folder, pending.blocks))
    run = Run(store, setup, executor, pool, rows_done=sum(store.layout.task(block).n_rows for block in done))
    with run.noting_its_end():
        run.execute(pending)
        return run.finish(store.index.left_out)


# --- plans ------------------------------------------------------------------------------------------------------------


def _planned(addition: Addition) -> JsonObject:
    layout, level = addition.store.layout, addition.level
    return {
        "store": addition.store.folder.displayed,
        "level": json.loads(json.dumps(asdict(level))),
        "made_of": str(addition.way),
        "bytes": layout.n_rows * level.row_bytes,
        "objects": sum(len(layout.shard_names(level, task.block)) for task in layout.tasks()),
        "tasks": layout.n_blocks,
        "pending": len(addition.store.pending()),
    }


def _plan_lines(addition: Addition, plan: JsonObject) -> Iterator[str]:
    level, rows = addition.level, addition.store.layout.n_rows
    shape = " x ".join(map(str, level.row_shape))
    size = f"{size_text(rows * level.row_bytes)} in {plan['objects']:,} objects"
    yield f"store      {plan['store']}  (complete, {rows:,} images)"
    yield f"add        {level.name}  {shape}  {level.encoding}  {level.method}  {size}"
    yield f"made of    {plan['made_of']}"
    yield f"tasks      {plan['pending']:,} of {plan['tasks']:,} to be done"
    for note in addition.bundle.unfamiliar(addition.bundle.spec, addition.patch):
        yield f"note       {note}"
