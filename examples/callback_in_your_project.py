"""Continual learning in a Lightning project that exists already: one callback, one fit per task.

python examples/callback_in_your_project.py
"""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from clmerge.callbacks import MergeCallback
from clmerge.merging import MagMax, WeightAverage


class YourModule(LightningModule):
    """Stands for the module that you have."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the loss of a batch."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch: list[torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the accuracy of a batch."""
        self.log("accuracy", (self.net(batch[0]).argmax(dim=1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def your_data(task: int) -> DataLoader[tuple[torch.Tensor, ...]]:
    """Return batches of one task: points around a corner of its own for every class."""
    corners = torch.eye(8)[:4] * 3 + torch.eye(8)[4 + task]
    labels = torch.arange(64) % 4
    noise = torch.randn(64, 8, generator=torch.Generator().manual_seed(task))
    return DataLoader(TensorDataset(corners[labels] + noise / 2, labels), batch_size=16)


def main() -> None:
    """Train three tasks one after another, and test the merged model after each."""
    torch.manual_seed(0)
    model = YourModule()
    merge = MergeCallback([MagMax(), WeightAverage()], deploy="weight_average")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    for task in range(3):
        Trainer(max_epochs=3, callbacks=[merge], enable_model_summary=False, **quiet).fit(model, your_data(task))
        seen = [your_data(number) for number in range(task + 1)]
        found = Trainer(callbacks=[merge], enable_model_summary=False, **quiet).test(model, seen, verbose=False)
        accuracies = [value for row in found for value in row.values()]
        print(f"after task {task + 1}: " + " ".join(f"{100 * value:.0f} %" for value in accuracies))
    print(f"merged {merge.num_tasks} tasks; {len(merge.merged_state())} tensors to save")


if __name__ == "__main__":
    main()
