"""The denoiser as a frozen teacher."""

from pathlib import Path

import pytest
import torch
from diffusion.fakes import tiny_vit
from torch.testing import assert_close

from w2s.diffusion.denoisers import unet
from w2s.diffusion.process import as_epsilon, noise_schedule
from w2s.diffusion.teacher import DenoiserTeacher


def make_teacher(model, prediction: str = "epsilon", **options) -> DenoiserTeacher:
    process = noise_schedule(prediction=prediction)
    return DenoiserTeacher(model, process=process, source=Path("run"), device="cpu", **options)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_teacher_gives_epsilon_whatever_it_predicts(prediction):
    torch.manual_seed(0)
    model = unet("nc16-rb1", 8, 1).eval()
    x_t, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 500, 999])
    with torch.no_grad():
        expected = as_epsilon(noise_schedule(prediction=prediction), model(x_t, t), x_t=x_t, t=t)
    assert_close(make_teacher(model, prediction)(x_t, t), expected)
    assert_close(make_teacher(model, prediction, channels_last=True)(x_t, t), expected)


def test_teacher_is_frozen_and_says_what_it_is():
    model = tiny_vit().train()
    teacher = make_teacher(model)
    assert (teacher.name, teacher.source) == ("vit_tiny_patch16_224", "run")
    assert teacher.params == sum(p.numel() for p in model.parameters())
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    x_t = torch.randn(2, 1, 8, 8, requires_grad=True)
    assert not teacher(x_t, torch.tensor([1, 2])).requires_grad


def test_labels_reach_a_class_conditional_teacher():
    torch.manual_seed(0)
    model = tiny_vit(num_classes=10)
    torch.nn.init.normal_(model.head.weight)
    teacher = make_teacher(model)
    x_t, t = torch.randn(1, 1, 8, 8).repeat(2, 1, 1, 1), torch.tensor([3, 3])
    same, other = teacher(x_t, t, torch.tensor([4, 4])), teacher(x_t, t, torch.tensor([4, 5]))
    assert_close(same[0], same[1])
    assert (other[0] - other[1]).abs().max() > 1e-3


def test_untrained_teacher_is_of_the_same_architecture():
    model = unet("nc16-rb1", 8, 1, dropout=0.1)
    teacher = make_teacher(model)
    untrained = teacher.rebuild()
    assert str(untrained) == str(model)
    teacher.model.load_state_dict(untrained.state_dict())
    teacher.release()
    assert teacher.model is None and teacher.rebuild is None
