"""What grows with the number of tasks, models and tensors: memory, open files, seconds per task, the run folder.

    growth.py [--budget SECONDS] [--tasks 50] [--models 100] [--tensors 20000] [--what fit,models,tensors,handles]

``fit``: a stream of tiny tasks; resident memory and open files after task 10 and after the last, the median time per
task of the first and of the last ten, the run folder per task. ``models``: merging 100 models, peak memory against 2
models. ``tensors``: base and 2 models of 20,000 tensors. ``handles``: 100 models with 64 open files allowed. Prints one
line; exits 1 if memory grows by more than 40 % or 120 MiB, open files grow, an own part of a task takes more than 2.5
times as long, or a merge fails or gives another result than the sum.
"""

import argparse
import itertools
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = """
name: many
stream:
  class_path: ClassIncremental
  init_args: {{source: {{class_path: NpzSource, init_args: {{path: {npz}, templates: generic}}}}, num_tasks: {tasks}}}
model:
  backbone: OpenClip
  loss_classes: all
  optimizer: {{class_path: AdamW, init_args: {{lr: 1e-4}}}}
mergers: [MagMax, TIES]
data: {{batch_size: 8}}
trainer: {{max_epochs: 1, accelerator: cpu, log_every_n_steps: 1}}
logging: {{wandb: {wandb}}}
"""
MAKE = """
import sys, numpy as np
r = np.random.default_rng(0); n = int(sys.argv[2])
y = np.arange(n)
np.savez(sys.argv[1], train_images=r.integers(0, 255, (4*n, 12, 12), dtype=np.uint8), train_labels=np.tile(y, 4),
         test_images=r.integers(0, 255, (n, 12, 12), dtype=np.uint8), test_labels=y,
         classes=np.array([f"thing {i}" for i in range(n)]))
"""
MODELS = """
import sys, torch
from safetensors.torch import save_file
torch.manual_seed(0); count, tensors, side = map(int, sys.argv[1:4])
base = {f"l{i}.w": torch.randn(side, side) for i in range(tensors)}
save_file(base, "base.safetensors")
for k in range(count): save_file({n: t + 0.01 * torch.randn_like(t) for n, t in base.items()}, f"m{k}.safetensors")
"""
CHECK = """
import sys, torch
from safetensors import safe_open
count = int(sys.argv[1])
files = [safe_open(f"m{k}.safetensors", "pt") for k in range(count)]
base, out = safe_open("base.safetensors", "pt"), safe_open("out.safetensors", "pt")
names = list(out.keys()); assert sorted(names) == sorted(base.keys())
for n in names[:: max(1, len(names) // 50)]:
    b = base.get_tensor(n).double()
    want = b + sum(f.get_tensor(n).double() - b for f in files) / count
    assert torch.allclose(out.get_tensor(n).double(), want, atol=1e-4), n
print("right")
"""


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", type=float, default=900.0)
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--tensors", type=int, default=20000)
    parser.add_argument("--what", default="fit,models,tensors,handles")
    parser.add_argument("--wandb", default="false")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="growth."))
    os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    python = sys.executable
    said, faults = [], []
    try:
        for what in options.what.split(","):
            CHECKS[what](options, work, python, said, faults)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"growth: {'; '.join(said)}; {len(faults)} faults{': ' + '; '.join(faults) if faults else ''}")
    return 1 if faults else 0


def check_fit(options, work, python, said, faults):
    subprocess.run([python, "-c", MAKE, work / "d.npz", str(2 * options.tasks)], check=True)
    (work / "c.yaml").write_text(CONFIG.format(npz=work / "d.npz", tasks=options.tasks, wandb=options.wandb))
    command = [sys.executable, "-m", "clmerge", "fit", "--config", work / "c.yaml", "--run_dir", work / "run"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    rows, started, last = [], time.monotonic(), []
    for line in child.stderr:
        last = [*last, line][-15:]
        if match := re.match(r"task (\d+)/\d+ .*epoch 1/1", line):
            status = Path(f"/proc/{child.pid}/status").read_text()
            rss = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) >> 10
            threads = int(re.search(r"Threads:\s+(\d+)", status)[1])
            cpu = sum(
                map(int, Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13])
            ) / os.sysconf("SC_CLK_TCK")
            size = sum(f.stat().st_size for f in (work / "run").rglob("*") if f.is_file())
            rows.append((int(match[1]), rss, len(list(Path(f"/proc/{child.pid}/fd").iterdir())), threads, cpu, size))
        if time.monotonic() - started > options.budget:
            child.kill()
            break
    code = child.wait()
    if code != 0 and len(rows) < options.tasks:
        faults.append(
            f"fit ended with {code} after {len(rows)} tasks: {''.join(last)[-200:]!r}"
            if len(rows) < 20
            else f"only {len(rows)} tasks in the budget"
        )
    if len(rows) < 20:
        return
    early, late = rows[9], rows[-1]
    seconds = [b[4] - a[4] for a, b in itertools.pairwise(rows)]
    first, final = statistics.median(seconds[1:11]), statistics.median(seconds[-10:])
    said.append(
        f"{len(rows)} tasks: RSS {early[1]} -> {late[1]} MiB, files {early[2]} -> {late[2]}, "
        f"threads {early[3]} -> {late[3]}, "
        f"CPU per task {first:.2f} -> {final:.2f} s, folder {late[5] / len(rows) / 1e6:.2f} MB/task"
    )
    if late[1] > 1.4 * early[1] or late[1] > early[1] + 120:
        faults.append(f"memory grows from {early[1]} to {late[1]} MiB")
    if late[2] > early[2] + 8:
        faults.append(f"open files grow from {early[2]} to {late[2]}")
    if final > 2.5 * first + 0.2:
        faults.append(f"a task takes {final:.2f} s instead of {first:.2f}")
    print("\n".join(map(str, rows[::7])), file=sys.stderr)


def merged(options, folder, count, extra=(), limit=None):
    out = folder / "out.safetensors"
    out.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "clmerge",
        "merge",
        "--base",
        "base.safetensors",
        "--models",
        *[f"m{k}.safetensors" for k in range(count)],
        "--out",
        "out.safetensors",
        *(extra or ("--merger", "WeightAverage")),
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    set_limit = (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))) if limit else None
    child = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=set_limit
    )
    peak = 0
    while child.poll() is None:
        try:
            found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{child.pid}/status").read_text())
            peak = max(peak, int(found[1]) >> 10 if found else 0)
        except OSError:
            pass
        time.sleep(0.02)
    err = child.stderr.read()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (
        child.returncode,
        peak,
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        time.monotonic() - started,
        err,
    )


def check_models(options, work, python, said, faults):
    folder = work / "models"
    folder.mkdir()
    subprocess.run([python, "-c", MODELS, str(options.models), "8", "256"], cwd=folder, check=True)
    two, many = merged(options, folder, 2), merged(options, folder, options.models)
    said.append(
        f"{options.models} models: rc {many[0]}, anonymous {two[1]} -> {many[1]} MiB, "
        f"CPU {two[2]:.1f} -> {many[2]:.1f} s"
    )
    if many[0] or subprocess.run([python, "-c", CHECK, str(options.models)], cwd=folder).returncode:
        faults.append(f"{options.models} models: {many[4][-200:]}")
    if many[1] > two[1] + 60:
        faults.append(f"memory grows with models: {two[1]} -> {many[1]} MiB")


def check_handles(options, work, python, said, faults):
    folder = work / "handles"
    folder.mkdir()
    subprocess.run([python, "-c", MODELS, str(options.models), "2", "8"], cwd=folder, check=True)
    code, _, _, _, err = merged(options, folder, options.models, limit=64)
    left = [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]
    said.append(
        f"{options.models} models with 64 files: rc {code} {err.strip().splitlines()[-1][:120] if err.strip() else ''}"
    )
    if "Traceback" in err or left or (code == 0 and not (folder / "out.safetensors").exists()):
        faults.append(f"64 files: {err.strip().splitlines()[-1][:150]} {left}")


def check_tensors(options, work, python, said, faults):
    folder = work / "tensors"
    folder.mkdir()
    subprocess.run([python, "-c", MODELS, "2", str(options.tensors), "8"], cwd=folder, check=True)
    for rule in ("WeightAverage", "TIES"):
        code, peak, cpu, _wall, err = merged(options, folder, 2, ("--merger", rule))
        said.append(f"{options.tensors} tensors, {rule}: rc {code}, anonymous {peak} MiB, CPU {cpu:.1f} s")
        if code:
            faults.append(f"{options.tensors} tensors: {err[-200:]}")
        elif rule == "WeightAverage" and subprocess.run([python, "-c", CHECK, "2"], cwd=folder).returncode:
            faults.append(f"{options.tensors} tensors: wrong result")


CHECKS = {"fit": check_fit, "models": check_models, "tensors": check_tensors, "handles": check_handles}

if __name__ == "__main__":
    raise SystemExit(main())
