"""The tables of `jobs/benchmark.py read`."""

from collections.abc import Iterator, Mapping

from pipelines.benchmarks.read import BY_ROW, IN_ORDER, Rate, ReadBenchmark, ReadResult
from pipelines.costs.clocks import Machine
from pipelines.results import table_lines


def read_report(config: ReadBenchmark, result: ReadResult, machine: Machine) -> Iterator[str]:
    """The numbers as Markdown, line by line."""
    places, ratios = result.places, result.ratios
    shape = f"{config.grid[0]} x {config.grid[1]} x {config.channels} float16"
    yield f"## read: rows of {shape}: " + ", ".join(f"{one.rows:,} {place}" for place, one in places.items())
    yield machine.usual_line()
    for place, one in places.items():
        yield from _rates(f"{place}: random rows", one.reads, {"of zarr by row": BY_ROW})
        yield from _rates(f"{place}: an epoch", one.epochs, {"of zarr by row": BY_ROW, "of in order": IN_ORDER[0]})
    rows = [[r.ratio, r.target, *(f"{value:.2f}" for value in r.found.values())] for r in ratios]
    yield from table_lines(["ratio", "target", *ratios[0].found], rows)
    steps = [step for one in places.values() for step in one.openings]
    rows = [[s.step, f"{s.first_ms:.1f}", f"{s.ms:.1f}", f"{sum(s.requests.values())}"] for s in steps]
    yield from table_lines(["new objects and connections", "first, ms", "again (median), ms", "S3 requests"], rows)
    yield f"""
- MB as decoded. CPU is the client's, with its workers. Epochs: the best of up to {config.repeat}.
- "stopped": not done after {config.seconds:g} s; its rate, also for an epoch, is that of the rows it had read by then.
- What every contender read was compared with what was written, and every whole epoch had each row once.
- Local reads come from the page cache. {result.server}"""


def _rates(title: str, contenders: Mapping[str, Rate], bases: Mapping[str, str]) -> Iterator[str]:
    is_served = any(one.server_cpu_s_per_1000 is not None for one in contenders.values())
    rows = []
    for name, one in contenders.items():
        served = [f"{one.server_cpu_s_per_1000 or 0:,.2f}"] if is_served else []
        numbers = [f"{one.rows_per_s:,.0f}", f"{one.mb_per_s:,.0f}", f"{one.cpu_s_per_1000:,.2f}", *served]
        ratios = [f"{one.rows_per_s / contenders[base].rows_per_s:.2f}" for base in bases.values()]
        rows.append([name, *numbers, f"{one.rows:,}{'' if one.done else ' (stopped)'}", *ratios])
    columns = ["rows/s", "MB/s", "CPU s / 1,000 rows", *(["server's"] if is_served else [])]
    yield from table_lines([title, *columns, "rows read", *bases], rows)
