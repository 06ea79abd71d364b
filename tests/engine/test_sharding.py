"""Sharding over two CPU processes: what is refused, what is a block, and how evaluations keep in step."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import on_processes, refused
from timm.optim import create_optimizer_v2
from torch import nn

from w2s.engine.sharding import OPTIMIZERS, InStep, asked_for, block_classes, settle_options, shard, weights_norm
from w2s.images.models import create_model

SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


# ---- what is refused ----


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, ["DeepSpeed", "FSDP2", "recipes/accelerate/fsdp.yaml"]),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, ["FSDP1", "fsdp_version: 2"]),
        ({"ACCELERATE_USE_FSDP": "true"}, ["FSDP1"]),
        ({**SHARDED, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, ["--grad-checkpointing"]),
        ({**SHARDED, "FSDP_OFFLOAD_PARAMS": "True"}, ["fsdp_offload_params"]),
    ],
)
def test_a_launch_that_is_not_supported_is_refused(changes, words, monkeypatch):
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with refused(*words):
        asked_for()


def test_fsdp2_is_what_a_launch_may_ask_for(monkeypatch):
    assert not asked_for()
    for name, value in {**SHARDED, "FSDP_OFFLOAD_PARAMS": "false"}.items():
        monkeypatch.setenv(name, value)
    assert asked_for()


def options(**changes: object) -> SimpleNamespace:
    given = {"clip_grad": 1.0, "clip_mode": "norm", "opt": "adamw", "torchcompile": None, "channels_last": True}
    return SimpleNamespace(**given | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clip_mode": "agc"}, ["--clip-mode agc"]),
        ({"clip_mode": "value"}, ["--clip-mode value"]),
        ({"opt": "muon"}, ["--opt muon", "adamw"]),
        ({"torchcompile": "inductor"}, ["--torchcompile"]),
        ({"kd_term": "nd"}, ["--kd-term", "FSDP2"]),
        ({"teacher": ["weak", "strong"]}, ["several teachers", "FSDP2"]),
    ],
)
def test_options_that_need_whole_weights_are_refused(changes, words):
    with refused(*words):
        settle_options(options(**changes), SimpleNamespace(scaler=None))


def test_fp16_is_refused_and_the_memory_format_left_out():
    with refused("fp16", "bf16"):
        settle_options(options(), SimpleNamespace(scaler=torch.amp.GradScaler("cpu")))
    args = options(clip_grad=None, clip_mode="agc")
    settle_options(args, SimpleNamespace(scaler=None))
    assert args.channels_last is False


# ---- blocks ----


@pytest.mark.parametrize(
    ("model", "classes"),
    [
        ("vit_tiny_patch16_224", ["Block"]),
        ("resnet18", ["BasicBlock"]),
        ("convnext_atto", ["ConvNeXtBlock", "ConvNeXtStage"]),
    ],
)
def test_the_blocks_of_a_model_are_found(model, classes):
    assert block_classes(create_model(model, 10)) == classes


# ---- training ----


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def steps(model: nn.Module, optimizer, rows: slice, backward) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        images, targets = torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)
        backward(nn.functional.cross_entropy(model(images[rows]), targets[rows]))
        optimizer.step()
        optimizer.zero_grad()
    return model


def furthest(accelerator) -> dict[str, float]:
    """By how much three updates on sharded weights differ from the same ones on whole weights, by optimiser."""
    from w2s.engine.sharding import build_plugin, shard_on_cpu

    found = {}
    for name in OPTIMIZERS:
        shard_on_cpu(accelerator, build_plugin())
        given = {"opt": name, "lr": 0.01, "weight_decay": 0.1, "momentum": 0.9}
        whole, model = network(), network()
        steps(whole, create_optimizer_v2(whole, **given), slice(None), lambda loss: loss.backward())
        model, optimizer = shard(accelerator, model, None, create_optimizer_v2(model, **given))
        rows = slice(4 * accelerator.process_index, 4 * accelerator.process_index + 4)
        steps(model, optimizer, rows, accelerator.backward)
        norms = weights_norm(model), weights_norm(whole)
        pairs = zip(model.parameters(), whole.parameters(), strict=True)
        parts = [(one.full_tensor() - other).abs().max() for one, other in pairs]
        found[name] = max(*parts, (norms[0] - norms[1]).abs()).item()
    return found


def test_every_optimiser_that_is_let_through_does_on_parts_what_it_does_on_the_whole():
    for found in on_processes(2, furthest, env=SHARDED):
        assert len(found) == len(OPTIMIZERS)
        assert all(difference < 1e-5 for difference in found.values()), found


# ---- evaluations ----


def evaluate(accelerator, batches: tuple[int, int], signal_at: int | None) -> tuple[list[float], int, bool]:
    """What the first process sees of a sharded model, and how many forwards each makes, where they have so many."""
    from w2s.engine.sharding import build_plugin, shard_on_cpu

    shard_on_cpu(accelerator, build_plugin())
    model = network()
    whole = copy.deepcopy(model)
    model, _ = shard(accelerator, model, None, torch.optim.SGD(model.parameters(), 0.1))
    asked, forwards, same = [], [], []
    in_step = InStep(accelerator, model, signalled=lambda: bool(asked), stop=lambda: asked.append(True))
    model.register_forward_hook(lambda *_: forwards.append(True))
    model.eval()
    with torch.no_grad():
        for batch in range(batches[accelerator.process_index]):
            if asked:
                break
            images = torch.full((2, 6), float(batch))
            same.append(torch.allclose(model(images), whole(images)))
            if accelerator.process_index == 1 and batch == signal_at:
                asked.append(True)
        in_step.finish()
    return all(same), len(forwards), bool(asked)


@pytest.mark.parametrize("batches", [(3, 2), (1, 4), (2, 0), (0, 0)])
def test_processes_make_as_many_forwards_whatever_batches_they_have(batches):
    assert on_processes(2, evaluate, batches, None, env=SHARDED) == [(True, max(batches), False)] * 2


def test_a_signal_that_one_process_received_ends_the_evaluation_of_both():
    (_, ours, stopped), (_, theirs, _) = on_processes(2, evaluate, (50, 50), 1, env=SHARDED)
    assert ours == theirs and ours <= 4 and stopped
