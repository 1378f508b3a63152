from itertools import pairwise

import open_clip
import pytest
import timm
import torch
from support.tiny import TINY_CLIP
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from clmerge.merging import FisherMaskNodes
from clmerge.statistics.mask_nodes import mask_node_fisher

CLASSES, HEADS, WIDTH, HIDDEN = 3, 2, 8, 32


class Timm(nn.Module):
    block, projection, narrow = "net.blocks", "attn.proj", "mlp.fc2"

    def __init__(self):
        super().__init__()
        self.net = timm.models.vision_transformer.VisionTransformer(
            img_size=8, patch_size=4, embed_dim=WIDTH, depth=2, num_heads=HEADS, num_classes=CLASSES, init_values=0.5
        )

    def forward(self, x):
        return self.net(x)


class Clip(nn.Module):
    block, projection, narrow = "net.transformer.resblocks", "attn.out_proj", "mlp.c_proj"

    def __init__(self):
        super().__init__()
        self.net = open_clip.CLIP(**TINY_CLIP["model_cfg"]).visual

    def forward(self, x):
        return self.net(x)[:, :CLASSES]


@pytest.fixture(params=[Timm, Clip])
def module(request):
    torch.manual_seed(0)
    module = request.param().double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


def data(seed=0, num=5):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num, 3, 8, 8, generator=generator).double()
    return [(images, torch.randint(CLASSES, (num,), generator=generator))]


def by_masks(module, layer):
    """Information of the masks themselves: they multiply what the projections read, example by example."""
    heads, hidden = (torch.ones(size, dtype=torch.float64, requires_grad=True) for size in (HEADS, HIDDEN))
    weights = dict(module.named_parameters())
    projection, narrow = (f"{module.block}.{layer}.{name}.weight" for name in (module.projection, module.narrow))
    masked = {
        projection: weights[projection] * heads.repeat_interleave(WIDTH // HEADS),
        narrow: weights[narrow] * hidden,
    }
    squares = []
    for images, labels in data():
        for image, label in zip(images, labels, strict=True):
            logits = functional_call(module, {**weights, **masked}, (image[None],))
            loss = functional.log_softmax(logits, dim=1)[0, label]
            squares.append([g.square() for g in torch.autograd.grad(loss, [heads, hidden], retain_graph=True)])
    return [torch.stack(column).mean(dim=0) for column in zip(*squares, strict=True)]


def test_parameters_have_the_information_of_their_heads_and_features(module):
    found = mask_node_fisher(module, data(), labels="true", chunk_size=2)
    assert {name: tensor.shape for name, tensor in found.items()} == {n: p.shape for n, p in module.named_parameters()}
    means = []
    for layer in range(2):
        heads, hidden = by_masks(module, layer)
        means.append(heads.mean() + hidden.mean())
        by_head = heads.repeat_interleave(WIDTH // HEADS)
        packed = torch.cat([by_head, by_head, heads.mean().expand(WIDTH)])
        rows = {
            ("attn.qkv.weight", "attn.in_proj_weight"): packed,
            ("attn.qkv.bias", "attn.in_proj_bias"): packed,
            (f"{module.projection}.weight", f"{module.projection}.bias"): heads.mean().expand(WIDTH),
            ("norm1.weight", "ln_1.bias", "ls1.gamma"): heads.mean().expand(WIDTH),
            ("mlp.fc1.weight", "mlp.c_fc.bias"): hidden,
            (f"{module.narrow}.weight", f"{module.narrow}.bias"): hidden.mean().expand(WIDTH),
            ("norm2.bias", "ln_2.weight", "ls2.gamma"): hidden.mean().expand(WIDTH),
        }
        for names, expected in rows.items():
            own = [tensor for name in names if (tensor := found.get(f"{module.block}.{layer}.{name}")) is not None]
            assert own, names
            for tensor in own:
                shown = expected.view(-1, *[1] * (tensor.ndim - 1)).expand(tensor.shape)
                torch.testing.assert_close(tensor, shown, rtol=1e-9, atol=0)
    outside = [tensor for name, tensor in found.items() if not name.startswith(module.block)]
    assert len(outside) >= 4
    for tensor in outside:
        torch.testing.assert_close(tensor, torch.stack(means).mean().expand(tensor.shape), rtol=1e-9, atol=0)


def test_chosen_parameters_alone_and_their_layers(module):
    name = f"{module.block}.1.{module.projection}.weight"
    found = mask_node_fisher(module, data(), [name], labels="true")
    torch.testing.assert_close(found[name], by_masks(module, 1)[0].mean().expand(WIDTH, WIDTH), rtol=1e-9, atol=0)


def test_layers_of_torch_itself():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Sequential(layer), nn.Flatten(), nn.Linear(4 * WIDTH, CLASSES)).double().eval()
    found = mask_node_fisher(model, [torch.randn(3, 4, WIDTH).double()])
    queries = found["0.0.self_attn.in_proj_weight"][:WIDTH, 0]
    assert all(torch.equal(a, b) == (row % (WIDTH // HEADS) != 0) for row, (a, b) in enumerate(pairwise(queries), 1))
    assert found["0.0.linear1.weight"][:, 0].unique().numel() == HIDDEN


def test_what_is_no_transformer_is_refused():
    with pytest.raises(ValueError, match="layers of a transformer"):
        mask_node_fisher(nn.Linear(2, 3), [torch.ones(1, 2)])


def test_a_task_is_heard_where_its_heads_count():
    merger = FisherMaskNodes()
    for value, information in ((1.0, [3.0, 0.0]), (5.0, [1.0, 0.0])):
        given = {"mask_fisher": {"w": torch.tensor(information)}}
        merger.update({"w": torch.full((2,), value)}, statistics=given)
    torch.testing.assert_close(merger.compute()["w"], torch.tensor([2.0, 3.0]))
