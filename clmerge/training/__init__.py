"""How one task is trained: the LightningModule, regularizers, optimizers."""
