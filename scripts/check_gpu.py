"""Check clmerge on a GPU and measure what merging, training and evaluating cost there, in at most 8 minutes.

python scripts/check_gpu.py [--tiny] [--only merge spectral step evaluate] [--rounds 5]

Needs PyTorch, torchvision, torchmetrics, safetensors, lightning, timm and open_clip_torch (with ftfy and wcwidth); what
a machine without a network lacks of these can be carried to it as wheels. No data: weights and images are random. Exits
1 where a result on the GPU differs from the CPU's by more than the rule's tolerance.

`--tiny` runs the same code on small shapes, on the CPU where there is no GPU; its times mean nothing. `--only
operations` needs no GPU: it counts the operations other than views that an update starts, with parameters one at a
time, as on a CPU, and with many at once, as on a GPU.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor, nn
from torch.optim import AdamW
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from typing_extensions import override

from clmerge.deploy.predictors import Merged
from clmerge.evaluation.evaluator import Evaluator
from clmerge.lightning_compat import quiet_lightning
from clmerge.merging import (
    DARE,
    EMR,
    OPCM,
    SLERP,
    TIES,
    TSVM,
    Breadcrumbs,
    Fisher,
    IsoC,
    MagMax,
    Merger,
    ModelStock,
    RegMean,
    TaskArithmetic,
    WeightAverage,
    blocks,
)
from clmerge.models import Full, LinearHead, Linearized, LoRA, OpenClip, Tuning
from clmerge.training.module import ContinualClassifier

Vector = dict[str, Tensor]
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")

# A rule, and how far the results of GPU and CPU may lie apart, relative to the merged vector's norm.
ENTRYWISE: dict[str, tuple[Callable[[], Merger], float]] = {
    "TaskArithmetic": (TaskArithmetic, 0.0),
    "WeightAverage": (WeightAverage, 0.0),
    "MagMax": (MagMax, 0.0),
    "TIES": (TIES, 0.0),
    "TIES by tensor": (lambda: TIES(trim="tensor"), 0.0),
    "DARE": (DARE, 1e-6),
    "EMR": (EMR, 1e-6),
    "Breadcrumbs": (Breadcrumbs, 0.0),
    "ModelStock": (ModelStock, 1e-6),
    "SLERP": (SLERP, 1e-6),
    "Fisher": (Fisher, 0.0),
}
SPECTRAL: dict[str, tuple[Callable[[], Merger], float]] = {
    "TSVM": (TSVM, 1e-3),
    "IsoC": (IsoC, 1e-3),
    "OPCM": (OPCM, 1e-3),
    "RegMean": (RegMean, 1e-3),
}


def vit_shapes(width: int, layers: int, patch: int, tokens: int, out: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an open_clip image tower."""
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (width,),
        "positional_embedding": (tokens, width),
        "proj": (width, out),
        "conv1.weight": (width, 3, patch, patch),
    }
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        shapes |= {f"{block}.{norm}.{part}": (width,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
        for name, rows, columns in (
            ("attn.in_proj_", 3 * width, width),
            ("attn.out_proj.", width, width),
            ("mlp.c_fc.", 4 * width, width),
            ("mlp.c_proj.", width, 4 * width),
        ):
            shapes |= {f"{block}.{name}weight": (rows, columns), f"{block}.{name}bias": (rows,)}
    return shapes


def vectors(shapes: dict[str, tuple[int, ...]], count: int) -> list[Vector]:
    """Return random task vectors on the device."""
    made = []
    for task in range(count):
        generator = torch.Generator(DEVICE).manual_seed(task)
        made.append({n: torch.randn(s, generator=generator, device=DEVICE) * 1e-3 for n, s in shapes.items()})
    return made


def statistics_of(merger: Merger, vector: Vector, task: int) -> dict[str, Any]:
    """Return random statistics of the kind the rule requires."""
    given: dict[str, Any] = {}
    if "fisher" in merger.requires:
        given["fisher"] = {name: tensor.square() + 1e-8 * (task + 1) for name, tensor in vector.items()}
    if "gram" in merger.requires:
        given["gram"] = {}
        for name, tensor in vector.items():
            if tensor.ndim == 2 and name.endswith("weight"):
                inputs = torch.randn(tensor.shape[1], tensor.shape[1], device=tensor.device)
                given["gram"][name] = inputs.T @ inputs
    return given


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds(work: Callable[[], object]) -> float:
    """Wall seconds of some work on the device."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def median(work: Callable[[], object], rounds: int) -> float:
    work()
    return statistics.median(seconds(work) for _ in range(rounds))


def copy_bandwidth(numel: int, rounds: int) -> float:
    """Bytes per second of a large copy on the device, read and written."""
    source, target = torch.randn(numel, device=DEVICE), torch.empty(numel, device=DEVICE)
    return 8 * numel / median(lambda: target.copy_(source), rounds)


def counted(work: Callable[[], object]) -> tuple[int, int]:
    """Return the kernels that some work starts, and the copies from the device to the host."""
    if not CUDA:
        return 0, 0
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        work()
        synchronize()
    events = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(events), sum("DtoH" in e.name for e in events)


class Operations(TorchDispatchMode):
    """Count the operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    @override
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not function.is_view
        return function(*args, **(kwargs or {}))


def count_operations() -> None:
    """Print how many operations the second update of a rule starts, one parameter at a time and many at once.

    For a ViT-B/32 whose every width, and with them what a device takes at once, is a quarter: the counts are those of
    a ViT-B/32.
    """
    taus = vectors(vit_shapes(192, 12, 32, 50, 128), 2)
    blocks.CPU_BLOCK = blocks.DEVICE_BLOCK = blocks.DEVICE_BLOCK // 16
    print(f"\nOperations of an update of {len(taus[0])} tensors\n\n| rule | one at a time | many at once |")
    print("|---|---|---|", flush=True)
    for name, (build, _) in ENTRYWISE.items():
        found = []
        for one_by_one in (frozenset({"cpu"}), frozenset[str]()):
            blocks.ONE_BY_ONE = one_by_one
            merger = build()
            given = [statistics_of(merger, tau, task) for task, tau in enumerate(taus)]
            merger.update(taus[0], statistics=given[0])
            with Operations() as operations:
                merger.update(taus[1], statistics=given[1])
            found.append(operations.number)
        print(f"| {name} | {found[0]} | {found[1]} |", flush=True)


def apart(ours: Vector, theirs: Vector) -> float:
    """Return the distance of two merged vectors, relative to the norm of the second."""
    differences = sum(float((ours[n].cpu().double() - theirs[n].double()).square().sum()) for n in theirs)
    return (differences / sum(float(theirs[n].double().square().sum()) for n in theirs)) ** 0.5


def check_rules(
    title: str,
    rules: dict[str, tuple[Callable[[], Merger], float]],
    taus: list[Vector],
    rounds: int,
    bandwidth: float,
    *,
    compare: bool,
) -> list[str]:
    """Print a table of updates and reads; return what differs from the CPU by more than it may."""
    wrong = []
    numel = sum(t.numel() for t in taus[0].values())
    print(f"\n{title}: {len(taus)} task vectors of {numel / 1e6:.1f} M in {len(taus[0])} tensors\n")
    print("| rule | update, ms | least, ms | share | kernels | to host | compute, ms | peak, copies | off the CPU's |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for name, (build, tolerance) in rules.items():
        merger = build()
        needed = [statistics_of(merger, tau, t) for t, tau in enumerate(taus)]

        def fold(task: int, into: Merger, given: list[dict[str, Any]] = needed) -> None:
            into.update(taus[task], task=task, statistics=given[task])

        fold(0, merger)
        fold(1, merger)
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        times = [seconds(partial(fold, task, merger)) for task in range(2, len(taus))]
        peak = (torch.cuda.max_memory_allocated() - before) / (4 * numel) if CUDA else 0.0
        read = median(merger.compute, max(1, rounds // 2))
        probe = build()
        fold(0, probe)
        kernels, copies = counted(partial(fold, 1, probe))
        held = merger.state_dict()["slots"]
        slots = sum(s.numel() * s.element_size() for group in held.values() for s in group.values())
        least = (4 * numel + 2 * slots) / bandwidth
        update = statistics.median(times)
        off = "-"
        if compare:
            distance = apart(merger.compute(), on_cpu(build, taus, needed))
            off = "0" if distance == 0 else f"{distance:.1e}"
            if not distance <= tolerance:
                wrong.append(f"{title}: {name} differs from the CPU by {distance:.2e}, allowed {tolerance:.0e}")
        print(
            f"| {name} | {1e3 * update:.2f} | {1e3 * least:.2f} | {least / update:.2f} | {kernels} | {copies} | "
            f"{1e3 * read:.2f} | {peak:.1f} | {off} |",
            flush=True,
        )
        del merger, needed
    return wrong


def check_refusal() -> list[str]:
    """Return what is wrong with the device's answer to a vector that is not finite."""
    wrong = []
    for value in (torch.nan, torch.inf, -torch.inf):
        try:
            MagMax().update({"a": torch.ones(3, device=DEVICE), "b": torch.tensor([1.0, value], device=DEVICE)})
            wrong.append(f"MagMax took a vector with {value}")
        except ValueError:
            pass
    return wrong


def on_cpu(build: Callable[[], Merger], taus: list[Vector], given: list[dict[str, Any]]) -> Vector:
    """Return what the rule gives on the CPU."""

    def moved(value: Any) -> Any:
        return {k: moved(v) for k, v in value.items()} if isinstance(value, dict) else value.cpu()

    merger = build()
    for task, tau in enumerate(taus):
        merger.update(moved(tau), task=task, statistics=moved(given[task]))
    return merger.compute()


class Images(LightningDataModule):
    """Random images that lie on the device already, so that steps alone are timed."""

    def __init__(self, batch: int, steps: int, size: int, classes: int) -> None:
        super().__init__()
        self.batch = (
            torch.randn(batch, 3, size, size, device=DEVICE),
            torch.randint(classes, (batch,), device=DEVICE),
        )
        self.steps = steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([self.batch] * self.steps)

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([self.batch] * self.steps, batch_size=None)


class Clock(Callback):
    """Time the steps."""

    def __init__(self) -> None:
        self.started, self.times = 0.0, list[float]()

    @override
    def on_train_batch_start(self, trainer: Trainer, *args: object) -> None:
        synchronize()
        self.started = self.started or time.perf_counter()

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        synchronize()
        now = time.perf_counter()
        self.times.append(now - self.started)
        self.started = now


def classifier(backbone: Callable[[], Any], tuning: Tuning, classes: int, *, compiled: bool) -> ContinualClassifier:
    torch.manual_seed(0)
    module = ContinualClassifier(backbone(), LinearHead(), tuning=tuning, loss_classes="seen")
    module.begin_stream(classes)
    module.begin_task(range(classes))
    if compiled:
        module.backbone.compile()
    return module


def bare_step(module: ContinualClassifier, data: Images, warmup: int) -> list[float]:
    """Return the times of steps of a plain loop."""
    module.to(DEVICE).train()
    optimizer = AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.1)
    times = []
    for images, labels in data:
        synchronize()
        started = time.perf_counter()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(module.head(module.backbone(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        synchronize()
        times.append(time.perf_counter() - started)
    return times[warmup:]


def fit_step(module: ContinualClassifier, data: Images, warmup: int) -> list[float]:
    """Return the times of steps inside a Lightning Trainer."""
    clock = Clock()
    Trainer(
        max_epochs=1,
        accelerator="gpu" if CUDA else "cpu",
        devices=1,
        precision="bf16-mixed",
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, datamodule=data)
    return clock.times[warmup:]


def check_steps(tiny: bool) -> None:
    """Print what a training step costs: harness against a bare loop, modes of tuning against full fine-tuning."""
    build = partial(OpenClip, "nano") if tiny else partial(OpenClip, "ViT-B-32")
    size, batch, steps, warmup, classes = (28, 8, 4, 1, 10) if tiny else (224, 128, 40, 10, 100)
    print(f"\nTraining step, {'nano' if tiny else 'ViT-B-32'}, batch {batch}, bf16-mixed, medians\n")
    print("| tuning | compiled | bare loop, ms | clmerge, ms | ratio | of the full step | peak, GB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    full: dict[bool, float] = {}
    modes: tuple[tuple[str, type[Tuning]], ...] = (("full", Full), ("LoRA", LoRA), ("linearized", Linearized))
    for compiled in (False,) if tiny else (False, True):
        for name, tuning in modes[:1] if compiled else modes:  # compiling the others takes minutes
            data = Images(batch, steps, size, classes)
            bare = statistics.median(bare_step(classifier(build, tuning(), classes, compiled=compiled), data, warmup))
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            ours = statistics.median(fit_step(classifier(build, tuning(), classes, compiled=compiled), data, warmup))
            peak = torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0
            full.setdefault(compiled, ours)
            print(
                f"| {name} | {'yes' if compiled else 'no'} | {1e3 * bare:.2f} | {1e3 * ours:.2f} | {ours / bare:.3f} | "
                f"{ours / full[compiled]:.2f} | {peak:.2f} |",
                flush=True,
            )
            if compiled:
                torch._dynamo.reset()


def check_evaluation(tiny: bool, rounds: int) -> None:
    """Print what evaluating 8 models in one pass costs against one model and seven more forwards."""
    build = partial(OpenClip, "nano") if tiny else partial(OpenClip, "ViT-B-32")
    size, batch, steps, classes = (28, 8, 2, 10) if tiny else (224, 256, 20, 100)
    module = classifier(build, Full(), classes, compiled=False).to(DEVICE).eval()
    own = {n: p.detach() for n, p in module.named_parameters() if n in module.trained_names}
    models = {f"m{k}": {n: p + 1e-3 * torch.randn_like(p) for n, p in own.items()} for k in range(8)}
    images, labels = Images(batch, 1, size, classes).batch
    triple = (images, labels, torch.zeros_like(labels))

    def one_pass(names: list[str]) -> None:
        evaluator = Evaluator(module, {n: Merged(models[n]) for n in names}, [list(range(classes))], classes)
        evaluator.to(DEVICE)
        evaluator.on_test_start()
        with torch.inference_mode():
            for step in range(steps):
                evaluator.test_step(triple, step)
        evaluator.restore()

    def forwards() -> None:
        with torch.inference_mode():
            for _ in range(steps):
                module(images)

    every, single, forward = (
        median(work, rounds) for work in (lambda: one_pass(list(models)), lambda: one_pass(["m0"]), forwards)
    )
    print(
        f"\nEvaluating 8 models in one pass: {1e3 * every / steps:.2f} ms a batch of {batch}, one model "
        f"{1e3 * single / steps:.2f} ms, a forward {1e3 * forward / steps:.2f} ms; ratio to one model and seven "
        f"forwards {every / (single + 7 * forward):.3f}",
        flush=True,
    )


def main() -> int:
    """Check and measure; return 1 if a result is wrong."""
    parts = ("merge", "spectral", "step", "evaluate", "operations")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts[:-1])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if [*options.only] == ["operations"]:
        count_operations()
        return 0
    if not CUDA and not options.tiny:
        print("check_gpu: expected a CUDA device, got none; --tiny runs the same code on the CPU", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    quiet_lightning()
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.cuda.get_device_name() if CUDA else "CPU"
    bandwidth = copy_bandwidth(1 << 16 if options.tiny else 1 << 28, options.rounds)
    print(f"{device}, torch {torch.__version__}; a copy on the device moves {bandwidth / 1e12:.2f} TB/s", flush=True)
    tasks = 4 if options.tiny else 8
    small = vit_shapes(16, 1, 4, 5, 8)
    wrong: list[str] = []
    if "merge" in options.only:
        wrong += check_refusal()
        for title, shapes, compare in (
            ("ViT-B/32", small if options.tiny else vit_shapes(768, 12, 32, 50, 512), True),
            ("ViT-L/14", small if options.tiny else vit_shapes(1024, 24, 14, 257, 768), False),
        ):
            taus = vectors(shapes, tasks)
            wrong += check_rules(title, ENTRYWISE, taus, options.rounds, bandwidth, compare=compare)
            del taus
    if "spectral" in options.only:
        shapes = small if options.tiny else vit_shapes(768, 2, 32, 50, 512)
        taus = vectors(shapes, tasks)
        wrong += check_rules("Two blocks of ViT-B/32", SPECTRAL, taus, options.rounds, bandwidth, compare=True)
        del taus
    if "step" in options.only:
        check_steps(options.tiny)
    if "evaluate" in options.only:
        check_evaluation(options.tiny, options.rounds)
    for line in wrong:
        print(f"WRONG {line}", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
