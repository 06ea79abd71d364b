"""Weights files of every common training loop give the same tensors under the same names."""

import argparse
from collections import OrderedDict

import pytest
import torch
from helpers import refused
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from w2s.images.checkpoints import read_checkpoint, read_weights


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), head=nn.Linear(4, 2)))


def weights(seed: int = 0, prefix: str = "") -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in net(seed).state_dict().items()}


def averaged(seed: int) -> dict[str, torch.Tensor]:
    return AveragedModel(net(seed), use_buffers=True).state_dict()


OPTIONS = argparse.Namespace(model="resnet10t", model_kwargs={"stem_width": 8}, lr=0.1)
MAKES = {
    "bare": weights(),
    "ddp": weights(prefix="module."),
    "compiled": weights(prefix="_orig_mod."),
    "ddp of compiled": weights(prefix="module._orig_mod."),
    "compiled ddp": weights(prefix="_orig_mod.module."),
    "a compiled part": {name.replace("norm.", "norm._orig_mod."): tensor for name, tensor in weights().items()},
    "pytorch examples": {"epoch": 3, "arch": "resnet18", "state_dict": weights(prefix="module."), "best_acc1": 70.0},
    "timm": {"epoch": 3, "arch": "resnet10t", "state_dict": weights(), "args": OPTIONS, "metric": 71.5},
    "timm with ema": {"arch": "resnet10t", "state_dict": weights(1), "state_dict_ema": weights(), "args": OPTIONS},
    "torchvision": {"model": weights(), "optimizer": {"state": {}}, "epoch": 3, "args": OPTIONS},
    "torchvision with ema": {"model": weights(1), "model_ema": averaged(0), "epoch": 3},
    "averaged": averaged(0),
    "lightning": {
        "pytorch-lightning_version": "2.5",
        "state_dict": {**weights(prefix="model."), "metric.total": torch.zeros(())},
        "hyper_parameters": {"lr": 0.1},
    },
    "lightning of compiled": {"pytorch-lightning_version": "2.5", "state_dict": weights(prefix="model._orig_mod.")},
    "model prefix": weights(prefix="model."),
    "model_state_dict": {"model_state_dict": weights(), "epoch": 3},
    "net": {"net": weights(prefix="module."), "acc": 71.5},
    "ema": {"ema": weights(), "model": weights(1)},
    "basicsr": {"params": weights(1), "params_ema": weights()},
}


@pytest.mark.parametrize("make", MAKES)
def test_every_make_of_checkpoint_gives_the_models_own_tensors(tmp_path, make):
    torch.save(MAKES[make], tmp_path / "last.pth")
    read = read_weights(tmp_path / "last.pth")
    assert read.keys() == weights().keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in weights().items())


def test_safetensors_hold_the_tensors_alone(tmp_path):
    save_file(weights(prefix="module."), tmp_path / "last.safetensors")
    checkpoint = read_checkpoint(tmp_path / "last.safetensors")
    assert checkpoint.weights.keys() == weights().keys() and checkpoint.arch is None


def test_a_checkpoint_names_its_architecture_and_its_arguments(tmp_path):
    torch.save(MAKES["timm"], tmp_path / "last.pth")
    _, arch, model_kwargs = read_checkpoint(tmp_path / "last.pth")
    assert (arch, model_kwargs) == ("resnet10t", {"stem_width": 8})


def test_a_prefix_that_not_all_names_have_is_part_of_the_names(tmp_path):
    state = {**weights(prefix="model."), "head.bias": torch.zeros(2)}
    torch.save(state, tmp_path / "last.pth")
    assert read_weights(tmp_path / "last.pth").keys() == state.keys()


@pytest.mark.parametrize("content", [[torch.zeros(3)], {"epoch": 3}, {"state_dict": {"head.bias": 1.0}}])
def test_a_file_without_tensors_by_name_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "last.pth")
    with refused("last.pth", "no state_dict"):
        read_weights(tmp_path / "last.pth")
