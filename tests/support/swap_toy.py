"""A base swap in small: two pretraining seeds of a network for digits, and a task of turned images."""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional


@dataclass
class Toy:
    """Two releases of one network, and the new task."""

    old: nn.Module
    new: nn.Module
    tau: dict[str, Tensor]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    oracle: float

    def accuracy(self, tau=None, scale=1.0):
        weights = {k: v + scale * (tau[k] if tau else 0.0) for k, v in self.new.state_dict().items()}
        return score(self.new, weights, self.test)


def score(net, weights, data):
    with torch.no_grad():
        return float((torch.func.functional_call(net, weights, (data[0],)).argmax(1) == data[1]).double().mean())


def trained(net, data, epochs, seed):
    net, generator = copy.deepcopy(net), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(data[1]), generator=generator).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(net(data[0][rows]), data[1][rows]).backward()
            optimizer.step()
    return net


def toy(seeds=(0, 1), *, pretraining=25, tuning=15):
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32).view(-1, 8, 8)
    labels = torch.tensor(labels)
    order = torch.tensor(np.random.default_rng(0).permutation(len(labels)))
    images, labels = images[order], labels[order]
    turned = images.rot90(1, (1, 2)).reshape(-1, 64)
    plain = images.reshape(-1, 64)
    releases = []
    for seed in seeds:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        releases.append(trained(net, (plain[:1200], labels[:1200]), pretraining, seed))
    task = (turned[:1200], labels[:1200])
    test = (turned[1200:], labels[1200:])
    expert, best = (trained(net, task, tuning, 7) for net in releases)
    tau = {k: expert.state_dict()[k] - v for k, v in releases[0].state_dict().items()}
    return Toy(*releases, tau, task, test, score(best, best.state_dict(), test))
