"""Disturb clmerge at its file operations and at other moments, go on, and compare with an undisturbed run.

    kill_points.py [--seed N] [--points N] [--what fit,branches,...] [--modes kill,torn,...] [--log FILE] [--keep DIR]

``kill`` ends the process by SIGKILL before the n-th file operation under its folder, ``torn`` in the middle of the n-th
write; ``enospc`` lets the disk be full from the n-th on, ``eio`` lets the n-th fail; ``time`` is SIGKILL, ``term``,
``int`` and ``hup`` are those signals after some seconds. For every command and mode, ``--points`` of them are spread
evenly over the run, from an offset that the seed chooses; 0 takes every operation there is. Then the command is run
again (``--resume`` for a fit) and must succeed, give the same bits, and leave nothing that an undisturbed one does not.
A first run that fails says why in words and without a traceback; one that a signal ends has 128 + its number as exit
code, and a fit says how it is resumed. Needs gcc. Prints one line; exits 1 on a fault.
"""

import argparse
import hashlib
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from forks import EIO, ENOSPC, HANGS, KILL, TORN, Forks
from tiny_runs import VARIANTS

CALLS = {"kill": KILL, "torn": TORN, "enospc": ENOSPC, "eio": EIO}
SIGNALS = {"time": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT, "hup": signal.SIGHUP}
SCENES = (*VARIANTS, "merge", "shards", "compare", "report")
MERGE = "merge --base models/base.safetensors --models models/m0.safetensors models/m1.safetensors --merger TIES"
COMMANDS = {name: (f"fit --config {name}.yaml --run_dir run", "run") for name in VARIANTS} | {
    "merge": (f"{MERGE} --out out/merged.safetensors", "out"),
    "shards": (f"{MERGE} --out out/merged --shard-size 40KB --overwrite", "out"),
    "compare": ("compare done --mergers MagMax TIES --scale 0.4:0.8:0.2 --out cmp", "cmp"),
    "report": ("report done --out rep/report.html", "rep"),
}
# What no two runs have in common.
TIMES = ("seconds", "merge_seconds", "time", "created", "files")


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--points", type=int, default=3)
    parser.add_argument("--what", default=",".join(SCENES))
    parser.add_argument("--modes", default=",".join([*CALLS, *SIGNALS]))
    parser.add_argument("--log", default="", help="gets a line of JSON for every disturbance")
    parser.add_argument("--keep", default="", help="gets a copy of the folder of every fault")
    return parser


def main():
    options = build_parser().parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill_points.") as folder, Forks(folder) as forks:
        tester = Tester(forks, options)
        tester.sweep()
    shown = ", ".join(f"{count} {what}" for what, count in sorted(tester.counts.items()))
    print(
        f"kill_points: {tester.number} disturbances in {time.monotonic() - started:.0f} s (seed {options.seed}): "
        f"{shown}; {len(tester.faults)} faults"
    )
    return 1 if tester.faults or not tester.number else 0


class Scene:
    """One command, what it leaves, and how it goes on.

    Args:
        name: Its name in ``COMMANDS``.
        forks: Runs it, undisturbed: twice, to see what differs anyway.
    """

    def __init__(self, name, forks):
        command, folder = COMMANDS[name]
        self.name, self.argv, self.folder = name, command.split(), folder
        self.work, self.root = forks.work, forks.work / folder
        log = self.work / f"operations-{name}.txt"
        self.clean()
        forks.run(self.argv, folder, must=0, log=str(log))
        self.lines = [line.split(" ", 2)[1:] for line in log.read_text().splitlines()]
        self.wanted = contents(self.root)
        self.clean()
        self.seconds = forks.run(self.argv, folder, must=0)["seconds"]
        assert not (different := differences(contents(self.root), self.wanted)), f"two undisturbed runs: {different}"

    def clean(self):
        """Make the world as it is before the command."""
        shutil.rmtree(self.root, ignore_errors=True)
        if self.name == "shards":
            shutil.copytree(self.work / "older", self.root)

    def moments(self, mode, points, rng):
        """Return the operations, or the seconds, at which a mode strikes."""
        if mode in SIGNALS:
            offset = rng.random()
            return [self.seconds * (number + offset) / (points or 20) for number in range(points or 20)]
        found = [n for n, (call, _) in enumerate(self.lines, 1) if mode != "torn" or "write" in call]
        if not points or points >= len(found):
            return found
        offset = rng.random()
        return [found[int(len(found) * (number + offset) / points)] for number in range(points)]

    def what(self, at):
        """Say what an operation is."""
        call, path = self.lines[at - 1]
        return f"{call} {hide(path.removeprefix(f'{self.root}/'))}"

    def go_on(self):
        """Return the command that finishes what was begun."""
        if self.argv[0] == "fit" and (self.root / "manifest.json").is_file():
            return ["fit", "--resume", self.folder]
        if self.name == "merge" and (self.root / "merged.safetensors").exists():
            return [*self.argv, "--overwrite"]
        return self.argv  # nothing was committed: what a user would do is begin again

    def half_written(self):
        """Say what is under its final name and not whole, right after the disturbance."""
        for name in ("merged.safetensors", "report.html"):
            if (self.root / name).exists() and contents(self.root)[name] != self.wanted[name]:
                return [f"{name} is half-written under its final name"]
        return []


class Tester:
    """Disturb scenes, and keep count.

    Args:
        forks: Runs commands.
        options: The command line.
    """

    def __init__(self, forks, options):
        self.forks, self.options = forks, options
        self.counts, self.faults, self.number = Counter(), [], 0

    def sweep(self):
        """Run all that the options name."""
        names, modes = self.options.what.split(","), self.options.modes.split(",")
        if "shards" in names:  # an older result is replaced
            self.forks.run([*MERGE.split(), "--out", "older/merged", "--shard-size", "60KB"], "older", must=0)
        if {"compare", "report"} & set(names):
            self.forks.run(["fit", "--config", "fit.yaml", "--run_dir", "done"], "done", must=0)
        for name in names:
            scene = Scene(name, self.forks)
            print(f"  {name}: {len(scene.lines)} file operations, {scene.seconds:.1f} s", file=sys.stderr, flush=True)
            for mode in modes:
                rng = random.Random(f"{self.options.seed} {name} {mode}")
                for at in scene.moments(mode, self.options.points, rng):
                    self.disturb(scene, mode, at)

    def disturb(self, scene, mode, at):
        """Run a command, disturbed, then go on and compare."""
        scene.clean()
        if mode in CALLS:
            where = f"{mode} at operation {at} ({scene.what(at)})"
            found = self.forks.run(scene.argv, scene.folder, mode=CALLS[mode], at=at)
        else:
            where = f"{mode} after {at:.2f} of {scene.seconds:.2f} s"
            found = self.forks.run(scene.argv, scene.folder, signal=SIGNALS[mode], after=at)
        self.number += 1
        self.counts[mode] += 1
        bad = [*ending(scene, mode, found), *scene.half_written()]
        again = self.forks.run(scene.go_on(), scene.folder)
        if again["code"]:
            bad.append(f"going on ended with {again['code']}: {last_lines(again['text'])}")
        else:
            bad += differences(contents(scene.root), scene.wanted)
        self.faults += [f"{scene.name} {where}: {fault}" for fault in bad]
        for fault in bad:
            print(f"  FAULT {scene.name} {where}: {fault}", file=sys.stderr, flush=True)
        if self.options.log:
            texts = {"text": found["text"][-1500:], "again": again["text"][-1500:]}
            entry = {"scene": scene.name, "where": where, "code": found["code"], "bad": bad} | texts
            with Path(self.options.log).open("a") as file:
                file.write(json.dumps(entry) + "\n")
        if bad and self.options.keep:
            shutil.copytree(scene.root, Path(self.options.keep) / f"{scene.name}-{self.number}")


def ending(scene, mode, found):
    """Say what is wrong with how a disturbed command ended."""
    code, text = found["code"], found["text"]
    if code == HANGS:
        return ["hangs"]
    if code == 0:  # it got to its end in spite of it
        return [f"exit code 0 and {fault}" for fault in differences(contents(scene.root), scene.wanted)]
    bad = []
    if mode not in ("kill", "torn", "time"):
        if "Traceback (most recent" in text:
            bad.append(f"traceback: {last_lines(text)}")
        if not text.strip():
            bad.append("no message")
    if mode in ("term", "int", "hup"):
        if code != 128 + SIGNALS[mode]:
            bad.append(f"ends with {code}: {last_lines(text)}")
        resumable = scene.argv[0] == "fit" and (scene.root / "checkpoints").is_dir()
        if resumable and f"resume with clmerge fit --resume {scene.folder}" not in text:
            bad.append(f"does not say how it is resumed: {last_lines(text)}")
    return bad


def contents(root):
    """Return what is in a folder, by path: a digest, without what no two runs have in common."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_dir():
            continue
        if path.suffix == ".json":
            found[name] = digest(json.dumps(without_times(json.loads(path.read_text())), sort_keys=True))
        elif path.suffix in (".html", ".csv", ".md", ".tex"):
            found[name] = digest(re.sub(r"[0-9.]+ s\b|SHA-256.*|[0-9a-f]{64}", "", path.read_text()))
        elif path.suffix == ".pt":
            found[name] = "there"  # pickles of equal tensors need not be equal
        else:
            found[name] = digest(path.read_bytes())
    return found


def differences(found, wanted):
    """Say how one folder's contents are not those of another."""
    return [
        *[f"left behind: {hide(name)}" for name in found if name not in wanted],
        *[f"missing: {name}" for name in wanted if name not in found],
        *[f"differs: {name}" for name in found if name in wanted and found[name] != wanted[name]],
    ]


def without_times(value):
    """Return a JSON document without the entries that no two runs have in common."""
    if isinstance(value, dict):
        own = {"name"} if "models" in value else set()  # a run's record has the name of its folder
        return {key: without_times(entry) for key, entry in value.items() if key not in own.union(TIMES)}
    return [without_times(entry) for entry in value] if isinstance(value, list) else value


def digest(content):
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def hide(name):
    """Write a file's name without what is random in it."""
    return re.sub(r"[0-9a-f]{32}", "HEX", re.sub(r"\.tmp\w{6}$", ".tmpXXXXXX", name))


def last_lines(text):
    return " | ".join(line for line in text.strip().splitlines()[-2:])[:300]


if __name__ == "__main__":
    raise SystemExit(main())
