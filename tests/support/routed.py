"""Tasks of a small network in float64, and routed models of them, without a run."""

import torch
from support.tiny import tiny_clip

from clmerge.deploy.routing.routing import Deployment, Frame, TaskEnd
from clmerge.models import OpenClip, ZeroShotHead
from clmerge.streams import AdaptationBatch

CLASSES = [[0, 1], [2], [3, 4]]
NUM_CLASSES = 5


def make_frame(folder):
    backbone = OpenClip(tiny_clip(folder))
    head = ZeroShotHead()
    head.build(backbone, NUM_CLASSES, [[f"class {index}"] for index in range(NUM_CLASSES)])
    backbone, head = backbone.double().eval(), head.double()
    base = {name: one.detach().clone() for name, one in backbone.named_parameters() if name.startswith("model.visual")}
    return Frame(backbone, head, base, torch.device("cpu"))


def images_of(task, number=4):
    """Images of a task, which lie around a mean of their own."""
    generator = torch.Generator().manual_seed(task)
    mean = torch.randn(1, 3, 8, 8, generator=generator, dtype=torch.float64)
    return mean + 0.3 * torch.randn(number, 3, 8, 8, generator=generator, dtype=torch.float64)


def task_end(frame, task, *, size=0.1, classes=None):
    generator = torch.Generator().manual_seed(100 + task)
    tau = {
        name: size * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        for name, tensor in frame.base.items()
    }
    own = CLASSES[task] if classes is None else classes
    labels = torch.tensor([own[index % len(own)] for index in range(4)])
    return TaskEnd(task, own, tau, frame, lambda: iter([(images_of(task), labels)]), seed=task)


def mean_of(frame, ends):
    """The merged weights: theta_0 plus the mean of the task vectors."""
    return {name: base + sum(end.tau[name] for end in ends) / len(ends) for name, base in frame.base.items()}


def deployment(frame, ends, *, merged=None):
    vectors = {end.task: end.tau for end in ends}
    labels = {end.task: next(end.images())[1] for end in ends}

    def rounds():
        while True:
            yield [AdaptationBatch(images_of(end.task), labels[end.task], end.task, torch.arange(4)) for end in ends]

    return Deployment(
        tasks=[end.task for end in ends],
        classes=[end.classes for end in ends],
        num_classes=NUM_CLASSES,
        merged=mean_of(frame, ends) if merged is None else merged,
        frame=frame,
        vector=vectors.__getitem__,
        batches=rounds,
        seed=0,
    )


def routed(routing, frame, tasks=(0, 1, 2), **given):
    """Collect some tasks in order and build the routed model, in float64."""
    ends = [task_end(frame, task) for task in tasks]
    for end in ends:
        routing.collect(end)
    return routing.build(deployment(frame, ends, **given)).double()
