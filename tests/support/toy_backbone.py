"""An image encoder of a few dozen weights, with everything that behaves differently in training."""

from torch import nn
from torchvision import transforms

from clmerge.models import Backbone


class ToyBackbone(Backbone):
    """A linear layer with batch norm and dropout."""

    def __init__(self, *, size: int = 4) -> None:
        super().__init__()
        self.feature_dim = 6
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))

    def forward(self, images):
        return self.model(images)


class Normed(ToyBackbone):
    """The same for small digits, with a transform to tensors."""

    def __init__(self) -> None:
        super().__init__(size=8)
        self.train_transform = self.eval_transform = transforms.ToTensor()
