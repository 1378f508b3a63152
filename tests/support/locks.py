"""Another process that has locked a folder."""

import subprocess
import sys

HOLD = """
import os, sys, time
from pathlib import Path
from clmerge.results.run_lock import hold_lock
class Holder: pass
holder = Holder()
hold_lock(Path(sys.argv[1]), holder)
if len(sys.argv) > 2:
    os.fork()  # both wait: a data loader's worker outlives its parent
os.write(1, b"held\\n")
sys.stdin.read()
"""


def other_process(folder, *options):
    command = [sys.executable, "-c", HOLD, str(folder), *options]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def end(process):
    process.stdin.close()
    process.stdout.close()
    process.wait()
