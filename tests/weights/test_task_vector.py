import hashlib

import pytest
import torch

from clmerge.weights import apply_task_vector, fingerprint, task_vector


def state(**tensors):
    return {name: torch.tensor(values) for name, values in tensors.items()}


def test_difference_and_sum_are_inverse():
    base, theta = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    tau = task_vector({"w": theta}, {"w": base})
    torch.testing.assert_close(apply_task_vector({"w": base}, tau)["w"], theta)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_before_the_subtraction(dtype):
    theta, base = torch.tensor([1.0, 0.3]).to(dtype), torch.tensor([1.0078125, 0.1]).to(dtype)
    tau = task_vector({"w": theta}, {"w": base})["w"]
    assert tau.dtype == torch.float32
    assert torch.equal(tau, theta.float() - base.float())
    merged = apply_task_vector({"w": base}, {"w": tau})["w"]
    assert merged.dtype == dtype
    assert torch.equal(merged, theta)


def test_float64_is_kept():
    tau = task_vector({"w": torch.ones(1, dtype=torch.float64)}, {"w": torch.zeros(1)})
    assert tau["w"].dtype == torch.float64
    merged = apply_task_vector({"w": torch.ones(1, dtype=torch.float64)}, {"w": torch.full((1,), 1e-12)})
    assert merged["w"].dtype == torch.float64
    assert merged["w"].item() > 1


def test_nothing_is_shared_with_the_inputs():
    theta, base = state(w=[1.0], v=[2.0]), state(w=[1.0], v=[1.0])
    tau = task_vector(theta, base)
    merged = apply_task_vector(base, {"w": tau["w"]})
    for tensor in [*theta.values(), *tau.values()]:
        tensor.fill_(99)
    for tensor in base.values():
        tensor.fill_(77)
    assert merged["w"].item() == 1.0
    assert merged["v"].item() == 1.0
    zero_base = task_vector(theta, {name: torch.zeros(1) for name in theta})
    theta["w"].fill_(-1)
    assert zero_base["w"].item() == 99.0


def test_parameters_of_a_module_give_plain_tensors():
    module = torch.nn.Linear(2, 1)
    tau = task_vector(dict(module.named_parameters()), module.state_dict())
    assert not any(tensor.requires_grad for tensor in tau.values())
    merged = apply_task_vector(dict(module.named_parameters()), tau)
    assert not any(tensor.requires_grad for tensor in merged.values())


def test_errors_name_parameters_and_sources():
    with pytest.raises(ValueError, match=r"'c' only in expert.pt and 'b' only in base.pt"):
        task_vector(state(a=[1.0], c=[1.0]), state(a=[1.0], b=[1.0]), sources=("expert.pt", "base.pt"))
    with pytest.raises(ValueError, match=r"shape for 'a', got \(2,\) in expert.pt and \(1,\) in base.pt"):
        task_vector(state(a=[1.0, 2.0]), state(a=[1.0]), sources=("expert.pt", "base.pt"))
    with pytest.raises(ValueError, match=r"int64 for 'steps' in the fine-tuned model"):
        task_vector(state(steps=[1]), state(steps=[1]))
    with pytest.raises(ValueError, match=r"'x', 'y', 'z' and 1 more in the task vector"):
        apply_task_vector(state(a=[1.0]), state(x=[1.0], y=[1.0], z=[1.0], zz=[1.0]))
    with pytest.raises(ValueError, match="one shape for 'a'"):
        apply_task_vector(state(a=[1.0]), state(a=[1.0, 2.0]))


def test_fingerprint_sees_names_dtypes_shapes_and_bytes():
    first = fingerprint(state(a=[1.0, 2.0], b=[3.0]))
    assert first == fingerprint(dict(reversed(state(a=[1.0, 2.0], b=[3.0]).items())))
    assert len(first) == 64
    changed = [
        state(a=[1.0, 2.0], c=[3.0]),
        state(a=[1.0, 2.5], b=[3.0]),
        state(a=[[1.0, 2.0]], b=[3.0]),
        {"a": torch.tensor([1.0, 2.0]).view(torch.int32), "b": torch.tensor([3.0])},
        state(a=[1.0, 2.0]),
    ]
    assert len({first, *map(fingerprint, changed)}) == 6


def test_fingerprint_of_any_layout_and_dtype():
    matrix = torch.arange(6.0).view(2, 3)
    assert fingerprint({"w": matrix.t()}) == fingerprint({"w": matrix.t().contiguous()})
    assert fingerprint({"w": matrix.to(torch.bfloat16)}) != fingerprint({"w": matrix.to(torch.float16)})
    assert fingerprint({"w": torch.tensor(1.0)}) != fingerprint({"w": torch.zeros(0)})


def test_fingerprint_is_the_hash_it_says():
    text = b'["w", "float32", [1]]\n' + b"\x00\x00\x80\x3f"
    assert fingerprint({"w": torch.ones(1)}) == hashlib.sha256(text).hexdigest()
