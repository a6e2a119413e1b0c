"""``PatientDataModule`` in Lightning: every batch once, resumed exactly, also on another number of devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import make_loader
from tests.page_code import ACROSS_RANKS, LAYOUTS, build_script, run_processes, run_script, take_notes
from tests.training.runs import write_tiny_data

pytest.importorskip("lightning", reason="lightning is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # what Lightning advises

FLAGS: dict[str, Any] = {
    "max_epochs": 3,
    "use_distributed_sampler": False,
    "reload_dataloaders_every_n_epochs": 1,
    "logger": False,
}
FLAGS |= {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
POLICIES = [{"batch_size": 6}, {"max_events": 80}]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_tiny_data(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def expected(split: str = "train", epochs: int = 3, **options: Any) -> list[list[str]]:
    loader = make_loader("data", split=split, shuffle=split == "train", **options)
    return [batch.patient_id for _ in range(epochs) for batch in loader]


def fit(policy: dict[str, Any], resume: str | None = None, **flags: Any) -> Any:
    """Train a model that notes what it is given, with a checkpoint after each step and each epoch."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    from integrations.lightning import PatientDataModule

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.head = torch.nn.Linear(1, 1)
            self.seen: dict[str, list[list[str]]] = {"train": [], "valid": [], "test": []}

        def compute(self, split: str, batch: Any) -> Any:
            self.seen[split].append(batch.patient_id)
            return self.head(batch.value[:, None]).square().mean()

        def training_step(self, batch: Any, _: int) -> Any:
            return self.compute("train", batch)

        def validation_step(self, batch: Any, _: int) -> None:
            self.compute("valid", batch)

        def test_step(self, batch: Any, number: int) -> None:
            self.compute("test", batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    names = {"dirpath": "checkpoints", "save_top_k": -1, "auto_insert_metric_name": False}
    callbacks = [
        ModelCheckpoint(**names, filename="step{step}", every_n_train_steps=1),
        ModelCheckpoint(**names, filename="end{epoch}", every_n_epochs=1, save_on_train_epoch_end=True),
    ]
    trainer = lightning.Trainer(callbacks=callbacks, **{**FLAGS, **flags})
    module, data = Module(), PatientDataModule("data", **policy)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer, module, data


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_fit_from_any_checkpoint_goes_on_with_the_next_batch(folder: Path, policy: dict[str, Any]) -> None:
    """In an epoch, after its last batch, and after its end; epochs of ``max_events`` have several lengths.

    Where lengths differ, Lightning takes what it saved after an epoch's last step for a place in the next epoch.
    """
    trainer, whole, _ = fit(policy)
    assert whole.seen["train"] == expected(**policy)
    assert whole.seen["valid"][-1:] == expected("valid", 1, **policy)[-1:]
    ends = [len(expected(epochs=epochs, **policy)) for epochs in (1, 2)]
    for step in set(range(1, trainer.global_step)) - (set(ends) if "max_events" in policy else set()):
        _, module, _ = fit(policy, f"checkpoints/step{step}.ckpt")
        assert module.seen["train"] == whole.seen["train"][step:], step
        assert torch.equal(module.head.weight, whole.head.weight)
    for epoch, step in enumerate(ends):
        _, module, data = fit(policy, f"checkpoints/end{epoch}.ckpt")
        assert module.seen["train"] == whole.seen["train"][step:], epoch
        assert torch.equal(module.head.weight, whole.head.weight)
        assert data.state_dict()["step"] == len(whole.seen["train"])


def test_each_validation_sees_the_whole_split_whatever_was_looked_at_before(folder: Path) -> None:
    """Lightning looks at two batches before training, and validates twice an epoch."""
    trainer, module, data = fit({"batch_size": 3}, num_sanity_val_steps=2, val_check_interval=0.5, max_epochs=2)
    valid = expected("valid", 1, batch_size=3)
    assert module.seen["valid"] == valid[:2] + 4 * valid
    assert module.seen["train"] == expected(epochs=2, batch_size=3)
    trainer.test(module, datamodule=data)
    assert module.seen["test"] == expected("test", 1, batch_size=3)
    assert data.state_dict()["epoch"] == 1, "the place in training stays"


def test_a_trainer_that_asks_for_one_length_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="needs Trainer"):
        fit({}, reload_dataloaders_every_n_epochs=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_training_of_the_page_runs(folder: Path, layout: str) -> None:
    names = run_script(build_script("Lightning", layout), folder)
    assert len(names["noted"]) == 2 * 2
    assert names["trainer"].current_epoch == 2


def test_one_device_goes_on_as_two_in_the_middle_of_an_epoch(folder: Path) -> None:
    saved = "dirpath='steps', filename='{step}', save_top_k=-1, every_n_train_steps=4"
    flags = f"max_epochs=2, callbacks=[lightning.pytorch.callbacks.ModelCheckpoint({saved})], logger=False"
    script = build_script("Lightning", "ragged", **ACROSS_RANKS, **{"max_epochs=2": flags + ", accelerator='cpu'"})
    whole = run_script(script, folder)["trainer"].model.state_dict()
    (alone,) = take_notes(folder, 1)
    (folder / "steps" / "step=8.ckpt").rename("last.ckpt")
    script = script.replace(flags, f"{flags}, devices=2, strategy='ddp', enable_progress_bar=False")
    run_processes(script + "torch.save(trainer.model.state_dict(), 'weights.pt')\n", folder)
    ranks = zip(*take_notes(folder, 2), strict=True)
    assert [sorted(first + second) for first, second in ranks] == [sorted(ids) for ids in alone[8:]]
    for name, ours in torch.load("weights.pt", weights_only=True).items():
        assert torch.allclose(ours, whole[name], atol=1e-5), name
