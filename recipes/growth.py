"""How an update's cost grows with the batch, the images and the processes: `bench.py`, one changed at a time.

    python recipes/growth.py -c recipes/cifar10_cpu_w2s.yaml --teacher RUN [--json FILE] [any option of bench.py]

The first value of each is the one the others are changed at. Prints a Markdown table; memory is that of one process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from w2s.engine.run import default_precision


def bench(options: list[str], batch_size: int, img_size: int, processes: int) -> dict:
    """The figures of one benchmark, made by processes of its own.

    Raises:
        SystemExit: the benchmark failed; what it said stands on the terminal.
    """
    threads = max(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), 1)
    launch = ["--num_processes", processes, "--num_cpu_threads_per_process", max(threads // processes, 1)]
    launch += ["--num_machines", 1, "--main_process_port", 0, "--dynamo_backend", "no"]
    launch += ["--mixed_precision", default_precision() or "no"]
    if not torch.cuda.is_available():
        launch.append("--cpu")
    elif processes > 1:
        launch.append("--multi_gpu")
    with tempfile.TemporaryDirectory() as folder:
        size = ["--batch-size", batch_size, "--img-size", img_size, "--json", f"{folder}/figures.json"]
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            *launch,
            Path(__file__).with_name("bench.py"),
            *options,
            *size,
        ]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL)
        if done.returncode:
            sys.exit(f"error: the benchmark of batch {batch_size}, {img_size} px, {processes} process(es) failed")
        return json.loads(Path(folder, "figures.json").read_text())


def row(batch_size: int, img_size: int, processes: int, figures: dict) -> str:
    """A line of the table."""
    rates = " | ".join(f"{figures['images_per_second'][name]:.0f}" for name in ("plain", "teacher"))
    memory = " | ".join(f"{(figures['memory_bytes'][name] or 0) / 2**20:.0f}" for name in ("plain", "teacher"))
    ratios = f"{figures['teacher_ratio']:.2f}x | {figures['flops_bound']:.2f}x"
    return f"| {batch_size} | {img_size} | {processes} | {rates} | {ratios} | {memory} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 32, 512], metavar="N", help="a process")
    parser.add_argument("--img-sizes", type=int, nargs="+", default=[32, 64, 96], metavar="N")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    args, options = parser.parse_known_args()
    (batch, *batches), (size, *sizes), (processes, *more) = args.batch_sizes, args.img_sizes, args.processes
    points = [(batch, size, processes), *((n, size, processes) for n in batches)]
    points += [*((batch, n, processes) for n in sizes), *((batch, size, n) for n in more)]
    print("| batch a process | px | processes | images/s alone | with the teacher | ratio | bound | MiB alone | with |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    for point in points:
        figures = bench(options, *point)
        rows.append({**dict(zip(("batch_size", "img_size", "processes"), point, strict=True)), **figures})
        print(row(*point, figures), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
