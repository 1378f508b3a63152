"""Fuzz `clmerge merge` with damaged and hostile inputs.

    fuzz_merge.py CLMERGE [SEED] [BUDGET_SECONDS] [--only CATEGORY,...] [--case CATEGORY:N] [--process N] [--log FILE]

CLMERGE is the command (its python, which lies beside it, runs the inputs in-process through `clmerge.cli.main`); every
`--process`-th input goes through the real command instead. Every outcome must be a result that an independent
calculation confirms, or an exit code above 0 with one message that names the file or the option. Faults: traceback,
crash (signal), hang, memory, exec (code of an input ran), leftover (files beside the output), changed (an input was
written to), wrong (another result), nan (a result with NaN made of finite inputs). Prints one line; exits 1 if there is
any fault. Messages that do not name the file (`unnamed`) or run over many lines (`long`) are counted, and are faults
with --strict. `--first` begins at another input, `--count` ends after so many.
"""

import argparse
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HANG = 12.0  # seconds that the processor works on one input
WAIT = 60.0  # seconds that pass meanwhile, on a machine that others use, too
FAULTS = ("traceback", "crash", "hang", "memory", "exec", "leftover", "changed", "wrong", "nan")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("clmerge")
    parser.add_argument("seed", nargs="?", type=int, default=0)
    parser.add_argument("budget", nargs="?", type=float, default=60.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--case", default="")
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--log", default="")
    parser.add_argument("--strict", action="store_true")
    parser.add_argument(
        "--ignore", default="", help="regular expression of 'VERDICT category: kind' that is known and no fault"
    )
    parser.add_argument("--worker", type=int, default=-1)
    parser.add_argument("--work", default="")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1 << 60)
    parser.add_argument("--end", type=int, default=0)
    options = parser.parse_args()
    if options.worker >= 0:
        from merge_judge import worker  # torch, which the parent does without

        return worker(options)
    python = Path(options.clmerge).absolute().parent / "python"
    work = Path(tempfile.mkdtemp(prefix="fuzz_merge."))
    log = Path(options.log) if options.log else None
    counts, kinds, firsts = Counter(), Counter(), {}
    started, number = time.monotonic(), options.first
    options.end = options.first + options.count
    try:
        while time.monotonic() - started < options.budget:
            number = one_worker(python, options, work, number, started, counts, kinds, firsts, log)
            if options.case or number < 0 or number >= options.end:
                break
    finally:
        shutil.rmtree(work, ignore_errors=True)
    total = sum(counts.values())
    known = 0
    if options.ignore:
        for verdict, signature in list(kinds):
            if verdict in FAULTS and re.search(options.ignore, f"{verdict} {signature}"):
                known += kinds[verdict, signature]
                counts[verdict] -= kinds[verdict, signature]
                firsts.pop((verdict, signature), None)
        counts["known"] = known
    faults = sum(counts[kind] for kind in FAULTS)
    for (verdict, signature), first in firsts.items():
        if verdict in (*FAULTS, "unnamed", "long"):
            print(f"  {verdict} x{kinds[verdict, signature]}: {signature}\n      e.g. --case {first}", file=sys.stderr)
    seconds = time.monotonic() - started
    shown = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items(), key=lambda x: -x[1]))
    print(f"fuzz_merge: {total} inputs in {seconds:.0f} s (seed {options.seed}): {shown}; {faults} faults")
    bad = faults + (counts["unnamed"] + counts["long"] if options.strict else 0)
    return 1 if bad or not total else 0


def one_worker(python, options, work, number, started, counts, kinds, firsts, log):
    """Run a worker until it ends, hangs or the budget is spent; return the next input's number."""
    ours, theirs = os.pipe()
    given = {"worker": theirs, "work": work, "first": number, "end": options.end, "only": options.only}
    given |= {"case": options.case, "process": options.process}
    command = [str(python), __file__, options.clmerge, str(options.seed), str(options.budget)]
    command += [f"--{key}={value}" for key, value in given.items()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "WANDB_MODE": "offline"}
    child = subprocess.Popen(command, pass_fds=[theirs], env=environment, start_new_session=True)
    os.close(theirs)
    buffer, current, since, ready = b"", None, time.monotonic(), False
    verdict, work_before = None, 0.0
    try:
        while True:
            readable, _, _ = select.select([ours], [], [], 0.5)
            if readable:
                data = os.read(ours, 1 << 16)
                if not data:
                    break
                buffer += data
                *lines, buffer = buffer.split(b"\n")
                for line in lines:
                    message = json.loads(line)
                    since, work_before = time.monotonic(), used(child.pid)
                    if message["what"] == "ready":
                        ready = True
                    elif message["what"] == "begin":
                        current, number = message, message["number"]
                    elif message["what"] == "end":
                        tell(message, counts, kinds, firsts, log)
                        current, number = None, message["number"] + 1
                    if options.case and message["what"] == "end":
                        print(json.dumps(message, indent=1), file=sys.stderr)
                        print(message["stderr"], file=sys.stderr)
            more = 10 if not ready or (current or {}).get("process") else 1
            if used(child.pid) - work_before > HANG * more or time.monotonic() - since > WAIT * more:
                verdict = "hang"
                break
            if time.monotonic() - started > options.budget and current is None:
                break
        if child.poll() is None and (verdict or time.monotonic() - started > options.budget):
            os.killpg(child.pid, signal.SIGKILL)
        code = child.wait(timeout=60)
        if current is not None:
            if verdict is None:
                verdict = "crash"
            end = current | {
                "what": "end",
                "verdict": verdict,
                "rc": code,
                "stderr": "",
                "signature": f"{current['category']}: {current['name']}",
            }
            tell(end, counts, kinds, firsts, log)
            if options.case:
                print(json.dumps(end), file=sys.stderr)
            return number + 1
        return -1 if code == 0 and not verdict and time.monotonic() - started < options.budget else number
    finally:
        os.close(ours)


def used(process):
    """Return the seconds that a processor has worked for a process."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def tell(message, counts, kinds, firsts, log):
    counts[message["verdict"]] += 1
    key = message["verdict"], message["signature"]
    kinds[key] += 1
    firsts.setdefault(key, f"{message['category']}:{message['number']}")
    if log:
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(message) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
