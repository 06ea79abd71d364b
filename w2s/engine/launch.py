"""The processes of a launch: the accelerator that joins them, where they run, and what they decide together."""

import os
import platform
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import accelerate
import timm
import torch
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DynamoBackend,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from timm.layers import set_fused_attn
from timm.utils import distribute_bn
from torch import nn

from w2s.engine.errors import Finished, InputError
from w2s.engine.sharding import asked_for, build_plugin, shard_on_cpu

Decision = TypeVar("Decision")
PRECISION = "ACCELERATE_MIXED_PRECISION"  # of the environment, in which a launcher hands it down


def build_accelerator(folder: Path, trackers: list[str] | None, *, timeout: float) -> accelerate.Accelerator:
    """The accelerator of a run.

    Args:
        folder: the run folder.
        trackers: their names, as Accelerate knows them.
        timeout: --ddp-timeout in seconds.

    Raises:
        InputError: several processes were started that know nothing of each other, or the launch asks for a precision
            that does not exist here, for DeepSpeed, FSDP1 or a part of FSDP that is not supported, or compiles.
    """
    asked = os.environ.get(PRECISION, "no")
    if asked not in ("no", "bf16", "fp16"):  # Accelerate would train in float32 and call it that
        raise InputError(f"{PRECISION}={asked}: the precision is no, bf16 or fp16")
    plugin = build_plugin() if asked_for() else None
    # the buffers that are evaluated and saved are those of the main process, see `share_buffers`
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # Accelerate does not know its new name yet
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = accelerate.Accelerator(
        # accelerate launch does not hand use_cpu down to several processes
        cpu=not torch.accelerator.is_available(),
        kwargs_handlers=[ddp, InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))],
        mixed_precision=default_precision(),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loop accumulates, not the launcher
        fsdp_plugin=plugin,
        log_with=trackers,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / "tensorboard")),
    )
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise InputError(
            f"{started} processes were started (WORLD_SIZE), but Accelerate joins {accelerator.num_processes}, so that "
            "each would train alone: to train on CPUs, set ACCELERATE_USE_CPU=true"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("fp16 needs a GPU: on a CPU the precision is bf16 or no")
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise InputError("leave out the launcher's --dynamo_backend: to compile is the script's --torchcompile")
    if plugin:
        shard_on_cpu(accelerator, plugin)
    # torch's fused attention for CPUs takes some twenty times as long for its backward in bf16 as in float32
    slow = accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16"
    torch.backends.cuda.enable_flash_sdp(not slow)  # says the same of CPUs
    if accelerator.device.type == "cpu":  # without flash, torch computes attention in float32, timm's own code in bf16
        set_fused_attn(not slow and os.environ.get("TIMM_FUSED_ATTN") != "0")
    return accelerator


def default_precision() -> str | None:
    """bf16 on GPUs and CPUs that have it in hardware, unless a launcher has decided."""
    if PRECISION in os.environ:
        return None
    if parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available():
        found = torch.cpu.get_capabilities()
        has_bf16 = found.get("avx512_bf16", False) or found.get("amx_bf16", False)
    else:
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else None


def wait_for_device(device: torch.device) -> Callable[[], None]:
    """What waits until all work that was queued on a device is done."""
    return (lambda: None) if device.type == "cpu" else torch.accelerator.synchronize


def processor_name() -> str:
    """The model of the processor, as Linux or else Python knows it; "cpu" where neither does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, [*names, platform.processor()]), "cpu")


def environment(accelerator: accelerate.Accelerator, earlier: list[int]) -> dict:
    """Versions, hardware and precision, for summary.json.

    Args:
        earlier: the other numbers of processes that the run has had before it was resumed.
    """
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if device.type == "cpu":
        name = f"{processor_name()}, {os.cpu_count()} cores"
    try:
        git = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        git = None
    return {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
        "python": sys.version.split()[0],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "device": name,
        "processes": accelerator.num_processes,
        "earlier_processes": earlier,
        "mixed_precision": accelerator.mixed_precision,
        "sharding": "fsdp2" if accelerator.is_fsdp2 else None,
        "git": git,
    }


def decide_on_main(decide: Callable[[], Decision]) -> Decision:
    """What the main process decides, on all processes: each of them might see another state of a shared disk.

    Args:
        decide: called on the main process only; its result must be picklable.

    Raises:
        InputError, Finished: on all processes, where `decide` raises it.
    """
    outcome = None
    if accelerate.PartialState().is_main_process:
        try:
            outcome = decide(), None
        except (InputError, Finished) as error:
            outcome = None, error
    decision, error = broadcast_object_list([outcome])[0]
    if error is not None:
        raise error
    return decision


def refuse_together(problem: str | None) -> None:
    """Refuse on all processes what any of them finds wrong.

    Args:
        problem: what this process finds wrong, if anything.

    Raises:
        InputError: on all processes, with the first problem.
    """
    if problems := [found for found in gather_object([problem]) if found]:
        raise InputError(problems[0])


def share_batch(images: int, processes: int, batch_size: int) -> tuple[int, int]:
    """How so many processes share out an update of `images`: images of a micro-batch of one process, and micro-batches.

    A micro-batch has at most `batch_size` images, for which there is memory, and as many as possible. It has an even
    number of them where `batch_size` is even, as mixup pairs them.

    Raises:
        InputError: they cannot share it out evenly.
    """
    whole = 1 if batch_size % 2 else 2
    if images % (processes * whole):
        most = [count for count in range(1, images // whole + 1) if images % (count * whole) == 0]
        nearest = min(most, key=lambda count: (abs(count - processes), count))
        raise InputError(
            f"the run's updates of {images} images cannot be shared out evenly among {processes} processes; "
            f"resume it with {nearest}"
        )
    units = images // (processes * whole)
    steps = next(steps for steps in range(1, units + 1) if units % steps == 0 and units // steps * whole <= batch_size)
    return units // steps * whole, steps


def share_buffers(model: nn.Module) -> None:
    """Give all processes the BatchNorm statistics of the first one: each has seen its own batches."""
    if (processes := accelerate.PartialState().num_processes) > 1:
        distribute_bn(model, processes, reduce=False)


def processes_here() -> tuple[int, int]:
    """The index of this process among those of its machine, and their number. All processes call this."""
    machines, process = gather_object([socket.gethostname()]), accelerate.PartialState().process_index
    here = [rank for rank, machine in enumerate(machines) if machine == machines[process]]
    return here.index(process), len(here)
