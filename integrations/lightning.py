"""Batches of a data directory in Lightning; docs/loader.md shows a training with it."""

from collections.abc import Generator
from typing import Any

from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningDataModule

from pipeline.loading.loader import PatientLoader, make_loader
from pipeline.loading.place import StepCounts


class PatientDataModule(LightningDataModule):
    """The splits of a data directory, with the options of :func:`pipeline.make_loader`.  Checkpoints keep the place."""

    trainer: Any

    def __init__(self, data_dir: str, **options: Any) -> None:
        super().__init__()
        self._data_dir, self._options = data_dir, options

    def setup(self, stage: str) -> None:
        if stage != "fit" and hasattr(self, "_train"):
            return  # the place of a fit before it stays
        options = {**self._options, "rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        self._train = make_loader(self._data_dir, split="train", **options)
        options["shuffle"] = False
        self._valid, self._test = (WholeSplit(self._data_dir, split=each, **options) for each in ("valid", "test"))

    def train_dataloader(self) -> PatientLoader:
        if self.trainer.reload_dataloaders_every_n_epochs != 1:  # else the first epoch's length would be that of all
            raise ValueError("PatientDataModule needs Trainer(reload_dataloaders_every_n_epochs=1)")
        self._train.set_epoch(self.trainer.current_epoch)
        return self._train

    def val_dataloader(self) -> Any:
        return self._valid

    def test_dataloader(self) -> Any:
        return self._test

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, tuple):
            return tuple(self.transfer_batch_to_device(part, device, dataloader_idx) for part in batch)
        return batch if isinstance(batch, StepCounts) else move_data_to_device(batch, device)  # counts are frozen

    def state_dict(self) -> dict[str, Any]:
        return self._train.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._train.load_state_dict(state_dict)


class WholeSplit(PatientLoader):
    """A split of which each iteration begins at the first batch, also after one that was left early."""

    def __iter__(self) -> Generator[Any, None, None]:
        for epoch in (1, 0):  # the start of another epoch, and then of this one
            self.set_epoch(epoch)
        yield from super().__iter__()
