"""Measure what comparing mergers costs beside training, in CPU seconds of one process.

python scripts/bench_compare.py [--rounds 3] [--threads 1]

A round trains the quickstart stream once (MagMax alone rides on it), compares eight mergers after every task of that
run with all reference rows, and evaluates one and eight models in one pass as ``fit`` does after a task. The table has
the median over the rounds, and the median of the rounds' ratios. Imports are not counted; opening the run is.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from lightning.pytorch import Trainer

from clmerge.cli.fit import main as fit
from clmerge.cli.open_run import open_run
from clmerge.deploy.predictors import Merged
from clmerge.lightning_compat import quiet_lightning
from clmerge.merging import DARE, TIES, TSVM, Breadcrumbs, IsoC, MagMax, TaskArithmetic, WeightAverage
from clmerge.runs.comparison.compare import Request, compare_run
from clmerge.runs.comparison.refold import Refold
from clmerge.runs.comparison.row_cache import RowCache
from clmerge.runs.stored_run import StoredRun

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
MERGERS = (MagMax, TIES, WeightAverage, TaskArithmetic, DARE, Breadcrumbs, TSVM, IsoC)


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds that ``work`` takes in this process."""
    started = time.process_time()
    work()
    return time.process_time() - started


@contextlib.contextmanager
def counted(times: list[float]) -> Iterator[None]:
    """Add up the CPU seconds of every ``Trainer.fit``."""
    original = Trainer.fit

    def measured(self: Trainer, *args: object, **kwargs: object) -> None:
        times.append(seconds(lambda: original(self, *args, **kwargs)))  # type: ignore[arg-type]

    with mock.patch.object(Trainer, "fit", measured):
        yield


def evaluation(run: StoredRun, num_models: int) -> float:
    """Return the CPU seconds of evaluating merged models of the last task on all test images in one pass."""
    refold = Refold(run, {f"model {i}": TaskArithmetic(scale=0.1 * (i + 1)) for i in range(num_models)})
    for task in range(len(run.tasks)):
        refold.fold(task)
    merge = refold.merge
    models = {name: merge.predictor(name, run.module) for name in merge.mergers}
    return min(seconds(lambda: run.evaluate_again("evaluating", models, len(run.tasks) - 1)) for _ in range(3))


def forward(run: StoredRun) -> float:
    """Return the CPU seconds of bare forward passes over all test images, which are in memory."""
    run.module.eval()
    batches = [batch[0] for batch in run.data.eval_dataloader("test")]

    @torch.inference_mode()
    def work() -> None:
        for images in batches:
            run.module(images)

    return min(seconds(work) for _ in range(3))


def measure() -> dict[str, float]:
    """Return the CPU seconds of one round."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nothing:  # noqa: PTH123
        path, times = Path(folder, "run"), list[float]()
        quiet = ("--logging.wandb=false", "--mergers=[MagMax]", "--run_dir", str(path))
        with contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
            with counted(times):
                found["fit"] = seconds(lambda: fit(["--config", str(CONFIG), *quiet]))
            os.environ.pop("CLMERGE_RUN_DIR", None)
            request = Request({merger.name: merger() for merger in MERGERS})

            def compare() -> None:
                run, _ = open_run(str(path), name="run")
                Path(folder, "scratch").mkdir()
                run.use_scratch(Path(folder, "scratch"), image_memory=1024)
                compare_run(run, request, RowCache(Path(folder, "rows.json")))

            found["compare"] = seconds(compare)
            found["train"] = sum(times)
            run, _ = open_run(str(path), name="run")
            run.evaluate_again("warm up", {"expert": Merged(run.expert(0))}, 0)
            found["one"], found["eight"] = evaluation(run, 1), evaluation(run, len(MERGERS))
            found["forward"] = forward(run)
    return found


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    quiet_lightning()
    torch.set_num_threads(options.threads)
    rounds = []
    for number in range(options.rounds):
        rounds.append(measure())
        print(f"round {number + 1} of {options.rounds} done", file=sys.stderr, flush=True)
    few = len(MERGERS) - 1

    def median(value: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(value(one) for one in rounds)

    table = (
        ("`clmerge fit`, one merger, whole command", lambda r: r["fit"], lambda r: r["fit"] / r["train"]),
        ("training in it", lambda r: r["train"], lambda r: 1.0),
        ("comparing 8 mergers after each of 5 tasks", lambda r: r["compare"], lambda r: r["compare"] / r["train"]),
        ("evaluating 1 model", lambda r: r["one"], lambda r: 1.0),
        (
            "evaluating 8 models in one pass",
            lambda r: r["eight"],
            lambda r: r["eight"] / (r["one"] + few * r["forward"]),
        ),
    )
    print("| | CPU seconds | ratio |\n|---|---|---|")
    for name, value, ratio in table:
        print(f"| {name} | {median(value):.2f} | {median(ratio):.3f} |")
    print(f"\nThe last ratio is to 1 model plus {few} forward passes, the others are to training.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
