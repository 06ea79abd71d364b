"""The kinds of knowledge of --kd-term: features that are found, branches beside a student, centres, a moving target."""

import copy
import math
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate import Accelerator
from helpers import on_processes
from images.pictures import model_of
from timm.task import FeatureDistillationTask
from torch import nn

from w2s.engine.errors import InputError
from w2s.images.branches import LogitHead, StudentBranches, branch_flops, find_features
from w2s.images.classes import MappedLogits
from w2s.images.foreign import torchvision_model
from w2s.images.models import create_model
from w2s.images.teacher import ImageTeacher
from w2s.images.terms import Term, TermState, class_centres
from w2s.losses import kl_softmax


def pixels(batch: int = 4) -> torch.Tensor:
    return torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def image_teacher(model: nn.Module) -> ImageTeacher:
    return ImageTeacher(model, source="here", device="cpu", mean=(0.5,) * 3, std=(0.5,) * 3)


VIT = {"patch_size": 4, "embed_dim": 32, "depth": 8, "num_heads": 2}
FAMILIES = {  # model, kwargs, pooled features, (C, H, W) of the intermediate ones
    "resnet10t": (
        {"channels": (8, 8, 16, 24), "stem_width": 8},
        24,
        [(8, 8, 8), (8, 4, 4), (16, 2, 2), (24, 1, 1)],
    ),
    "vit_tiny_patch16_224": (VIT, 32, [(32, 8, 8)] * 4),
    "mobilenetv3_small_050": ({}, 1024, [(8, 8, 8), (16, 4, 4), (24, 2, 2), (288, 1, 1)]),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_found_and_the_model_stays_as_it_was(name):
    kwargs, pooled, shapes = FAMILIES[name]
    model = create_model(name, 10, img_size=32, model_kwargs=kwargs).train()
    before = copy.deepcopy(model.state_dict())
    width, found = find_features(model, (3, 32, 32))
    assert width == pooled and list(found.values()) == shapes
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_blocks_of_a_transformer_are_taken_at_quarters_of_its_depth():
    model = create_model("vit_tiny_patch16_224", 10, img_size=32, model_kwargs=VIT)
    assert list(find_features(model, (3, 32, 32))[1]) == [1, 3, 5, 7]


def test_models_without_features_in_front_of_their_classifier_have_none():
    assert (
        find_features(torchvision_model("torchvision/resnet18", model_kwargs={}, num_classes=10), (3, 32, 32)) is None
    )
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=10)  # two classifiers
    assert find_features(distilled, (3, 224, 224)) is None


def features_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.forward_head(model.forward_features(images), pre_logits=True)


def test_a_teacher_gives_the_pooled_features_of_its_last_call():
    model, images = model_of(), pixels()
    teacher = image_teacher(model)
    plain = teacher(images)
    teacher.give_features()
    assert torch.equal(teacher(images), plain)
    assert torch.equal(teacher.features, features_of(model, images))
    assert teacher.facts(switch=1, report=2)["features"] == 16
    order = torch.tensor([2, 3, 0, 1])
    assert torch.equal(teacher.shuffled(lambda *_: order, images), plain[order])
    assert torch.equal(teacher.features, features_of(model, images)[order])
    teacher.release()
    assert teacher.features is None


def test_a_teacher_whose_classes_are_mapped_gives_features_too():
    model, images = model_of(), pixels()
    mapped = MappedLogits(model, [3, None, 5])
    mapped.pretrained_cfg = model.pretrained_cfg
    teacher = image_teacher(mapped)
    teacher.give_features()
    teacher(images)
    assert torch.equal(teacher.features, features_of(model, images))


def test_a_foreign_teacher_without_features_is_refused():
    model = torchvision_model("torchvision/resnet18", model_kwargs={}, num_classes=10)
    model.pretrained_cfg |= {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(InputError, match="gives no features; --kd-term ofa needs none"):
        image_teacher(model).give_features()


def taught(model: nn.Module, teacher, kind: str, images: torch.Tensor, targets: torch.Tensor, temperature=1.0):
    """The student's logits and the term of a batch."""
    kd = SimpleNamespace(temperature=temperature, teacher=teacher)
    outputs = teacher(images)
    logits = model(images)
    return logits, Term(kd, model, kind, weight=1.0)(logits, outputs, targets)


@pytest.mark.parametrize("width", [16, 24])
def test_features_is_timms_task(width):
    """Of equal and of different widths, where timm puts a linear map between them."""
    torch.manual_seed(1)
    student = create_model("resnet10t", 10, model_kwargs={"channels": (8, 8, 16, width), "stem_width": 8})
    student.pretrained_cfg = model_of().pretrained_cfg
    images, targets = pixels(8), torch.arange(8)
    task = FeatureDistillationTask(
        student, model_of(), nn.CrossEntropyLoss(), distill_loss_weight=2.0, device=torch.device("cpu"), verbose=False
    )
    projection = task.trainable_module.projection
    assert (projection is None) == (width == 16)
    expected = task(images, targets)
    teacher = image_teacher(model_of())
    teacher.give_features()
    model = StudentBranches(student, wanted=lambda: True, pooled=True, projection=projection)
    logits, loss = taught(model, teacher, "features", images, targets)
    loss = loss - kl_softmax(logits, teacher(images))
    torch.testing.assert_close(loss, expected["kd_loss"])
    total = nn.functional.cross_entropy(logits, targets) + 2 * loss
    torch.testing.assert_close(total, expected["loss"])


def test_nd_points_to_the_centre_of_the_class():
    teacher, images = image_teacher(model_of()), pixels(4)
    teacher.give_features()
    teacher(images)
    state = TermState((10, 16))
    state.centres.copy_(torch.randn(10, 16, generator=torch.Generator().manual_seed(0)))
    student = model_of(seed=1).eval()
    model = StudentBranches(student, wanted=lambda: True, pooled=True, state=state)
    mixed = torch.eye(10)[[3, 1, 4, 1]] * 0.7 + 0.03
    for targets in (torch.tensor([3, 1, 4, 1]), mixed):
        logits, loss = taught(model, teacher, "nd", images, targets)
        expected = []
        for k, label in enumerate([3, 1, 4, 1]):
            ours, theirs = features_of(student, images)[k].double(), teacher.features[k].double()
            centre = state.centres[label].double()
            longer = max(ours.square().sum().sqrt(), theirs.square().sum().sqrt())
            expected.append(1 - (ours * centre).sum() / centre.square().sum().sqrt() / longer)
        nd = (loss - kl_softmax(logits, teacher(images))).item()
        assert nd == pytest.approx(float(sum(expected) / 4), rel=1e-5)


def ofa_student() -> StudentBranches:
    torch.manual_seed(0)
    student = model_of(seed=1)
    shapes = find_features(student, (3, 32, 32))[1]
    heads = {stage: LogitHead(shape, 16, 10) for stage, shape in shapes.items()}
    return StudentBranches(student, wanted=lambda: True, heads=heads)


def test_ofa_trains_the_student_through_every_branch():
    teacher, images, targets = image_teacher(model_of()), pixels(4), torch.arange(4)
    model = ofa_student()
    logits, loss = taught(model, teacher, "ofa", images, targets, temperature=2.0)
    (loss - kl_softmax(logits, teacher(images), 2.0)).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.branches().parameters() if parameter.ndim > 1)
    assert model.student.conv1[0].weight.grad.abs().sum() > 0
    assert model.student.fc.weight.grad is None or not model.student.fc.weight.grad.any()


def test_an_update_that_is_not_taught_is_that_of_the_student_alone():
    """Bit for bit; every branch has a gradient of 0, which processes wait for."""
    model, images = ofa_student(), pixels(4)
    alone = copy.deepcopy(model.student)
    model.wanted = lambda: False
    for module in (model, alone):
        module(images).square().sum().backward()
    assert model.outputs == (None, [])
    for ours, theirs in zip(model.student.parameters(), alone.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert all(not parameter.grad.any() for parameter in model.branches().parameters())


def test_flops_of_the_branches():
    model = StudentBranches(model_of(), wanted=lambda: True, pooled=True, projection=nn.Linear(16, 24))
    assert branch_flops(model, 16, {}, batch=8) == 3 * 2 * 16 * 24 * 8  # forward, and both halves of the backward
    assert branch_flops(StudentBranches(model_of(), wanted=lambda: True, pooled=True), 16, {}, batch=8) == 0


def labelled(count: int):
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        yield torch.rand(30, 3, 32, 32, generator=generator), torch.arange(30) % 3


def test_centres_are_the_means_of_the_teachers_features():
    teacher = image_teacher(model_of())
    teacher.give_features()
    images = torch.cat([images for images, _ in labelled(2)])
    features = features_of(teacher.model, images).double()
    centres = class_centres(teacher, labelled(9), most=2, num_classes=4)
    for label in range(3):
        torch.testing.assert_close(centres[label], features[label::3].mean(0), rtol=1e-5, atol=1e-7)
    assert not centres[3].any()  # a class without an image


def test_centres_take_no_more_batches_than_they_need():
    teacher = image_teacher(model_of())
    teacher.give_features()
    class_centres(teacher, labelled(50), most=50, num_classes=3)
    assert teacher.calls == 10  # 10 images of each class a batch


def centres_of_a_share(accelerator: Accelerator) -> list:
    teacher = image_teacher(model_of())
    teacher.give_features()
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    share = ((images[mine], labels[mine]) for images, labels in labelled(2))
    return class_centres(teacher, share, most=2, num_classes=3).tolist()


def test_two_processes_find_the_centres_of_one():
    ours, theirs = on_processes(2, centres_of_a_share)
    assert ours == theirs
    torch.testing.assert_close(
        torch.tensor(ours), torch.tensor(centres_of_a_share(Accelerator(cpu=True))), rtol=1e-4, atol=1e-6
    )


def batches_for_centres(accelerator: Accelerator) -> int:
    teacher = image_teacher(model_of())
    teacher.give_features()
    class_centres(teacher, labelled(50), most=50, num_classes=3)
    return teacher.calls


def test_two_processes_need_half_the_batches_for_the_centres():
    assert on_processes(2, batches_for_centres) == [5, 5]


def test_the_target_of_taid_moves_to_the_teacher():
    state, student, teacher = TermState(length=4), torch.zeros(2, 3), torch.ones(2, 3)
    seen = []
    for loss in (1.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        seen.append(state.target(student, teacher)[0, 0].item())
        state.follow(torch.tensor(loss))
    assert seen[0] == seen[1] == pytest.approx(0.4)  # the first loss tells nothing of its change
    assert seen[2] == pytest.approx(0.55) and seen[4] == pytest.approx(0.85) and seen[5] == 1
    again = TermState(length=4)
    again.load_state_dict(state.state_dict())
    assert again.t == state.t and again.previous == 1 and math.isfinite(again.momentum)


@pytest.mark.parametrize("overflow", [math.inf, math.nan])
def test_the_target_of_taid_forgets_a_loss_that_overflowed(overflow):
    """A gradient scaler skips that update, and the run goes on."""
    state = TermState(length=10)
    for loss in (2.0, overflow, 1.0, 1.0):
        state.follow(torch.tensor(loss))
    assert state.t == pytest.approx(0.58) and state.previous == 1 and math.isfinite(state.momentum)


def test_the_target_of_taid_moves_by_updates_however_many_micro_batches_they_have():
    """So that it goes on in the same place with another number of processes."""
    whole, parts = TermState(length=40000), TermState(length=40000, micro_batches=2)
    for update in range(300):  # so many that most of the way is leaps, not the line
        whole.follow(torch.tensor(2.0 * 0.98**update))
        for share in (1.5, 0.5):
            parts.follow(torch.tensor(share * 2.0 * 0.98**update))
    for name, value in whole.state_dict().items():
        assert float(parts.state_dict()[name]) == pytest.approx(float(value), abs=1e-4), name
    assert whole.updates == 300 and whole.t > 0.4 + 0.6 * 300 / 40000 + 0.01
