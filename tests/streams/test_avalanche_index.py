import subprocess
import sys

import torch

from clmerge.streams.avalanche_index import (
    IndexDataset,
    avalanche_benchmarks,
    experience_indices,
    one_experience_each,
)


def test_positions_come_back_ascending():
    targets = [2, 0, 1, 2, 0, 1, 1]
    benchmark = avalanche_benchmarks().class_incremental_benchmark(
        {"train": IndexDataset(targets)}, class_order=[2, 1, 0], num_classes_per_exp=[2, 1]
    )
    assert [experience_indices(exp) for exp in benchmark.train_stream] == [[0, 2, 3, 5, 6], [1, 4]]


def test_one_experience_per_data_set_has_timeline_and_task_labels():
    benchmark = one_experience_each([[3, 4], [4, 5, 5]], [[3], [5]])
    assert [set(exp.classes_in_this_experience) for exp in benchmark.train_stream] == [{3, 4}, {4, 5}]
    assert [exp.task_label for exp in benchmark.test_stream] == [0, 1]
    assert [experience_indices(exp) for exp in benchmark.train_stream] == [[0, 1], [0, 1, 2]]


def test_building_a_stream_leaves_the_global_random_state_alone():
    from clmerge.streams import ClassIncremental, SklearnDigits

    before = torch.get_rng_state()
    _ = ClassIncremental(SklearnDigits(), class_order="random").tasks
    assert torch.equal(torch.get_rng_state(), before)


def test_packages_are_imported_late_and_without_warnings():
    code = (
        "import sys\n"
        "import clmerge.streams\n"
        "assert not {'torch', 'avalanche', 'lightning', 'sklearn', 'numpy'} & set(sys.modules)\n"
        "stream = clmerge.streams.ClassIncremental(clmerge.streams.SklearnDigits())\n"
        "clmerge.streams.TorchvisionSource('MNIST', root='nowhere')\n"
        "assert not {'torch', 'avalanche', 'lightning', 'sklearn', 'numpy'} & set(sys.modules)\n"
        "stream.tasks\n"
        "assert 'avalanche' in sys.modules\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
