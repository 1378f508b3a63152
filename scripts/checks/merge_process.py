"""Run a command in this process or in one of its own, and catch what it says."""

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

HANG = 12.0


def captured(command, argv):
    """Run a command in this process; return what it wrote to descriptors 1 and 2, the exit code and the exception."""
    kept = [os.dup(1), os.dup(2)]
    files = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]  # noqa: SIM115 - closed below
    sys.stdout.flush(), sys.stderr.flush()
    error, rc = None, None
    stdout, stderr = sys.stdout, sys.stderr
    try:
        for number, file in enumerate(files, 1):
            os.dup2(file.fileno(), number)
        sys.stdout = io.TextIOWrapper(os.fdopen(os.dup(1), "wb"), errors="backslashreplace", write_through=True)
        sys.stderr = io.TextIOWrapper(os.fdopen(os.dup(2), "wb"), errors="backslashreplace", write_through=True)
        try:
            rc = command([str(a) for a in argv])
        except SystemExit as stop:
            rc = stop.code if isinstance(stop.code, int) else 1
        except BaseException as found:
            last = traceback.extract_tb(found.__traceback__)
            own = [f for f in last if "clmerge" in f.filename]
            at = f"{Path(own[-1].filename).name}:{own[-1].name}" if own else ""
            error = f"{type(found).__name__} in {at}: {str(found)[:150]}"
            rc = 1
            with contextlib.suppress(Exception):
                traceback.print_exc(limit=-4)
        sys.stdout.flush(), sys.stderr.flush()
    finally:
        sys.stdout, sys.stderr = stdout, stderr
        for number, old in enumerate(kept, 1):
            os.dup2(old, number)
            os.close(old)
    texts = []
    for file in files:
        file.seek(0)
        texts.append(file.read(1 << 20).decode("utf-8", "replace"))
        file.close()
    return texts[0], texts[1], rc, error


def as_a_process(clmerge, argv):
    if any("\0" in str(a) or (not str(a).isascii() and "\ud800" in str(a)) for a in argv):
        return 2, "", "an argument that no process can get: out.safetensors"
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen([clmerge, *map(str, argv)], stdout=out, stderr=err, stdin=subprocess.DEVNULL)
        try:
            rc = child.wait(timeout=8 * HANG)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            rc = -999
        out.seek(0), err.seek(0)
        return rc, out.read(1 << 20).decode("utf-8", "replace"), err.read(1 << 20).decode("utf-8", "replace")


def status(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    return 0
