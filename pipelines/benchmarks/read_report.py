"""The tables of `jobs/benchmark.py read`."""

from collections.abc import Iterator
from typing import Any

from pipelines.benchmarks.read import BY_ROW, IN_ORDER, ReadBenchmark
from pipelines.costs.clocks import CORES, table


def read_report(config: ReadBenchmark, result: dict[str, Any]) -> Iterator[str]:
    """The numbers as Markdown, line by line."""
    found, places, ratios = result["machine"], result["places"], result["ratios"]
    shape = f"{config.grid[0]} x {config.grid[1]} x {config.channels} float16"
    yield f"## read: rows of {shape}: " + ", ".join(f"{one['rows']:,} {place}" for place, one in places.items())
    yield f"\n{found['cpu']}, {CORES} cores, torch {found['torch']}. Load average when it ended: {found['load']:.1f}."
    for place, one in places.items():
        yield from _rates(f"{place}: random rows", one["reads"], {"of zarr by row": BY_ROW})
        yield from _rates(f"{place}: an epoch", one["epochs"], {"of zarr by row": BY_ROW, "of in order": IN_ORDER[0]})
    rows = [[r["ratio"], r["target"], *(f"{value:.2f}" for value in r["found"].values())] for r in ratios]
    yield from table(["ratio", "target", *ratios[0]["found"]], rows)
    steps = [step for one in places.values() for step in one["openings"]]
    rows = [[s["step"], f"{s['first_ms']:.1f}", f"{s['ms']:.1f}", f"{sum(s['requests'].values())}"] for s in steps]
    yield from table(["new objects and connections", "first, ms", "again (median), ms", "S3 requests"], rows)
    yield f"""
- MB as decoded. CPU is the client's, with its workers. Epochs: the best of up to {config.repeat}.
- "stopped": not done after {config.seconds:g} s; its rate, also for an epoch, is that of the rows it had read by then.
- What every contender read was compared with what was written, and every whole epoch had each row once.
- Local reads come from the page cache. {result["server"]}"""


def _rates(title: str, contenders: dict[str, Any], bases: dict[str, str]) -> Iterator[str]:
    columns = {"rows/s": "rows_per_s", "MB/s": "mb_per_s", "CPU s / 1,000 rows": "cpu_s_per_1000"}
    if any(one["server_cpu_s_per_1000"] is not None for one in contenders.values()):
        columns["server's"] = "server_cpu_s_per_1000"
    rows = []
    for name, one in contenders.items():
        numbers = [f"{one[column]:,.{2 if '1000' in column else 0}f}" for column in columns.values()]
        ratios = [f"{one['rows_per_s'] / contenders[base]['rows_per_s']:.2f}" for base in bases.values()]
        rows.append([name, *numbers, f"{one['rows']:,}{'' if one['done'] else ' (stopped)'}", *ratios])
    yield from table([title, *columns, "rows read", *bases], rows)
