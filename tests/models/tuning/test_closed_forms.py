"""Every rule against central differences of the plain function, and its gradient against ordinary reverse mode."""

import pytest
import torch
from torch import nn
from torch.func import jvp
from torch.nn import functional as F

from clmerge.models.tuning.closed_forms import RULES, ClosedForms, load_forward_mode


@pytest.fixture(autouse=True)
def double():
    load_forward_mode()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def check(f, *inputs, moved=None):
    """``moved`` says which inputs have a tangent; default every one of them."""
    moved = range(len(inputs)) if moved is None else moved
    tangents = [torch.randn_like(inputs[i]).requires_grad_() for i in moved]

    def at(*chosen):
        whole = list(inputs)
        for i, value in zip(moved, chosen, strict=True):
            whole[i] = value
        torch.manual_seed(1)  # for dropout
        return f(*whole)

    def closed(*chosen):
        with ClosedForms():
            return at(*chosen)

    start = tuple(inputs[i] for i in moved)
    value, change = jvp(closed, start, tuple(tangents))
    h = 1e-5
    ahead = at(*(x + h * t.detach() for x, t in zip(start, tangents, strict=True)))
    behind = at(*(x - h * t.detach() for x, t in zip(start, tangents, strict=True)))
    torch.testing.assert_close(value, at(*start))
    torch.testing.assert_close(change, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-8)

    direction = torch.randn_like(change)
    theta = tuple(x.clone().requires_grad_() for x in start)
    transposed = torch.autograd.grad(at(*theta), theta, direction)
    torch.testing.assert_close(torch.autograd.grad(change, tangents, direction), transposed)


PARTS = [(0, 1, 2), (1,), (2,), (0,), (0, 2), (1, 2)]


@pytest.mark.parametrize("moved", PARTS)
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_linear(shape, moved):
    check(F.linear, torch.randn(shape), torch.randn(4, 5), torch.randn(4), moved=moved)


def test_linear_without_bias_of_a_batch_that_is_not_contiguous():
    check(F.linear, torch.randn(3, 2, 5).transpose(0, 1), torch.randn(4, 5))


@pytest.mark.parametrize("moved", PARTS)
def test_convolution(moved):
    def convolve(x, w, b):
        return F.conv2d(x, w, b, stride=2, padding=1, groups=2)

    check(convolve, torch.randn(2, 4, 5, 5), torch.randn(6, 2, 3, 3), torch.randn(6), moved=moved)


@pytest.mark.parametrize("moved", PARTS)
@pytest.mark.parametrize("dims", [1, 2])
def test_layer_norm(dims, moved):
    shape = (3, 5)[-dims:]
    check(
        lambda x, w, b: F.layer_norm(x, shape, w, b, 1e-3), torch.randn(2, 3, 5), *torch.randn(2, *shape), moved=moved
    )


def test_layer_norm_without_parameters_or_without_bias():
    check(lambda x: F.layer_norm(x, (5,)), torch.randn(2, 5))
    check(lambda x, w: F.layer_norm(x, (5,), w), torch.randn(2, 5), torch.randn(5))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate):
    check(lambda x: F.gelu(x, approximate=approximate), torch.randn(20))


def heads(length=4, number=2):
    return torch.randn(2, number, length, 3)


@pytest.mark.parametrize("moved", [(0, 1, 2), (0,), (1,), (2,), (0, 2)])
def test_attention(moved):
    check(F.scaled_dot_product_attention, heads(), heads(5), heads(5), moved=moved)


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"scale": 0.3},
        {"dropout_p": 0.5},
        {"attn_mask": torch.tensor([[True, False], [True, True]])},
        {"attn_mask": torch.tensor([[0.3, -torch.inf], [-1.0, 2.0]], dtype=torch.float64)},
    ],
    ids=str,
)
def test_attention_with_options(options):
    check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options), *(heads(2) for _ in range(3)))


def test_attention_with_a_trained_bias():
    check(F.scaled_dot_product_attention, heads(), heads(), heads(), torch.randn(4, 4))


def test_attention_of_groups():
    def grouped(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    check(grouped, heads(number=4), heads(), heads())


class Attend(nn.Module):
    def __init__(self, *, other=False, call=None, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **options)
        self.other = other
        self.call = {"need_weights": False} if call is None else call

    def forward(self, x):
        y = x.flip(0) if self.other else x
        return self.attention(x, y, y, **self.call)[0]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {},
        {"bias": False},
        {"dropout": 0.5},
        {"other": True},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"call": {}},
        {"call": {"need_weights": False, "attn_mask": torch.tensor([[0.0, -1.0, 2.0]] * 3, dtype=torch.float64)}},
        {"call": {"need_weights": False, "attn_mask": torch.ones(4, 3, 3, dtype=torch.float64).tril()}},
        {"call": {"need_weights": False, "key_padding_mask": torch.tensor([[False, True, False]] * 2)}},
    ],
    ids=str,
)
def test_multi_head_attention(options, training):
    """Every way to call it; ``nn.MultiheadAttention`` is kept off the fast path that evaluation would take."""
    layer = Attend(**options).train(training)
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))

    length_first = torch.randn(3, 2, 4)
    x = length_first.transpose(0, 1) if options.get("batch_first") else length_first
    check(call, x.contiguous(), *(p.detach() for p in layer.parameters()))


def test_other_functions_go_through_the_rules_of_pytorch():
    assert F.silu not in RULES
    check(lambda x, w: F.linear(F.silu(x).cumsum(0), w), torch.randn(3, 4), torch.randn(2, 4))


def test_without_tangents_nothing_changes():
    x, w = torch.randn(3, 4), torch.randn(2, 4)
    with ClosedForms():
        assert torch.equal(F.linear(x, w), x @ w.T)
        torch.testing.assert_close(F.gelu(x), x * 0.5 * (1 + torch.erf(x / 2**0.5)))
