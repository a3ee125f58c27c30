"""The same with Lightning under torchrun, with a data loader whose place is in the checkpoint."""

import os
import sys
from datetime import timedelta

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torchdata.stateful_dataloader import StatefulDataLoader

from benchmarks.faults import trace
from benchmarks.faults.plain import BATCH, EPOCHS, LanguageModel, Lines, loss_fn

SAVE_EVERY = 20


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = LanguageModel()

    def training_step(self, batch, _):
        inputs, targets = batch
        trace.read(inputs)
        return loss_fn(self.model(inputs), targets)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=1e-3)


class Tracing(lightning.Callback):
    def on_train_start(self, trainer, module):
        trace.begin()

    def on_train_batch_end(self, trainer, module, *_):
        trace.step(trainer.global_rank, trainer.global_step, trainer.current_epoch)


def main(folder):
    lightning.seed_everything(0)
    nodes = int(os.environ["GROUP_WORLD_SIZE"])
    module, train_set = Module(), Lines()
    loader = StatefulDataLoader(train_set, BATCH // nodes, shuffle=True, drop_last=True)
    saving = ModelCheckpoint(f"{folder}/saved", every_n_train_steps=SAVE_EVERY, save_last=True)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=nodes,
        strategy=DDPStrategy(timeout=timedelta(seconds=20)),
        max_epochs=EPOCHS,
        callbacks=[saving, Tracing()],
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, loader, ckpt_path="last")
    if trainer.is_global_zero:
        torch.save(module.model.state_dict(), f"{folder}/model.pt")


if __name__ == "__main__":
    main(sys.argv[1])
