import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from clmerge.results.metrics import TaskAccuracy

CLASSES = [[0, 3], [1], [2, 4, 5]]


def batch(seed, size=64):
    generator = torch.Generator().manual_seed(seed)
    tasks = torch.randint(3, (size,), generator=generator)
    labels = torch.tensor([CLASSES[t][int(torch.randint(len(CLASSES[t]), (1,), generator=generator))] for t in tasks])
    return torch.randn(size, 6, generator=generator), labels, tasks


def naive(logits, labels, tasks, competing=tuple(range(6))):
    """Count with Python loops: {task: (agnostic, aware, samples)}."""
    counts = {task: [0, 0, 0] for task in range(len(CLASSES))}
    for row, label, task in zip(logits.tolist(), labels.tolist(), tasks.tolist(), strict=True):
        counts[task][0] += max(competing, key=lambda c: row[c]) == label
        counts[task][1] += max(CLASSES[task], key=lambda c: row[c]) == label
        counts[task][2] += 1
    return counts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_naive_count_over_several_batches(seed, dtype):
    metric = TaskAccuracy(3, 6, CLASSES)
    logits, labels, tasks = batch(seed)
    logits = logits.to(dtype)
    for part in (slice(0, 5), slice(5, 6), slice(6, None)):
        metric.update(logits[part], labels[part], tasks[part])
    result = metric.compute()
    for task, (agnostic, aware, samples) in naive(logits.double(), labels, tasks).items():
        assert result["task_agnostic"][task].item() == agnostic / samples
        assert result["task_aware"][task].item() == aware / samples
        assert result["samples"][task].item() == samples


def test_seen_restricts_the_task_agnostic_reading_only():
    metric = TaskAccuracy(3, 6, CLASSES, seen=[0, 2])
    data = batch(0)
    metric.update(*data)
    result = metric.compute()
    for task, (agnostic, aware, samples) in naive(*data, competing=(0, 2, 3, 4, 5)).items():
        assert result["task_agnostic"][task].item() == agnostic / samples
        assert result["task_aware"][task].item() == aware / samples
    assert result["task_agnostic"][1] == 0


def test_a_growing_head_scores_unseen_classes_minus_infinity():
    metric = TaskAccuracy(3, 6, CLASSES)
    inf = float("inf")
    # The only class of the second sample is not scored at all: it is wrong, although nothing beats it.
    logits = torch.tensor([[2.0, -inf, -inf, 1.0, -inf, -inf], [0.0, -inf, -inf, 0.0, -inf, -inf]])
    metric.update(logits, torch.tensor([0, 1]), torch.tensor([0, 1]))
    result = metric.compute()
    assert result["task_agnostic"][:2].tolist() == [1, 0]
    assert result["task_aware"][:2].tolist() == [1, 0]
    metric.reset()
    # Class 0 is where argmax points if nothing is scored.
    metric.update(torch.full((1, 6), -inf), torch.tensor([0]), torch.tensor([0]))
    result = metric.compute()
    assert (result["task_agnostic"][0], result["task_aware"][0]) == (0, 0)


def test_nan_among_the_competing_logits_is_wrong():
    nan = float("nan")
    metric = TaskAccuracy(3, 6, CLASSES)
    # Class 1 is NaN: the task-aware reading of task 0 (classes 0 and 3) does not see it.
    metric.update(torch.tensor([[5.0, nan, 0, 0, 0, 0]]), torch.tensor([0]), torch.tensor([0]))
    result = metric.compute()
    assert (result["task_agnostic"][0], result["task_aware"][0]) == (0, 1)
    metric.reset()
    # NaN at the label's own place: argmax alone would call this right.
    metric.update(torch.full((1, 6), nan), torch.tensor([0]), torch.tensor([0]))
    assert metric.compute()["task_aware"][0] == 0


def test_ties_go_to_the_lowest_class_id():
    metric = TaskAccuracy(3, 6, CLASSES)
    metric.update(torch.zeros(2, 6), torch.tensor([2, 4]), torch.tensor([2, 2]))
    result = metric.compute()
    assert result["task_agnostic"][2] == 0
    assert result["task_aware"][2] == 0.5


def test_tasks_without_samples_are_nan_and_tasks_may_share_classes():
    metric = TaskAccuracy(2, 2, [[0, 1], [0, 1]])
    metric.update(torch.eye(2), torch.tensor([0, 1]), torch.tensor([1, 1]))
    result = metric.compute()
    assert result["task_agnostic"].isnan().tolist() == [True, False]
    assert result["samples"].tolist() == [0, 2]


def test_an_empty_batch_counts_nothing_and_inputs_stay_as_they_are():
    metric = TaskAccuracy(3, 6, CLASSES)
    metric.update(torch.empty(0, 6), torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long))
    logits, labels, tasks = batch(1)
    before = logits.clone()
    metric.update(logits, labels, tasks)
    assert torch.equal(logits, before)
    assert metric.compute()["samples"].sum() == 64


def test_counts_are_integers_so_large_numbers_stay_exact():
    metric = TaskAccuracy(1, 1, [[0]])
    metric.samples += 2**53
    metric.correct_aware += 2**53
    metric.update(torch.ones(1, 1), torch.tensor([0]), torch.tensor([0]))
    assert metric.samples.item() == metric.correct_aware.item() == 2**53 + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 2, []), "at least one task"),
        ((2, 2, [[0, 1]]), "2 entries, got 1"),
        ((1, 2, [[0, 2]]), r"classes of task 0 .* \[0, 2\), got \[2\]"),
        ((1, 2, [[]]), "got none"),
    ],
)
def test_constructor_names_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        TaskAccuracy(*arguments)


@pytest.mark.parametrize("seen", [[3], []])
def test_seen_must_name_tasks(seen):
    with pytest.raises(ValueError, match="seen"):
        TaskAccuracy(3, 6, CLASSES, seen=seen)


@pytest.mark.parametrize(
    ("shape", "label", "task", "message"),
    [
        ((1, 5), 0, 0, r"shape \(batch, 6\), got \(1, 5\)"),
        ((2, 6), 0, 0, r"labels of shape \(2,\), got \(1,\)"),
        ((1, 6), 6, 0, "label 6, task 0 at position 0"),
        ((1, 6), 0, 3, "label 0, task 3"),
        ((1, 6), 0, -1, "task -1"),
        ((1, 6), 1, 0, "to be a class of its task, got label 1, task 0"),
    ],
)
def test_update_names_what_is_wrong_and_counts_nothing(shape, label, task, message):
    metric = TaskAccuracy(3, 6, CLASSES)
    with pytest.raises(ValueError, match=message):
        metric.update(torch.zeros(shape), torch.tensor([label]), torch.tensor([task]))
    assert metric.samples.sum() == 0


def test_update_refuses_wrong_types():
    metric = TaskAccuracy(3, 6, CLASSES)
    index = torch.tensor([0])
    with pytest.raises(TypeError, match=r"floating point logits, got torch\.int64"):
        metric.update(torch.zeros(1, 6, dtype=torch.long), index, index)
    with pytest.raises(TypeError, match=r"integer labels, got torch\.float32"):
        metric.update(torch.zeros(1, 6), torch.tensor([0.0]), index)


WORKER = """
    import json, sys
    import torch
    import torch.distributed as dist
    from clmerge.results.metrics import TaskAccuracy

    torch.set_num_threads(1)
    rank, rendezvous, data = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    logits, labels, tasks = torch.load(data, weights_only=True)
    metric = TaskAccuracy(3, 6, [[0, 3], [1], [2, 4, 5]])
    share = slice(0, 7) if rank == 0 else slice(7, None)
    metric.update(logits[share], labels[share], tasks[share])
    if rank == 1:
        metric.update(logits[:0], labels[:0], tasks[:0])
    print(json.dumps({name: value.tolist() for name, value in metric.compute().items()}))
    dist.destroy_process_group()
"""


@pytest.mark.exhaustive  # tests/evaluation/test_evaluate.py counts in two processes, too
@pytest.mark.distributed
def test_two_processes_with_uneven_shares_equal_one(tmp_path: Path):
    data = batch(5)
    torch.save(data, tmp_path / "data.pt")
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    command = [sys.executable, str(script)]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "rendezvous"), str(tmp_path / "data.pt")],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    metric = TaskAccuracy(3, 6, CLASSES)
    metric.update(*data)
    expected = {name: value.tolist() for name, value in metric.compute().items()}
    assert [json.loads(output.splitlines()[-1]) for output in outputs] == [expected, expected]
