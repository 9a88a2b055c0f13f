"""The death of a process that a program can't do without ends it with a sentence, and nothing else does."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import os, signal, subprocess, sys, time
from cluster.lost import ending_with

children = [subprocess.Popen(["sleep", "9"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
try:
    with ending_with({children[0].pid: "the first", children[1].pid: "the second"}):
        {inside}
    children[0].kill()  # after the block it's nobody's business
    time.sleep(0.5)
    print("ended in order")
finally:
    for child in children:
        child.kill()
"""


def run(inside: str) -> subprocess.CompletedProcess:
    program = PROGRAM.replace("{inside}", inside)
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_killed_process_ends_the_program_with_a_sentence_while_it_waits_in_native_code():
    done = run("children[1].kill(); time.sleep(50)")

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("ClusterError: the second has died")
    assert done.stderr.endswith("the same command continues.\n")


def test_it_is_noticed_by_a_program_with_many_open_files():
    many = """import resource
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 4096), most))
        files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
        children.append(subprocess.Popen(["sleep", "9"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        with ending_with({children[2].pid: "the third"}):
            children[2].kill()
            time.sleep(50)"""
    done = run(many)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("ClusterError: the third has died")


def test_program_whose_processes_live_on_ends_in_order():
    done = run("time.sleep(0.2)")

    assert (done.returncode, done.stdout, done.stderr) == (0, "ended in order\n", "")


def test_program_that_is_being_terminated_itself_ends_in_order():
    done = run("signal.signal(signal.SIGTERM, signal.SIG_IGN); children[0].kill(); time.sleep(2)")

    assert (done.returncode, done.stdout) == (0, "ended in order\n")
