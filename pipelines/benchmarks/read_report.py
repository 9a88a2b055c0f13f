"""The tables of `jobs/benchmark.py read`."""

from collections.abc import Iterator, Mapping

from pipelines.benchmarks.read import BY_ROW, IN_ORDER, Rate, ReadBenchmark, ReadResult
from pipelines.costs.clocks import Machine
from pipelines.results import number_lines


def read_report(config: ReadBenchmark, result: ReadResult, machine: Machine) -> Iterator[str]:
    """The numbers as Markdown, line by line."""
    places, ratios = result.places, result.ratios
    shape = f"{config.grid[0]} x {config.grid[1]} x {config.channels} float16"
    yield f"## read: rows of {shape}: " + ", ".join(f"{one.rows:,} {place}" for place, one in places.items())
    yield machine.usual_line()
    for place, one in places.items():
        yield from _rates(f"{place}: random rows", one.reads, {"of zarr by row": BY_ROW})
        yield from _rates(f"{place}: an epoch", one.epochs, {"of zarr by row": BY_ROW, "of in order": IN_ORDER[0]})
    columns = {"ratio": "", "target": "", **dict.fromkeys(ratios[0].found, ".2f")}
    yield from number_lines(columns, [[r.ratio, r.target, *r.found.values()] for r in ratios])
    steps = [step for one in places.values() for step in one.openings]
    columns = {"new objects and connections": "", "first, ms": ".1f", "again (median), ms": ".1f", "S3 requests": ""}
    yield from number_lines(columns, [[s.step, s.first_ms, s.ms, sum(s.requests.values())] for s in steps])
    yield f"""
- MB as decoded. CPU is the client's, with its workers. Epochs: the best of up to {config.repeat}.
- "stopped": not done after {config.seconds:g} s; its rate, also for an epoch, is that of the rows it had read by then.
- What every contender read was compared with what was written, and every whole epoch had each row once.
- Local reads come from the page cache. {result.server}"""


def _rates(title: str, contenders: Mapping[str, Rate], bases: Mapping[str, str]) -> Iterator[str]:
    is_served = any(one.server_cpu_s_per_1000 is not None for one in contenders.values())
    columns = {title: "", "rows/s": ",.0f", "MB/s": ",.0f", "CPU s / 1,000 rows": ",.2f"}
    columns |= {"server's": ",.2f"} if is_served else {}
    rows = []
    for name, one in contenders.items():
        served = [one.server_cpu_s_per_1000 or 0.0] if is_served else []
        ratios = [one.rows_per_s / contenders[base].rows_per_s for base in bases.values()]
        count = f"{one.rows:,}{'' if one.done else ' (stopped)'}"
        rows.append([name, one.rows_per_s, one.mb_per_s, one.cpu_s_per_1000, *served, count, *ratios])
    return number_lines({**columns, "rows read": "", **dict.fromkeys(bases, ".2f")}, rows)
