"""What is measured on the batches of training: the gradients of --kd-balance against those that autograd gives."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import on_processes
from torch import Tensor

from w2s.losses import kl_softmax
from w2s.running import GradientBalance, RunningScores


def losses(seed: int = 0, batch: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, their cross entropy, and their divergence from a teacher's at T 4."""
    torch.manual_seed(seed)
    logits = (3 * torch.randn(batch, 5)).requires_grad_()
    teacher = 3 * torch.randn(batch, 5)
    return logits, F.cross_entropy(logits, torch.arange(batch) % 5), kl_softmax(logits, teacher, 4.0)


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


@pytest.mark.parametrize("weight", [0.5, 1.0, 10.0])
def test_lambda_is_the_ratio_of_the_gradients_and_the_whole_keeps_the_size_of_the_task(weight):
    logits, task_loss, kd_loss = losses()
    balance = GradientBalance()
    balance.measure(task_loss, kd_loss, [logits])
    task, kd = gradient(task_loss, logits), gradient(weight * balance.ratio * kd_loss, logits)
    assert kd.norm() / task.norm() == pytest.approx(weight, rel=1e-5)
    whole = gradient(balance.scale(weight) * (task_loss + weight * balance.ratio * kd_loss), logits)
    assert (task * kd).sum() > 0  # or the case below
    assert whole.norm() == pytest.approx(float(task.norm()), rel=1e-5)


def test_gradients_that_cancel_each_other_are_not_blown_up():
    logits = torch.tensor([1.0, 2.0], requires_grad=True)
    balance = GradientBalance()
    balance.measure(logits.sum(), -3 * logits.sum(), [logits])
    assert float(balance.ratio) == pytest.approx(1 / 3)
    assert float(balance.scale(1.0)) == pytest.approx(1 / math.sqrt(2))


def test_losses_that_pull_the_same_way_share_the_gradient():
    logits = torch.tensor([1.0, 2.0], requires_grad=True)
    balance = GradientBalance()
    balance.measure(logits.sum(), 5 * logits.sum(), [logits])
    assert float(balance.scale(3.0)) == pytest.approx(1 / 4)
    assert float(balance.scale(0.0)) == 1.0


def test_an_output_that_one_loss_does_not_depend_on_has_no_gradient_there():
    first, second = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    balance = GradientBalance()
    balance.measure(first.sum() + second.sum(), 2 * first.sum(), [first, second])
    assert balance.means.tolist() == [5.0, 8.0, 4.0]


def test_the_ratio_follows_slowly_and_never_rises_above_the_first_one():
    weight = torch.ones(1, requires_grad=True)
    balance = GradientBalance()

    def update(kd: float) -> float:
        balance.measure(weight.sum(), kd * weight.sum(), [weight])
        balance.end_update()
        return float(balance.ratio)

    assert update(0.5) == pytest.approx(2)
    assert update(1.0) == pytest.approx((0.95 * 0.25 + 0.05 * 1.0) ** -0.5)  # a mean of squares
    for _ in range(500):
        loud = update(8.0)
    assert loud == pytest.approx(1 / 8)
    for _ in range(500):
        silent = update(0.0)
    assert silent == pytest.approx(2)


def test_all_micro_batches_of_an_update_count_and_the_ratio_stays_during_it():
    weight = torch.ones(1, requires_grad=True)
    balance = GradientBalance()
    balance.measure(weight.sum(), weight.sum(), [weight])
    balance.measure(weight.sum(), 3 * weight.sum(), [weight])
    assert float(balance.ratio) == 1.0  # the same for all of them
    balance.end_update()
    assert balance.means.tolist() == pytest.approx([0.95 + 0.05 * 2, 0.95 + 0.05 * 10, 0.95 + 0.05 * 4])


def test_a_student_that_starts_from_its_teachers_weights_is_not_blown_up():
    """Its term has no gradient at first, and the one that it has then is not made louder without bound."""
    torch.manual_seed(0)
    teacher, images = torch.randn(20, 5), torch.randn(256, 20)
    labels = (images @ torch.randn(20, 5)).argmax(-1)
    student, balance, losses = teacher.clone().requires_grad_(), GradientBalance(), []
    optimizer = torch.optim.SGD([student], lr=0.5, momentum=0.9)
    for _ in range(10):
        logits = images @ student
        task_loss, kd_loss = F.cross_entropy(logits, labels), kl_softmax(logits, images @ teacher, 2.0)
        balance.measure(task_loss, kd_loss, [logits])
        optimizer.zero_grad()
        (balance.scale(1.0) * (task_loss + balance.ratio * kd_loss)).backward()
        optimizer.step()
        balance.end_update()
        losses.append(task_loss.item())
    assert max(losses) < 2 * losses[0]


def test_an_overflow_changes_nothing():
    weight = torch.ones(1, requires_grad=True)
    balance = GradientBalance()
    for factor in (2.0, math.inf):
        balance.measure(weight.sum(), factor * weight.sum(), [weight])
        balance.end_update()
    assert float(balance.ratio) == pytest.approx(0.5)


@pytest.mark.parametrize("overflow", [math.inf, math.nan])
def test_an_overflow_in_the_first_update_is_forgotten(overflow):
    """A gradient scaler skips that update, and the run goes on."""
    weight = torch.ones(1, requires_grad=True)
    balance, later = GradientBalance(), GradientBalance()
    balance.measure(weight.sum(), overflow * weight.sum(), [weight])
    balance.end_update()
    balance.measure(weight.sum(), 2 * weight.sum(), [weight])
    assert float(balance.ratio) == float(balance.scale(3.0)) == 1.0
    balance.end_update()
    assert float(balance.ratio) == pytest.approx(0.5) and float(balance.scale(3.0)) == pytest.approx(1 / 4)
    later.load_state_dict(json.loads(json.dumps(balance.state_dict())))
    for one in (balance, later):
        one.measure(weight.sum(), 0.5 * weight.sum(), [weight])
        for _ in range(200):
            one.end_update()
            one.measure(weight.sum(), 0.5 * weight.sum(), [weight])
        assert float(one.ratio) == pytest.approx(0.5)  # not above the first one


def test_an_update_without_a_teacher_changes_nothing():
    balance = GradientBalance()
    balance.end_update()
    assert balance.state_dict() is None


def test_the_state_continues_bit_for_bit():
    balance, again = GradientBalance(), GradientBalance()
    for seed in range(3):
        logits, task_loss, kd_loss = losses(seed)
        balance.measure(task_loss, kd_loss, [logits])
        balance.end_update()
    again.load_state_dict(balance.state_dict())
    for one in (balance, again):
        one.measure(task_loss, kd_loss, [logits])
        one.end_update()
    assert torch.equal(balance.ratio, again.ratio) and torch.equal(balance.scale(3.0), again.scale(3.0))


def balance_of_a_share(accelerator) -> list[float]:
    """r and s after each of two updates, on this process's share of the batch."""
    balance = GradientBalance(accelerator.reduce)
    found = []
    for seed in range(2):
        logits, task_loss, kd_loss = losses(seed=10 * seed + accelerator.process_index)
        balance.measure(task_loss, kd_loss, [logits])
        found += [float(balance.ratio), float(balance.scale(3.0))]
        balance.end_update()
    return [*found, float(balance.ratio)]


def test_all_processes_hold_the_same_numbers():
    one, other = on_processes(2, balance_of_a_share)
    assert one == other and len(set(one)) > 2


def scores(*updates: tuple[float, float, int], **options) -> RunningScores:
    """After updates of so many images each, all with this score of the student and of the teacher."""
    running = RunningScores(**options)
    for student, teacher, count in updates:
        running.add(torch.full((count,), student), torch.full((count,), teacher))
        running.end_update()
    return running


def test_running_scores_are_means_over_images_that_fade():
    assert scores((100.0, 0.0, 3), (0.0, 50.0, 1)).means() == pytest.approx((100 * 2.94 / 3.94, 50 / 3.94))
    assert scores(*[(0.0, 100.0, 8)] * 400, *[(100.0, 0.0, 8)] * 400).means() == pytest.approx((100.0, 0.0), abs=0.1)


def test_running_scores_sum_the_micro_batches_of_an_update_and_wait_for_the_first():
    running = scores()
    assert all(map(math.isnan, running.means()))
    running.end_update()  # an update in which the teacher was silent
    running.add(torch.tensor([100.0]), torch.tensor([0.0]))
    running.add(torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0.0, 100.0, 100.0]))
    running.end_update()
    assert running.means() == (25.0, 50.0)


def test_running_scores_leave_out_an_update_that_is_not_finite():
    assert scores((60.0, 50.0, 4), (math.nan, 50.0, 4)).means() == (60.0, 50.0)


def test_running_scores_continue_from_a_checkpoint_and_are_shared():
    running = scores((60.0, 50.0, 4), reduce=lambda sums: sums * 2)
    again = RunningScores()
    again.load_state_dict(json.loads(json.dumps(running.state_dict())))
    assert again.means() == running.means() == (60.0, 50.0)
    assert running.state_dict()[2] == 8
    assert RunningScores().state_dict() is None
