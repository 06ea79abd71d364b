"""Lightning with an early teacher: gradient accumulation, what is read after a validation, and a resume."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from adapters.loops import CLASSES, CountingTeacher, Killed, WatchedRun, data
from helpers import read_rows, read_summary, timeless
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from w2s.adapters.lightning import EarlyTeaching

SPLITS = {"report": data(48, seed=1), "switch": data(32, seed=2)}


class Student(LightningModule):
    def __init__(self, run: WatchedRun, lr: float = 0.05) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.run, self.lr = run, lr
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, CLASSES))

    def training_step(self, batch, batch_idx):
        images, targets = batch
        logits = self.model(images)
        return F.cross_entropy(logits, targets) + self.run.term(logits, images)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        images, targets = batch
        found = 100 * (self.model(images).argmax(1) == targets).float().mean()
        self.log(("report", "switch")[dataloader_idx], found, add_dataloader_idx=False)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


def score(teacher) -> dict[str, float]:
    return {
        name: 100 * (teacher(split.tensors[0]).argmax(1) == split.tensors[1]).float().mean().item()
        for name, split in SPLITS.items()
    }


def fit(folder: Path, teacher=None, *, phase=None, batch=16, callbacks=(), ckpt_path=None, lr=0.05, **options):
    """Train a student for five epochs of four batches; returns it."""
    run = WatchedRun(folder, teacher, **(phase or {}))
    saving = ModelCheckpoint(folder / "checkpoints", filename="last", enable_version_counter=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(
        callbacks=[EarlyTeaching(run, score=score), saving, *callbacks], **{"max_epochs": 5, **quiet, **options}
    )
    student = Student(run, lr)
    trainer.fit(
        student,
        DataLoader(data(64), batch_size=batch),
        [DataLoader(split, batch_size=16) for split in SPLITS.values()],
        ckpt_path=ckpt_path,
    )
    return student


class KillAt(Callback):
    """Ends the training after so many batches."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.batches:
            raise Killed


def parameters(student: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in student.parameters()])


def test_an_update_of_two_micro_batches_is_that_of_their_union(tmp_path):
    options = {"phase": {"off": "never"}, "max_epochs": 1, "lr": 0.5}
    whole = fit(tmp_path / "whole", CountingTeacher(), batch=64, **options)
    halves = fit(tmp_path / "halves", CountingTeacher(), batch=32, accumulate_grad_batches=2, **options)
    alone = fit(tmp_path / "alone", batch=64, max_epochs=1, lr=0.5)
    assert list(halves.run.seen) == list(whole.run.seen) == [0]
    torch.testing.assert_close(parameters(halves), parameters(whole))
    assert (parameters(whole) - parameters(alone)).abs().max() > 1e-3
    assert halves.run.samples == whole.run.samples == 64


def test_the_micro_batches_of_an_update_have_the_same_lambda(tmp_path):
    student = fit(tmp_path / "run", CountingTeacher(), phase={"warmup": 1.0}, accumulate_grad_batches=3, max_epochs=2)
    assert [weight for weight, _ in student.run.seen.values()] == [0.0, 1.0, 2.0, 2.0]  # two updates an epoch


def test_a_student_alone_is_recorded_too(tmp_path):
    fit(tmp_path / "run", max_epochs=2)
    rows = read_rows(tmp_path / "run")
    assert [row["epoch"] for row in rows] == ["1.0", "2.0"] and {row["kd_weight"] for row in rows} == {"0.0"}
    summary = read_summary(tmp_path / "run")
    assert (summary["status"], summary["teacher"]) == ("finished", None)


def test_a_metric_that_is_not_logged_is_named(tmp_path):
    run = WatchedRun(tmp_path / "run")
    trainer = Trainer(
        callbacks=[EarlyTeaching(run, switch="held_out")], max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    loaders = [DataLoader(split, batch_size=16) for split in SPLITS.values()]
    with pytest.raises(ValueError, match="held_out"):
        trainer.fit(Student(run), DataLoader(data(64), batch_size=16), loaders)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, WatchedRun]:
    folder = tmp_path_factory.mktemp("lightning") / "run"
    run = fit(folder, CountingTeacher()).run
    assert run.distillation.off["reason"] == "surpass" and run.distillation.off["update"] < 16
    return folder, run


@pytest.mark.parametrize("killed_at", [7, 18], ids=["while it teaches", "when it is silent"])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(whole, tmp_path, killed_at):
    with pytest.raises(Killed):
        fit(tmp_path / "run", CountingTeacher(), callbacks=[KillAt(killed_at)])
    teacher = CountingTeacher()
    run = fit(tmp_path / "run", teacher, ckpt_path=tmp_path / "run" / "checkpoints" / "last.ckpt").run
    folder, uncut = whole
    assert run.distillation.off == uncut.distillation.off
    start = killed_at // 4 * 4  # the checkpoint of the last epoch
    assert run.seen == {update: seen for update, seen in uncut.seen.items() if update >= start}
    assert teacher.calls == (uncut.distillation.off["update"] - start if killed_at == 7 else 0)
    assert timeless(tmp_path / "run") == timeless(folder)
