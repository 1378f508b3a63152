"""The smallest mode of tuning that trains other tensors than the dense weights, under other names."""

import torch
from torch import nn
from torch.func import functional_call

from clmerge.weights.parametrized import Parametrized


class Shifted(Parametrized):
    """Compute with ``base + shift``: the base is frozen, the shift is trained; names lose their ``base.``."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.shift = nn.ParameterDict({n.replace(".", "/"): torch.zeros_like(p) for n, p in base.named_parameters()})
        self.draws = []

    def names(self):
        return [name for name, _ in self.base.named_parameters()]

    def inner(self):
        return [f"shift.{name}" for name in self.shift]

    def dense(self):
        return {name: base + self.shift[name.replace(".", "/")] for name, base in self.base.named_parameters()}

    def delta(self, base):
        own = dict(self.base.named_parameters())
        return {n: (own[n] - b).detach() + self.shift[n.replace(".", "/")].detach() for n, b in base.items()}

    def state(self, base, tau):
        return {f"base.{name}": tensor for name, tensor in base.items()} | {
            f"shift.{name.replace('.', '/')}": tensor for name, tensor in tau.items()
        }

    def renew(self, generator):
        self.draws.append(torch.rand(1, generator=generator).item())

    def folded(self):
        import copy

        plain = copy.deepcopy(self.base).requires_grad_(True)
        plain.load_state_dict(self.dense(), strict=False)
        return plain

    def dense_name(self, own):
        return own.removeprefix("base.")

    def forward(self, x):
        return functional_call(self.base, self.dense(), (x,))
