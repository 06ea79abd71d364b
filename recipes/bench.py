"""Measures what an update costs alone, with the teacher and after the switch-off, and whether the data keep up.

    python recipes/bench.py -c recipes/cifar10_r50_w2s.yaml [--json FILE] [any option of the recipe's script]

What is timed is the function that trains: `train` of train_cls.py, train_det.py or train_diffusion.py, whichever has
the recipe's options. It runs on batches that are already on the device. Ratios are medians over rounds in which the
updates that are compared take turns. Nothing is kept on disk but FILE.
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
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench_tasks import TASKS, Task

from w2s.engine.errors import InputError
from w2s.engine.launch import environment
from w2s.engine.main import call_main
from w2s.engine.parsing import Parser, positive_int
from w2s.engine.recipe import read_recipe
from w2s.engine.training import Job

DISTINCT_BATCHES = 4  # the timed updates cycle through so many batches
WARMUP = 5  # updates, or batches, that run before anything is timed

Timer = Callable[[int], float]  # runs so many updates and returns the seconds that one of them took


class Bench:
    """Times the updates of one recipe on this machine.

    Args:
        task: the recipe.
    """

    def __init__(self, task: Task) -> None:
        self.task, self.run = task, task.run
        self.run.open(metric="metric", mode=task.mode, targets=[], reported=("metric",), facts={})

    def seconds(self, call: Callable[[], object]) -> float:
        """How long a call takes in seconds, until the device has finished the work that it started."""
        self.run.clock.sync()
        begin = time.perf_counter()
        call()
        self.run.clock.sync()
        return time.perf_counter() - begin

    # ---- data ----

    def loader_rate(self, count: int) -> float:
        """Images a second that reach the device of this process while nothing is done with them.

        Args:
            count: how many batches are timed.
        """
        batches = self.task.batches()
        for _ in range(WARMUP):
            next(batches)
        seconds = self.seconds(lambda: [next(batches) for _ in range(count)])
        return count * self.task.args.batch_size / seconds

    def loaded_batches(self) -> Callable[[], Iterator]:
        """Load the first batches of the run; what is returned gives an endless iterator over them at every call."""
        loader = self.task.batches()
        batches = [next(loader) for _ in range(DISTINCT_BATCHES)]
        loader.close()
        return lambda: itertools.cycle(copy.deepcopy(batches))  # a copy, because mixup writes into the images

    # ---- updates ----

    def timer(self, train: Callable[[int, Iterator], object], source: Callable[[], Iterator]) -> Timer:
        """A function that runs so many updates and returns the seconds that one of them took.

        Args:
            train: takes the number of updates and an endless iterator of batches.
            source: gives that iterator, before the clock is started.
        """

        def seconds_per_update(count: int) -> float:
            batches = source()
            return self.seconds(lambda: train(count, batches)) / count

        return seconds_per_update

    def job_timer(self, job: Job, source: Callable[[], Iterator]) -> Timer:
        """The timer of the script's own loop. Every call continues the job with its next updates."""
        return self.timer(
            lambda count, batches: self.task.train(job, stop=job.update + count, batches=batches), source=source
        )

    def take_turns(self, timers: dict[str, Timer], rounds: int, count: int) -> dict[str, list[float]]:
        """Call timers in turn, so that a machine that slows down does so for all of them.

        Args:
            timers: by name.
            rounds: how often each of them is called.
            count: updates of one call.

        Returns:
            What each timer returned, round by round.
        """
        for timer in timers.values():
            timer(WARMUP)
        seconds = {name: [] for name in timers}
        for _ in range(rounds):
            for name, timer in timers.items():
                seconds[name].append(timer(count))
        return seconds

    # ---- memory and the machine ----

    def peak_memory(self, job: Job, source: Callable[[], Iterator]) -> int | None:
        """Bytes at the peak of two updates: of the GPU's memory, or of the process on a CPU.

        None where the system does not tell.
        """
        timer = self.job_timer(job, source)
        timer(2)
        gc.collect()
        if self.run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            timer(2)
            return torch.cuda.max_memory_allocated()
        try:  # Linux
            ctypes.CDLL(None).malloc_trim(0)  # returns freed memory to the system
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            timer(2)
            lines = Path("/proc/self/status").read_text().splitlines()
        except (OSError, AttributeError):
            return None
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    def matmul_rate(self) -> float:
        """FLOP/s of the fastest of ten large matrix products, in the precision of the run."""
        size = 8192 if self.run.device.type == "cuda" else 1024
        layer = nn.Linear(size, size, bias=False, device=self.run.device)
        rows = torch.randn(size, size, device=self.run.device)
        with torch.no_grad(), self.run.accelerator.autocast():
            return max(2 * size**3 / self.seconds(lambda: layer(rows)) for _ in range(10))


def median_ratio(base: list[float], other: list[float]) -> float:
    """How many times as long as `base` the other one takes: the median over rounds."""
    return statistics.median(b / a for a, b in zip(base, other, strict=True))


def silence(job: Job) -> None:
    """Switch the teacher of a job off, as happens when the student has surpassed it."""
    job.distillation.silence(update=job.update, reason="surpass")


def measure_memory(bench: Bench, source: Callable[[], Iterator]) -> dict[str, int | None]:
    """The peak of memory in bytes for each kind of update. Only one job exists at a time."""
    memory = {}
    job = bench.task.job(taught=False)
    memory["plain"] = bench.peak_memory(job, source)
    del job
    bench.run.accelerator.free_memory()  # the accelerator holds on to what it has prepared
    job = bench.task.job(taught=True)
    memory["teacher"] = bench.peak_memory(job, source)
    silence(job)
    memory["after"] = bench.peak_memory(job, source)
    del job
    bench.run.accelerator.free_memory()
    return memory


def measure(bench: Bench, rounds: int, count: int) -> dict:
    """All figures that --json writes.

    Args:
        bench: of the recipe.
        rounds: that medians are taken over.
        count: updates of a round.
    """
    batch, processes = bench.task.plan.batch, bench.run.accelerator.num_processes
    loader_rate = bench.loader_rate(max(count, WARMUP)) * processes
    source = bench.loaded_batches()
    memory = measure_memory(bench, source)

    plain, taught = bench.task.job(taught=False), bench.task.job(taught=True)
    plain_timer, taught_timer = bench.job_timer(plain, source), bench.job_timer(taught, source)
    before = bench.take_turns({"plain": plain_timer, "teacher": taught_timer}, rounds=rounds, count=count)
    silence(taught)
    after = bench.take_turns({"plain": plain_timer, "after": taught_timer}, rounds=rounds, count=count)

    seconds = {
        "plain": statistics.median(before["plain"]),
        "teacher": statistics.median(before["teacher"]),
        "after": statistics.median(after["after"]),
    }
    student_flops = taught.flops["student_update"]
    teacher_flops = taught.flops["teacher_forward"] + taught.flops.get("branches", 0)
    flops = {"plain": student_flops, "teacher": student_flops + teacher_flops, "after": student_flops}
    matmul_rate = bench.matmul_rate()
    return {
        "loader_images_per_second": loader_rate,
        "step_images_per_second": batch / seconds["plain"],
        "images_per_second": {name: batch / value for name, value in seconds.items()},
        "teacher_ratio": median_ratio(before["plain"], before["teacher"]),
        "flops_bound": (student_flops + teacher_flops) / student_flops,
        "after_ratio": median_ratio(after["plain"], after["after"]),
        "memory_bytes": memory,
        "flops_per_update": flops,
        "matmul_flops_per_second": matmul_rate,
        "utilisation": {name: flops[name] / processes / seconds[name] / matmul_rate for name in seconds},
        "rounds": rounds,
        "updates_per_round": count,
        "batch": batch,
        "cache": bench.task.cache,
        "threads": torch.get_num_threads(),
        "environment": environment(bench.run.accelerator, earlier=[]),
    }


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
    """The task whose script has most of the options on a command line and in the recipe that it names."""
    known, words = Parser("").parse_known_args([word for word in argv if word not in ("-h", "--help")])
    options = [str(key) for key in read_recipe(Path(known.config))] if known.config else []
    options += [word[2:].partition("=")[0] for word in words if word.startswith("--")]
    names = {option.replace("-", "_") for option in options}
    names |= {name.removeprefix("no_") for name in names}

    def options_in_common(task: type[Task]) -> int:
        return len(names & set(vars(task.script.build_parser().parse_args([]))))

    return max(TASKS, key=options_in_common)


def parse_options(argv: list[str], kind: type[Task], description: str) -> argparse.Namespace:
    """The options of a benchmark: those of the recipe's script, which `resolve` has not seen yet, and its own.

    Raises:
        InputError: an option is wrong, there is no teacher or a control in its place, or no folder for --json.
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
    if isinstance(args.teacher, list):
        raise InputError("a benchmark times one --teacher; give one of them")
    if args.kd_control:
        raise InputError("--kd-control: a benchmark times the teacher itself; leave it out")
    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise InputError(f"--json {args.json}: no such folder")
    args.dry_run = True  # keeps nothing on disk
    args.log_interval, args.log_with = 10**9, None
    args.kd_off = "never"  # the teacher takes part in every update, from the first one on
    args.kd_warmup, args.kd_hold, args.kd_decay = 0.0, None, 0.0
    return args


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    kind = task_of(argv)
    args = parse_options(argv, kind, description=__doc__)
    bench = Bench(kind(args))
    figures = measure(bench, rounds=args.rounds, count=args.round_updates)
    if bench.run.is_main:
        print(table(figures))
        if args.json:
            Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    call_main(main)
