"""timm's task with an early phase: equal to timm's own where lambda is constant, and silent for good after it."""

import copy

import pytest
import timm
import torch
from adapters.loops import CLASSES, WatchedRun
from timm.task import ClassificationTask, LogitDistillationTask, resume_task_checkpoint
from timm.utils import CheckpointSaver
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from w2s.adapters.timm_task import EarlyDistillationTask

BATCHES = 4  # an epoch
CONSTANT = {"weight": 0.7, "off": "never", "temperature": (3, 3)}


def model_of(seed: int, mean: float = 0.5) -> nn.Module:
    torch.manual_seed(seed)
    overlay = {"mean": (mean,) * 3, "std": (0.5,) * 3}
    kwargs = {"channels": (8, 8, 8, 8), "stem_width": 8, "pretrained_cfg_overlay": overlay}
    return timm.create_model("resnet10t", num_classes=CLASSES, **kwargs)


def batches(count: int = BATCHES) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, 8, 3, 16, 16, generator=generator)
    return [(batch, torch.arange(8) % CLASSES) for batch in images]


def loader() -> DataLoader:
    images, targets = zip(*batches(2), strict=True)
    return DataLoader(TensorDataset(torch.cat(images), torch.cat(targets)), batch_size=8)


def task_of(folder, teacher: nn.Module | None, accum: int = 1, seed: int = 1, **phase) -> EarlyDistillationTask:
    run = WatchedRun(folder, teacher, metric="top1", **phase)
    loaders = {"report": loader(), "switch": loader()}
    return EarlyDistillationTask(
        model_of(seed), run, batches_per_epoch=BATCHES, grad_accum_steps=accum, eval_loaders=loaders, verbose=False
    )


def gradients(task: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in task.get_trainable_module().parameters()]


@pytest.mark.parametrize("mean", [0.5, 0.3], ids=["the same normalisation", "another normalisation"])
def test_with_constant_lambda_it_is_timms_own_task(tmp_path, mean):
    ours = task_of(tmp_path / "run", model_of(2, mean), **CONSTANT).train()
    theirs = LogitDistillationTask(
        model_of(1), model_of(2, mean), distill_loss_weight=0.7, task_loss_weight=1.0, temperature=3.0, verbose=False
    ).train()
    images, targets = batches()[0]
    results = [task(images, targets) for task in (ours, theirs)]
    for result in results:
        result["loss"].backward()
    assert set(results[0]) == set(results[1])
    torch.testing.assert_close(results[0]["loss"], results[1]["loss"])
    assert results[0]["loss"] > results[0]["task_loss"] > 0
    for one, other in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(one, other)


def test_without_a_teacher_it_is_timms_classification(tmp_path):
    images, targets = batches()[0]
    ours, theirs = task_of(tmp_path / "run", None).train(), ClassificationTask(model_of(1), verbose=False).train()
    for task in (ours, theirs):
        task(images, targets)["loss"].backward()
    assert all(torch.equal(one, other) for one, other in zip(gradients(ours), gradients(theirs), strict=True))


@pytest.mark.parametrize(("accum", "updates"), [(1, 8), (2, 4), (3, 4)])
def test_the_batches_of_an_update_have_the_same_lambda(tmp_path, accum, updates):
    task = task_of(tmp_path / "run", model_of(2), accum, warmup=1.0)
    for images, targets in batches() * 2:
        task(images, targets)
    assert sorted(task.run.seen) == list(range(updates))
    assert task.run.seen[updates // 4][0] == pytest.approx(2.0 * (updates // 4) / (updates / 2))
    assert task.run.samples == 64


def test_the_teacher_is_no_part_of_the_task(tmp_path):
    task = task_of(tmp_path / "run", model_of(2))
    task(*batches()[0])
    assert set(task.state_dict()) == {f"trainable_module.{name}" for name in model_of(1).state_dict()}
    assert not any("teacher" in name for name in task.get_checkpoint_state()["task_state"]["phase"])


def train(task: EarlyDistillationTask, saver_folder, start: int, stop: int) -> None:
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), 0.05)
    saver = CheckpointSaver(
        task.get_trainable_module(), optimizer, checkpoint_dir=saver_folder, recovery_dir=saver_folder, task=task
    )
    for epoch in range(start, stop):
        task.get_trainable_module().train()
        for images, targets in batches():
            task(images, targets)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        task.get_eval_model().eval()
        task.evaluated({"top1": 10.0 * epoch}, lr=0.05)
        saver.save_checkpoint(epoch, metric=1.0)


def weak(model: nn.Module) -> nn.Module:
    """A teacher that is wrong on all images that it is measured on, so that any student passes it soon."""
    model = copy.deepcopy(model)
    nn.init.zeros_(model.fc.weight)
    with torch.no_grad():
        model.fc.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    return model


@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_task_ends_as_one_that_was_not_interrupted(tmp_path, stop):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved-whole").mkdir()
    whole = task_of(tmp_path / "whole", weak(model_of(2)))
    train(whole, tmp_path / "saved-whole", 0, 6)
    assert whole.run.distillation.off["reason"] in ("surpass", "window") and whole.run.distillation.off["update"] <= 16
    train(task_of(tmp_path / "cut", weak(model_of(2))), tmp_path / "saved", 0, stop)

    teacher, calls = weak(model_of(2)), []
    teacher.register_forward_hook(lambda *call: calls.append(1))
    again = task_of(tmp_path / "cut", teacher)
    start = resume_task_checkpoint(again, str(tmp_path / "saved" / "last.pth.tar"))
    assert start == stop
    train(again, tmp_path / "saved", start, 6)
    assert again.run.distillation.off == whole.run.distillation.off
    assert again.run.seen == {update: seen for update, seen in whole.run.seen.items() if update >= BATCHES * stop}
    assert bool(calls) == (stop == 1)
    assert again.run.record.rows[-1]["samples"] == whole.run.record.rows[-1]["samples"]


def test_a_checkpoint_within_an_epoch_goes_on_at_the_next_as_timm_does(tmp_path):
    task = task_of(tmp_path / "run", model_of(2))
    for images, targets in batches() + batches(1):
        task(images, targets)
    again = task_of(tmp_path / "run", model_of(2))
    again.load_task_state(task.get_task_state())
    assert again.update == 2 * BATCHES
