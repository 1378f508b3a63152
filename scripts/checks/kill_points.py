"""Kill clmerge at file operations and at random moments, go on, and compare with an undisturbed run.

    kill_points.py CLMERGE [SEED] [BUDGET_SECONDS] [--what fit,merge,shards,compare,report] [--log FILE] [--keep]
                   [--modes kill,torn,time,enospc,eio,term,int,hup] [--config FILE] [--at OPERATION]

A library that is preloaded (fault_shim.c, compiled with gcc) counts what the process does to files under its folder:
open for writing, write, fsync, rename, unlink, mkdir, truncate. In mode `kill` the process gets SIGKILL before the n-th
of them, in `torn` in the middle of the n-th write, in `time` at a random moment; `enospc` lets the disk be full from
the n-th on, `eio` lets the n-th fail; `term`, `int` and `hup` send these signals at a random moment. Then the same is
run again (`--resume` for fit) and must succeed, give the same bits, and leave nothing behind that an undisturbed run
does not leave. After `enospc` and `eio` the first run must say what is wrong in one message without a traceback and
with an exit code above 0, or succeed with the same bits. Children are forked from a process that has imported
everything. Prints one line; exits 1 on a fault.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
KILLS = {"kill": 1, "torn": 2, "enospc": 3, "eio": 4}
SIGNALS = {"time": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT, "hup": signal.SIGHUP}
CONFIG = """
name: killed
stream:
  class_path: ClassIncremental
  init_args: {source: {class_path: SklearnDigits, init_args: {test_fraction: 0.05}}, num_tasks: 3, val_fraction: 0.1}
model:
  backbone: OpenClip
  loss_classes: all
  optimizer: {class_path: AdamW, init_args: {lr: 2e-4}}
mergers: [MagMax, TIES, RandomMix]
data: {batch_size: 32}
learner: {start_policy: merged}
trainer: {max_epochs: 2, accelerator: cpu, log_every_n_steps: 1, limit_train_batches: 3, limit_val_batches: 1}
logging: {wandb: false}
"""


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("clmerge")
    parser.add_argument("seed", nargs="?", type=int, default=0)
    parser.add_argument("budget", nargs="?", type=float, default=120.0)
    parser.add_argument("--what", default="fit,merge,shards,compare,report")
    parser.add_argument("--modes", default="kill,torn,time")
    parser.add_argument("--log", default="")
    parser.add_argument("--at", type=int, default=0)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--config", default="")
    parser.add_argument("--server", action="store_true")
    options = parser.parse_args()
    if options.server:
        return serve()
    work = Path(tempfile.mkdtemp(prefix="kill_points."))
    library = work / "fault_shim.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "fault_shim.c", "-ldl"], check=True)
    python = Path(options.clmerge).absolute().parent / "python"
    environment = os.environ | {
        "LD_PRELOAD": str(library),
        "SHIM": str(library),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
    }
    server = subprocess.Popen(
        [python, __file__, "x", "--server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
        cwd=work,
    )
    try:
        return Tester(options, work, server).run()
    finally:
        server.stdin.close()
        server.wait(timeout=30)
        if not options.keep:
            shutil.rmtree(work, ignore_errors=True)


class Tester:
    def __init__(self, options, work, server):
        self.options, self.work, self.server = options, work, server
        self.rng = random.Random(options.seed)
        self.counts, self.faults = Counter(), []
        self.log = Path(options.log).open("a") if options.log else None  # noqa: SIM115

    def run(self):
        started = time.monotonic()
        kinds = self.options.what.split(",")
        scenes = {}
        (self.work / "config.yaml").write_text(Path(self.options.config).read_text() if self.options.config else CONFIG)
        if {"compare", "report"} & set(kinds):
            self.job(["fit", "--config", "config.yaml", "--run_dir", "done"], "done", must=0)
        if {"merge", "shards"} & set(kinds):
            self.job(["make-models"], "models", must=0)
        for kind in kinds:
            scenes[kind] = Scene(kind, self)
        number = 0
        while time.monotonic() - started < self.options.budget:
            modes = self.options.modes.split(",")
            kind, mode = kinds[number % len(kinds)], modes[(number // len(kinds)) % len(modes)]
            self.one(scenes[kind], mode, number)
            number += 1
            if self.options.at:
                break
        for kind, scene in scenes.items():
            print(f"  {kind}: {scene.operations} file operations, {scene.seconds:.1f} s undisturbed", file=sys.stderr)
        for fault in self.faults:
            print(f"  FAULT {fault}", file=sys.stderr)
        shown = ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items()))
        print(
            f"kill_points: {number} disturbances in {time.monotonic() - started:.0f} s (seed {self.options.seed}): "
            f"{shown}; {len(self.faults)} faults"
        )
        return 1 if self.faults or not number else 0

    def job(self, argv, folder, *, mode=0, at=0, sig=0, after=0.0, must=None, log="", **more):
        """Run a command in a forked child; return exit code, stdout+stderr, seconds and the number of operations."""
        order = {
            "argv": argv,
            "prefix": str(self.work / folder),
            "mode": mode,
            "at": at,
            "sig": sig,
            "after": after,
            "log": log,
            "cwd": str(self.work),
        } | more
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        answer = json.loads(self.server.stdout.readline())
        if must is not None and answer["code"] != must:
            raise SystemExit(f"kill_points: {argv} ended with {answer['code']}:\n{answer['text'][-3000:]}")
        return answer

    def one(self, scene, mode, number):
        rng = random.Random(f"{self.options.seed}-{number}")
        scene.clean()
        where = ""
        if mode in KILLS:
            at = self.options.at or scene.choose(rng, mode)
            found = self.job(scene.argv, scene.name, mode=KILLS[mode], at=at)
            where = f"{mode} at operation {at} ({scene.what(at)})"
        else:
            after = rng.uniform(0.0, scene.seconds)
            found = self.job(scene.argv, scene.name, sig=SIGNALS[mode], after=after)
            where = f"{mode} after {after:.2f} s of {scene.seconds:.2f}"
        self.counts[f"{scene.kind}/{mode}"] += 1
        bad = []
        if found["code"] == 99:
            bad.append("hangs")
        if (
            mode in ("enospc", "eio", "term", "int", "hup")
            and found["code"] not in (0,)
            and "Traceback (most recent" in found["text"]
        ):
            last = [x for x in found["text"].splitlines() if x.strip()][-1][:150]
            bad.append(f"traceback: {last}")
        if mode in ("enospc", "eio") and found["code"] == 0:
            bad += [f"exit 0 and {x}" for x in scene.differences()]
        if mode in ("enospc", "eio") and found["code"] > 0 and not found["text"].strip():
            bad.append("no message")
        left_now = scene.half_written()
        second = ""
        if rng.random() < 0.25 and mode in ("kill", "torn", "time") and scene.can_go_on():
            # killed again while it goes on
            after = rng.uniform(0.0, scene.seconds)
            again = self.job(scene.go_on(), scene.name, sig=signal.SIGKILL, after=after)
            second = f", killed again after {after:.2f} s ({again['code']})"
            self.counts["second kills"] += 1
        resumed = self.job(scene.go_on(), scene.name)
        if resumed["code"] != 0:
            bad.append(
                f"going on ended with {resumed['code']}: {' | '.join(resumed['text'].strip().splitlines()[-2:])[:300]}"
            )
        else:
            bad += scene.differences()
        bad += left_now
        if self.log:
            self.log.write(
                json.dumps(
                    {
                        "kind": scene.kind,
                        "where": where + second,
                        "code": found["code"],
                        "resumed": resumed["code"],
                        "bad": bad,
                        "text": found["text"][-1500:],
                        "text2": resumed["text"][-1500:],
                    }
                )
                + "\n"
            )
            self.log.flush()
        self.faults += [f"{scene.kind} {where}{second}: {x}" for x in dict.fromkeys(bad)]
        if bad and self.options.keep:
            shutil.copytree(self.work / scene.name, self.work / f"kept-{number}", dirs_exist_ok=True)


class Scene:
    """One command, what it leaves, and how it goes on after a kill."""

    def __init__(self, kind, tester):
        self.kind, self.tester, self.work = kind, tester, tester.work
        self.name = {"fit": "run", "merge": "out", "shards": "out", "compare": "cmp", "report": "rep"}[kind]
        models = [
            "--base",
            "models/base.safetensors",
            "--models",
            "models/m0.safetensors",
            "models/m1.safetensors",
            "--merger",
            "TIES",
        ]
        self.argv = {
            "fit": ["fit", "--config", "config.yaml", "--run_dir", "run"],
            "merge": ["merge", *models, "--out", "out/merged.safetensors"],
            "shards": ["merge", *models, "--out", "out/merged", "--shard-size", "3MB", "--overwrite"],
            "compare": ["compare", "done", "--mergers", "MagMax", "TIES", "--scale", "0.4:0.8:0.2", "--out", "cmp"],
            "report": ["report", "done", "--out", "rep/report.html"],
        }[kind]
        log = self.work / f"operations-{kind}.txt"
        self.clean()
        found = tester.job(self.argv, self.name, must=0, log=str(log))
        self.seconds = found["seconds"]
        self.lines = [line.split(" ", 2) for line in log.read_text().splitlines()]
        self.operations = len(self.lines)
        self.wanted = self.contents()
        if kind == "fit":  # a second undisturbed run tells what differs anyway
            self.clean()
            tester.job(self.argv, self.name, must=0)
            assert self.contents() == self.wanted, "two undisturbed runs differ"

    def clean(self):
        shutil.rmtree(self.work / self.name, ignore_errors=True)
        if self.kind == "shards":  # an older result is replaced
            (self.work / "out").mkdir()
            if (self.work / "older").is_dir():
                shutil.copytree(self.work / "older", self.work / "out/merged")

    def what(self, at):
        if at > len(self.lines):
            return "?"
        _, op, path = self.lines[at - 1]
        return f"{op} {os.path.relpath(path, self.work / self.name)}"

    def choose(self, rng, mode):
        """Choose an operation: every kind of operation on every kind of file is as likely."""
        import re

        groups = {}
        for number, op, path in self.lines:
            if mode == "torn" and "write" not in op:
                continue
            kind = re.sub(r"[0-9a-f]{32}|\.tmp\w{6}|\d+", "#", os.path.relpath(path, self.work / self.name))
            kind = re.sub(r"^(plots|logs|\w+_figures)/.*", r"\1", kind)
            groups.setdefault((op, kind), []).append(int(number))
        return rng.choice(groups[rng.choice(sorted(groups))]) if groups else 1

    def can_go_on(self):
        return self.kind != "fit" or (self.work / "run/manifest.json").is_file()

    def go_on(self):
        if self.kind == "fit":
            if self.can_go_on():
                return ["fit", "--resume", "run"]
            # nothing was committed: what a user would do is begin again
            if (self.work / "run").exists() and any((self.work / "run").iterdir()):
                self.tester.counts["begun again"] += 1
            return self.argv
        if self.kind == "merge" and (self.work / "out/merged.safetensors").exists():
            return [*self.argv, "--overwrite"]
        return self.argv

    def half_written(self):
        """What is wrong right after the kill, before anything goes on."""
        if self.kind == "merge":
            file = self.work / "out/merged.safetensors"
            if file.exists() and digest(file) != self.wanted["merged.safetensors"]:
                return ["a half-written output is there under its final name"]
        if self.kind == "report":
            file = self.work / "rep/report.html"
            if (
                file.exists()
                and "report.html" in self.wanted
                and self.contents()["report.html"] != self.wanted["report.html"]
            ):
                return ["a half-written page is there under its final name"]
        return []

    def contents(self):
        root = self.work / self.name
        found = {}
        for path in sorted(root.rglob("*")):
            name = str(path.relative_to(root))
            if path.is_dir() or path.name == ".lock" or name.startswith("logs/"):
                continue
            if path.suffix == ".json":
                try:
                    found[name] = digest_text(json.dumps(without_times(json.loads(path.read_text())), sort_keys=True))
                except ValueError:
                    found[name] = "not JSON"
            elif path.name == "config.yaml" or path.suffix == ".png":
                found[name] = "there"
            elif path.suffix in (".html", ".csv"):
                import re

                text = path.read_text()
                found[name] = (
                    digest_text(re.sub(r"[0-9.]+ s\b|SHA-256.*|[0-9a-f]{64}", "", text))
                    if path.suffix == ".csv" or self.kind == "report"
                    else "there"
                )
            elif path.suffix == ".pt":
                found[name] = "there"  # pickles of equal tensors need not be equal
            else:
                found[name] = digest(path)
        return found

    def differences(self):
        found = self.contents()
        bad = []
        ignore = (".tmp",) if self.kind in ("merge", "shards") else ()  # documented
        for name in sorted(set(found) | set(self.wanted)):
            if name not in self.wanted:
                if (not name.split("/")[0].endswith(ignore) and not name.endswith(ignore)) or not ignore:
                    bad.append(f"left behind: {hide(name)}")
            elif name not in found:
                bad.append(f"missing: {name}")
            elif found[name] != self.wanted[name]:
                bad.append(f"differs: {name}")
        return bad


def hide(name):
    import re

    return re.sub(r"[0-9a-f]{32}", "HEX", re.sub(r"\.tmp\w{6}$", ".tmpXXXXXX", name))


def without_times(value):
    if isinstance(value, dict):
        return {
            k: without_times(v)
            for k, v in value.items()
            if k not in ("seconds", "merge_seconds", "wandb_id", "time", "created", "files")
        }
    if isinstance(value, list):
        return [without_times(v) for v in value]
    return value


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digest_text(text):
    return hashlib.sha256(text.encode()).hexdigest()


# --------------------------------------------------------------------------------------------------------- the server


def serve():
    import ctypes
    import warnings

    warnings.filterwarnings("ignore")
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    library = ctypes.CDLL(os.environ["SHIM"])
    os.environ.pop("LD_PRELOAD", None)
    import torch

    torch.set_num_threads(1)
    import matplotlib.pyplot  # noqa: F401
    import sklearn.datasets  # noqa: F401

    import clmerge.cli.compare
    import clmerge.cli.fit
    import clmerge.cli.merge
    import clmerge.cli.report
    import clmerge.learner
    from clmerge.cli import main as command

    clmerge.cli.fit.build_parser()
    clmerge.cli.merge.build_parser()
    clmerge.cli.compare.build_parser()
    for line in sys.stdin:
        order = json.loads(line)
        began = time.monotonic()
        with tempfile.TemporaryFile() as output:
            twin = os.fork() if order.get("twin") else 0
            child = os.fork() if twin or not order.get("twin") else 0
            if child == 0:
                os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
                os.setsid()
                os.chdir(order["cwd"])
                code = 70
                try:
                    if order["argv"] == ["make-models"]:
                        code = make_models()
                    else:
                        prepare(order)
                        library.shim_arm(
                            order["prefix"].encode(), order["mode"], ctypes.c_long(order["at"]), order["log"].encode()
                        )
                        code = command(order["argv"])
                except SystemExit as stop:
                    code = stop.code if isinstance(stop.code, int) else 1
                except KeyboardInterrupt:
                    import traceback

                    traceback.print_exc()
                    code = 130
                except BaseException:
                    import traceback

                    traceback.print_exc()
                    code = 1
                finally:
                    try:
                        sys.stdout.flush(), sys.stderr.flush()
                        import threading

                        if order["sig"] in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                            import atexit

                            atexit._run_exitfuncs()
                        del threading
                    finally:
                        os._exit(code or 0)
            sent = False
            while True:
                pid, state = os.waitpid(child, os.WNOHANG)
                if pid:
                    break
                passed = time.monotonic() - began
                if order["sig"] and not sent and passed >= order["after"]:
                    os.kill(child, order["sig"])
                    sent = True
                if passed > 300:
                    os.killpg(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    state = 99 << 8
                    break
                time.sleep(0.002)
            other = os.waitstatus_to_exitcode(os.waitpid(twin, 0)[1]) if twin else None
            output.seek(0)
            text = output.read(1 << 20).decode("utf-8", "replace")
        channel.write(
            json.dumps(
                {
                    "twin": other,
                    "code": os.waitstatus_to_exitcode(state),
                    "text": text,
                    "seconds": time.monotonic() - began,
                }
            )
            + "\n"
        )
    return 0


def prepare(order):
    """Make the child's world worse: few file handles, small files, little memory, a clock that runs backwards."""
    import resource

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in its background without it
    for name, key in (
        ("files", resource.RLIMIT_NOFILE),
        ("size", resource.RLIMIT_FSIZE),
        ("memory", resource.RLIMIT_DATA),
    ):
        if order.get(name):
            resource.setrlimit(key, (order[name], order[name]))
    if order.get("clock"):
        real, start = time.time, time.time()
        time.time = lambda: start - 5 * (real() - start) - 86400 * 400


def make_models():
    import torch
    from safetensors.torch import save_file

    from clmerge.cli import main as command

    Path("models").mkdir(exist_ok=True)
    torch.manual_seed(0)
    base = {f"layer.{i}.weight": torch.randn(256, 512) for i in range(16)} | {
        f"layer.{i}.bias": torch.randn(256) for i in range(16)
    }
    save_file(base, "models/base.safetensors")
    for number in range(2):
        save_file({k: v + 0.1 * torch.randn_like(v) for k, v in base.items()}, f"models/m{number}.safetensors")
    names = ["--base", "models/base.safetensors", "--models", "models/m0.safetensors", "--merger", "MagMax"]
    return command(["merge", *names, "--out", "older", "--shard-size", "2MB"])


if __name__ == "__main__":
    raise SystemExit(main())
