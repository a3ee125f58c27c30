"""The same with Lightning under torchrun, with a data loader whose place is in the checkpoint."""

import os
import sys
from datetime import timedelta

import torch
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from benchmarks.faults import trace
from benchmarks.faults.plain import BATCH, EPOCHS, SAVE_EVERY, LanguageModel, Lines, loss_fn
from hpc_absa.torchvision_import import prepare_torchvision

prepare_torchvision()  # Lightning imports it, which fails beside a PyTorch for CPUs
import lightning  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy  # noqa: E402


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
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    module, train_set = Module(), Lines()
    # without a sampler Lightning adds one that begins another order after a restart
    sampler = StatefulDistributedSampler(train_set, size, rank, seed=0)
    loader = StatefulDataLoader(train_set, BATCH // size, sampler=sampler, drop_last=True)
    saving = ModelCheckpoint(f"{folder}/saved", every_n_train_steps=SAVE_EVERY, save_last=True)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=int(os.environ["GROUP_WORLD_SIZE"]),
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
