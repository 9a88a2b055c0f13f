"""What a process has imported of whose forks benchmarks are measured (`forked_benchmarks`). Nothing here may start a thread."""

import pipelines.benchmarks.baselines
import pipelines.benchmarks.feeding
import pipelines.benchmarks.read
import pipelines.benchmarks.watched
import pipelines.extraction.run
import pipelines.extraction.worker  # noqa: F401
