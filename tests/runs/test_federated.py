"""Federated rounds: unequal clients, some of which take part, merged by statistics of their own images."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from support.records import without_times

from clmerge import ContinualClassifier, Learner
from clmerge.evaluation.probes import CommunicatedBytes
from clmerge.merging import Fisher, WeightAverage, WeightedAverage
from clmerge.models import OpenClip
from clmerge.results.run_folder import RunFolder
from clmerge.streams import ClassIncremental, SklearnDigits, StreamDataModule
from clmerge.weights import TaskVectorBank

NAME = "backbone.model.visual.proj"
CLIENTS = {"branches": 4, "rounds": 2, "branch_fraction": 0.5}


pytestmark = pytest.mark.usefixtures("no_pictures")


def make_learner(clip, merger, *, num_tasks=1, **options):
    torch.manual_seed(0)
    module = ContinualClassifier(
        OpenClip(clip), loss_classes="all", optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3)
    )
    stream = ClassIncremental(SklearnDigits(), num_tasks=num_tasks)
    data = StreamDataModule(64, dirichlet=0.5)
    return Learner(stream, module, WeightAverage(), data, branch_merger=merger, statistics_images=16, **options)


class Ends(Callback):
    """Remember the weights and the images of every fit."""

    def __init__(self, ends):
        self.ends = ends

    def on_train_end(self, trainer, pl_module):
        data = trainer.datamodule
        self.ends.append((data.part, data.num_train_images, pl_module.backbone.model.visual.proj.detach().clone()))


def traced(ends, **changes):
    def build(**given):
        given["callbacks"] = [*given["callbacks"], Ends(ends)]
        return Trainer(accelerator="cpu", max_epochs=1, limit_train_batches=2, limit_val_batches=0, **changes | given)

    return build


def test_half_of_the_clients_take_part_and_their_images_weigh(clip, tmp_path):
    ends: list[tuple] = []
    learner = make_learner(clip, WeightedAverage(), probes=[CommunicatedBytes()], **CLIENTS)
    results = learner.fit(RunFolder.create(tmp_path / "run"), trainer=traced(ends))
    drawn = [learner.participants(0, turn) for turn in range(2)]
    assert [part for part, _, _ in ends] == [(client, 4) for clients in drawn for client in clients]
    (_, n, first), (_, m, second) = ends[-2:]
    assert n != m
    result = learner.merge.base[NAME] + TaskVectorBank(tmp_path / "run" / "bank")[0][NAME]
    expected = (n * first.double() + m * second.double()) / (n + m)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-6)
    size = sum(tensor.numel() for tensor in learner.merge.base.values())
    sent = results.model("expert").probes["communicated_bytes"]
    assert sent["value"] == 2 * 4 * size * 4  # two clients in each of two rounds, there and back
    assert sent["values"] == {"down": 4.0 * size * 4, "up": 4.0 * size * 4}
    assert sent["n"] == 4


def test_rounds_draw_clients_anew_and_all_take_part_by_default(clip):
    learner = make_learner(clip, WeightedAverage(), branches=8, branch_fraction=0.25)
    drawn = [tuple(learner.participants(task, turn)) for task in range(3) for turn in range(5)]
    assert all(len(set(one)) == 2 for one in drawn)
    assert len(set(drawn)) > 3
    assert make_learner(clip, WeightedAverage(), branches=3).participants(0, 1) == [0, 1, 2]
    with pytest.raises(ValueError, match="branch_fraction above 0 and up to 1, got 0"):
        make_learner(clip, WeightedAverage(), branches=3, branch_fraction=0.0)


def test_fisher_is_measured_on_the_images_of_each_client(clip, tmp_path, monkeypatch):
    ends: list[tuple] = []
    learner = make_learner(clip, Fisher(), branches=2)
    seen = []
    measure = Learner.measure

    def told(self, needed, task, **options):
        found = measure(self, needed, task, **options)
        seen.append(found)
        return found

    monkeypatch.setattr(Learner, "measure", told)
    learner.fit(RunFolder.create(tmp_path / "run"), trainer=traced(ends))
    branch = [each for each in seen if "fisher" in each]
    assert len(branch) == 2
    assert [each["samples"] for each in branch] == [n for _, n, _ in ends]
    f, g = (each["fisher"][NAME].double() for each in branch)
    (_, _, first), (_, _, second) = ends
    base = learner.merge.base[NAME].double()
    moved = (f * (first.double() - base) + g * (second.double() - base)) / (f + g)
    result = TaskVectorBank(tmp_path / "run" / "bank")[0][NAME].double()
    known = (f + g) > 1e-12
    torch.testing.assert_close(result[known], moved[known], rtol=1e-3, atol=1e-6)


class KilledError(Exception):
    pass


def test_a_federated_run_resumes_to_the_same_bits(clip, tmp_path):
    class Kill(Callback):
        def on_train_start(self, trainer, pl_module):
            started.append(trainer)
            if len(started) == 4:
                raise KilledError

    def run(folder, *, kill):
        def build(**given):
            given["callbacks"] = [*given["callbacks"], *([Kill()] if kill else [])]
            return Trainer(accelerator="cpu", max_epochs=1, limit_train_batches=2, limit_val_batches=0, **given)

        learner = make_learner(clip, Fisher(), **CLIENTS)
        opened = RunFolder.open(folder) if (folder / "manifest.json").is_file() else RunFolder.create(folder)
        return without_times(learner.fit(opened, trainer=build).to_dict())["models"]

    whole = run(tmp_path / "whole", kill=False)
    started: list[Trainer] = []
    with pytest.raises(KilledError):
        run(tmp_path / "killed", kill=True)
    assert run(tmp_path / "killed", kill=False) == whole
