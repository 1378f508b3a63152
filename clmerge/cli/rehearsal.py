"""``clmerge fit --dry_run`` and ``--fast_dev_run``: what a run would be, and the whole path on a few images."""

import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from clmerge.callbacks.progress import matrix_lines, trainable_line
from clmerge.names import tell
from clmerge.runs.notices import notices
from clmerge.streams.overview import stream_lines
from clmerge.weights.modes import eval_mode
from clmerge.weights.parametrization import merged_parameters

if TYPE_CHECKING:
    from clmerge.results.run_folder import RunFolder
    from clmerge.runs.learner import Learner
    from clmerge.streams import Stream
    from clmerge.streams.plan import Split

_SPLITS: "tuple[Split, ...]" = ("train", "val", "test")
_STEPS = 4  # of which the first is not counted: it allocates memory, and compiles what is compiled
_QUIET = {"logger": False, "plugins": [], "enable_checkpointing": False, "enable_model_summary": False}


class StepTimes(Callback):
    """Measure the seconds of every training step, loading of its images included.

    Attributes:
        seconds: Seconds by step.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = time.perf_counter()

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def shrink(stream: "Stream", number: int) -> None:
    """Keep so many images of every task and split at most, taken from all classes in turn.

    Args:
        stream: Changed in place.
        number: Images that are kept.
    """
    for task in stream.tasks:
        for split in _SPLITS:
            stream.keep(task.index, split, in_turn(stream.dataset(task.index, split).targets, number))


def in_turn(targets: Sequence[int], number: int) -> list[int]:
    """Return positions of the first image of every class, then of the second, and so on, in ascending order.

    Example:
        >>> in_turn([0, 0, 0, 1, 1], 3)
        [0, 1, 3]
    """
    seen: defaultdict[int, int] = defaultdict(int)
    ranked = []
    for position, target in enumerate(targets):
        ranked.append((seen[target], position))
        seen[target] += 1
    return sorted(position for _, position in sorted(ranked)[:number])


def dry_run(learner: "Learner", build: Any, config: Any) -> None:
    """Print what a run would be, decode images of every task, measure a few steps, and write nothing.

    Args:
        learner: The learner; it cannot be used for a run afterwards.
        build: Builds Trainers; without the callbacks of the configuration.
        config: The parsed configuration.
    """
    stream, module, data = learner.stream, learner.module, learner.data
    images = {task.index: len(stream.dataset(task.index, "train")) for task in learner.tasks}
    tests = [len(stream.dataset(task.index, "test")) for task in learner.tasks]
    for line in [*stream_lines(stream), *model_lines(learner), *notices(module, stream)]:
        tell(line)
    with tempfile.TemporaryDirectory() as folder:
        times = StepTimes()
        trainer: Trainer = build(**_QUIET, callbacks=[], enable_progress_bar=False, default_root_dir=folder)
        device = trainer.strategy.root_device
        tell(f"device    {_device_name(device)}, precision {trainer.precision}, {data.batch_size} images a step")
        batches = _STEPS * int(trainer.accumulate_grad_batches)
        shrink(stream, batches * data.batch_size)
        data.setup_stream(stream, module.backbone.train_transform, module.backbone.eval_transform)
        module.begin_stream(len(stream.class_names), learner.prompts)
        tell(f"images    {_decode(learner)} decoded, of every task and split")
        limits = {"max_epochs": 1, "max_steps": -1, "limit_train_batches": batches, "limit_val_batches": 0}
        fitting: Trainer = build(
            **_QUIET | limits,
            callbacks=[times],
            enable_progress_bar=False,
            default_root_dir=folder,
            num_sanity_val_steps=0,
        )
        module.to(device)
        data.task = 0
        module.begin_task(
            learner.tasks[0].classes, data.eval_dataloader("train", [0]) if module.head.wants_prototypes else None
        )
        learner.regularized.begin(device)
        if any(parameter.requires_grad for parameter in module.parameters()):
            fitting.fit(module, datamodule=data)
        step = median(times.seconds[1:] or times.seconds or [0.0])
        image = _seconds_per_image(learner, device)
    per_task = {task: _steps(trainer, count, data.batch_size) for task, count in images.items()}
    steps = sum(number * _epochs(learner, trainer, task) for task, number in per_task.items())
    models = len(learner.mergers) * (1 + len(learner.calibrated) + len(learner.routed)) + 1
    after = [task for task in range(len(tests)) if learner.is_evaluated(task)]
    evaluated = models * sum(tests[other] for task in after for other in learner.evaluated_tasks(task))
    tell(
        f"time      about {_duration(steps * step + evaluated * image)}: {steps} steps of {1e3 * step:.0f} ms, "
        f"{len(after)} evaluations of {models} models on {sum(tests)} images of {1000 * image:.1f} ms"
    )
    if device.type == "cuda":
        tell(f"memory    {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB of the GPU in these steps")
    tell("nothing was written; leave --dry_run out to begin")


def model_lines(learner: "Learner") -> list[str]:
    """Describe model, head, mergers and what they take in memory and on disk, one line each.

    Args:
        learner: The learner.
    """
    module, tasks = learner.module, len(learner.tasks)
    backbone, head = module.backbone, module.head
    weights = backbone.read or ("random weights" if backbone.starts_random else "pretrained weights")
    learns = "knows all classes from their names" if head.open_vocabulary else "learns the classes of every task"
    number = sum(parameter.numel() for parameter in backbone.parameters())
    lines = [
        f"backbone  {type(backbone).__name__}, {number:,} parameters, {weights}",
        f"head      {type(head).__name__}, which {learns}; the loss is over {module.loss_classes} classes",
        f"tuning    {trainable_line(module)}",
    ]
    if not learner.mergers:
        return [*lines, "mergers   none: the backbone is frozen"]
    merged = merged_parameters(module, module.trained_names)
    shapes = {name: tuple(tensor.shape) for name, tensor in merged.items()}
    state = sum(merger.state_size(shapes, tasks) for merger in learner.mergers.values())
    vector = 4 * sum(math.prod(shape) for shape in shapes.values())
    model = sum(tensor.numel() * tensor.element_size() for tensor in backbone.state_dict().values())
    disk = tasks * vector * learner.keep_task_vectors + (len(learner.mergers) + 1) * model + state
    return [
        *lines,
        f"mergers   {', '.join(learner.mergers)}; every task starts from {learner.merge.start_policy}, "
        f"{learner.merge.deploy} is deployed",
        *matrix_lines(module, learner.mergers),
        f"bytes     {vector / 1e6:,.1f} MB a task vector, {state / 1e6:,.1f} MB of accumulators in memory, "
        f"{disk / 1e6:,.1f} MB on disk",
    ]


def fast_dev_config(config: Any) -> None:
    """Change a parsed configuration to one epoch of one batch for every task, without loggers.

    Args:
        config: Changed in place.
    """
    for name, value in {"max_epochs": 1, "max_steps": -1, "limit_train_batches": 1, "limit_val_batches": 1}.items():
        config.trainer[name] = value
    config.learner.epochs = None
    config.logging.csv = config.logging.wandb = config.logging.artifacts = False
    config.logging.extra = []


def fast_dev_run(learner: "Learner", build: Any, folder: "RunFolder") -> None:
    """Train, merge, evaluate and save every task on one batch of images, in a folder that is removed afterwards.

    Args:
        learner: The learner of a stream that was shrunk.
        build: Builds Trainers.
        folder: The run folder, a temporary one.
    """
    started = time.perf_counter()
    results = learner.fit(folder, trainer=build)
    written = sum(file.stat().st_size for file in Path(folder.path).rglob("*") if file.is_file())
    tell(
        f"fast_dev_run: {len(results.tasks)} tasks were trained, merged, evaluated and saved in "
        f"{_duration(time.perf_counter() - started)}; the {written / 1e6:,.1f} MB written were removed"
    )


def _decode(learner: "Learner") -> int:
    """Decode a batch of every task and split; return the number of images."""
    count = 0
    for split in _SPLITS:
        for task in learner.tasks:
            if len(learner.stream.dataset(task.index, split)):
                images, *_ = next(iter(learner.data.eval_dataloader(split, [task.index])))
                count += len(images)
    return count


def _seconds_per_image(learner: "Learner", device: torch.device) -> float:
    images, *_ = next(iter(learner.data.eval_dataloader("test", [0])))
    module = learner.module.to(device)
    with torch.no_grad(), eval_mode(module):
        module(images.to(device))
        started = time.perf_counter()
        module(images.to(device))
        if device.type == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - started) / len(images)


def _steps(trainer: Trainer, images: int, batch_size: int) -> int:
    batches = math.ceil(images / batch_size)
    limit = trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else max(1, int(batches * limit))


def _epochs(learner: "Learner", trainer: Trainer, task: int) -> int:
    return learner.epochs[task] if learner.epochs is not None else max(1, trainer.max_epochs or 1)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _duration(seconds: float) -> str:
    """Return a duration in words.

    Example:
        >>> _duration(5), _duration(300), _duration(9000)
        ('5 seconds', '5 minutes', '2.5 hours')
    """
    if seconds < 90:
        return "1 second" if seconds < 1.5 else f"{round(seconds)} seconds"
    return f"{round(seconds / 60)} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
