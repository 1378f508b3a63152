import pytest
import torch
from torch import nn

from clmerge.checkpoints.formats import open_models
from clmerge.checkpoints.vectors import CheckpointVectors
from clmerge.merging import TALL
from clmerge.merging.vectors import Pack
from clmerge.models import add_lora
from clmerge.weights import TaskVectorBank, fingerprint
from clmerge.weights.bank import BankVector
from clmerge.weights.factored import Product, factored
from clmerge.weights.parametrization import merged_parameters, read_factors, read_task_vector


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.ModuleDict({"attn": nn.MultiheadAttention(64, 4), "fc": nn.Linear(64, 32), "head": nn.Linear(32, 2)})
    net.attn.requires_grad_(False)
    net.fc.requires_grad_(False)
    add_lora(net, "attn|fc", rank=2, alpha=3)
    return net


def step(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.clamp(min=0) if "lora_B" in name else noise)  # with rows of zeros


def filled(model, folder, steps=2):
    base = {name: tensor.detach().clone() for name, tensor in merged_parameters(model).items()}
    bank, taus = TaskVectorBank(folder), []
    for task in range(steps):
        step(model, task)
        taus.append(read_task_vector(model, base))
        bank.append(task, taus[-1], name=f"t{task}", factors=read_factors(model, base))
    return base, bank, taus


def test_a_bank_of_adapters_costs_rank_not_model_size(model, tmp_path):
    base, bank, _taus = filled(model, tmp_path)
    dense = sum(tensor.numel() for tensor in base.values())
    factors = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name) + 32 * 2 + 2
    assert dense == 4 * 64 * 64 + 32 * 64 + 32 * 2 + 2
    for task in bank.tasks:
        assert 4 * factors <= bank.path(task).stat().st_size < 4 * factors + 2000
    assert 4 * factors + 2000 < 4 * dense / 3


def test_it_reads_back_the_bits_that_were_merged(model, tmp_path):
    base, bank, taus = filled(model, tmp_path)
    for task, tau in enumerate(taus):
        assert bank[task].keys() == base.keys()
        assert all(torch.equal(tensor, tau[name]) for name, tensor in bank[task].items())
        assert fingerprint(bank[task]) == bank.metadata(task)["sha256"] == fingerprint(tau)
        lazy = BankVector(bank, task)
        assert set(lazy.names()) == set(base)
        assert torch.equal(lazy["fc.weight"], tau["fc.weight"])
        with pytest.raises(KeyError):
            lazy["fc.weight/A"]


def test_mergers_and_clmerge_merge_read_factors(model, tmp_path):
    base, bank, taus = filled(model, tmp_path)
    found, expected = TALL(), TALL()
    for task, tau in enumerate(taus):
        found.update(BankVector(bank, task), task=task)
        expected.update(tau, task=task)
    for name, tensor in expected.compute().items():
        torch.testing.assert_close(found.compute()[name], tensor)
    opened = open_models([tmp_path])
    assert [checkpoint.kind for checkpoint in opened] == ["task vector"] * 2
    vectors = CheckpointVectors(opened[0], opened, sorted(base))
    for name, tensor in taus[1].items():
        assert vectors.shapes[name] == tensor.shape
        pack = Pack({name: vectors.shapes[name]})
        assert torch.equal(vectors.read(1, pack), tensor.flatten())
        assert torch.equal(vectors.read(1, pack, slice(1, 5)), tensor.flatten()[1:5])


def test_what_is_no_product_stays_dense(model, tmp_path):
    base = {name: tensor.detach().clone() for name, tensor in merged_parameters(model).items()}
    step(model)
    assert set(read_factors(model, base)) == {name for name in base if not name.startswith("head.")}
    elsewhere = {name: tensor + 1 for name, tensor in base.items()}
    assert read_factors(model, elsewhere) == {}
    good = Product(torch.ones(1, 8), torch.ones(8, 1), 2.0)
    tau = {"good": torch.full((8, 8), 2.0), "other": torch.full((8, 8), 3.0), "tall": torch.full((2, 2), 2.0)}
    small = Product(torch.ones(1, 2), torch.ones(2, 1), 2.0)
    tensors, header = factored(tau, {"good": good, "other": good, "tall": small})
    assert set(tensors) == {"good/A", "good/B", "other", "tall"}
    assert header == {"low_rank": '{"good": 2.0}'}
    assert factored(tau, {}) == (tau, {})


def test_half_precision_factors_are_multiplied_in_single(model, tmp_path):
    model.bfloat16()
    _base, bank, taus = filled(model, tmp_path, steps=1)
    assert taus[0]["fc.weight"].dtype == torch.float32
    assert torch.equal(bank[0]["fc.weight"], taus[0]["fc.weight"])
    assert "low_rank" in bank.metadata(0)
