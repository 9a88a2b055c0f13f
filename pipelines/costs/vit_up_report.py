"""What `measure_vit_up` found, as Markdown."""

from collections.abc import Iterator, Sequence

from pipelines.costs.clocks import Machine
from pipelines.costs.upsamplers import BACKBONE, network_of
from pipelines.costs.vit_up import ALL_GRIDS, Line, ViTUpBenchmark, ViTUpResult
from pipelines.costs.windows import window_report
from pipelines.published.vit_up import VIT_UP_RUNTIME
from pipelines.results import table_lines
from storage.differences import differences
from storage.documents import JsonValue


def vit_up_report(config: ViTUpBenchmark, result: ViTUpResult, machine: Machine) -> Iterator[str]:
    """The numbers as Markdown, line by line."""
    parameters, macs = result.parameters, result.macs
    own = parameters["head"] + parameters["lora"]
    yield f"## cost --vit-up: {config.model} at {config.size} px, one image, {result.precision}, random weights"
    yield machine.usual_line(device=result.device)
    yield (
        f"\nParameters: ViT-Up {own / 1e6:.1f} M (head {parameters['head']:,} + LoRA {parameters['lora']:,}), "
        f"LiFT {parameters['lift']:,}; the backbone {parameters[BACKBONE]:,}."
    )
    yield from _time_report(result.rows)
    yield from _memory_report(result.rows)
    once = f"backbone {_giga(macs.backbone)}, query grid {_giga(macs.query_grid)}"
    yield f"""
- Times: medians of rounds of all rows, one after another, and of each round's ratios; "runs" says of how many.
- Bilinear and LiFT: with the plain backbone's pass. ViT-Up: with its own adapted one, and without the plain one.
- Peak memory: what torch's allocator holds at once, with weights and result, without the input. Declared: `peak_bytes`.
- 10^9 multiply-accumulates of the upsampler. ViT-Up's are the head's, with keys and values ({_giga(macs.keys_values)}); beside
  it: {once}. By formula: the paper's head, which decodes all layers; counted: what runs, the last one's decoder."""
    if not result.device.startswith("CPU"):
        yield from _published_report(config, result)
    if result.left_out:
        sides = ", ".join(f"{side} x {side}" for side in result.left_out)
        yield f"- Left out: {sides} (--grids {' '.join(map(str, ALL_GRIDS))} has all; on a CPU that takes minutes for each row)."
    yield from window_report(result.windows)


def _published_report(config: ViTUpBenchmark, result: ViTUpResult) -> Iterator[str]:
    """Table 9 beside what it is of, and not beside anything else."""
    here: dict[str, JsonValue] = {"model": network_of(config.model), "size": config.size, "precision": result.precision}
    if different := differences({name: VIT_UP_RUNTIME.settings[name] for name in here}, here):
        yield f"- The paper's Table 9 has nothing of this, so it isn't printed: {different.line('published', 'here')}."
        return
    rows = [
        [name, *(", ".join(f"{value:,.1f}" for value in values.get(side, {}).values()) for side in ("112", "224", "448"))]
        for name, values in VIT_UP_RUNTIME.rows.items()
    ]
    yield f"\nThe paper's Table 9, {VIT_UP_RUNTIME.of} at {config.size} px, bf16 on a GPU that it doesn't name, ms and MiB:"
    yield from table_lines(["", "112 x 112", "224 x 224", "448 x 448"], rows)


def _giga(macs: int) -> str:
    return f"{macs / 1e9:,.1f}" if macs >= 1e10 else f"{macs / 1e9:.3g}"


def _mebi(size: float) -> str:
    return f"{size / 2**20:,.1f}"


def _time_report(rows: Sequence[Line]) -> Iterator[str]:
    lines = [
        [
            row.label,
            f"{row.parameters / 1e6:.2f} M",
            f"{row.ms:,.1f}",
            f"{len(row.seconds)}",
            f"{row.of_alone:.2f}",
            "" if row.of_bilinear is None else f"{row.of_bilinear:.2f}",
            _mebi(row.peak_bytes),
        ]
        for row in rows
    ]
    yield from table_lines(["", "parameters", "ms", "runs", "of alone", "of bilinear", "peak MiB"], lines)


def _memory_report(rows: Sequence[Line]) -> Iterator[str]:
    lines = [
        [
            row.label,
            _mebi(row.call_bytes),
            _mebi(row.declared_bytes),
            f"{row.call_bytes / row.declared_bytes:.2f}",
            _giga(row.macs),
            "" if row.published_macs is None else _giga(row.published_macs),
        ]
        for row in rows
    ]
    yield "\nMemory and operations of that part alone:"
    yield from table_lines(["", "peak MiB", "declared", "of declared", "10^9, counted", "by formula"], lines)
    for grid in sorted({row.grid for row in rows}):
        sizes = {row.queries: row.call_bytes for row in rows if row.grid == grid and row.queries}
        if grid**2 in sizes and len(sizes) > 1:
            ratio = sizes[grid**2] / sizes[min(sizes)]
            yield f"\n{grid} x {grid}: all queries at once take {ratio:.1f} times the memory of {min(sizes):,} at once."
