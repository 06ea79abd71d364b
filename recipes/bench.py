"""What an update costs, alone, with the teacher and after the switch-off, and whether the data keep up.

    python recipes/bench.py -c recipes/cifar10_r50_w2s.yaml [--json FILE] [any option of the recipe's script]

The functions timed are those that train (`train` of train_cls.py, train_det.py or train_diffusion.py, whichever knows
the options), on batches that are already there; ratios are medians over rounds in which the sides alternate. Nothing is
kept.
"""

import argparse
import copy
import ctypes
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench_tasks import TASKS, Task

from w2s.engine.errors import InputError
from w2s.engine.options import Parser, early_phase, positive_int, read_recipe
from w2s.engine.run import Run, call_main, environment
from w2s.engine.training import Job
from w2s.record import RunRecord

KEPT_BATCHES = 4  # different ones that the timed updates go through
WARMUP = 5  # updates, or batches, before anything is timed


class Bench:
    """One recipe on this machine."""

    def __init__(self, task: Task, run: Run) -> None:
        self.task, self.args, self.run = task, task.args, run
        task.load(run)
        self.images = self.args.batch_size * self.args.grad_accum_steps * run.accelerator.num_processes
        self.updates_per_epoch = max(task.samples // self.images, 1)
        self.flops: dict = {}
        run.open(lambda folder, facts, log: RunRecord(folder, "metric", task.mode, [], ("metric",), facts, log))

    def job(self, taught: bool) -> Job:
        """A student in training, with a teacher that speaks at every update or with none."""
        args, run, task = self.args, self.run, self.task
        run.seed()
        student = task.student().to(run.device)
        teacher = task.teacher(run, student) if taught else None
        if taught and not self.flops:
            self.flops = task.flops(student, teacher, self.images)
        if args.channels_last:
            student = task.channels_last(student)
        optimizer, scheduler = task.optimizer(student, self.images, self.updates_per_epoch)
        ema = ModelEmaV3(student, args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None
        if args.torchcompile:
            for module in (student, teacher and teacher.model):
                if module:
                    task.compiled(module).compile(backend=args.torchcompile)
        model, optimizer = run.accelerator.prepare(student, optimizer)
        phase = early_phase(args, task.length, task.mode) if taught else None
        total = task.length * (self.updates_per_epoch if task.unit == "epoch" else 1)
        return Job(
            *(run, model, student, ema, optimizer, scheduler, phase, teacher, {}, self.flops),
            *(self.updates_per_epoch, total, self.images, task.export, task.unit, task.terms),
        )

    def source(self) -> Iterator:
        """The training batches of this process."""
        return self.task.batches(self.run, self.updates_per_epoch * self.args.grad_accum_steps)

    def loader(self, batches: int) -> float:
        """Images a second of this process when nothing is done with them."""
        source = self.source()
        for _ in range(WARMUP):
            next(source)
        return batches * self.args.batch_size / self.seconds(lambda: [next(source) for _ in range(batches)])

    def batches(self) -> list:
        """Some batches on the device."""
        source = self.source()
        batches = [next(source) for _ in range(KEPT_BATCHES)]
        source.close()
        return batches

    def timed(self, train: Callable[[int, Iterator], None], kept: list) -> Callable[[int], float]:
        """From what trains so many updates on batches: a function from their number to seconds an update."""

        def updates(count: int) -> float:
            fresh = itertools.cycle(copy.deepcopy(kept))  # mixup writes into them
            return self.seconds(lambda: train(count, fresh)) / count

        return updates

    def updates(self, job: Job, kept: list) -> Callable[[int], float]:
        """`timed` of the script's loop."""
        return self.timed(lambda count, batches: self.task.train(job, job.update + count, batches), kept)

    def alternate(self, sides: list[Callable[[int], float]], rounds: int, count: int) -> list[list[float]]:
        """What each side gives for `count` updates, round by round."""
        for side in sides:
            side(WARMUP)
        seconds = [[side(count) for side in sides] for _ in range(rounds)]
        return [list(times) for times in zip(*seconds, strict=True)]

    def peak(self, job: Job, kept: list) -> int | None:
        """Bytes at the peak of a few updates: of the GPU's memory, or of the process where there is none."""
        updates = self.updates(job, kept)
        updates(2)
        gc.collect()
        if self.run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            updates(2)
            return torch.cuda.max_memory_allocated()
        try:
            ctypes.CDLL(None).malloc_trim(0)  # Linux: give back what is free, and forget the peak so far
            Path("/proc/self/clear_refs").write_text("5")
            updates(2)
            lines = Path("/proc/self/status").read_text().splitlines()
        except (OSError, AttributeError):
            return None
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    def seconds(self, call: Callable[[], object]) -> float:
        """Of a call, its work on the device included."""
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
            return max(2 * size**3 / self.seconds(lambda: square(rows)) for _ in range(10))


def measure(bench: Bench, rounds: int, count: int) -> dict:
    """All figures of `--json`."""
    loader = bench.loader(batches=max(count, WARMUP))
    kept = bench.batches()
    plain = bench.job(taught=False)
    memory = {"plain": bench.peak(plain, kept)}
    del plain
    bench.run.accelerator.free_memory()  # which holds on to all it has prepared
    taught = bench.job(taught=True)
    memory["teacher"] = bench.peak(taught, kept)
    switch_off(taught)
    memory["after"] = bench.peak(taught, kept)
    del taught
    bench.run.accelerator.free_memory()
    plain, taught = bench.job(taught=False), bench.job(taught=True)
    sides = [bench.updates(job, kept) for job in (plain, taught)]
    with_teacher = bench.alternate(sides, rounds, count)
    switch_off(taught)
    after = bench.alternate(sides, rounds, count)
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
        "teacher_ratio": ratio(*with_teacher),
        "flops_bound": (student + teacher) / student,
        "after_ratio": ratio(*after),
        "memory_bytes": memory,
        "flops_per_update": flops,
        "matmul_flops_per_second": peak,
        "utilisation": {name: flops[name] / processes / seconds[name] / peak for name in seconds},
        "rounds": rounds,
        "updates_per_round": count,
        "batch": bench.images,
        "cache": getattr(bench.args, "cache", "none"),
        "threads": torch.get_num_threads(),
        "environment": environment(bench.run.accelerator),
    }


def ratio(one: list[float], other: list[float]) -> float:
    """How many times as long the other took: the median over rounds."""
    return statistics.median(b / a for a, b in zip(one, other, strict=True))


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


def task_of(argv: list[str]) -> type[Task]:
    """The task whose script knows the most of the options on a command line and in the recipe it names."""
    config, words = Parser("").parse_known_args([word for word in argv if word not in ("-h", "--help")])
    options = {f"--{str(key).replace('_', '-')}" for key in (read_recipe(Path(config.config)) if config.config else {})}
    options |= {word.partition("=")[0] for word in words if word.startswith("--")}
    return max(TASKS, key=lambda task: len(options & set(task.script.build_parser()._option_string_actions)))


def set_up(argv: list[str], kind: type[Task], description: str) -> tuple[argparse.Namespace, Bench]:
    """The options and the benchmark of a command line.

    Raises:
        InputError: as the script does; no teacher or a control in its place, or nowhere to write --json.
    """
    parser = kind.script.build_parser()
    parser.description = description
    group = parser.add_argument_group("benchmark")
    group.add_argument("--json", metavar="FILE", help="write all figures there")
    group.add_argument("--rounds", type=positive_int, default=7, metavar="N", help="medians are over these (7)")
    group.add_argument("--round-updates", type=positive_int, default=10, metavar="N", help="updates a round (10)")
    args = parser.parse_recipe(argv)
    if not args.teacher:
        raise InputError("a benchmark of distillation needs a --teacher")
    if args.kd_control:
        raise InputError("--kd-control: a benchmark times the teacher itself; leave it out")
    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise InputError(f"--json {args.json}: no such folder")
    args.log_interval, args.log_with = 10**9, None
    args.kd_off, args.kd_warmup, args.kd_hold, args.kd_decay = "never", 0.0, 0.0, 0.0
    task = kind(args)
    args.dry_run = True  # keeps nothing; after the options are resolved, which it would change
    return args, Bench(task, Run(args, task.name))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args, bench = set_up(argv, task_of(argv), __doc__)
    figures = measure(bench, args.rounds, args.round_updates)
    if bench.run.is_main:
        print(table(figures))
        if args.json:
            Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    call_main(main)
