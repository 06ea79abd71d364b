"""What an update costs, alone, with the teacher and after the switch-off, and whether the data keep up.

    python -m w2s.bench -c recipes/cifar10_r50_w2s.yaml [--json FILE] [any option of train_cls.py]

The functions timed are those that train (`train_cls.train`), on batches that are already there; ratios are medians over
rounds in which the two sides alternate. Nothing is kept.
"""

import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import train_cls
from w2s.crossing import RunRecord
from w2s.data import load_data
from w2s.loading import train_batches
from w2s.models import export
from w2s.optim import build_optimizer, scaled_lr
from w2s.options import InputError, early_phase, positive_int
from w2s.run import Run, call_main, environment
from w2s.training import Job

KEPT_BATCHES = 4  # different ones that the timed updates go through
WARMUP = 5  # updates, or batches, before anything is timed


class Bench:
    """One recipe on this machine."""

    def __init__(self, args, config: dict, run: Run) -> None:
        self.args, self.config, self.run = args, config, run
        self.data = load_data(args, config, args.num_classes, run.accelerator)
        self.images = args.batch_size * args.grad_accum_steps * run.accelerator.num_processes
        self.updates_per_epoch = max(self.data.samples // self.images, 1)
        self.criterion = train_cls.task_criterion(args)
        self.mixup = train_cls.build_mixup(args, self.data.num_classes)
        self.flops: dict = {}
        run.open(lambda folder, facts, log: RunRecord(folder, "top1", "max", [], train_cls.METRICS, facts, log))

    def job(self, taught: bool) -> Job:
        """A student in training, with a teacher that speaks at every update or with none."""
        args, run = self.args, self.run
        run.seed()
        student = train_cls.build_student(args, self.config, self.data.num_classes).to(run.device)
        teacher = train_cls.set_up_teacher(args, run, self.config, self.data) if taught else None
        if taught:
            self.flops = train_cls.flops_of(student, teacher, args, self.config, self.images)
        if args.channels_last:
            student = student.to(memory_format=torch.channels_last)
        optimizer, scheduler = build_optimizer(
            args, student, scaled_lr(args, self.images), args.epochs, self.updates_per_epoch
        )
        if args.torchcompile:
            for module in (student, teacher and teacher.model):
                if module:
                    module.compile(backend=args.torchcompile)
        model, optimizer = run.accelerator.prepare(student, optimizer)
        phase = early_phase(args, args.epochs, "max") if taught else None
        return Job(
            *(run, model, student, None, optimizer, scheduler, phase, teacher, {}, self.flops),
            *(self.updates_per_epoch, args.epochs * self.updates_per_epoch, self.images, export),
        )

    def loader(self, batches: int) -> float:
        """Images a second of this process when nothing is done with them."""
        source = train_batches(self.data.train, self.args, self.run.accelerator, 0, self._micro_batches())
        for _ in range(WARMUP):
            next(source)
        return batches * self.args.batch_size / self._seconds(lambda: [next(source) for _ in range(batches)])

    def _micro_batches(self) -> int:
        return self.updates_per_epoch * self.args.grad_accum_steps

    def batches(self) -> list:
        """Some batches on the device."""
        source = train_batches(self.data.train, self.args, self.run.accelerator, 0, self._micro_batches())
        batches = [[tensor.to(self.run.device) for tensor in next(source)] for _ in range(KEPT_BATCHES)]
        source.close()
        return batches

    def updates(self, job: Job, kept: list, count: int) -> float:
        """Seconds an update."""
        fresh = itertools.cycle([(images.clone(), targets.clone()) for images, targets in kept])  # mixup writes into it

        def updates() -> None:
            train_cls.train(job, job.update + count, fresh, self.criterion, self.mixup)

        return self._seconds(updates) / count

    def alternate(self, jobs: list[Job], kept: list, rounds: int, count: int) -> list[list[float]]:
        """Seconds an update of each job, round by round."""
        for job in jobs:
            self.updates(job, kept, WARMUP)
        seconds = [[self.updates(job, kept, count) for job in jobs] for _ in range(rounds)]
        return [list(times) for times in zip(*seconds, strict=True)]

    def peak(self, job: Job, kept: list) -> int | None:
        """Bytes at the peak of a few updates: of the GPU's memory, or of the process where there is none."""
        self.updates(job, kept, 2)
        if self.run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.updates(job, kept, 2)
            return torch.cuda.max_memory_allocated()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
            self.updates(job, kept, 2)
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return None
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    def _seconds(self, call: Callable[[], object]) -> float:
        self.run.clock.sync()
        begin = time.perf_counter()
        call()
        self.run.clock.sync()
        return time.perf_counter() - begin

    def matmul_peak(self) -> float:
        """FLOP/s of the fastest of some large matrix products, in the precision of the run."""
        size = 8192 if self.run.device.type == "cuda" else 1024
        square = nn.Linear(size, size, bias=False, device=self.run.device)
        rows = torch.randn(size, size, device=self.run.device)
        with torch.no_grad(), self.run.accelerator.autocast():
            return max(2 * size**3 / self._seconds(lambda: square(rows)) for _ in range(10))


def measure(bench: Bench, rounds: int, count: int) -> dict:
    """All figures of `--json`."""
    loader = bench.loader(batches=max(count, WARMUP))
    kept = bench.batches()
    plain = bench.job(taught=False)
    memory = {"plain": bench.peak(plain, kept)}
    del plain
    taught = bench.job(taught=True)
    memory["teacher"] = bench.peak(taught, kept)
    switch_off(taught)
    memory["after"] = bench.peak(taught, kept)
    del taught
    plain, taught = bench.job(taught=False), bench.job(taught=True)
    with_teacher = bench.alternate([plain, taught], kept, rounds, count)
    switch_off(taught)
    after = bench.alternate([plain, taught], kept, rounds, count)

    def ratio(pair: list[list[float]]) -> float:
        return statistics.median(b / a for a, b in zip(*pair, strict=True))

    seconds = {
        "plain": statistics.median(with_teacher[0]),
        "teacher": statistics.median(with_teacher[1]),
        "after": statistics.median(after[1]),
    }
    student, teacher = bench.flops["student_update"], bench.flops["teacher_forward"]
    flops = {"plain": student, "teacher": student + teacher, "after": student}
    peak, processes = bench.matmul_peak(), bench.run.accelerator.num_processes
    return {
        "loader_images_per_second": loader * processes,
        "step_images_per_second": bench.images / seconds["plain"],
        "images_per_second": {name: bench.images / value for name, value in seconds.items()},
        "teacher_ratio": ratio(with_teacher),
        "flops_bound": (student + teacher) / student,
        "after_ratio": ratio(after),
        "memory_bytes": memory,
        "flops_per_update": flops,
        "matmul_flops_per_second": peak,
        "utilisation": {name: flops[name] / processes / seconds[name] / peak for name in seconds},
        "rounds": rounds,
        "updates_per_round": count,
        "batch": bench.images,
        "cache": bench.args.cache,
        "threads": torch.get_num_threads(),
        "environment": environment(bench.run.accelerator),
    }


def switch_off(job: Job) -> None:
    """End the distillation of a job, as a won comparison would."""
    job.phase.kd_off = {"at": job.progress, "reason": "surpass"}
    job.switch_off()


def table(figures: dict) -> str:
    """The figures for a terminal."""
    lines = [f"{'update':<10}{'images/s':>10}{'GFLOPs':>10}{'of peak':>9}{'memory, MiB':>13}"]
    for name, rate in figures["images_per_second"].items():
        memory = figures["memory_bytes"][name]
        lines.append(
            f"{name:<10}{rate:>10.0f}{figures['flops_per_update'][name] / 1e9:>10.1f}"
            f"{figures['utilisation'][name]:>9.1%}{memory / 2**20 if memory else float('nan'):>13.0f}"
        )
    lines += [
        f"{'loader':<10}{figures['loader_images_per_second']:>10.0f}",
        f"teacher / plain {figures['teacher_ratio']:.3f}x, bound by FLOPs {figures['flops_bound']:.3f}x; "
        f"after / plain {figures['after_ratio']:.3f}x",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = train_cls.build_parser()
    parser.description = __doc__
    group = parser.add_argument_group("benchmark")
    group.add_argument("--json", metavar="FILE", help="write all figures there")
    group.add_argument("--rounds", type=positive_int, default=7, metavar="N", help="medians are over these (7)")
    group.add_argument("--round-updates", type=positive_int, default=10, metavar="N", help="updates a round (10)")
    args = parser.parse_recipe(argv)
    if not args.teacher:
        raise InputError("a benchmark of distillation needs a --teacher")
    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise InputError(f"--json {args.json}: no such folder")
    args.dry_run, args.log_interval, args.log_with = True, 10**9, None
    args.kd_off, args.kd_warmup, args.kd_hold, args.kd_decay = "never", 0.0, 0.0, 0.0
    config = train_cls.resolve(args)
    run = Run(args, "cls")
    figures = measure(Bench(args, config, run), args.rounds, args.round_updates)
    if run.is_main:
        print(table(figures))
        if args.json:
            Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    call_main(main)
