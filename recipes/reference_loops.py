"""The loops of the libraries' own training examples: timm's, torchvision's and diffusers'.

The libraries' packages do not contain these scripts, so their loop bodies are written out here step by step. They use
the default memory format and optimiser kernels and read the losses at every step, as the originals do. Model, weights,
batch, precision and optimiser are those of a recipe.

Each `*_loop` returns a function that takes a number of updates and an iterator of batches, and trains on them.
"""

import statistics
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from bench_tasks import Classification, Detection, Diffusion, Task
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from timm.data import create_dataset, create_loader
from timm.scheduler.scheduler import Scheduler
from timm.task import LogitDistillationTask
from timm.utils import AverageMeter
from torch import Tensor, nn
from tqdm import tqdm

from w2s.diffusion.denoisers import UNet


def reference_optimizer(task: Task, model: nn.Module) -> tuple[torch.optim.Optimizer, Scheduler]:
    """The recipe's optimiser with the kernels that torch chooses by default, and the recipe's schedule."""
    optimizer, scheduler = task.build_optimizer(model)
    for group in optimizer.param_groups:
        group["fused"] = None
    return optimizer, scheduler


# ---- classification: timm ----


def timm_batches(task: Classification) -> Iterator:
    """The training batches of timm's train.py, from its dataset, loader and prefetcher, without end."""
    args, data_config, device = task.args, task.data_config, task.run.device
    keys = {name: getattr(args, name) for name in ("input_key", "target_key") if getattr(args, name)}
    dataset = create_dataset(args.dataset, args.data_dir, split=args.train_split, is_training=True, **keys)
    loader = create_loader(
        dataset,
        input_size=data_config["input_size"],
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        hflip=args.hflip,
        color_jitter=args.color_jitter,
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        pin_memory=device.type == "cuda",
        use_prefetcher=True,
        device=device,
    )
    while True:
        yield from loader


def bare_loop(task: Classification) -> Callable[[int, Iterator], None]:
    """Nothing but the arithmetic of an update: forward, loss, backward and optimiser, with our memory format."""
    run, criterion = task.run, task.criterion
    run.seed_all()
    student = task.build_student().to(run.device).train()
    optimizer, _ = task.build_optimizer(student)

    def train(count: int, batches: Iterator) -> None:
        for images, targets in islice(batches, count):
            with run.accelerator.autocast():
                loss = criterion(student(images), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return train


def timm_loop(task: Classification, taught: bool) -> Callable[[int, Iterator], None]:
    """`train_one_epoch` of timm's train.py, alone or `taught` through timm's LogitDistillationTask."""
    run, criterion, meter = task.run, task.criterion, AverageMeter()
    run.seed_all()
    student = task.build_student().to(run.device)
    optimizer, scheduler = reference_optimizer(task, student)
    if taught:
        teacher = task.build_teacher(student).model.to(memory_format=torch.contiguous_format)
        distillation = LogitDistillationTask(student, teacher, criterion, temperature=4.0, verbose=False)
        distillation.to(run.device).train()
    student.train()

    def loss_of(images: Tensor, targets: Tensor) -> Tensor:
        if taught:
            return distillation(images, targets)["loss"]
        return criterion(student(images), targets)

    def train(count: int, batches: Iterator) -> None:
        for images, targets in islice(batches, count):
            with run.accelerator.autocast():
                loss = loss_of(images, targets)
            meter.update(loss.item(), len(images))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step_update(meter.count // len(images), metric=meter.avg)

    return train


# ---- detection: torchvision ----


class Meters:
    """Does with losses what torchvision's MetricLogger does.

    It reads each of them at every step, and every 20 steps it writes the medians of the last 20.
    """

    def __init__(self) -> None:
        self.windows, self.step = defaultdict(partial(deque, maxlen=20)), 0

    def update(self, **values: Tensor | float) -> None:
        """Read the values of a step and keep them."""
        for name, value in values.items():
            self.windows[name].append(value.item() if isinstance(value, Tensor) else value)
        if self.step % 20 == 0:
            medians = {name: statistics.median(window) for name, window in self.windows.items()}
            tqdm.write(f"step {self.step} {medians}", file=sys.stderr)
        self.step += 1


def torchvision_detector(task: Detection) -> nn.Module:
    """The student as an object of torchvision's own class, whose forward returns the losses and nothing else."""
    model = task.build_student()
    model.__class__ = task.config.kind.torchvision
    for module in model.modules():  # the hooks record what a teacher needs
        module._forward_hooks.clear()
    return model


def torchvision_loop(task: Detection) -> Callable[[int, Iterator], None]:
    """`train_one_epoch` of references/detection/engine.py."""
    device, meters = task.run.device, Meters()
    task.run.seed_all()
    model = torchvision_detector(task).to(device).train()
    optimizer, _ = reference_optimizer(task, model)
    warmup = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1 / 1000, total_iters=min(1000, task.plan.updates_per_epoch - 1)
    )

    def train(count: int, batches: Iterator) -> None:
        for images, targets in islice(batches, count):
            images = [image.to(device) for image in images]
            targets = [{k: v.to(device) for k, v in t.items() if isinstance(v, Tensor)} for t in targets]
            with task.run.accelerator.autocast():
                losses = model(images, targets)
                loss = sum(losses.values())
            loss.item()  # the example stops where this is not finite
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            warmup.step()
            meters.update(loss=loss, **losses, lr=optimizer.param_groups[0]["lr"])

    return train


# ---- diffusion: diffusers ----


def diffusers_unet(student: UNet) -> UNet2DModel:
    """An object of diffusers' own class with the weights of a student."""
    model = UNet2DModel.from_config(student.config)
    model.load_state_dict(student.state_dict())
    return model


def diffusers_loop(task: Diffusion) -> Callable[[int, Iterator], None]:
    """The loop of examples/unconditional_image_generation/train_unconditional.py."""
    args, accelerator, process = task.args, task.run.accelerator, task.process
    task.run.seed_all()
    model = diffusers_unet(task.build_student())
    optimizer, _ = reference_optimizer(task, model)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=args.updates)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    ema = EMAModel(
        model.parameters(),
        decay=args.model_ema_decay,
        use_ema_warmup=True,
        inv_gamma=1.0,
        power=3 / 4,
        model_cls=UNet2DModel,
        model_config=model.config,
    )
    bar = tqdm(total=args.updates, desc="reference")
    model.train()

    def train(count: int, batches: Iterator) -> None:
        for images, _ in islice(batches, count):
            noise = torch.randn(images.shape, device=images.device)
            t = torch.randint(0, process.config.num_train_timesteps, (len(images),), device=images.device).long()
            x_t = process.add_noise(images, noise, t)
            with accelerator.accumulate(model):
                prediction = model(x_t, t).sample
                loss = F.mse_loss(prediction.float(), noise.float())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                ema.step(model.parameters())
                bar.update(1)
            bar.set_postfix(loss=loss.detach().item(), lr=scheduler.get_last_lr()[0], ema_decay=ema.cur_decay_value)

    return train
