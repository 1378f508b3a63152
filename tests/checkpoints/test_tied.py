import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

from clmerge.checkpoints import open_checkpoint
from clmerge.checkpoints.merge import CheckpointMerge
from clmerge.checkpoints.tied import twins
from clmerge.checkpoints.verify import verify
from clmerge.merging import DARE, TIES, MagMax


def drawn(seed):
    generator = torch.Generator().manual_seed(seed)
    embed = torch.randn(7, 4, generator=generator)
    return {"body": torch.randn(4, 4, generator=generator), "embed.weight": embed, "head.weight": embed}


def stored(kind, state, path):
    """Write a tied model; ``"kept NAME"`` is a file with that one of the two names."""
    if kind == "shared":
        torch.save(state, path.with_suffix(".pt"))
        return path.with_suffix(".pt")
    if kind == "copied":
        save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    else:
        dropped = {"embed": "head.weight", "head": "embed.weight"}[kind.split()[1]]
        save_file({name: tensor for name, tensor in state.items() if name != dropped}, path)
    return path


@pytest.mark.parametrize("model_kind", ["shared", "copied", "kept embed", "kept head"])
@pytest.mark.parametrize("base_kind", ["shared", "copied"])
@pytest.mark.parametrize("merger", [DARE(0.5, scale=1.0), TIES(0.4)], ids=["DARE", "TIES"])
def test_tied_tensors_are_merged_once_however_they_are_stored(merger, base_kind, model_kind, tmp_path):
    states = [drawn(seed) for seed in range(3)]
    base = stored(base_kind, states[0], tmp_path / "base.safetensors")
    models = [stored(model_kind, state, tmp_path / f"{index}.safetensors") for index, state in enumerate(states[1:])]
    job = CheckpointMerge(base, models=models, merger=merger, strict=True)
    assert job.policy.tied == {"head.weight": "embed.weight"}
    assert "tied         1  one tensor with another, merged once: head.weight (with embed.weight)" in job.describe()
    out = tmp_path / "out.safetensors"
    job.run(out)
    merged = load_file(out)
    assert torch.equal(merged["head.weight"], merged["embed.weight"])
    assert not torch.equal(merged["embed.weight"], states[0]["embed.weight"])
    assert verify(out)[0] == []
    # It counts once: the other name might as well not be there.
    once = [stored("kept embed", state, tmp_path / f"once_{index}.safetensors") for index, state in enumerate(states)]
    CheckpointMerge(once[0], models=once[1:], merger=merger).run(tmp_path / "expected.safetensors")
    expected = load_file(tmp_path / "expected.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("model_kind", ["shared", "copied"])
def test_a_second_name_that_the_base_leaves_out_is_no_problem(model_kind, tmp_path):
    base = stored("kept embed", drawn(0), tmp_path / "base.safetensors")
    model = stored(model_kind, drawn(1), tmp_path / "model.safetensors")
    job = CheckpointMerge(base, models=[model], merger=MagMax(), strict=True)
    assert f"one tensor with another that the base has, of {model}: head.weight" in job.describe()


def test_the_header_of_save_model_says_which_name_was_left_out(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(4, 4, bias=False)
            self.z = torch.nn.Linear(4, 4, bias=False)
            self.z.weight = self.a.weight

    model = Tied()
    save_model(model, str(tmp_path / "model.safetensors"))
    (kept,) = load_file(tmp_path / "model.safetensors")
    dropped = {"a.weight": "z.weight", "z.weight": "a.weight"}[kept]
    theta = torch.randn(4, 4)
    save_file({dropped: theta}, tmp_path / "base.safetensors")
    job = CheckpointMerge(tmp_path / "base.safetensors", models=[tmp_path / "model.safetensors"], merger=MagMax(1.0))
    job.run(tmp_path / "out.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors")[dropped], model.a.weight.detach())


def test_what_one_model_unties_is_merged_by_name(tmp_path):
    base = stored("shared", drawn(0), tmp_path / "base")
    untied = drawn(2) | {"head.weight": torch.zeros(7, 4)}
    models = [stored(kind, state, tmp_path / kind) for kind, state in (("shared", drawn(1)), ("copied", untied))]
    models = [models[0], models[1].rename(tmp_path / "untied.safetensors")]
    job = CheckpointMerge(base, models=models, merger=MagMax())
    assert job.policy.tied == {}
    assert job.policy.merged == ["body", "embed.weight", "head.weight"]


def test_patterns_may_part_them(tmp_path):
    paths = [stored("shared", drawn(seed), tmp_path / str(seed)) for seed in range(2)]
    job = CheckpointMerge(paths[0], models=paths[1:], merger=MagMax(), exclude=["head.*"])
    assert job.policy.merged == ["body", "embed.weight"]
    job.run(tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")["head.weight"], drawn(0)["head.weight"])


def test_equal_vectors_and_constants_are_not_tied(tmp_path):
    ones, matrix = torch.ones(3), torch.randn(3, 3)
    state = {"a": ones, "b": ones.clone(), "zero": torch.zeros(3, 3), "other zero": torch.zeros(3, 3)}
    state |= {"matrix": matrix, "turned": matrix.t().contiguous(), "last": torch.cat([matrix[:2], matrix[:1]])}
    save_file(state, tmp_path / "model.safetensors")
    assert twins(open_checkpoint(tmp_path / "model.safetensors")) == {}
    torch.save(state | {"c": ones, "empty": torch.zeros(0), "none": torch.zeros(0)}, tmp_path / "model.pt")
    assert twins(open_checkpoint(tmp_path / "model.pt")) == {"c": "a"}
