"""How long `clmerge fit` takes to its first training step, beside the imports that any such run needs.

python scripts/bench_start.py --rounds 5

Seconds are those of the processor, since a shared machine makes the others wait; medians over alternating rounds.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
IMPORTS = "import lightning, open_clip, timm"
# A callback of the run's own Trainer tells the time at the first batch, and ends the process there.
FIT = """
import os, sys, time
from importlib.abc import MetaPathFinder
class Patch(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "clmerge.runs.task_training":  # imported when the callbacks are
            sys.meta_path.remove(self)
            from clmerge.callbacks.progress import EpochSeed
            def first(self, trainer, pl_module, batch, batch_idx):
                print(time.process_time(), flush=True)
                os._exit(0)
            EpochSeed.on_train_batch_start = first
sys.meta_path.insert(0, Patch())
from clmerge.cli import main
sys.exit(main(sys.argv[1:]))
"""


def seconds(*command: str) -> float:
    """Return the last number that a Python program prints."""
    environment = os.environ | {"WANDB_MODE": "offline"}
    done = subprocess.run([sys.executable, "-c", *command], capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    imports, starts = [], []
    for _ in range(rounds):
        imports.append(seconds(f"{IMPORTS}\nimport time\nprint(time.process_time())"))
        with tempfile.TemporaryDirectory() as folder:
            starts.append(seconds(FIT, "fit", "--config", str(CONFIG), "--run_dir", f"{folder}/run"))
    print(f"{IMPORTS}: {median(imports):.2f} s")
    print(f"clmerge fit, to the first step: {median(starts):.2f} s, {median(starts) / median(imports):.2f} times that")


if __name__ == "__main__":
    main()
