"""Look at a feature store: what became of it, what its features see; and at training runs. Any URL, also of one in progress.

    python jobs/show.py status feats.zarr                     # counts, rate, what takes the time
    python jobs/show.py failures s3://bucket/feats.zarr       # by reason, with keys
    python jobs/show.py rows feats.zarr                       # what a row is, sizes, the first rows
    python jobs/show.py view feats.zarr --out view.png        # photographs and PCA colours of every level
    python jobs/show.py similar feats.zarr --key coffee --point 300 200
    python jobs/show.py nearest feats.zarr --key coffee --point 300 200 --others  # the most similar cells of the whole store
    python jobs/show.py index feats.zarr                      # an index for nearest --index, which then reads a small part
    python jobs/show.py view bilinear.zarr lift.zarr          # several methods beside each other; similar likewise
    python jobs/show.py compare a.zarr b.zarr --level x1      # cosine per row, worst rows
    python jobs/show.py export feats.zarr --out vectors/      # vectors and keys as Parquet
    python jobs/show.py report feats.zarr --out report.html   # all of it in one page that can be sent
    python jobs/show.py card feats.zarr                       # a README for it, as the Hugging Face hub has them
    python jobs/show.py push feats.zarr hf://datasets/me/feats  # store and card to a hub or any URL; goes on where it stopped
    python jobs/show.py browse s3://bucket/feats.zarr         # all of it in a browser: prints an address of this machine
    python jobs/show.py training runs/lift runs/jbu           # training runs side by side: held-out scores, best and last
    python jobs/show.py training runs/lift --out lift.html    # the same as a page, with curves, pictures, command and settings
    python jobs/show.py backbones                             # those that DeAP compares: size, grid, channels, normalisation

Exit codes: 0 shown, 2 wrong settings or nothing to show.
"""

import sys

from jobs.program import Command, Program
from pipelines.showing import commands
from pipelines.showing.search_build import SearchIndex
from pipelines.tables import backbones

program = Program(
    name="show",
    doc=__doc__,
    commands={
        "status": Command(run=commands.Status.lines, default=commands.Status),
        "failures": Command(run=commands.Failures.lines, default=commands.Failures),
        "rows": Command(run=commands.Rows.lines, default=commands.Rows),
        "view": Command(run=commands.View.lines, default=commands.View),
        "similar": Command(run=commands.Similar.lines, default=commands.Similar),
        "nearest": Command(run=commands.Nearest.lines, default=commands.Nearest),
        "index": Command(run=SearchIndex.lines, default=SearchIndex()),
        "compare": Command(run=commands.Compare.lines, default=commands.Compare),
        "export": Command(run=commands.Export.lines, default=commands.Export),
        "report": Command(run=commands.Report.lines, default=commands.Report),
        "card": Command(run=commands.Card.lines, default=commands.Card),
        "push": Command(run=commands.Push.lines, default=commands.Push),
        "browse": Command(run=commands.Browse.lines, default=commands.Browse),
        "training": Command(run=commands.Training.lines, default=commands.Training),
        "backbones": Command(run=backbones.main, default=backbones.Backbones),
    },
)
run = program.run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
