"""What a stream of many tasks costs through the real code: time per task, memory, the run folder, compare and report.

python scripts/simulate_tasks.py [--tasks 1000] [--every 100] [--out FOLDER]

Trains tiny tasks (four images of one class each, a tower of 10,000 parameters), evaluates every so many tasks on the
tasks seen, and prints one line per hundredth of the stream. Seconds are CPU seconds of the process.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = """
name: many
stream:
  class_path: ClassIncremental
  init_args: {{source: {{class_path: NpzSource, init_args: {{path: {npz}, templates: generic}}}}, num_tasks: {tasks}}}
model:
  backbone: {{class_path: OpenClip, init_args: {{name: "{tower}"}}}}
  loss_classes: all
  optimizer: {{class_path: AdamW, init_args: {{lr: 1e-4}}}}
mergers: [MagMax, TIES]
learner: {{evaluate_every: {every}, evaluate_on: seen}}
data: {{batch_size: 64}}
trainer: {{max_epochs: 1, accelerator: cpu, log_every_n_steps: 1, enable_progress_bar: false}}
logging: {{wandb: false, csv: true}}
"""
TOWER = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def write_images(file: Path, tasks: int) -> None:
    """Write four training images and one test image of every class."""
    draw = np.random.default_rng(0)
    labels = np.arange(tasks)
    np.savez(
        file,
        train_images=draw.integers(0, 255, (4 * tasks, 16, 16), dtype=np.uint8),
        train_labels=np.tile(labels, 4),
        test_images=draw.integers(0, 255, (tasks, 16, 16), dtype=np.uint8),
        test_labels=labels,
        classes=np.array([f"thing {label}" for label in labels]),
    )


def tower(folder: Path) -> str:
    """Write a tiny CLIP with random weights; return its name."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TOWER, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    model = open_clip.CLIP(**TOWER)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def size(folder: Path, pattern: str = "**/*") -> int:
    return sum(file.stat().st_size for file in folder.glob(pattern) if file.is_file())


def memory() -> float:
    """Resident MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="many-"))
    out.mkdir(parents=True, exist_ok=True)
    write_images(out / "images.npz", options.tasks)
    config = out / "config.yaml"
    given = {"npz": out / "images.npz", "tasks": options.tasks, "every": options.every}
    config.write_text(CONFIG.format(tower=tower(out / "tower"), **given))

    from clmerge.cli import main as clmerge
    from clmerge.results.run_folder import RunFolder

    run, begun, step = out / "run", time.process_time(), max(1, options.tasks // 20)
    commit_state, seen = RunFolder.commit_state, [time.process_time()]

    def measured(self: RunFolder, task: int, *given: Any) -> None:
        before = time.process_time()
        commit_state(self, task, *given)
        now = time.process_time()
        if (task + 1) % step == 0:
            each, sizes = (now - seen[-1]) / step, [size(run, name) for name in ("manifest.json", "**/*")]
            print(
                f"task {task + 1:5}  {each:.3f} s a task  commit {now - before:.3f} s  {memory():6.0f} MiB  "
                f"manifest {sizes[0] / 1e6:.2f} MB  run folder {sizes[1] / 1e6:.1f} MB",
                flush=True,
            )
            seen.append(time.process_time())

    RunFolder.commit_state = measured  # type: ignore[method-assign]
    sys.stderr = (out / "log.txt").open("w")
    code = clmerge(["fit", "--config", str(config), "--run_dir", str(run)])
    print(f"fit {time.process_time() - begun:.0f} s, results.json {size(run, 'results.json') / 1e6:.1f} MB")
    for words in (
        ["compare", str(run), "--mergers", "MagMax", "--scale", "1.0"][:4],
        ["report", str(run), "--out", str(out / "page.html")],
    ):
        begun = time.process_time()
        code = code or clmerge(words)
        print(f"{words[0]} {time.process_time() - begun:.0f} s", flush=True)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB, in {out}")
    return code


if __name__ == "__main__":
    sys.exit(main())
