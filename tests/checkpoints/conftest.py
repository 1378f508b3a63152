import pytest
import torch
from safetensors.torch import save_file

SHAPES = {"net.0.weight": (8, 5), "net.0.bias": (8,), "net.1.weight": (6, 8), "logit_scale": ()}


def made_up(seed, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {name: spread * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def theta():
    return made_up(0)


@pytest.fixture
def models(theta):
    return [{name: tensor + made_up(seed, 0.1)[name] for name, tensor in theta.items()} for seed in (1, 2, 3)]


@pytest.fixture
def base(tmp_path, theta):
    path = tmp_path / "base.safetensors"
    save_file(theta, path)
    return path
