"""Runs of the scripts for the tests, in three ways of rising cost.

`call_script` calls a script's main in this process, as if it were its first. `start_script` is a real process with its
own exit code that can be killed; it is forked from a server that has imported everything, which saves the ten seconds
of imports. `run_script` is the user's command itself, `accelerate launch` too.
"""

import contextlib
import csv
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import psutil

# before torch is imported, here and in all processes started: one thread, unless asked otherwise, float32 on any CPU,
# and no network
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")
ROOT = Path(__file__).parents[1]
COCO = ROOT.parent / "shared" / "data" / "coco_subset"  # real photographs; tests that need them skip where absent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402

TIMEOUT = int(os.environ.get("TEST_TIMEOUT", "180"))  # seconds for any one process; more on a busy machine
ON_CPU = {"ACCELERATE_USE_CPU": "true"}  # bit-equal runs are promised on the CPU
TIME_COLUMNS = ("train_seconds", "total_seconds", "teacher_seconds")
# data, model and optimiser of nearly all runs of train_cls.py: 4 updates an epoch, with random augmentation
DIGITS = (
    "--dataset digits --img-size 16 --train-samples 128 --switch-split 0.02 --batch-size 32 --epochs 2 --workers 0 "
    "--check-images 0 --opt adamw --lr 3e-3"
)
RESNET = "--model resnet10t --model-kwargs channels=(8,8,16,16) stem_width=8"
TEACHER = "--model resnet10t --model-kwargs channels=(8,8,8,8) stem_width=8"
FOLDER = (
    "--img-size 16 --batch-size 8 --epochs 1 --workers 0 --opt adamw --lr 1e-3 --switch-split 0.1 --check-images -1 "
    "--val-split val --data-dir"
)
VIT = "--model vit_tiny_patch16_224 --model-kwargs patch_size=4 embed_dim=32 depth=2 num_heads=2"


def words(*parts: object) -> list[str]:
    """Command-line words from strings of several words, lists of words, and paths."""
    flat = []
    for part in parts:
        flat += part.split() if isinstance(part, str) else map(str, part) if isinstance(part, list) else [str(part)]
    return flat


# the same for train_det.py, --data apart: 6 updates an epoch
DETECT = (
    "--model resnet10t --model-kwargs channels=(8,8,16,16) stem_width=8 --norm gn --strides 8 16 --extra-levels 0 "
    "--anchor-scale 2 --fpn-channels 16 --min-size 64 --max-size 64 --batch-size 4 --epochs 2 --workers 0 "
    "--check-images 0 --switch-split 0.1 --opt adamw --lr 3e-3 --sched constant --warmup-epochs 0 "
    "--validation-batch-size 8"
)


# ---- in this process ----


def call_script(main, *parts: object) -> None:
    """Call a script's main here; Accelerate's state and the signal handlers are put back."""
    from accelerate.state import AcceleratorState, GradientState

    def forget() -> None:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    forget()
    try:
        with mock.patch.dict(os.environ, ON_CPU):
            main(words(*parts))
    finally:
        forget()
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def watching_forwards(see) -> Iterator[None]:
    """Have `see(module, inputs)` called before every forward of every module in this process."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    handle = register_module_forward_pre_hook(see)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def signal_in_evaluation(forward: int, is_model) -> Iterator[list]:
    """A real SIGTERM in a forward of the first evaluation, counted from 0; gives how many images each forward had.

    `is_model(module)` tells whole models from their parts.
    """
    seen = []

    def see(module, inputs: tuple) -> None:
        if is_model(module) and not module.training and inputs[0][0].device.type != "meta":  # FLOPs are counted there
            if len(seen) == forward:
                signal.raise_signal(signal.SIGTERM)
            seen.append(len(inputs[0]))

    with watching_forwards(see):
        yield seen


@contextlib.contextmanager
def under_a_scaler() -> Iterator[list[bool]]:
    """Give the runs in the block a gradient scaler, as fp16 does on a GPU; gives for each step whether it was fused."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    from w2s.engine import run

    build, fused = run.build_accelerator, []

    def with_scaler(*args: object, **options: object):
        accelerator = build(*args, **options)
        accelerator.scaler = torch.amp.GradScaler("cpu")
        return accelerator

    def see(optimizer: torch.optim.Optimizer, *_: object) -> None:
        fused.append(bool(optimizer.param_groups[0].get("fused")))

    handle = register_optimizer_step_pre_hook(see)
    try:
        with mock.patch.object(run, "build_accelerator", with_scaler):
            yield fused
    finally:
        handle.remove()


# ---- data ----


def image_folder(root: Path, train: int = 8, val: int = 4) -> Path:
    """An image folder of two classes with digits in them."""
    import numpy as np

    from w2s.images.digits import Digits

    digits = Digits("train")
    for split, count in (("train", train), ("val", val)):
        for digit in (0, 1):
            (root / split / f"class{digit}").mkdir(parents=True)
            for k, row in enumerate(np.flatnonzero(digits.targets == digit)[:count]):
                digits[row][0].resize((16, 16)).save(root / split / f"class{digit}" / f"{k}.png")
    return root


# ---- refusals ----


@contextlib.contextmanager
def refused(*words: str) -> Iterator[pytest.ExceptionInfo]:
    """The block ends in an InputError of one line that holds these words."""
    from w2s.engine.errors import InputError

    with pytest.raises(InputError) as caught:
        yield caught
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


# ---- a process of its own, quickly ----

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    ["torch._dynamo", "sklearn.model_selection", "sklearn.datasets", "train_cls", "train_det", "train_diffusion"]
)


def _child(script: str, argv: list[str], log: str, env: dict) -> None:
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.environ.update(env)
    multiprocessing.set_start_method(None, force=True)  # the script's own workers start as they do from the shell
    sys.argv = [script, *argv]
    from importlib import import_module

    from w2s.engine.main import call_main

    call_main(import_module(script).main)


class Started:
    """A running script: one or several processes, and what they print."""

    def __init__(self, processes: list, log: Path) -> None:
        self.processes, self.log = processes, log

    def kill(self, number: int = signal.SIGKILL, rank: int | None = None) -> None:
        """Send a signal to all processes, or to one."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    @property
    def alive(self) -> bool:
        return all(p.is_alive() for p in self.processes)

    def wait(self, timeout: float = TIMEOUT) -> list[int]:
        """The exit codes, once all have ended; none is left running."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        hung = [p for p in self.processes if p.is_alive()]
        if hung:
            self.kill()
        assert not hung, f"still running after {timeout} s:\n{self.text}"
        return [p.exitcode for p in self.processes]

    def wait_for(self, condition, timeout: float = TIMEOUT) -> bool:
        """Poll until `condition()`; False if the script ended before."""
        end = time.monotonic() + timeout
        while not condition():
            if not self.alive:
                return False
            assert time.monotonic() < end, f"nothing after {timeout} s:\n{self.text}"
            time.sleep(0.005)
        return True

    @property
    def text(self) -> str:
        """stdout and stderr so far."""
        return self.log.read_text(errors="replace")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_script(script: str, log: Path, *parts: object, processes: int = 1, env: dict | None = None) -> Started:
    """Start `python SCRIPT.py ...`, or as many processes as `accelerate launch --cpu` would start.

    Args:
        script: its module, as train_cls.
        log: a file that takes stdout and stderr (appended), or a terminal's device.
        parts: the command line.
        processes: how many.
        env: changes to the environment.
    """
    port, started = free_port(), []
    for rank in range(processes):
        mine = {**ON_CPU, **(env or {})}
        if processes > 1:
            mine |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            mine |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        mine = {k: str(v) for k, v in mine.items()}
        started.append(_server.Process(target=_child, args=(script, words(*parts), str(log), mine)))
        started[-1].start()
    return Started(started, Path(log))


def _member(module: str, function: str, args: tuple, env: dict, rank: int, results) -> None:
    os.environ.update(env)
    from importlib import import_module

    import accelerate

    accelerator = accelerate.Accelerator()
    try:
        results.put((rank, getattr(import_module(module), function)(accelerator, *args)))
    except Exception as error:
        results.put((rank, error))
    accelerator.wait_for_everyone()
    accelerator.end_training()


def on_processes(count: int, function, *args: object, env: dict | None = None) -> list:
    """What `function(accelerator, *args)` returns or raises in each of so many processes of one gloo group, by rank."""
    module = function.__module__.removeprefix("tests.")  # another `tests` may be installed
    port, results, processes = free_port(), _server.Queue(), []
    for rank in range(count):
        mine = {**ON_CPU, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        mine |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **(env or {})}
        mine = {k: str(v) for k, v in mine.items()}
        processes.append(_server.Process(target=_member, args=(module, function.__name__, args, mine, rank, results)))
        processes[-1].start()
    found = dict(results.get(timeout=TIMEOUT) for _ in range(count))
    for process in processes:
        process.join(TIMEOUT)
    return [found[rank] for rank in range(count)]


# ---- the user's command ----


def run_script(
    script: str,
    *parts: object,
    processes: int = 0,
    timeout: float = TIMEOUT,
    env: dict | None = None,
    config: Path = ROOT / "recipes/accelerate/cpu_two.yaml",
) -> subprocess.CompletedProcess:
    """`python SCRIPT.py ...`, or under `accelerate launch` with so many processes; output is captured."""
    command = [sys.executable, str(ROOT / f"{script}.py")]
    if processes:
        launch = ["--config_file", str(config), "--num_processes", str(processes)]
        command[:1] = [sys.executable, "-m", "accelerate.commands.launch", *launch]
        command[-1:-1] = ["--main_process_port", str(free_port())]
    return subprocess.run(
        [*command, *words(*parts)], env=launched_env(env), capture_output=True, text=True, timeout=timeout, check=False
    )


def launched_env(changes: dict | None = None) -> dict[str, str]:
    """The environment of a user's command, on the CPU: there is nothing to set where no GPU is."""
    import torch

    return {**os.environ, **(ON_CPU if torch.accelerator.is_available() else {}), **(changes or {})}


class Machine:
    """`accelerate launch` of one process on one of two machines, which here are one; output goes to a file.

    Args:
        number: of the machine; the first one has the main process.
        port: of the main process.
        log: takes the output, appended.
        script, parts: the command line.
    """

    def __init__(self, number: int, port: int, log: Path, script: str, *parts: object) -> None:
        self.log, config = log, ROOT / "recipes/accelerate/cpu_two.yaml"
        launch = words("--config_file", config, "--num_machines 2 --machine_rank", number)
        launch += words("--main_process_ip 127.0.0.1 --main_process_port", port, ROOT / f"{script}.py")
        command = [sys.executable, "-m", "accelerate.commands.launch", *launch, *words(*parts)]
        with open(log, "a") as file:
            self.process = subprocess.Popen(command, env=launched_env(), stdout=file, stderr=file)

    def fail(self) -> None:
        """End the launcher and what it has started, at once and without a word."""
        launcher = psutil.Process(self.process.pid)
        for process in [launcher, *launcher.children(recursive=True)]:
            process.kill()
        self.process.wait()

    def wait(self, timeout: float = TIMEOUT) -> int:
        """The launcher's exit code. It is not left running."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.fail()
            raise


# ---- what a run leaves ----


def read_rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv as it stands: cells are text, so equal cells are equal bits."""
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def timeless(folder: Path) -> list[dict[str, str]]:
    """The rows of a run without the columns that measure time."""
    return [{k: v for k, v in row.items() if k not in TIME_COLUMNS} for row in read_rows(folder)]


def read_summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def weights_of(folder: Path, part: str = "model") -> bytes:
    """The exported weights, bit for bit."""
    return (folder / part / "model.safetensors").read_bytes()


def checkpoint_tensors(path: Path, part: str = "student") -> dict:
    """The tensors of a part of a checkpoint: student, ema or optimizer."""
    from w2s.engine.tensors import read_part

    return read_part(path, part)
