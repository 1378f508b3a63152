import pytest
import torch
from checkpoints.test_merge import assert_same_bits, in_memory, written
from safetensors.torch import load_file

from clmerge.checkpoints.groups import Group
from clmerge.checkpoints.merge import CheckpointMerge
from clmerge.checkpoints.verify import verify
from clmerge.merging import EMR, SLERP, TIES, MagMax, Pipeline, Scale, TaskArithmetic


@pytest.fixture
def paths(models, tmp_path):
    return written(models, tmp_path)


def only(state, *names):
    return {name: state[name] for name in names}


def test_every_group_is_merged_as_if_there_were_no_others(base, paths, theta, models, tmp_path):
    groups = [Group(["net.0.*"], TIES(0.3)), Group(["*.weight", "nothing.*"][:1], MagMax()), Group(["logit_*"], None)]
    job = CheckpointMerge(base, models=paths, groups=groups, strict=True)
    table = job.describe()
    assert "for net.0.*: 2 tensors" in table
    assert "copied       1  no rule is given for it: logit_scale" in table
    job.run(tmp_path / "out.safetensors")
    expected = only(theta, "logit_scale")
    for merger, names in ((TIES(0.3), ["net.0.weight", "net.0.bias"]), (MagMax(), ["net.1.weight"])):
        expected |= in_memory(merger, only(theta, *names), [only(model, *names) for model in models])
    assert_same_bits(load_file(tmp_path / "out.safetensors"), expected)
    found, ledger = verify(tmp_path / "out.safetensors")
    assert found == []
    assert ledger.merger is None
    assert ledger.groups[0] == {
        "match": ["net.0.*"],
        "merger": {"class_path": "TIES", "init_args": TIES(0.3).settings()},
    }


def test_a_rule_for_the_rest(base, paths, theta, models, tmp_path):
    job = CheckpointMerge(base, models=paths, merger=MagMax(), groups=[Group(["net.0.*"], TaskArithmetic(0.1))])
    job.run(tmp_path / "out.safetensors")
    rest = [name for name in theta if not name.startswith("net.0")]
    expected = in_memory(MagMax(), only(theta, *rest), [only(model, *rest) for model in models])
    first = [name for name in theta if name.startswith("net.0")]
    expected |= in_memory(TaskArithmetic(0.1), only(theta, *first), [only(model, *first) for model in models])
    assert_same_bits(load_file(tmp_path / "out.safetensors"), expected)


def test_a_pattern_that_matches_nothing_is_named(base, paths):
    with pytest.raises(ValueError, match=r"got 'nte\.0\.weight'; the nearest is 'net\.0\.weight'"):
        CheckpointMerge(base, models=paths, groups=[Group(["nte.0.weight"], MagMax())])


def test_a_rule_that_no_tensor_is_left_for_is_said_and_refused_if_strict(base, paths):
    groups = [Group(["*"], MagMax()), Group(["net.*"], TIES())]
    table = CheckpointMerge(base, models=paths, groups=groups, merger=TaskArithmetic()).describe()
    assert f"unused  {TIES()!r} for net.*: the groups before it have all of its tensors" in table
    assert f"unused  {TaskArithmetic()!r}: the groups before it have all of its tensors" in table
    with pytest.raises(ValueError, match=r"expected rules with tensors to merge \(--strict\), got TIES\(.* for net"):
        CheckpointMerge(base, models=paths, groups=groups, strict=True)
    assert "unused" not in CheckpointMerge(base, models=paths, groups=groups[::-1], strict=True).describe()


def test_settings_for_more_models_than_there_are_are_refused(base, paths):
    merger = Pipeline(TaskArithmetic(weights=[1, 2, 3]), finisher=Scale(0.5))
    CheckpointMerge(base, models=paths[:3], merger=merger)
    with pytest.raises(
        ValueError, match=r"each of the 2 tasks in weights of TaskArithmetic, got 3: \[1, 2, 3\]; give 2"
    ):
        CheckpointMerge(base, models=paths[:2], merger=merger)


@pytest.mark.parametrize("merger", [EMR(), Pipeline(EMR(), finisher=Scale(0.5))])
def test_the_plan_says_that_views_per_task_are_left_out(merger, base, paths):
    said = "merges to its one model for inputs of unknown task"
    assert f"{merger!r} {said}" in CheckpointMerge(base, models=paths, merger=merger).describe()
    assert said not in CheckpointMerge(base, models=paths, merger=MagMax()).describe()


def test_weights_themselves(base, paths, theta, models, tmp_path):
    merger = SLERP(0.3)
    CheckpointMerge(base, models=paths[:2], merger=merger, origin="zero").run(tmp_path / "out.safetensors")
    for model in models[:2]:
        merger.update(model)
    assert_same_bits(load_file(tmp_path / "out.safetensors"), merger.compute())
    assert verify(tmp_path / "out.safetensors")[0] == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_another_dtype_is_rounded_to_once(dtype, base, paths, theta, models, tmp_path):
    CheckpointMerge(base, models=paths, merger=MagMax(), dtype=dtype).run(tmp_path / "out.safetensors")
    merger = MagMax()
    for model in models:
        merger.update({name: model[name] - theta[name] for name in theta})
    wanted = getattr(torch, dtype)
    expected = {name: (theta[name] + tau).to(wanted) for name, tau in merger.compute().items()}
    assert_same_bits(load_file(tmp_path / "out.safetensors"), expected)
    assert verify(tmp_path / "out.safetensors")[0] == []


def test_what_is_no_dtype_is_named(base, paths):
    with pytest.raises(ValueError, match=r"expected a dtype of float64, .*, got 'int8'"):
        CheckpointMerge(base, models=paths, merger=MagMax(), dtype="int8")
