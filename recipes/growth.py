"""Measures how the cost of an update grows with the batch, the image size and the number of processes.

    python recipes/growth.py -c recipes/cifar10_cpu_w2s.yaml --teacher RUN [--json FILE] [any option of bench.py]

Each setting is one run of recipes/bench.py under `accelerate launch`. The first batch size, image size and number of
processes are the setting that the others are compared with: each further setting changes one of the three. Prints a
Markdown table as the figures come in. Its memory is that of one process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from w2s.engine.launch import default_precision

BENCHMARK = Path(__file__).with_name("bench.py")
HEADER = """\
| batch a process | px | processes | images/s alone | with the teacher | ratio | bound | MiB alone | with |
|---|---|---|---|---|---|---|---|---|"""


class Setting(NamedTuple):
    """What one benchmark is run with.

    Attributes:
        batch_size: images of a micro-batch of one process.
        img_size: height and width of the images in pixels.
        processes: how many processes train.
    """

    batch_size: int
    img_size: int
    processes: int


def settings_of(batch_sizes: list[int], img_sizes: list[int], processes: list[int]) -> list[Setting]:
    """The setting made of the first values, and after it those that differ from it in one value."""
    first = Setting(batch_size=batch_sizes[0], img_size=img_sizes[0], processes=processes[0])
    settings = [first]
    settings += [first._replace(batch_size=batch_size) for batch_size in batch_sizes[1:]]
    settings += [first._replace(img_size=img_size) for img_size in img_sizes[1:]]
    settings += [first._replace(processes=count) for count in processes[1:]]
    return settings


def available_cores() -> int:
    """How many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def launch_command(processes: int) -> list[str]:
    """`accelerate launch` of so many processes on this machine, which share its cores out among them."""
    threads = max(available_cores() // processes, 1)
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--num_machines", "1", "--num_processes", str(processes), "--main_process_port", "0"]
    command += ["--num_cpu_threads_per_process", str(threads)]
    command += ["--mixed_precision", default_precision() or "no", "--dynamo_backend", "no"]
    if processes > 1:
        command.append("--multi_gpu")  # on CPUs, too: --cpu starts one process, whatever --num_processes says
    elif not torch.cuda.is_available():
        command.append("--cpu")
    return command


def measure(setting: Setting, options: list[str]) -> dict:
    """The figures of bench.py for a setting.

    Args:
        setting: what is varied.
        options: further options of bench.py, the recipe among them.

    Raises:
        SystemExit: the benchmark failed. Its own message is on the terminal.
    """
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [*launch_command(setting.processes), str(BENCHMARK), *options]
        command += ["--batch-size", str(setting.batch_size), "--img-size", str(setting.img_size), "--json", str(file)]
        finished = subprocess.run(command, stdout=subprocess.DEVNULL, env=environment)
        if finished.returncode != 0:
            sys.exit(
                f"error: the benchmark failed at a batch of {setting.batch_size}, {setting.img_size} px and "
                f"{setting.processes} process(es)"
            )
        return json.loads(file.read_text())


def table_row(setting: Setting, figures: dict) -> str:
    """A line of the Markdown table."""
    rate, memory = figures["images_per_second"], figures["memory_bytes"]
    cells = [
        *(str(value) for value in setting),
        f"{rate['plain']:.0f}",
        f"{rate['teacher']:.0f}",
        f"{figures['teacher_ratio']:.2f}x",
        f"{figures['flops_bound']:.2f}x",
        f"{(memory['plain'] or 0) / 2**20:.0f}",
        f"{(memory['teacher'] or 0) / 2**20:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 32, 512], metavar="N", help="a process")
    parser.add_argument("--img-sizes", type=int, nargs="+", default=[32, 64, 96], metavar="N", help="in pixels")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    args, options = parser.parse_known_args()
    print(HEADER)
    results = []
    for setting in settings_of(args.batch_sizes, args.img_sizes, args.processes):
        figures = measure(setting, options)
        results.append({**setting._asdict(), **figures})
        print(table_row(setting, figures), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
