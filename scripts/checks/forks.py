"""Run clmerge in forked children of a process that has imported everything, under a library that disturbs file calls.

``Forks`` compiles fault_shim.c with gcc, starts ``forks.py WORK`` as a server under it, and sends it one command line
after the other; the server, which has written the inputs of tiny_runs.py into the folder, forks a child for each, which
arms the library for files under one folder. Pictures of one pixel are written in place of figures, which would take
more time than all the rest.
"""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

from tiny_runs import write_configs, write_models

HERE = Path(__file__).resolve().parent
# What the library does at the operation that it is armed for.
KILL, TORN, ENOSPC, EIO, EACCES = 1, 2, 3, 4, 5
HANGS = 99
LIMITS = {"files": resource.RLIMIT_NOFILE, "size": resource.RLIMIT_FSIZE, "memory": resource.RLIMIT_DATA}
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001"
    "a5f645400000000049454e44ae426082"
)


class Forks:
    """The server, as a context manager; ``run`` sends it a command.

    Args:
        work: The folder that commands run in; gets their configurations and models.
    """

    def __init__(self, work):
        self.work = Path(work)

    def __enter__(self):
        library = self.work / "fault_shim.so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "fault_shim.c", "-ldl"], check=True)
        more = {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        more["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.server = subprocess.Popen(
            [sys.executable, __file__, str(self.work)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | more,
            text=True,
        )
        return self

    def __exit__(self, *_):
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()

    def run(self, argv, folder, *, must=None, **order):
        """Run a command in a child; return its exit code, its output and its seconds.

        Args:
            argv: The command line after ``clmerge``.
            folder: Folder whose files are counted.
            must: Exit code without which all ends here.
            order: ``mode`` and ``at`` for the library, and ``log`` for its list of operations; ``signal`` and
                ``after``, seconds from the start of the command; ``twins`` for several at once; ``files``, ``size``
                and ``memory`` for limits; ``clock`` for one that runs backwards.
        """
        order |= {"argv": list(map(str, argv)), "prefix": str(self.work / folder)}
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        answer = json.loads(self.server.stdout.readline())
        if must is not None and answer["code"] != must:
            raise SystemExit(f"{argv} ended with {answer['code']}:\n{answer['text'][-3000:]}")
        return answer


def serve(work):
    """Answer orders on stdin until it ends."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.chdir(work)
    warnings.filterwarnings("ignore")
    library = ctypes.CDLL(os.environ.pop("LD_PRELOAD"))
    write_configs(Path(work))
    write_models(Path(work) / "models")
    import_everything()
    for line in sys.stdin:
        order = json.loads(line)
        answers = [watch(*child, order) for child in [fork(order, library) for _ in range(order.get("twins", 1))]]
        channel.write(json.dumps(answers[0] | {"twins": answers[1:]}) + "\n")
    return 0


def import_everything():
    """Load what commands load when they first need it, so that children need not."""
    import avalanche.benchmarks  # noqa: F401
    import matplotlib.backends.backend_agg  # noqa: F401
    import open_clip  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import timm  # noqa: F401
    import torch
    import wandb  # noqa: F401

    import clmerge.figures
    import clmerge.report
    import clmerge.runs.learner
    import clmerge.streams.overlap
    import clmerge.streams.overview
    from clmerge.cli import compare, fit, merge, report

    torch.set_num_threads(1)
    clmerge.figures.to_png = clmerge.report.to_png = lambda figure: PIXEL
    clmerge.report.draw = lambda chart: None
    clmerge.report.page.draw_panels = lambda chart: []
    for name in [name for name in vars(clmerge.figures) if name.startswith("plot_") and name != "plot_files"]:
        setattr(clmerge.figures, name, lambda *_, **__: None)
    for command in (compare, merge, report):
        command.build_parser()
    for config in Path.cwd().glob("*.yaml"):  # fills caches of the parser
        fit.build_parser().parse_args(["--config", str(config)])


def fork(order, library):
    """Start a child; return its process id, the end of a pipe that closes when it begins, and its output."""
    output = tempfile.TemporaryFile()  # noqa: SIM115
    begins, begun = os.pipe()
    child = os.fork()
    if child:
        os.close(begun)
        return child, begins, output
    code = 70
    try:
        os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
        os.setsid()
        code = run_child(order, library, begun)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code or 0)


def run_child(order, library, begun):
    """Run the command of an order in a world that is as bad as it says."""
    from clmerge.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in its background without it
    for name, limit in LIMITS.items():
        if order.get(name):
            resource.setrlimit(limit, (order[name], order[name]))
    if order.get("clock"):
        real, start = time.time, time.time()
        time.time = lambda: start - 5 * (real() - start) - 86400 * 400
    what = order.get("mode", 0), ctypes.c_long(order.get("at", 0)), order.get("log", "").encode()
    library.shim_arm(order["prefix"].encode(), *what)
    os.close(begun)
    try:
        return main(order["argv"])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)


def watch(child, begins, output, order):
    """Wait for a child, and send it the signal that is ordered."""
    os.read(begins, 1)
    os.close(begins)
    began, sent, code = time.monotonic(), False, None
    while code is None:
        done, state = os.waitpid(child, os.WNOHANG)
        passed = time.monotonic() - began
        if done:
            code = os.waitstatus_to_exitcode(state)
        elif order.get("signal") and not sent and passed >= order["after"]:
            os.kill(child, order["signal"])
            sent = True
        elif passed > 300:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            code = HANGS
        else:
            time.sleep(0.002)
    output.seek(0)
    text = output.read(1 << 20).decode("utf-8", "replace")
    output.close()
    return {"code": code, "text": text, "seconds": passed}


if __name__ == "__main__":
    os._exit(serve(sys.argv[1]))  # the libraries' own endings may wait for threads that a fork has never had
