import torch

from clmerge.seeds import seeded_uniform


def test_every_ingredient_changes_the_numbers():
    tau = torch.zeros(100)
    base = {"seed": 0, "task": 1, "name": "w", "purpose": "drop"}
    first = seeded_uniform(tau, **base)
    assert torch.equal(first, seeded_uniform(tau.double(), **base))
    for change in ({"seed": 1}, {"task": 2}, {"name": "v"}, {"purpose": "mix"}):
        assert not torch.equal(first, seeded_uniform(tau, **(base | change)))


def test_the_global_generator_is_neither_used_nor_moved():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = seeded_uniform(torch.zeros(10), seed=0, task=0, name="w", purpose="drop")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(first, seeded_uniform(torch.zeros(10), seed=0, task=0, name="w", purpose="drop"))


def test_numbers_are_those_of_every_other_machine():
    drawn = seeded_uniform(torch.zeros(3), seed=0, task=0, name="w", purpose="drop")
    assert drawn.tolist() == [0.6011605262756348, 0.34633076190948486, 0.09416401386260986]
