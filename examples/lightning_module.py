"""Flat-LoRA in Lightning: python examples/lightning_module.py"""

import sys

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn

from flatkern.integrations.lightning import FlatLoRACallback
from flatkern.nn import replace_linear, save_adapter


class Regression(LightningModule):
    """A small network with adapters; or yours, pretrained, or a model of PEFT's."""

    def __init__(self):
        """Build the model; everything but the adapters is frozen."""
        super().__init__()
        self.model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))
        replace_linear(self.model, "all-linear", r=4, lora_alpha=8)

    def loss(self, x):
        """Mean squared error against the sum of squares."""
        return nn.functional.mse_loss(self.model(x), x.square().sum(1, keepdim=True))

    def training_step(self, x, batch_idx):
        """The noise is on here, one draw for the micro-batches of an optimizer step."""
        loss = self.loss(x)
        self.log("loss", loss)
        return loss

    def validation_step(self, x, batch_idx):
        """And off here."""
        self.log("validation_loss", self.loss(x), prog_bar=True)

    def configure_optimizers(self):
        """Of the adapters alone."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def main(folder, **options):
    """Train, then write the adapter into `folder`."""
    seed_everything(0)
    module = Regression()
    train, validation = (
        torch.utils.data.DataLoader(torch.randn(rows, 16), batch_size=32) for rows in (320, 64)
    )
    settings = {"max_epochs": 3, "accumulate_grad_batches": 4, "log_every_n_steps": 1}
    noise = FlatLoRACallback(sigma=0.05, seed=0)
    trainer = Trainer(default_root_dir=folder, callbacks=[noise], **settings | options)
    trainer.fit(module, train, validation)
    save_adapter(module.model, f"{folder}/adapter")
    return trainer


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "lightning-example")
