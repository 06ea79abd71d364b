"""transformers' Trainer with an early teacher: the loss, gradient accumulation, the evaluation, and a resume."""

from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from adapters.loops import CLASSES, CountingTeacher, Killed, WatchedRun, data
from helpers import read_rows, read_summary, timeless
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

from w2s.adapters.hf import EarlyTrainer
from w2s.losses import kl_softmax


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps the options of the first accelerator made in a process."""
    accelerate.state.AcceleratorState._reset_state(True)
    yield
    accelerate.state.AcceleratorState._reset_state(True)


class AsDicts(Dataset):
    def __init__(self, count: int, seed: int = 0) -> None:
        self.images, self.labels = data(count, seed).tensors

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def accuracy(found) -> dict:
    return {"accuracy": 100 * np.mean(found.predictions.argmax(1) == found.label_ids)}


def trainer_of(
    folder: Path, teacher=None, phase=None, callbacks=(), count: int = 64, checkpoint=None, **arguments
) -> EarlyTrainer:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(image_size=4, patch_size=2, num_channels=1, num_labels=CLASSES, **size)
    defaults = {
        "per_device_train_batch_size": 16, "num_train_epochs": 5, "learning_rate": 3e-3,
        "lr_scheduler_type": "constant", "eval_strategy": "epoch", "save_strategy": "epoch", "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "logging_strategy": "no",
    }  # fmt: skip
    model = ViTForImageClassification(config)
    if (
        checkpoint
    ):  # transformers 5 saves a ViT under the names of the hub, and its Trainer does not translate them back
        model = ViTForImageClassification.from_pretrained(checkpoint)
    return EarlyTrainer(
        run=WatchedRun(folder, teacher, **(phase or {})),
        model=model,
        args=TrainingArguments(output_dir=str(folder / "checkpoints"), **{**defaults, **arguments}),
        train_dataset=AsDicts(count),
        eval_dataset={"report": AsDicts(48, seed=1), "switch": AsDicts(32, seed=2)},
        compute_metrics=accuracy,
        callbacks=list(callbacks),
    )


class KillAt(TrainerCallback):
    """Ends the training after so many updates."""

    def __init__(self, update: int) -> None:
        self.update = update

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.update:
            raise Killed


ONE_UPDATE = {
    "num_train_epochs": 1, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "eval_strategy": "epoch",
    "save_strategy": "no",
}  # fmt: skip


def weights_after_one_update(folder: Path, batch: int, accum: int, **options) -> torch.Tensor:
    arguments = {**ONE_UPDATE, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accum}
    trainer = trainer_of(folder, count=32, **options, **arguments)
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.run.samples == 32
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def test_an_update_of_two_micro_batches_is_that_of_their_union(tmp_path):
    taught = {"teacher": CountingTeacher(), "phase": {"off": "never"}}
    whole = weights_after_one_update(tmp_path / "whole", 32, 1, **taught)
    halves = weights_after_one_update(tmp_path / "halves", 16, 2, **taught)
    alone = weights_after_one_update(tmp_path / "alone", 32, 1)
    torch.testing.assert_close(halves, whole)
    assert (whole - alone).abs().max() > 1e-3


def test_the_term_is_added_to_the_loss_of_training_and_not_to_that_of_an_evaluation(tmp_path):
    trainer = trainer_of(tmp_path / "run", CountingTeacher(), {"off": "never"}, num_train_epochs=1)
    trainer.train()
    batch = {name: torch.stack([trainer.train_dataset[i][name] for i in range(8)]) for name in ("pixel_values",)}
    batch["labels"] = trainer.train_dataset.labels[:8]
    evaluated = trainer.compute_loss(trainer.model.eval(), dict(batch))
    trained, outputs = trainer.compute_loss(trainer.model.train(), dict(batch), return_outputs=True)
    kd = trainer.run.distillation
    term = kl_softmax(outputs.logits, kd.teacher(batch["pixel_values"]), kd.temperature)
    torch.testing.assert_close(evaluated, outputs.loss)
    torch.testing.assert_close(trained, outputs.loss + 2.0 * term)


def test_the_teacher_is_measured_as_the_student_is(tmp_path):
    teacher = CountingTeacher()
    trainer = trainer_of(tmp_path / "run", teacher, num_train_epochs=1)
    trainer.train()
    for split in ("report", "switch"):
        images, labels = trainer.eval_dataset[split].images, trainer.eval_dataset[split].labels
        expected = 100 * (teacher(images).argmax(1) == labels).float().mean().item()
        assert read_summary(tmp_path / "run")["teacher"][split] == pytest.approx(expected)


def test_the_teacher_has_the_precision_of_the_student(tmp_path):
    teacher, seen = CountingTeacher(), []
    teacher.register_forward_hook(lambda module, inputs, logits: seen.append(logits.dtype))
    trainer_of(tmp_path / "run", teacher, {"off": "never"}, num_train_epochs=1, bf16=True).train()
    assert len(seen) > 4 and set(seen) == {torch.bfloat16}


def test_a_student_alone_is_trained_as_by_transformers_and_recorded(tmp_path):
    trainer_of(tmp_path / "run", num_train_epochs=2).train()
    rows = read_rows(tmp_path / "run")
    assert [row["epoch"] for row in rows] == ["1.0", "2.0"] and {row["kd_weight"] for row in rows} == {"0.0"}
    assert read_summary(tmp_path / "run")["status"] == "finished"


def test_evaluations_outside_of_the_training_are_not_written_down(tmp_path):
    trainer = trainer_of(tmp_path / "run", num_train_epochs=1)
    trainer.train()
    trainer.evaluate()
    assert len(read_rows(tmp_path / "run")) == 1


def test_both_splits_are_needed(tmp_path):
    with pytest.raises(ValueError, match="switch"):
        EarlyTrainer(
            run=WatchedRun(tmp_path / "run"),
            model=trainer_of(tmp_path / "other").model,
            args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
            eval_dataset=AsDicts(8),
        )


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, WatchedRun]:
    accelerate.state.AcceleratorState._reset_state(True)
    folder = tmp_path_factory.mktemp("hf") / "run"
    trainer = trainer_of(folder, CountingTeacher())
    trainer.train()
    assert trainer.run.distillation.off["reason"] == "surpass" and trainer.run.distillation.off["update"] < 16
    return folder, trainer.run


@pytest.mark.parametrize("killed_at", [7, 18], ids=["while it teaches", "when it is silent"])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(whole, tmp_path, killed_at):
    with pytest.raises(Killed):
        trainer_of(tmp_path / "run", CountingTeacher(), callbacks=[KillAt(killed_at)]).train()
    teacher, start = CountingTeacher(), killed_at // 4 * 4
    checkpoint = str(tmp_path / "run" / "checkpoints" / f"checkpoint-{start}")  # of the last whole epoch
    trainer = trainer_of(tmp_path / "run", teacher, checkpoint=checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    folder, run = whole
    assert trainer.run.distillation.off == run.distillation.off
    assert trainer.run.seen == {update: seen for update, seen in run.seen.items() if update >= start}
    assert teacher.calls == (run.distillation.off["update"] - start if killed_at == 7 else 0)
    assert timeless(tmp_path / "run") == timeless(folder)


def test_a_trainer_that_never_evaluates_is_refused(tmp_path):
    with pytest.raises(ValueError, match="set eval_strategy"):
        trainer_of(tmp_path / "run", eval_strategy="no").train()


@pytest.mark.parametrize("teacher", [None, CountingTeacher])
def test_a_metric_that_compute_metrics_does_not_give_is_named(tmp_path, teacher):
    trainer = trainer_of(tmp_path / "run", teacher and teacher(), num_train_epochs=1)
    trainer.compute_metrics = lambda found: {"top1": 0.0}
    with pytest.raises(ValueError, match=r"no .accuracy., which the run reports; there is: .*top1"):
        trainer.train()
