"""An update of our loops beside one of the library's own training example: one process, alternating rounds, medians.

    python recipes/beside.py cls -c recipes/cifar10_cpu_w2s.yaml --teacher RUN
    python recipes/beside.py det -c recipes/digits_det_w2s.yaml --teacher RUN
    python recipes/beside.py diffusion -c recipes/digits_diffusion_w2s.yaml --teacher RUN

cls: train.py of timm, alone and with its own distillation, each side reading the images of the recipe through its own
loader. det: references/detection of torchvision. diffusion: examples/unconditional_image_generation of diffusers, and
sampling beside its DDIMPipeline. None is in the packages, so their loop bodies stand here, step by step what they do:
default memory format and optimiser kernels, losses read at every step. Model, weights, batch, precision and kind of
optimiser are the recipe's on all sides; in classification timm crops as it does by default, in diffusion all sides clip
gradients at 1, as the example does.
"""

import json
import statistics
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import timm.task
from bench import Bench, ratio, set_up
from bench_tasks import Classification, Detection, Diffusion
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from timm.data import create_dataset, create_loader
from timm.scheduler.scheduler import Scheduler
from timm.utils import AverageMeter
from tqdm import tqdm

from w2s.diffusion.denoisers import UNet
from w2s.diffusion.process import generate
from w2s.engine.errors import InputError
from w2s.engine.run import call_main


class Meters:
    """Losses as torchvision's MetricLogger keeps them: each read at every step, medians of 20 written every 20."""

    def __init__(self) -> None:
        self.windows, self.step = defaultdict(partial(deque, maxlen=20)), 0

    def update(self, **values: Tensor | float) -> None:
        """Read and keep them."""
        for name, value in values.items():
            self.windows[name].append(value.item() if isinstance(value, Tensor) else value)
        if self.step % 20 == 0:
            medians = {name: statistics.median(window) for name, window in self.windows.items()}
            tqdm.write(f"step {self.step} {medians}", file=sys.stderr)
        self.step += 1


def optimizer_for(bench: Bench, model: nn.Module) -> tuple[torch.optim.Optimizer, Scheduler]:
    """The recipe's, with the kernels that torch takes by itself, and its schedule."""
    optimizer, schedule = bench.task.optimizer(model, bench.images, bench.updates_per_epoch)
    for group in optimizer.param_groups:
        group["fused"] = None
    return optimizer, schedule


def timm_loader(bench: Bench) -> Iterator:
    """The training batches of timm's train.py: its data set, loader and prefetcher, pass after pass."""
    args, config, device = bench.args, bench.task.config, bench.run.device
    keys = {name: getattr(args, name) for name in ("input_key", "target_key") if getattr(args, name)}
    dataset = create_dataset(args.dataset, args.data_dir, args.train_split, is_training=True, **keys)
    loader = create_loader(
        *(dataset, config["input_size"], args.batch_size),
        **{name: config[name] for name in ("mean", "std", "interpolation")},
        **dict(is_training=True, no_aug=args.no_aug, hflip=args.hflip, color_jitter=args.color_jitter),
        **dict(num_workers=args.workers, persistent_workers=args.workers > 0, device=device, use_prefetcher=True),
        pin_memory=device.type == "cuda",
    )
    while True:
        yield from loader


def timm_loop(bench: Bench, batches: Iterator, taught: bool) -> Callable[[int], float]:
    """train_one_epoch of timm's train.py; taught, with its LogitDistillationTask. Seconds an update."""
    run, criterion, meter = bench.run, bench.task.criterion, AverageMeter()
    run.seed()
    student = bench.task.student().to(run.device)
    optimizer, schedule = optimizer_for(bench, student)
    if taught:
        teacher = bench.task.teacher(run, student).model.to(memory_format=torch.contiguous_format)
        task = timm.task.LogitDistillationTask(student, teacher, criterion, temperature=4.0, verbose=False)
        task.to(run.device).train()
    student.train()

    def train(count: int) -> None:
        for images, targets in islice(batches, count):
            with run.accelerator.autocast():
                loss = task(images, targets)["loss"] if taught else criterion(student(images), targets)
            meter.update(loss.item(), len(images))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step_update(meter.count // len(images), metric=meter.avg)

    return lambda count: bench.seconds(lambda: train(count)) / count


def measure_cls(bench: Bench) -> dict:
    """Images a second of our loop and of timm's, loaders included, and of the loaders alone."""
    args = bench.args
    names = "plain", "teacher", "reference", "reference_teacher"
    sources = [bench.source(), timm_loader(bench)]
    jobs = [bench.job(taught) for taught in (False, True)]
    ours = [partial(lambda job, n: bench.task.train(job, job.update + n, sources[0]), job) for job in jobs]
    sides = [lambda n, side=side: bench.seconds(lambda: side(n)) / n for side in ours]
    sides += [timm_loop(bench, sources[1], taught) for taught in (False, True)]
    times = bench.alternate(sides, args.rounds, args.round_updates)
    loaders = [lambda n, s=source: bench.seconds(lambda: [next(s) for _ in range(n)]) / n for source in sources]
    count = 4 * args.round_updates  # more: workers have some batches ready when their turn comes
    alone = bench.alternate(loaders, args.rounds, count)
    return {
        "images_per_second": {n: bench.images / statistics.median(t) for n, t in zip(names, times, strict=True)},
        "reference_ratio": ratio(times[0], times[2]),
        "reference_teacher_ratio": ratio(times[1], times[3]),
        "loader_images_per_second": bench.images / statistics.median(alone[0]),
        "loader_images_per_second_reference": bench.images / statistics.median(alone[1]),
        "loader_ratio": ratio(*alone),
        "cache": args.cache,
        "workers": args.workers,
        "batch": bench.images,
        "threads": torch.get_num_threads(),
    }


def torchvision_loop(bench: Bench) -> Callable[[int, Iterator], None]:
    """train_one_epoch of references/detection/engine.py, on torchvision's own class."""
    device, meters = bench.run.device, Meters()
    bench.run.seed()
    model = bench.task.student().to(device).train()
    model.__class__ = type(model).__bases__[-1]  # without what is ours: forwards give losses alone
    for module in model.modules():
        module._forward_hooks.clear()
    optimizer, _ = optimizer_for(bench, model)
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1 / 1000, total_iters=min(1000, bench.updates_per_epoch - 1)
    )

    def train(count: int, batches: Iterator) -> None:
        for images, targets in islice(batches, count):
            images = [image.to(device) for image in images]
            targets = [{k: v.to(device) for k, v in t.items() if isinstance(v, Tensor)} for t in targets]
            with bench.run.accelerator.autocast():
                losses = model(images, targets)
                loss = sum(losses.values())
            loss.item()  # to see that it is finite
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            meters.update(loss=loss, **losses, lr=optimizer.param_groups[0]["lr"])

    return train


def diffusers_unet(student: UNet) -> UNet2DModel:
    """diffusers' own class with a student's weights."""
    plain = UNet2DModel.from_config(student.config)
    plain.load_state_dict(student.state_dict())
    return plain


def diffusers_loop(bench: Bench) -> Callable[[int, Iterator], None]:
    """The loop of examples/unconditional_image_generation/train_unconditional.py."""
    args, accelerator, process = bench.args, bench.run.accelerator, bench.task.process
    bench.run.seed()
    model = diffusers_unet(bench.task.student())
    optimizer, _ = optimizer_for(bench, model)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=args.updates)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    ema = EMAModel(
        *(model.parameters(), args.model_ema_decay),
        **dict(use_ema_warmup=True, inv_gamma=1.0, power=3 / 4, model_cls=UNet2DModel, model_config=model.config),
    )
    bar = tqdm(total=args.updates, desc="reference")
    model.train()

    def train(count: int, batches: Iterator) -> None:
        for images, _ in islice(batches, count):
            noise = torch.randn(images.shape, device=images.device)
            t = torch.randint(0, process.config.num_train_timesteps, (len(images),), device=images.device).long()
            noisy = process.add_noise(images, noise, t)
            with accelerator.accumulate(model):
                prediction = model(noisy, t).sample
                loss = F.mse_loss(prediction.float(), noise.float())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                ema.step(model.parameters())
                bar.update(1)
            bar.set_postfix(loss=loss.detach().item(), lr=schedule.get_last_lr()[0], ema_decay=ema.cur_decay_value)

    return train


def samplers(bench: Bench, student: UNet) -> list[Callable[[int], float]]:
    """Ours and diffusers': seconds an image, of one batch."""
    args, task, run, steps = bench.args, bench.task, bench.run, bench.args.sample_steps
    count = min(args.fd_samples, args.validation_batch_size)
    shape, student = (args.in_chans, args.img_size, args.img_size), student.eval()
    pipeline = DDIMPipeline(diffusers_unet(student).to(run.device), DDIMScheduler.from_config(task.process.config))
    pipeline.set_progress_bar_config(disable=True)

    def ours(_: int) -> float:
        call = partial(generate, student, task.process, count, 0, run.accelerator, shape, "ddim", steps, count)
        return bench.seconds(call) / count

    def theirs(_: int) -> float:
        call = partial(pipeline, batch_size=count, num_inference_steps=steps, output_type="np")
        with run.accelerator.autocast():
            return bench.seconds(call) / count

    return [ours, theirs]


def measure(bench: Bench) -> dict:
    """Seconds an update of each side and their ratios, for diffusion the seconds a sampled image, too."""
    args, kept = bench.args, bench.batches()
    plain, taught = bench.job(taught=False), bench.job(taught=True)
    reference = torchvision_loop(bench) if bench.task.name == "det" else diffusers_loop(bench)
    sides = [bench.updates(plain, kept), bench.updates(taught, kept), bench.timed(reference, kept)]
    times = bench.alternate(sides, args.rounds, args.round_updates)
    figures = {
        "seconds_per_update": dict(zip(("plain", "teacher", "reference"), map(statistics.median, times), strict=True)),
        "teacher_ratio": ratio(times[0], times[1]),
        "flops_bound": 1 + bench.flops["teacher_forward"] / bench.flops["student_update"],
        "reference_ratio": ratio(times[0], times[2]),
        "batch": bench.images,
    }
    if bench.task.name == "diffusion":
        times = bench.alternate(samplers(bench, plain.student), args.rounds, 1)
        names = "images_per_second_sampled", "images_per_second_sampled_reference"
        figures |= {name: 1 / statistics.median(seconds) for name, seconds in zip(names, times, strict=True)}
        figures["sampling_reference_ratio"] = ratio(*times)
    return figures


def main(argv: list[str] | None = None) -> None:
    kind, *argv = (sys.argv[1:] if argv is None else argv) or [""]
    kinds = {"cls": Classification, "det": Detection, "diffusion": Diffusion}
    if kind not in kinds:
        raise InputError(f"the first word is cls, det or diffusion, not '{kind}'")
    args, bench = set_up(argv, kinds[kind], __doc__)
    if bench.run.accelerator.num_processes > 1 or args.grad_accum_steps > 1:
        raise InputError("the reference loops are of one process and one micro-batch an update")
    if kind == "diffusion":
        if args.class_cond or args.prediction != "epsilon" or args.sampler != "ddim" or not args.model.startswith("nc"):
            raise InputError("the reference trains U-Nets to predict epsilon without classes, and samples with ddim")
        args.clip_grad = 1.0
    if kind == "cls" and (args.dataset == "digits" or bench.task.mixup):
        raise InputError("timm's loop is fed by timm: give a data set of timm's, and no mixup")
    figures = json.dumps(measure_cls(bench) if kind == "cls" else measure(bench), indent=2)
    print(figures)
    if args.json:
        Path(args.json).write_text(figures + "\n")


if __name__ == "__main__":
    call_main(main)
