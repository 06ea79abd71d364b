"""The bookkeeping around an update: what is skipped, what is left out of the time, what is saved when."""

import math
import time

import pytest
import torch
from torch import nn

from w2s.distillation import Distillation
from w2s.engine.errors import NonFiniteLoss, Preempted
from w2s.engine.optim import build_optimizer
from w2s.engine.plan import Plan
from w2s.engine.prepare import prepare_job
from w2s.engine.stopping import Stopping
from w2s.engine.training import Job
from w2s.teacher import Teacher


@pytest.fixture
def job_of(run_of):
    """A job of a linear student in an open run; `scaler` steps its optimiser, as in fp16."""

    def make(
        student: nn.Module | None = None,
        scaler: object = None,
        total: int = 100,
        trained: nn.Module | None = None,
        **changes: object,
    ) -> Job:
        torch.manual_seed(0)
        student = student or nn.Linear(4, 2)
        options = {"lr": 0.1, "opt": "sgd", "sched": "constant", "channels_last": False, **changes}
        run = run_of(**options)
        run.accelerator.scaler = scaler
        run.stopping = Stopping(run.accelerator)
        args = run.parsed
        optimizer, scheduler = build_optimizer(
            args, trained or student, lr=0.1, length=10, updates_per_unit=10, fused=run.fuses
        )
        job = prepare_job(
            args,
            run,
            Plan(batch=8, updates_per_epoch=10, total=total),
            Distillation(),
            student=student,
            compiled=student,
            optimizer=optimizer,
            scheduler=scheduler,
            flops={"student_update": 1, "teacher_forward": 0},
            export=lambda module, folder: None,
            trained=trained,
        )
        job.resume()
        run.open(metric="top1", mode="max", targets=[], reported=("top1",), facts=job.facts())
        return job

    return make


def train(job: Job, stop: int, factor=lambda update: 1.0) -> None:
    """Updates on random inputs, the loss multiplied by `factor(update)`."""
    for update in job.updates(stop):
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(update))
        loss = job.model(inputs).square().mean() * factor(update)
        job.run.accelerator.backward(loss)
        job.step(torch.stack([loss, loss, torch.zeros_like(loss)]).detach())


def weights(job: Job) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in job.student.parameters()])


# --- fp16 ------------------------------------------------------------------------------------------------------------


def test_an_update_that_the_scaler_skips_is_counted_and_changes_nothing(job_of):
    job = job_of(scaler=torch.amp.GradScaler("cpu"), model_ema=True)
    train(job, 3)
    before, averaged = weights(job), [p.clone() for p in job.ema.module.parameters()]
    train(job, 4, factor=lambda update: math.inf)
    assert torch.equal(weights(job), before)
    assert all(torch.equal(p, q) for p, q in zip(job.ema.module.parameters(), averaged, strict=True))
    assert (job.update, job.skipped) == (4, 1)
    train(job, 6)
    assert not torch.equal(weights(job), before)
    job.evaluated({"top1": 50.0})
    row = job.run.record.rows[0]
    assert row["update"] == 6 and math.isfinite(row["train_loss"])
    assert job.run.record.summary()["skipped_updates"] == 1


def test_each_step_draws_the_same_numbers_on_all_processes(job_of):
    """They have seen other images, by other random numbers."""
    job, seeds = job_of(), []
    job.optimizer.optimizer.register_step_pre_hook(lambda *_: seeds.append(torch.initial_seed()))
    for process in range(2):
        job.update = 0

        def factor(update: int, process: int = process) -> float:
            torch.manual_seed(10 * process + update)
            return 1.0

        train(job, 3, factor)
    assert seeds[:3] == seeds[3:] and len(set(seeds)) == 3


def test_where_every_update_was_skipped_there_is_no_mean_loss(job_of):
    job = job_of(scaler=torch.amp.GradScaler("cpu"))
    train(job, 2, factor=lambda update: math.nan)
    job.evaluated({"top1": 50.0})
    assert "train_loss" not in job.run.record.rows[0]


def test_what_was_skipped_is_known_after_a_resume(job_of):
    job = job_of(scaler=torch.amp.GradScaler("cpu"))
    train(job, 2, factor=lambda update: math.inf if update else 1.0)
    with job.saved():
        pass
    again = job_of(scaler=torch.amp.GradScaler("cpu"), resume="auto")
    assert (again.update, again.skipped) == (2, 1)


def test_a_scaler_that_skips_again_and_again_ends_the_run(job_of):
    job = job_of(scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(NonFiniteLoss, match="update 12"):
        train(job, 20, factor=lambda update: math.nan if update > 1 else 1.0)


def test_without_a_scaler_one_loss_that_is_not_finite_ends_the_run(job_of):
    with pytest.raises(NonFiniteLoss, match="update 3"):
        train(job_of(), 20, factor=lambda update: math.nan if update > 1 else 1.0)


# --- what is clipped -------------------------------------------------------------------------------------------------


class Branched(nn.Module):
    """A student with a branch that is trained beside it."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student, self.branch = student, nn.Linear(4, 2, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.student(inputs) + self.branch(inputs)


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_what_is_trained_beside_the_student_is_clipped_with_it(mode, job_of):
    model = Branched(nn.Linear(4, 2))
    before = model.branch.weight.detach().clone()
    plain = {"opt": "momentum", "momentum": 0.0, "weight_decay": 0.0}
    train(job_of(model.student, trained=model, clip_grad=0.01, clip_mode=mode, **plain), 1, factor=lambda update: 1e4)
    moved = (model.branch.weight - before).detach()
    size = {"norm": moved.norm(), "value": moved.abs().max(), "agc": (moved.norm(dim=1) / before.norm(dim=1)).max()}
    assert 0 < size[mode] <= 0.1 * 0.01 * 1.001  # learning rate times --clip-grad


# --- what is saved ---------------------------------------------------------------------------------------------------


def test_broken_weights_are_never_saved(job_of):
    """The loss of an update is that before its step."""
    job = job_of()
    train(job, 1)
    with job.saved():
        pass
    with torch.no_grad():
        job.student.bias.fill_(math.nan)
    with pytest.raises(NonFiniteLoss, match="update-00000001"), job.saved():
        pass


def saved_updates(job: Job) -> list[str]:
    return sorted(path.name for path in (job.run.folder / "checkpoints").iterdir())


def test_what_was_trained_is_safe_before_the_evaluation_begins(job_of):
    job = job_of()
    train(job, job.next_stop(5))
    with pytest.raises(KeyboardInterrupt), job.saved() as due:
        assert due and saved_updates(job) == ["update-00000005"]
        raise KeyboardInterrupt  # as a kill
    again = job_of(resume="auto")
    assert again.update == again.next_stop(10) == 5 and not again.done
    with again.saved() as due:
        assert due
        again.evaluated({"top1": 50.0})
    assert [row["update"] for row in again.run.record.rows] == [5]
    assert again.next_stop(10) == 10
    last = job_of(resume="auto")
    assert last.next_stop(10) == 10 and len(last.run.state["rows"]) == 1


def test_after_the_evaluation_only_the_state_is_written_anew(job_of):
    job = job_of()
    train(job, job.next_stop(5))
    file = job.run.folder / "checkpoints" / "update-00000005" / ".metadata"
    with job.saved():
        written = file.stat().st_mtime_ns, file.stat().st_ino
        job.evaluated({"top1": 50.0})
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == written


def test_a_signal_during_the_last_evaluation_leaves_it_for_the_resumed_run(job_of):
    job = job_of(total=5)
    train(job, job.next_stop(5))
    with pytest.raises(Preempted, match="saved at update 5"), job.saved():
        raise Preempted("stopped by a signal during an evaluation")
    again = job_of(total=5, resume="auto")
    assert not again.done and again.evaluation_due
    with again.saved():
        again.evaluated({"top1": 50.0})
    assert again.done


# --- what is left out of the time ------------------------------------------------------------------------------------


class SlowToCompile(nn.Linear):
    """Takes another branch, and so another compilation, once it is late."""

    late: bool

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs) * 2 if self.late else super().forward(inputs)


def test_an_update_that_compiled_is_left_out_of_the_train_seconds(job_of, monkeypatch):
    seconds, compiled = 0.0, []
    student = SlowToCompile(4, 2)
    student.late = False

    def slow(graph: torch.fx.GraphModule, inputs: list) -> object:
        nonlocal seconds
        seconds += 100.0
        compiled.append(graph)
        return graph.forward

    job = job_of(student)
    job.distillation.teacher = teacher = Teacher(nn.Identity(), "it", "here", torch.device("cpu"))
    teacher.forward = lambda late: time.sleep(0.2 if late else 0)
    monkeypatch.setattr(job.run.clock, "now", lambda: seconds)
    torch._dynamo.reset()
    student.compile(backend=slow)

    def factor(update: int) -> float:
        nonlocal seconds
        seconds += 1.0
        student.late = update >= 1  # from the next forward on
        teacher(update == 2)
        return 1.0

    train(job, 10, factor=factor)
    torch._dynamo.reset()
    assert len(compiled) == 2
    assert job.run.clock.train_seconds == 7.0  # ten updates but for the first two, which warm up, and the third
    assert job.distillation.take_seconds() < 0.1  # of the teacher, which was slow in the third alone


def test_the_teachers_time_leaves_out_what_the_student_leaves_out():
    teacher = Teacher(nn.Identity(), "it", "here", torch.device("cpu"))
    teacher.mark()
    teacher(torch.zeros(1))
    teacher.take_seconds()
    teacher.forward = lambda *inputs: time.sleep(0.2)
    teacher.mark()
    teacher(torch.zeros(1))
    teacher.forget_marked()
    assert teacher.take_seconds() == 0.0
