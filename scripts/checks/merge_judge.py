"""One input to `clmerge merge`: run it, and judge what came of it."""

import json
import os
import random
import re
import resource
import shutil
import time
import warnings
from pathlib import Path

import torch
from merge_files import Case, use_sound_files
from merge_inputs import CATEGORIES
from merge_oracle import checked_result
from merge_process import as_a_process, captured, status

import clmerge.checkpoints.verify  # noqa: F401 - what merge and verify import is loaded before the clock runs
from clmerge.cli import main as command

MEMORY = 1 << 30  # what one tiny input may add to the resident set


def worker(options):
    warnings.filterwarnings("ignore")
    pipe = os.fdopen(options.worker, "w", buffering=1)
    torch.set_num_threads(1)
    work = Path(options.work)
    use_sound_files(options.seed)
    canary = work / "canary"
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (6 << 30, 6 << 30))
    os.environ["FUZZ_CANARY"] = str(canary)
    os.chdir(work)
    pipe.write(json.dumps({"what": "ready"}) + "\n")
    chosen, number = options.only.split(",") if options.only else list(CATEGORIES), options.first
    if options.case:
        category, _, at = options.case.partition(":")
        chosen, number = [category], int(at)
    while number < options.end:
        category, case = make_case(work / "case", options.seed, number, chosen)
        as_process = bool(options.process) and number % options.process == 0
        begin = {"what": "begin", "number": number, "category": category, "name": case.name, "process": as_process}
        pipe.write(json.dumps(begin) + "\n")
        found = judged(case, command, canary, options.clmerge if as_process else None)
        found["signature"] = f"{category}: {case.name}: {found.pop('signature')}"[:300]
        pipe.write(json.dumps(begin | {"what": "end"} | found) + "\n")
        if options.case:
            break
        number += 1
    return 0


def make_case(folder, seed, number, chosen=tuple(CATEGORIES)):
    """Return the category of an input and the input, which is made anew in a folder."""
    rng = random.Random(f"{seed}-{number}")
    category = rng.choices(list(CATEGORIES), [weight for _, weight in CATEGORIES.values()])[0]
    if category not in chosen:
        category = rng.choices(chosen, [CATEGORIES[name][1] for name in chosen])[0]
    rng = random.Random(f"{seed}-{category}-{number}")
    torch.manual_seed(rng.getrandbits(32))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    case = Case(folder, rng)
    CATEGORIES[category][0](case)
    return category, case


def snapshot(folder):
    found = {}
    for path in folder.rglob("*"):
        info = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() and info.st_size < 1 << 22 else b""
        found[str(path.relative_to(folder))] = (info.st_mode, info.st_size, hash(content))
    return found


def judged(case, command, canary, clmerge):
    before = snapshot(case.folder)
    began = time.monotonic()
    Path("/proc/self/clear_refs").write_text("5")
    resident = status("VmRSS")
    error = None
    if clmerge is None:
        out, err, rc, error = captured(command, ["merge", *case.argv])
    else:
        rc, out, err = as_a_process(clmerge, ["merge", *case.argv])
        if rc == -999:
            return {"verdict": "hang", "rc": rc, "stderr": err[-2000:], "seconds": 0, "signature": "process"}
    seconds = time.monotonic() - began
    grown = status("VmHWM") - resident
    after = snapshot(case.folder)
    new = sorted(set(after) - set(before))
    gone = sorted(set(before) - set(after))
    changed = [name for name in before if name in after and before[name] != after[name]]
    allowed = (
        {"out.safetensors", "outdir", case.output} | {name for name in new if name.startswith("outdir/")}
        if rc == 0
        else set()
    )
    text = " | ".join(err.strip().splitlines()[-1:])
    verdict, signature = "", text
    lines = [
        x for x in err.splitlines() if x.strip() and not re.match(r"(merging|verifying): |clmerge merge: warning", x)
    ]
    if canary.exists():
        canary.unlink()
        verdict = "exec"
    elif error is not None and "embedded null" in error and clmerge is None:
        verdict = "clean"  # no process can get such an argument
    elif error is not None or "Traceback (most recent call last)" in err or "panicked at" in err:
        verdict = "memory" if "MemoryError" in (error or "") + text else "traceback"
        signature = (error or text)[:200]
    elif isinstance(rc, int) and rc < 0:
        verdict, signature = "crash", f"signal {-rc}"
    elif grown > MEMORY:
        verdict, signature = "memory", f"{grown >> 20} MiB"
    elif [name for name in new if name not in allowed]:
        verdict, signature = "leftover", f"rc {rc}, {new[:3]}"
    elif gone or [name for name in changed if name not in ("outdir", "out.safetensors")]:
        verdict, signature = "changed", f"{gone[:2]} {changed[:2]}"
    elif rc == 0:
        verdict, signature = checked_result(case, out)
    elif not lines:
        verdict, signature = "unnamed", "no message at all"
    elif case.names and not any(str(name) in err for name in case.names):
        verdict = "unnamed"
    elif len(lines) > 6:
        verdict, signature = "long", f"{len(lines)} lines: {lines[0]}"
    else:
        verdict = "clean"
    signature = re.sub(r"0x[0-9a-f]+|/tmp/\S*?/case/?", "", signature)
    signature = re.sub(r"[^\x20-\x7e]", "?", signature)
    signature = re.sub(r"\d+", "N", signature)[:160]
    return {
        "verdict": verdict, "rc": rc, "stderr": err[-3000:], "seconds": round(seconds, 2), "grown": grown >> 20,
        "signature": signature, "argv": [str(a)[:200] for a in case.argv], "new": new[:5],
    }  # fmt: skip
