"""Find a learning rate for a configuration of `clmerge fit`, on its first task, by Lightning's range test.

    python examples/find_learning_rate.py configs/quickstart.yaml
    python examples/find_learning_rate.py own.yaml --steps 200 --picture rates.png

The rate rises from step to step from 1e-7 to 1. Printed are the rate at which the smoothed loss is smallest and a tenth
of it, a usual first choice. (Lightning's own suggestion, the steepest point, depends on the noise of the first steps.)
Keep to a few epochs of the task, which are printed, too: in more the loss falls because the images are learned by
heart, whatever the rate. Nothing is kept of what is trained, and no run folder is made.
"""

import argparse
import math
import tempfile

from lightning.pytorch import Trainer
from lightning.pytorch.tuner import Tuner

from clmerge.cli.fit import build_parser
from clmerge.lightning_compat import quiet_lightning


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="configuration of clmerge fit")
    parser.add_argument("--steps", type=int, default=100, help="rates to try (default: 100)")
    parser.add_argument("--picture", help="file for a picture of loss and rate")
    given = parser.parse_args()

    quiet_lightning()
    fit_parser = build_parser()
    run = fit_parser.instantiate(fit_parser.parse_args(["--config", given.config]))
    stream, module, data = run.stream, run.model, run.data
    data.setup_stream(stream, module.backbone.train_transform, module.backbone.eval_transform)
    prompts = stream.class_prompts if module.head.open_vocabulary else []
    module.begin_stream(len(stream.class_names), prompts)
    batches = data.eval_dataloader("train", [0]) if module.head.wants_prototypes else None
    module.begin_task(stream.tasks[0].classes, batches)

    with tempfile.TemporaryDirectory() as folder:
        # The length is for the schedule of the optimizer, which the finder replaces by its own.
        trainer = Trainer(max_steps=given.steps, default_root_dir=folder, logger=False, enable_model_summary=False)
        found = Tuner(trainer).lr_find(
            module, datamodule=data, min_lr=1e-7, max_lr=1.0, num_training=given.steps, update_attr=False
        )
    pairs = zip(found.results["loss"], found.results["lr"], strict=True)
    losses = [(loss, rate) for loss, rate in pairs if math.isfinite(loss)]
    if len(losses) < given.steps // 4:
        raise SystemExit(f"only {len(losses)} of {given.steps} losses are finite: is the data what the model expects?")
    loss, rate = min(losses)
    print(f"{given.steps} steps are {given.steps / len(data.train_dataloader()):.1f} epochs of {stream.tasks[0].name}")
    print(f"smallest loss {loss:.3f} at learning rate {rate:.1e}; a tenth of that is {rate / 10:.1e}")
    if given.picture:
        found.plot().savefig(given.picture)


if __name__ == "__main__":
    main()
