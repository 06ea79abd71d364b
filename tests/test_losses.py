"""The distillation terms against torch's losses and distributions, timm's distillation task and hand-made numbers."""

import ast
import copy
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.task import LogitDistillationTask
from torch.distributions import Bernoulli, kl_divergence

from w2s import kl_sigmoid, kl_softmax, losses

TEMPERATURES = (0.5, 1.0, 2.5, 6.0, 20.0)
TERMS = pytest.mark.parametrize("term", [kl_softmax, kl_sigmoid])


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors gain nothing from more, and lose much where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Student logits that want a gradient, teacher logits."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(*shape, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher


# --- kl_softmax ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", [(1, 2), (8, 10), (4, 1000), (2, 3, 7), (2, 3, 2, 5)])
@pytest.mark.parametrize("log_target", [False, True])
def test_kl_softmax_is_kldivloss_times_squared_temperature(shape, temperature, log_target):
    student, teacher = logits(*shape)
    log_student = torch.log_softmax(student.double() / temperature, dim=-1).reshape(-1, shape[-1])
    soft_teacher = torch.softmax(teacher.double() / temperature, dim=-1).reshape(-1, shape[-1])
    reference = torch.nn.KLDivLoss(reduction="batchmean", log_target=log_target)
    expected = reference(log_student, soft_teacher.log() if log_target else soft_teacher) * temperature**2
    torch.testing.assert_close(kl_softmax(student, teacher, temperature).double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", [(8, 10), (2, 3, 7)])
def test_kl_softmax_of_shared_classes_is_kldivloss_of_their_columns(shape, temperature):
    student, teacher = logits(*shape)
    shared = torch.tensor([5, 0, 3])
    teacher[..., [1, 2, 4]] = -math.inf  # classes that the teacher does not know
    columns = student.detach()[..., shared].double().reshape(-1, 3)
    targets = teacher[..., shared].double().reshape(-1, 3)
    reference = torch.nn.KLDivLoss(reduction="batchmean", log_target=True)
    expected = reference((columns / temperature).log_softmax(-1), (targets / temperature).log_softmax(-1))
    loss = kl_softmax(student, teacher, temperature, shared)
    torch.testing.assert_close(loss.detach().double(), expected * temperature**2, rtol=1e-4, atol=1e-6)
    loss.backward()
    others = [label for label in range(shape[-1]) if label not in shared]
    assert (student.grad[..., others] == 0).all() and (student.grad[..., shared] != 0).any()


def test_kl_softmax_takes_a_single_vector_of_logits():
    student, teacher = logits(5)
    torch.testing.assert_close(kl_softmax(student, teacher, 2.0), kl_softmax(student[None], teacher[None], 2.0))


def test_kl_softmax_default_temperature_is_one():
    student, teacher = logits(4, 6)
    assert kl_softmax(student, teacher) == kl_softmax(student, teacher, 1.0)
    assert kl_softmax(student, teacher) != kl_softmax(student, teacher, 1.1)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", [(8, 10), (2, 3, 7)])
def test_kl_softmax_gradient_is_the_scaled_difference_of_the_softmaxes(shape, temperature):
    student, teacher = logits(*shape)
    kl_softmax(student, teacher, temperature).backward()
    count = math.prod(shape[:-1])
    difference = torch.softmax(student / temperature, -1) - torch.softmax(teacher / temperature, -1)
    torch.testing.assert_close(student.grad, (temperature * difference / count).detach(), rtol=1e-4, atol=1e-6)


def test_kl_softmax_puts_the_teacher_first():
    teacher, student = torch.tensor([[3 / 4, 1 / 4]]).log(), torch.tensor([[1 / 2, 1 / 2]]).log()
    forward = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)  # 0.1308
    reverse = 1 / 2 * math.log(2 / 3) + 1 / 2 * math.log(2)  # 0.1438
    assert kl_softmax(student, teacher).item() == pytest.approx(forward, rel=1e-5)
    assert kl_softmax(teacher, student).item() == pytest.approx(reverse, rel=1e-5)


def test_kl_softmax_ignores_a_constant_added_to_all_logits():
    student, teacher = logits(4, 6)
    torch.testing.assert_close(kl_softmax(student + 7, teacher - 5, 2.0), kl_softmax(student, teacher, 2.0))


def test_kl_softmax_is_infinite_in_neither_value_nor_gradient_when_both_sides_are_sure_of_different_classes():
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    value = kl_softmax(student, torch.tensor([[-1e4, 1e4, 0.0]]), 4.0)
    value.backward()
    assert value.item() == pytest.approx(4.0**2 * 2e4 / 4.0)  # all of the teacher's mass at a log-ratio of 2e4 / T
    torch.testing.assert_close(student.grad, torch.tensor([[4.0, -4.0, 0.0]]))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_full_step_equals_the_one_of_timms_logit_distillation_task(temperature):
    torch.manual_seed(0)
    teacher, student = (timm.create_model("resnet10t", num_classes=10) for _ in range(2))
    for model, std in ((teacher, 3.0), (student, 0.3)):
        torch.nn.init.normal_(model.get_classifier().weight, std=std)  # fresh models agree too well to tell much
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6)
    teacher.eval()
    theirs = copy.deepcopy(student)
    task = LogitDistillationTask(
        theirs, teacher, torch.nn.CrossEntropyLoss(),
        distill_loss_weight=1.0, task_loss_weight=1.0, temperature=temperature, verbose=False,
    )  # fmt: skip
    expected = task.train()(images, labels)
    expected["loss"].backward()

    with torch.no_grad():
        teacher_logits = teacher(images)
    output = student(images)
    term = kl_softmax(output, teacher_logits, temperature)
    loss = torch.nn.functional.cross_entropy(output, labels) + term
    loss.backward()

    assert term > 0.1 * loss  # the comparison is about the distillation term ...
    assert teacher_logits.softmax(-1).amax(-1).mean() > 0.5  # ... of a teacher that has something to say
    torch.testing.assert_close(term, expected["kd_loss"])
    torch.testing.assert_close(loss, expected["loss"])
    for ours, reference in zip(student.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, reference.grad)


# --- kl_sigmoid ------------------------------------------------------------------------------------------------------


def bernoulli_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Per logit, by torch.distributions in float64."""
    teacher, student = (Bernoulli(logits=z.detach().double() / temperature) for z in (teacher, student))
    return kl_divergence(teacher, student)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", [(7,), (8, 10), (2, 3, 7)])
def test_kl_sigmoid_is_the_mean_bernoulli_divergence_times_squared_temperature(shape, temperature):
    student, teacher = logits(*shape)
    expected = bernoulli_kl(student, teacher, temperature).mean() * temperature**2
    torch.testing.assert_close(kl_sigmoid(student, teacher, temperature).double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("weight_shape", [(), (5,), (6, 1), (6, 5), (1, 6, 1), (3, 6, 5)])
def test_weighted_kl_sigmoid_is_normalised_by_the_sum_of_the_broadcast_weights(weight_shape, temperature):
    student, teacher = logits(3, 6, 5)
    weight = 3 * torch.rand(weight_shape, generator=torch.Generator().manual_seed(1))
    every = weight.double() + torch.zeros(3, 6, 5, dtype=torch.float64)
    expected = (bernoulli_kl(student, teacher, temperature) * every).sum() / every.sum() * temperature**2
    actual = kl_sigmoid(student, teacher, temperature, weight=weight)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-6)


def test_a_weight_for_all_classes_of_an_anchor_is_never_spread_over_them():
    """Nothing of the logits' size is kept for the backward on its account."""
    student, teacher = logits(40, 50)

    def kept(weight: torch.Tensor) -> int:
        sizes = {}

        def see(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
            loss = kl_sigmoid(student, teacher, 2.0, weight)  # alive here, so that no storage is used again
            assert loss > 0
        return sum(size for size in sizes.values() if size >= 4 * student.numel())

    assert kept(torch.rand(40, 1)) == kept(torch.rand(40, 50)) - 4 * student.numel()


def test_kl_sigmoid_with_one_nonzero_weight_is_the_divergence_of_that_logit():
    student, teacher = logits(4, 3)
    weight = torch.zeros(4, 3)
    weight[2, 1] = 0.01
    expected = bernoulli_kl(student, teacher, 2.0)[2, 1].item() * 4
    assert kl_sigmoid(student, teacher, 2.0, weight).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 6.0])
@pytest.mark.parametrize("size", [1.0, 1e4])
@pytest.mark.parametrize("factor", [1, 3, 2**16])  # the term's weight, or a gradient scaler, on top
def test_kl_sigmoid_with_all_weights_zero_is_zero_with_zero_gradients(factor, size, temperature):
    student = torch.tensor([[size, -size]], requires_grad=True)
    value = kl_sigmoid(student, torch.tensor([[-size, size]]), temperature, weight=torch.zeros(1, 1))
    (factor * value).backward()
    assert value.item() == 0
    assert student.grad.tolist() == [[0, 0]]


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_kl_sigmoid_gradient_is_the_scaled_difference_of_the_sigmoids(temperature):
    student, teacher = logits(4, 6)
    kl_sigmoid(student, teacher, temperature).backward()
    difference = torch.sigmoid(student / temperature) - torch.sigmoid(teacher / temperature)
    torch.testing.assert_close(student.grad, (temperature * difference / 24).detach(), rtol=1e-4, atol=1e-6)


def test_kl_sigmoid_puts_the_teacher_first():
    three_quarters, half = torch.tensor([math.log(3.0)]), torch.tensor([0.0])
    forward = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)
    reverse = 1 / 2 * math.log(2 / 3) + 1 / 2 * math.log(2)
    assert kl_sigmoid(half, three_quarters).item() == pytest.approx(forward, rel=1e-5)
    assert kl_sigmoid(three_quarters, half).item() == pytest.approx(reverse, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("size", [50.0, 200.0, 1e4, 1e30])
def test_kl_sigmoid_of_opposite_certainties_grows_linearly_with_the_logits(size, temperature):
    student = torch.tensor([size, -size], requires_grad=True)
    value = kl_sigmoid(student, torch.tensor([-size, size]), temperature)
    value.backward()
    assert value.item() == pytest.approx(size * temperature, rel=1e-3)  # log(p / q) -> |z| / T, times T^2
    torch.testing.assert_close(student.grad, torch.tensor([0.5, -0.5]) * temperature, rtol=1e-4, atol=0)


# --- both ------------------------------------------------------------------------------------------------------------


@TERMS
@pytest.mark.parametrize("temperature", [1.0, 6.0])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_equal_logits_give_zero_and_no_push(term, scale, temperature):
    student, _ = logits(4, 6, scale=scale)
    value = term(student, student.detach().clone(), temperature)
    value.backward()
    assert value.item() == 0
    torch.testing.assert_close(student.grad, torch.zeros(4, 6), rtol=0, atol=1e-6)


@TERMS
def test_the_teacher_gets_no_gradient(term):
    student, teacher = logits(4, 6)
    teacher.requires_grad_()
    term(student, teacher, 2.0).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_the_teacher_gets_no_gradient_through_weights_made_from_its_confidence():
    student, teacher = logits(4, 6)
    teacher.requires_grad_()
    kl_sigmoid(student, teacher, 2.0, weight=teacher.sigmoid().amax(-1, keepdim=True)).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@TERMS
def test_teacher_logits_may_come_from_inference_mode(term):
    student, teacher = logits(4, 6)
    expected = torch.autograd.grad(term(student, teacher), student)
    with torch.inference_mode():
        teacher = teacher.clone()
    torch.testing.assert_close(torch.autograd.grad(term(student, teacher), student), expected)


def test_weights_may_come_from_inference_mode():
    student, teacher = logits(4, 6)
    weight = teacher.sigmoid().amax(-1, keepdim=True)
    expected = torch.autograd.grad(kl_sigmoid(student, teacher, weight=weight), student)
    with torch.inference_mode():
        weight = weight.clone()
    torch.testing.assert_close(torch.autograd.grad(kl_sigmoid(student, teacher, weight=weight), student), expected)


@TERMS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(term, dtype):
    student, teacher = (z.detach().to(dtype) for z in logits(8, 10))
    value = term(student, teacher, 3.0)
    assert value.dtype == torch.float32
    assert torch.equal(value, term(student.float(), teacher.float(), 3.0))


@TERMS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_student_may_meet_a_float32_teacher(term, dtype):
    student, teacher = (z.detach() for z in logits(8, 10))
    assert torch.equal(term(student.to(dtype), teacher, 3.0), term(student.to(dtype).float(), teacher, 3.0))


@TERMS
def test_autocast_does_not_lower_the_precision(term):
    student, teacher = logits(8, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = term(student, teacher, 3.0)
    assert torch.equal(value, term(student, teacher, 3.0))


@TERMS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 6.0])
def test_large_logits_stay_finite_in_value_and_gradient(term, dtype, temperature):
    student = torch.tensor([[1e4, -1e4, 0.0], [6e4, 1.0, -6e4]], dtype=dtype, requires_grad=True)
    value = term(student, -student.detach(), temperature)
    value.backward()
    assert math.isfinite(value.item())
    assert value > 1e3
    assert student.grad.isfinite().all()
    assert student.grad.abs().sum() > 0


@TERMS
@pytest.mark.parametrize("teacher_shape", [(4, 5), (1, 6), (6,), (4, 6, 1)])
def test_different_shapes_are_an_error_even_where_they_would_broadcast(term, teacher_shape):
    with pytest.raises(ValueError, match="shape"):
        term(torch.zeros(4, 6), torch.zeros(teacher_shape), 1.0)


@TERMS
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_an_error(term, temperature):
    with pytest.raises(ValueError, match="temperature"):
        term(torch.zeros(4, 6), torch.zeros(4, 6), temperature)


def test_the_module_imports_nothing_but_torch():
    imported = set()
    for node in ast.walk(ast.parse(Path(losses.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or "").split(".")[0])
    assert imported == {"torch"}


# --- the kinds of knowledge beside the logits ------------------------------------------------------------------------


def test_interpolated_logits_lie_between_both_and_have_no_gradient():
    student, teacher = logits(4, 10)
    for t, expected in ((0.0, student.detach()), (1.0, teacher), (0.25, 0.75 * student.detach() + 0.25 * teacher)):
        target = losses.interpolated_logits(student, teacher, t)
        torch.testing.assert_close(target, expected)
        assert not target.requires_grad
    # the gradient of the term is then that of KL to a constant: t (softmax moves from its own to the teacher's)
    assert kl_softmax(student, losses.interpolated_logits(student, teacher, 0.0)).item() == pytest.approx(0, abs=1e-6)


def test_the_target_moves_as_in_algorithm_1():
    """By hand: m = 0.99 * 0 + 0.01 * (2 - 1.5) / 2 = 0.0025; t = 0.4 + 0.0005 * sigmoid(0.0025) * 0.6."""
    rule = {"step": 5e-4, "beta": 0.99, "end": 1.0}
    t, momentum = torch.tensor(0.4), torch.tensor(0.0)
    first = losses.moved_target(t, momentum, torch.tensor(math.inf), torch.tensor(2.0), 0.41, **rule)
    assert [x.item() for x in first] == pytest.approx([0.4, 0])
    next_t, next_momentum = losses.moved_target(t, momentum, torch.tensor(2.0), torch.tensor(1.5), 0.4, **rule)
    assert next_momentum.item() == pytest.approx(0.0025)
    assert next_t.item() - 0.4 == pytest.approx(5e-4 * 0.6 / (1 + math.exp(-0.0025)), rel=1e-3)
    behind, _ = losses.moved_target(t, momentum, torch.tensor(2.0), torch.tensor(1.5), 0.7, **rule)
    assert behind.item() == pytest.approx(0.7)  # never behind the line
    ended, _ = losses.moved_target(torch.tensor(1.0), momentum, torch.tensor(2.0), torch.tensor(1.5), 1.0, **rule)
    assert ended.item() == 1


def test_enhanced_cross_entropy_by_hand():
    """Teacher (1/2, 1/4, 1/4), student (1/4, 1/4, 1/2), label 0, gamma 2: the target is (1.5^2 - 1, 1/16, 1/16)."""
    student = torch.tensor([[1.0, 1.0, 2.0]]).log()
    teacher = torch.tensor([[2.0, 1.0, 1.0]]).log()
    expected = 1.25 * math.log(4) + math.log(4) / 16 + math.log(2) / 16
    loss = losses.enhanced_cross_entropy(student, teacher, torch.tensor([0]), gamma=2.0)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_enhanced_cross_entropy_without_enhancement_has_the_gradient_of_kl(temperature):
    student, teacher = logits(6, 10)
    labels = torch.arange(6)
    (expected,) = torch.autograd.grad(kl_softmax(student, teacher, temperature), student)
    loss = losses.enhanced_cross_entropy(student, teacher, labels, temperature, gamma=1.0)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], expected)
    # with it, the label is raised
    enhanced = losses.enhanced_cross_entropy(student, teacher, labels, temperature, gamma=1.5)
    (gradient,) = torch.autograd.grad(enhanced, student)
    assert (gradient[labels, labels] < expected[labels, labels]).all()


def test_enhanced_cross_entropy_over_the_classes_that_both_know():
    student, teacher = logits(4, 5)
    teacher[:, 3] = -math.inf
    known, labels = torch.tensor([0, 1, 2, 4]), torch.tensor([0, 3, 4, 1])
    loss = losses.enhanced_cross_entropy(student, teacher, labels, 2.0, 1.5, known)
    p = (teacher[:, known] / 2).softmax(-1).numpy()
    q = (student.detach()[:, known] / 2).softmax(-1).numpy()
    is_label = (known == labels[:, None]).numpy()
    expected = -4 * (((p + is_label) ** 1.5 - is_label) * np.log(q)).sum() / 4
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_norm_and_direction_by_hand():
    student = torch.tensor([[3.0, 4.0], [0.3, 0.4], [-3.0, -4.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 1.0]])
    centres = torch.tensor([[30.0, 40.0], [0.0, 7.0], [3.0, 4.0]])
    # the first is right: longer than the teacher's, along the centre; 1 - 0.4 / 2; 1 + 5 / 5
    assert losses.norm_and_direction(student, teacher, centres).item() == pytest.approx((0 + 0.8 + 2) / 3)
    loss = losses.norm_and_direction(student[1:2], teacher[1:2], centres[1:2])
    (gradient,) = torch.autograd.grad(loss, student)  # a short feature grows along the centre: -e / |f_t|
    torch.testing.assert_close(gradient[1], torch.tensor([0.0, -0.5]))
    nothing = losses.norm_and_direction(student, teacher, torch.zeros(3, 2))
    assert nothing.item() == pytest.approx(1)


def test_mse_features_is_the_mean_squared_error():
    student, teacher = logits(4, 6)
    expected = torch.nn.functional.mse_loss(student, teacher)
    torch.testing.assert_close(losses.mse_features(student, teacher), expected)
    with pytest.raises(ValueError, match="shape"):
        losses.mse_features(student, teacher[:, :3])
