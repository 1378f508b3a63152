import open_clip
import pytest
import torch
from support.tiny import tiny_clip
from torch import nn
from torch.nn import functional

from clmerge.models import Backbone, CosineHead, LinearHead, OpenClip, ZeroShotHead

TEMPLATES = ("a photo of a {}.", "a drawing of the {}", "{}")
NAMES = ["cat", "dog", "road roller"]
INF = float("inf")


class Table(Backbone):
    """Stands in for a backbone: looks text embeddings up, with dropout as some text towers have it."""

    def __init__(self, table=None, feature_dim=4):
        super().__init__()
        self.table = table or {}
        self.feature_dim = feature_dim
        self.model = nn.Dropout(0.5)

    def forward(self, images):
        return images

    def encode_text(self, prompts):
        return self.model(torch.stack([self.table[prompt] for prompt in prompts]))

    def logit_scale(self):
        return 7.0


def features(num=5, dim=4, seed=0):
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def grown(head, *tasks, num_classes=6):
    """A head that has seen these tasks; prototypes are random."""
    torch.manual_seed(3)
    head.build(Table(), num_classes, [])
    for seed, classes in enumerate(tasks):
        head.add_classes(classes, features(len(classes), seed=seed))
    return head


@pytest.fixture(params=[LinearHead, CosineHead])
def kind(request):
    return request.param


# Zero-shot ------------------------------------------------------------------------------------------


def test_zero_shot_weights_are_normalised_means_of_normalised_embeddings():
    prompts = [[f"{c}{i}" for i in range(3)] for c in "ab"]
    table = {prompt: features(1, seed=i)[0] * (i + 1) for i, prompt in enumerate(prompts[0] + prompts[1])}
    backbone, head = Table(table), ZeroShotHead()
    head.build(backbone, 2, prompts)
    for c, own in enumerate(prompts):
        mean = sum(table[prompt] / table[prompt].square().sum().sqrt() for prompt in own) / 3
        torch.testing.assert_close(head.weight[c], 7.0 * mean / mean.square().sum().sqrt())
    assert backbone.model.training, "the text tower's mode comes back"
    assert not list(head.parameters())


def test_zero_shot_weights_equal_those_of_open_clip(tmp_path):
    backbone, head = OpenClip(tiny_clip(tmp_path)), ZeroShotHead()
    head.build(backbone, 3, [[template.format(name) for template in TEMPLATES] for name in NAMES])
    tokenize = open_clip.SimpleTokenizer(tmp_path / "bpe_simple_vocab.txt.gz", context_length=32)
    expected = open_clip.build_zero_shot_classifier(
        backbone.model, tokenize, NAMES, [template.format for template in TEMPLATES]
    )
    torch.testing.assert_close(head.weight, backbone.logit_scale() * expected.T)
    x = features(dim=8)
    expected_logits = functional.normalize(x, dim=-1) @ expected * backbone.logit_scale()
    torch.testing.assert_close(head(x), expected_logits)


def test_zero_shot_wants_prompts_for_every_class():
    table = {"a": features(1)[0]}
    with pytest.raises(ValueError, match="expected prompts for 2 classes, got them for 1"):
        ZeroShotHead().build(Table(table), 2, [["a"]])
    with pytest.raises(ValueError, match="expected a prompt for every class, got none for class 1"):
        ZeroShotHead().build(Table(table), 2, [["a"], []])


def test_zero_shot_weights_load_into_a_new_head():
    head, new = ZeroShotHead(), ZeroShotHead()
    head.build(Table({"a": features(1)[0], "b": features(1, seed=1)[0]}), 2, [["a"], ["b"]])
    new.load_state_dict(head.state_dict())
    assert torch.equal(new(features()), head(features()))
    assert new.load_state_dict({}, strict=False).missing_keys == ["weight"]
    assert torch.equal(new.weight, head.weight)


# Growing heads ------------------------------------------------------------------------------------------


def test_linear_logits_are_those_of_each_tasks_own_rows():
    head = grown(LinearHead(), [4, 1], [0, 5])
    logits = head(features())
    assert logits.shape == (5, 6)
    for block, classes in zip(head.blocks, ([4, 1], [0, 5]), strict=True):
        for row, c in zip(block.detach(), classes, strict=True):
            expected = (features() * row[:-1]).sum(dim=1) + row[-1]
            torch.testing.assert_close(logits[:, c].detach(), expected)
    assert torch.equal(logits[:, [2, 3]], torch.full((5, 2), -INF))


def test_linear_rows_start_like_a_linear_layer():
    torch.manual_seed(5)
    layer = nn.Linear(4, 2)
    head = LinearHead()
    head.build(Table(), 3, [])
    torch.manual_seed(5)
    head.add_classes([2, 0])
    torch.testing.assert_close(head(features())[:, [2, 0]], layer(features()))


def test_cosine_logits_are_scaled_similarities_to_the_prototypes():
    head = CosineHead(logit_scale=3.0)
    head.build(Table(), 6, [])
    means = features(3, seed=9)
    head.add_classes([4, 1], means[:2])
    head.add_classes([0], means[2:])
    logits = head(features())
    for mean, c in zip(means, (4, 1, 0), strict=True):
        expected = 3.0 * functional.cosine_similarity(features(), mean[None])
        torch.testing.assert_close(logits[:, c].detach(), expected)
    assert torch.equal(logits[:, [2, 3, 5]], torch.full((5, 3), -INF))
    head.blocks[0].data.mul_(4)  # training may change the length of a prototype, which says nothing
    torch.testing.assert_close(head(features()), logits)


def test_a_head_that_knows_nothing_scores_nothing(kind):
    assert torch.equal(grown(kind())(features()), torch.full((5, 6), -INF))


def test_repeated_classes_add_nothing(kind):
    head = grown(kind(), [1, 2])
    before = head(features())
    head.add_classes([2, 1], features(2, seed=8))
    assert len(head.blocks) == 1
    assert torch.equal(head(features()), before)
    head.add_classes([1, 4], features(2, seed=8))
    assert head.known.tolist() == [1, 2, 4]
    assert torch.equal(head(features())[:, [1, 2]], before[:, [1, 2]])


def test_the_prototype_of_a_new_class_beside_a_known_one_is_its_own():
    head = grown(CosineHead(), [1])
    head.add_classes([1, 4], torch.tensor([[9.0, 0, 0, 0], [0, 2.0, 0, 0]]))
    assert torch.equal(head.blocks[1].detach(), torch.tensor([[0, 1.0, 0, 0]]))


def frozen(head):
    return [not block.requires_grad for block in head.blocks]


def test_blocks_without_a_current_class_are_frozen(kind):
    head = grown(kind(), [0, 1], [2], [3])
    head.train_blocks([3])
    assert frozen(head) == [True, True, False]
    head.train_blocks([1, 3])
    assert frozen(head) == [False, True, False]
    head.train_blocks([0, 1])  # an old task's classes, seen again in another domain
    assert frozen(head) == [False, True, True]
    head.train_blocks(None)
    assert frozen(head) == [False, False, False]


def test_prototypes_that_are_not_trained_stay_frozen():
    head = grown(CosineHead(trainable=False), [0], [1])
    head.train_blocks(None)
    assert frozen(head) == [True, True]


def test_an_optimizer_step_leaves_frozen_blocks_alone(kind):
    head = grown(kind(), [0, 1], [2, 3])
    head.train_blocks([2, 3])
    before = [block.detach().clone() for block in head.blocks]
    optimizer = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    functional.cross_entropy(head(features())[:, [2, 3]], torch.tensor([0, 1, 0, 1, 0])).backward()
    optimizer.step()
    assert head.blocks[0].grad is None
    assert torch.equal(head.blocks[0], before[0])
    assert not torch.isclose(head.blocks[1], before[1]).any()


def test_weights_load_into_a_head_that_knows_fewer_classes(kind):
    head, new = grown(kind(), [0, 1], [5], [3, 2]), grown(kind(), [0, 1])
    new.load_state_dict(head.state_dict())
    assert new.known.tolist() == [0, 1, 5, 3, 2]
    assert torch.equal(new(features()), head(features()))
    new.add_classes([4, 5], features(2, seed=1))
    assert new.known.tolist() == [0, 1, 5, 3, 2, 4]


def test_weights_do_not_load_into_a_head_that_knows_more(kind):
    with pytest.raises(RuntimeError, match=r"blocks\.1"):
        grown(kind(), [0, 1], [5]).load_state_dict(grown(kind(), [0, 1]).state_dict())


def test_a_class_outside_of_the_stream_is_refused(kind):
    with pytest.raises(ValueError, match=r"in \[0, 6\), got 6"):
        grown(kind(), [5, 6])
    with pytest.raises(ValueError, match="build the head for the whole stream first"):
        kind().add_classes([0])


def test_prototypes_of_another_shape_are_refused():
    head = grown(CosineHead())
    with pytest.raises(ValueError, match=r"of shape \(2, 4\) for a CosineHead, got none"):
        head.add_classes([0, 1])
    with pytest.raises(ValueError, match=r"of shape \(2, 4\) for a CosineHead, got shape \(2, 3\)"):
        head.add_classes([0, 1], torch.zeros(2, 3))


@pytest.mark.parametrize("head", [LinearHead(), CosineHead()])
def test_logits_have_the_dtype_of_the_features(head):
    assert grown(head, [0, 1])(features().bfloat16()).dtype == torch.bfloat16
