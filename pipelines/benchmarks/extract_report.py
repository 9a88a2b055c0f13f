"""The tables of `jobs/benchmark.py extract`."""

from collections.abc import Iterator, Sequence

from pipelines.benchmarks.extract import BareStages, ExtractBenchmark, ExtractResult, Gap, LoopRun, PipelineRun
from pipelines.costs.clocks import Machine
from pipelines.costs.process import CORES
from pipelines.results import number_lines, table_lines


def extract_report(config: ExtractBenchmark, result: ExtractResult, machine: Machine) -> Iterator[str]:
    """The numbers as Markdown, line by line."""
    pipeline, loop, bare = result.best.pipeline, result.best.loop, result.best.bare
    yield f"## extract: {pipeline.images:,} images, {config.model} at {config.size} px, {config.precision}"
    measured = f"torch {machine.torch}; levels {' '.join(config.levels)}; best of {config.repeat}"
    yield machine.line(f"{machine.cores} cores", measured)
    if config.precision == "bf16" and not machine.native_bf16:
        yield "\n**This CPU has no bf16 instructions: bf16 is emulated here, and slow; --precision fp32 is likely faster.**"
    rates = {
        "(a) this pipeline, steady": pipeline.steady_images_per_s,
        "(a) this pipeline, whole run": pipeline.images_per_s,
        f"(b) bare forward, {CORES} processes of 1 thread": bare.forward_processes_images_per_s,
        f"(b) bare forward, 1 process of {CORES} threads": bare.forward_threads_images_per_s,
        "(c) bound: cores / sum of bare stages": bare.bound_images_per_s,
        "(d) the user's loop, steady": loop.steady_images_per_s,
        "(d) the user's loop, whole run": loop.images_per_s,
    }
    rows = [[name, rate, rate / bare.bound_images_per_s] for name, rate in rates.items()]
    yield from number_lines({"": "", "images/s": ".2f", "of the bound": ".2f"}, rows)
    ratios = [[name, r.target, r.best, " ".join(f"{x:.2f}" for x in r.all)] for name, r in result.ratios.items()]
    yield from number_lines({"ratio": "", "target": ".2f", "best": ".2f", "by round": ""}, ratios)
    yield from _gap_report(result.gap)
    yield from _process_report(pipeline, loop)
    yield from _notes(pipeline, loop, result.best.bare_each)


def _gap_report(gap: Gap) -> Iterator[str]:
    """Where the time between the bound and the steady rate goes."""
    yield "\nWhere it goes, in core milliseconds per image (largest gap first within the stages):"
    rows: list[list[object]] = [[one.stage, one.bare, one.clock, one.cpu, one.gap] for one in gap.stages]
    rows += [[name, None, None, value, value] for name, value in gap.outside.items()]
    rows += [["all", gap.bare, None, gap.total, gap.total - gap.bare]]
    yield from number_lines({"": "", "bare": ".2f", "stage clock": ".2f", "in the run": ".2f", "gap": "+.2f"}, rows)


_GROUPS = (("driver", "main process"), ("workers", "workers"), ("ray", "Ray's own processes"), ("other", "other programs"))


def _process_report(pipeline: PipelineRun, loop: LoopRun) -> Iterator[str]:
    def megabytes(value: float) -> str:
        return f"{value / 2**20:,.0f} MB" if value else "-"

    rows = [
        ["start-up", f"{pipeline.start_up_s:.1f} s", f"{loop.start_up_s:.1f} s"],
        *(
            [f"CPU time of it, {of}", *(f"{run.start_up_cpu_s[group]:.1f} s" for run in (pipeline, loop))]
            for group, of in _GROUPS
        ),
        ["whole run", f"{pipeline.seconds:.1f} s", f"{loop.seconds:.1f} s"],
    ]
    names = {"pss": "peak memory (PSS)", "rss": "peak memory (RSS)", "driver": "of it the main process"}
    names |= {"workers": "of it workers", "largest_worker": "largest worker", "ray": "of it Ray's own processes"}
    for name, title in names.items():
        rows.append([title, megabytes(pipeline.memory[name]), megabytes(loop.memory[name])])
    yield from table_lines(["", "pipeline", "user's loop"], rows)


def _notes(pipeline: PipelineRun, loop: LoopRun, bare: Sequence[BareStages]) -> Iterator[str]:
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in pipeline.start_up_parts_s.items())
    waits = ", ".join(f"{name} {ms:.1f}" for name, ms in loop.stage_ms.items())
    cosines = ", ".join(f"{name} {value:.6f}" for name, value in loop.cosine.items())
    samples = [str(run.memory["pss_samples"]) for run in (pipeline, loop)]
    bounds = " ".join(f"{each.bound_images_per_s:.1f}" for each in bare)
    opens = "first finished task's end" if pipeline.steady_from == "end" else "first task's beginning (few tasks)"
    yield f"""
- Whole run: from the process's start (interpreter and imports included) to the finished store; Ray's shutdown is left out.
- (a) start-up, seconds: {parts}; after the last task {pipeline.wrap_up_s:.1f}. Tasks: {pipeline.tasks}.
- (a) steady: {pipeline.steady_s:.1f} s from the {opens} to the last one's end; tasks under way when that opens
  count by the part of their stage time that lies in it.
- (d) steady: all images, from the first batch's arrival at the model to the end. ms per image in its main process:
  {waits}.
- (b), (c): {CORES} single-threaded processes at once, batches of {bare[0].batch}. Writes without fsync (the pipeline syncs).
- (c) is of the means of three measurements a round: before, between and after the contenders. Bounds of each: {bounds}.
- "stage clock" is workers' wall time; two tasks share a worker, so clocks overlap. "in the run" shares the workers' CPU time
  out by it. "idle" includes waiting for the disk; "other" is the machine's other programs.
- PSS counts shared pages once; sampled {" and ".join(samples)} times, as often as takes 1 % of a core.
- RSS counts them in every process; sampled every 0.5 s.
- Smallest cosine between (a)'s and (d)'s features, a few rows: {cosines}."""
