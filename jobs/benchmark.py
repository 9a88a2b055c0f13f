"""Measure Raylift on this machine, beside what it is to be compared with.

    python jobs/benchmark.py extract                      # this pipeline, its bare stages, and a user's own loop
    python jobs/benchmark.py extract debug                # the same in under a minute, to see that it works
    python jobs/benchmark.py index --samples 1000000 --tars 1000
    python jobs/benchmark.py precision --data photos.tar --model vit_tiny_patch16_224.augreg_in21k_ft_in1k
    python jobs/benchmark.py read                         # random rows and whole epochs, from disk and over S3
    python jobs/benchmark.py nearest                      # the nearest of 10^6 cells: all compared, by an index, by NumPy
    python jobs/benchmark.py cost                         # operations, time and memory of upsamplers beside the backbone
    python jobs/benchmark.py cost --vit-up                # ViT-Up for several output grids and chunks of queries
    python jobs/benchmark.py cost --deap                  # DeAP's published parameter counts, and readouts' operations
    python jobs/benchmark.py upsamplers                   # each beside bilinear, and beside its paper's plain formulation
    python jobs/benchmark.py train                        # images per second, beside a plain loop
    python jobs/benchmark.py scale                        # what one driver feeds: tens of actors that sleep
    python jobs/benchmark.py device                       # how busy extraction keeps a device, on one that sleeps
    python jobs/benchmark.py gpu                          # on a machine with a GPU: all that is said of one, in 8 minutes
    python jobs/benchmark.py chaos                        # 15 minutes of machines that die: is anything lost?
    python jobs/benchmark.py autoscale                    # nodes that come and go, with Ray's own autoscaler
    python jobs/benchmark.py readout                      # readouts trained from a store, beside the live backbone
    python jobs/benchmark.py evaluate                     # matching and label propagation beside the plainest code

Prints Markdown; --json PATH writes all numbers. Run it while nothing else does. Exit codes: 0 measured, 1 not, 2 wrong settings.
"""

import sys

from jobs.program import Command, Program
from pipelines.benchmarks.run import BENCHMARKS

program = Program(
    name="benchmark",
    doc=__doc__,
    commands={
        name: Command(run=each.run, default=presets["default"], presets=presets)
        for name, each in BENCHMARKS.items()
        for presets in [each.presets]
    },
    stopped="stopped; nothing was measured",
    pairs=True,
)
run = program.run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
