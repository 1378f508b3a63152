"""Resume runs of clmerge whose folders were moved, damaged, shared or starved.

    resume_faults.py [--seed N] [--variants fit,branches,statistics] [--only NAME,...] [--log FILE]

A run of three tasks is killed between two epochs of its last task; copies of its folder are damaged in one way each,
and resumed. Where the damage can be passed over (``same``), the run must end with the bits of an undisturbed one. For
the rest (``refused``) there must be an exit code above 0 and a message without a traceback that names the file, and no
file may have gone or changed; after the damage is undone the run must end with the same bits. The seed chooses where
files are cut and which bits are flipped. Needs gcc. Prints one line; exits 1 on a fault.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from forks import EACCES, ENOSPC, HANGS, KILL, Forks
from kill_points import contents, differences, last_lines
from tiny_runs import VARIANTS

STATE = "state/task_001"
# The checkpoint that the killed run leaves.
CHECKPOINTS = {"branches": "checkpoints/task_002_branch_001.ckpt"} | dict.fromkeys(
    ("fit", "statistics"), "checkpoints/task_002.ckpt"
)
BRANCH = "state/task_002_branch_001.pt"


@dataclass
class Case:
    """One damage: what it does to a run folder, what must come of it, and what a message may name."""

    damage: object
    names: tuple = ()
    job: dict = field(default_factory=dict)

    @property
    def refused(self):
        return bool(self.names)


def cases(rng, checkpoint):
    """Return the damages by name; ``rng`` chooses positions."""

    def cut(name):
        return lambda run: (run / name).write_bytes((data := (run / name).read_bytes())[: rng.randrange(len(data))])

    def content(name, data):
        return lambda run: (run / name).write_bytes(data)

    def gone(name):
        return lambda run: shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()

    def folder(name):
        return lambda run: ((run / name).unlink(), (run / name).mkdir())

    def flip(name):
        def damage(run):
            data = bytearray((run / name).read_bytes())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            (run / name).write_bytes(data)

        return damage

    def swap(one, two):
        def damage(run):
            first, second = (run / one).read_bytes(), (run / two).read_bytes()
            (run / one).write_bytes(second), (run / two).write_bytes(first)

        return damage

    def manifest(**new):
        def damage(run):
            found = json.loads((run / "manifest.json").read_text())
            (run / "manifest.json").write_text(json.dumps(found | new))

        return damage

    def config(old, new):
        def damage(run):
            text = (run / "config.yaml").read_text()
            assert old in text, old
            (run / "config.yaml").write_text(text.replace(old, new))

        return damage

    def half_written(run):
        for name in ("", "bank", "state", "checkpoints"):
            (run / name / ".task_9.abc.tmp").write_bytes(b"x")

    def nothing(run):
        pass

    found = {
        "nothing": Case(nothing),
        "moved": Case(nothing, job={"move": True}),
        "three at once": Case(nothing, job={"twins": 3}),
        "clock backwards": Case(nothing, job={"clock": True}),
        "half-written files": Case(half_written),
        "results gone": Case(gone("results.json")),
        "results cut": Case(cut("results.json")),
        "config gone": Case(gone("config.yaml")),
        "checkpoint gone": Case(gone(checkpoint)),
        "checkpoint cut": Case(cut(checkpoint)),
        "checkpoint empty": Case(content(checkpoint, b"")),
        "checkpoint garbage": Case(content(checkpoint, rng.randbytes(9999))),
        "checkpoint flipped": Case(flip(checkpoint)),
        "checkpoint a folder": Case(folder(checkpoint)),
        "manifest cut": Case(cut("manifest.json"), ("manifest.json",)),
        "manifest empty": Case(content("manifest.json", b""), ("manifest.json",)),
        "manifest binary": Case(content("manifest.json", b"\xff\xfe\0\0"), ("manifest.json",)),
        "manifest a folder": Case(folder("manifest.json"), ("manifest.json", "run")),
        "manifest schema": Case(manifest(schema=9), ("manifest.json",)),
        "manifest extra": Case(manifest(more=1), ("manifest.json",)),
        "manifest types": Case(manifest(trained="2"), ("manifest.json",)),
        "manifest ahead": Case(manifest(trained=3, evaluated=3), ("manifest.json",)),
        "manifest results": Case(manifest(results={"schema": 1}), ("manifest.json",)),
        "manifest state": Case(manifest(state="../../nowhere"), ("manifest.json",)),
        "manifest state null": Case(manifest(state=None), ("manifest.json",)),
        "config cut": Case(cut("config.yaml"), ("config.yaml",)),
        "config empty": Case(content("config.yaml", b""), ("config.yaml",)),
        "config other seed": Case(config("seed: 0\n", "seed: 1\n"), ("config.yaml",)),
        "config other tasks": Case(config("num_tasks: 3", "num_tasks: 2"), ("config.yaml",)),
        "config other rate": Case(config("lr: 0.003", "lr: 0.9"), ("config.yaml",)),
        "config other batch": Case(config("batch_size: 8", "batch_size: 4"), ("config.yaml",)),
        "bank gone": Case(gone("bank"), ("bank/task_000",)),
        "bank swapped": Case(swap("bank/task_000.safetensors", "bank/task_001.safetensors"), ("bank/task_00",)),
        "read-only": Case(nothing, ("ermission denied",), {"mode": EACCES, "at": 1}),
        "disk full": Case(nothing, ("no space left", "No space left"), {"mode": ENOSPC, "at": 1}),
        "disk full later": Case(
            nothing, ("no space left", "No space left"), {"mode": ENOSPC, "at": rng.randrange(20, 80)}
        ),
        "few file handles": Case(nothing, ("Too many open files",), {"files": 24}),
        "small files": Case(nothing, ("File too large",), {"size": 12 << 10}),
    }
    committed = [f"{STATE}/accumulators.pt", f"{STATE}/module.safetensors", "bank/task_000.safetensors"]
    for name in [*committed, "bank/task_001.safetensors", *([BRANCH] if "branch" in checkpoint else [])]:
        for damage in (cut, flip, gone):
            found[f"{name} {damage.__name__}"] = Case(damage(name), (name,))
    return found


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--only", default="", help="names of damages, separated by commas")
    parser.add_argument("--log", default="", help="gets a line of JSON for every damage")
    return parser


def main():
    options = build_parser().parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="resume_faults.") as folder, Forks(folder) as forks:
        counts, faults = resume(forks, options)
    shown = ", ".join(f"{count} {what}" for what, count in counts.items())
    took = f"{time.monotonic() - started:.0f} s (seed {options.seed})"
    print(f"resume_faults: {counts.total()} damages in {took}: {shown}; {len(faults)} faults")
    return 1 if faults or not counts else 0


def resume(forks, options):
    """Resume after every damage to every variant; return how many resumes ended how, and what was wrong."""
    counts, faults = Counter(), []
    for variant in options.variants.split(","):
        killed = Killed(forks, variant)
        for name, case in cases(random.Random(f"{options.seed} {variant}"), CHECKPOINTS[variant]).items():
            if options.only and name not in options.only.split(","):
                continue
            found, bad = killed.resume(case)
            counts["refused" if found["code"] else "went on"] += 1
            faults += bad
            word = "FAULT" if bad else "ok"
            told = f"{found['code']} {last_lines(found['text'])} {bad}"
            print(f"  {word} {variant} {name}: {told}", file=sys.stderr, flush=True)
            if options.log:
                entry = {"variant": variant, "name": name, "bad": bad, **found}
                with Path(options.log).open("a") as file:
                    file.write(json.dumps(entry) + "\n")
    return counts, faults


class Killed:
    """A run that was killed in its last task, and what it comes to where it is not.

    Args:
        forks: Runs commands.
        variant: Name of the configuration.
    """

    def __init__(self, forks, variant):
        self.forks, self.work, log = forks, forks.work, forks.work / "operations.txt"
        log.unlink(missing_ok=True)
        for name in ("whole", "killed"):
            shutil.rmtree(self.work / name, ignore_errors=True)
        fit = ["fit", "--config", f"{variant}.yaml", "--run_dir"]
        forks.run([*fit, "whole"], "whole", must=0, log=str(log))
        self.wanted = contents(self.work / "whole")
        lines = log.read_text().splitlines()
        checkpoint = CHECKPOINTS[variant]
        written = next(n for n, line in enumerate(lines, 1) if " rename " in line and line.endswith(checkpoint))
        forks.run([*fit, "killed"], "killed", must=-9, mode=KILL, at=written + 1)
        assert (self.work / "killed" / checkpoint).is_file()

    def resume(self, case):
        """Damage a copy of the run, resume it, and say what is wrong with what comes of it."""
        job, run = dict(case.job), self.work / "run"
        for name in ("run", "elsewhere"):
            shutil.rmtree(self.work / name, ignore_errors=True)
        shutil.copytree(self.work / "killed", run)
        if job.pop("move", False):
            run = run.rename(self.work / "elsewhere")
        case.damage(run)
        before = files(run)
        found = self.forks.run(["fit", "--resume", run.name], run.name, **job)
        if found["twins"]:
            return found, self.several(found, run)
        bad = self.refusal(case, found, before, run) if found["code"] else self.success(case, run)
        return found, bad

    def success(self, case, run):
        different = differences(contents(run), self.wanted)
        # Under a limit, a run that does not reach it may go on.
        return [f"not refused, and {fault}" if case.refused else fault for fault in different]

    def refusal(self, case, found, before, run):
        text, bad = found["text"], []
        if found["code"] == HANGS:
            return ["hangs"]
        if "Traceback (most recent" in text:
            bad.append("traceback")
        if not case.refused:
            bad.append("refused")
        elif not any(name in text for name in case.names):
            bad.append(f"the message names none of {case.names}")
        after = files(run)
        if not case.job and before != after:
            changed = [name for name in before | after if before.get(name) != after.get(name)]
            bad.append(f"a refused resume changes {changed[:3]}")
        if not case.job:
            self.repair(run, after)
        again = self.forks.run(["fit", "--resume", run.name], run.name)
        if again["code"]:
            return [*bad, f"repaired, it ends with {again['code']}: {last_lines(again['text'])}"]
        return bad + [f"repaired, it {fault}" for fault in differences(contents(run), self.wanted)]

    def repair(self, run, after):
        """Put every file back that is not as the killed run left it."""
        for name, content in files(self.work / "killed").items():
            if after.get(name) != content:
                target = run / name
                if target.is_dir():
                    target.rmdir()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)

    def several(self, found, run):
        """Judge several processes that were started at once: one works, and the others say who does."""
        all_of_them = [found, *found["twins"]]
        codes = sorted(one["code"] for one in all_of_them)
        others = [one["text"] for one in all_of_them if one["code"]]
        bad = differences(contents(run), self.wanted)
        if 0 not in codes or set(codes) - {0, 1}:
            bad.append(f"exit codes {codes}")
        if not all("has been writing since" in text or "another process writes" in text for text in others):
            bad.append(f"the others do not say who works: {[last_lines(text) for text in others]}")
        return bad


def files(run):
    found = (path for path in run.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in found}


if __name__ == "__main__":
    raise SystemExit(main())
