import re
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from clmerge.merging import ClipNorm, GroupScale, Pipeline, TaskArithmetic
from clmerge.weights import load_tensors

NAMES = ["visual.conv1.weight", "visual.blocks.0.attn.w", "visual.blocks.11.attn.w", "logit_scale"]


def coefficients(finisher):
    return [tensor.item() for tensor in finisher.finish({name: torch.tensor(1.0) for name in NAMES}).values()]


def test_the_first_pattern_that_matches_counts():
    patterns = {"visual.blocks.0.*": 2.0, "visual.blocks.*": 3.0, "visual.*": 5.0}
    assert coefficients(GroupScale(patterns)) == [5.0, 2.0, 3.0, 1.0]
    assert coefficients(GroupScale(dict(reversed(patterns.items())))) == [5.0, 5.0, 5.0, 1.0]


def test_shallow_layers_alone():
    """The pattern of the docstring, on names as timm's and as those of the CLIP that ships with the package."""
    shallow = GroupScale({"*blocks.[0-3].*": 1.0}, default=0.0)
    assert coefficients(shallow) == [0.0, 1.0, 0.0, 0.0]
    pattern = next(iter(shallow.coefficients))
    assert f'{{"{pattern}": 1.0}}, default=0' in GroupScale.__doc__
    file = files("clmerge") / "models" / "nano_clip" / "open_clip_model.safetensors"
    vector = {name: torch.ones_like(tensor) for name, tensor in load_tensors(Path(str(file))).items()}
    shallow.check_names({name: tuple(tensor.shape) for name, tensor in vector.items()})
    kept = {name for name, tensor in shallow.finish(vector).items() if tensor.any()}
    assert "visual.transformer.resblocks.3.attn.in_proj_weight" in kept
    assert kept == {name for name in vector if re.search(r"resblocks\.[0-3]\.", name)}


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"got 'text\.\*'"):  # before there is a vector
        Pipeline(finisher=GroupScale({"visual.*": 2.0, "text.*": 1.0})).check_names({name: (1,) for name in NAMES})
    with pytest.raises(ValueError, match=r"'visual\.conv2\.weight'; the nearest names are 'visual\.conv1\."):
        coefficients(GroupScale({"visual.*": 2.0, "visual.conv2.weight": 1.0}))


def test_finishers_follow_each_other_and_rebuild_from_their_settings():
    groups = GroupScale({"a": 3.0}, default=4.0)
    merger = Pipeline(Pipeline(TaskArithmetic(scale=1.0), finisher=groups), finisher=ClipNorm(10.0))
    merger.update({"a": torch.tensor([2.0]), "b": torch.tensor([4.0])})  # 6 and 16 after the groups
    other = Pipeline(Pipeline(TaskArithmetic(scale=1.0), finisher=groups), finisher=ClipNorm(10.0))
    other.load_state_dict(merger.state_dict())
    merged = other.compute()
    norm = (6**2 + 16**2) ** 0.5
    assert [merged["a"].item(), merged["b"].item()] == pytest.approx([60 / norm, 160 / norm])
    assert GroupScale(**groups.settings()).settings() == groups.settings()
    assert groups.scope == "model"
