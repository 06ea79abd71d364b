"""What every script does the same way: processes, seeds, folders, logs, checkpoints, preemption, exit codes."""

import contextlib
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NoReturn

import accelerate
import numpy as np
import timm
import torch
import yaml
from accelerate.utils import ProjectConfiguration, broadcast
from torch import nn

from w2s.crossing import Clock
from w2s.engine.checkpoint import load_checkpoint, locate, plain, save_checkpoint
from w2s.engine.errors import Finished, InputError, NonFiniteLoss, Preempted
from w2s.engine.randomness import mix_seed
from w2s.engine.trackers import check_trackers, close_trackers, default_group, start_trackers
from w2s.record import RunRecord, replacing


def call_main(main: Callable[[], None]) -> None:
    """Run a script's main and exit: 0 done, 2 bad input, 3 non-finite loss, 75 preempted and saved."""
    codes = {InputError: 2, NonFiniteLoss: 3, Preempted: 75, Finished: 0}
    rank = int(os.environ.get("RANK", 0))
    Run.opened = None
    try:
        main()
        code = 0
    except tuple(codes) as error:
        code = codes[type(error)]
        _leave_failed(error)
        # an error of a loader's worker comes back with the worker's traceback in front
        message = str(error).rsplit(f"{type(error).__name__}: ", 1)[-1].strip()
        sys.stdout.flush()
        if rank == 0:
            start = "\n" if sys.stderr.isatty() else ""  # a progress bar may stand on the line
            print(f"{start}{'' if code in (0, 75) else 'error: '}{message}", file=sys.stderr, flush=True)
        elif code == 2:  # perhaps this process alone saw it: a missing disk, a corrupt image
            # the launcher ends all when the first one exits: let the main process speak first, and end silently then
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10)
            print(f"error: process {rank}: {message}", file=sys.stderr, flush=True)
    except SystemExit as error:  # --help
        code = error.code or 0
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        _leave_failed(error)
        code = 1
    for worker in multiprocessing.active_children():
        worker.kill()  # loader workers ignore the gentle signal of an exit and would be waited for without end
    if code != 1 and torch.distributed.is_available() and torch.distributed.is_initialized():
        if code in (0, 75):
            torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    sys.exit(code)


def _leave_failed(error: BaseException) -> None:
    """Have summary.json say that the open run has failed: to launch it again would end the same way.

    It goes on saying "running" after a kill and a second Ctrl-C, and where one of several processes ends for another
    reason than bad input: perhaps because another one was killed.
    """
    run, Run.opened = Run.opened, None
    if run is None or not run.keeps:
        return
    if isinstance(error, InputError) or (isinstance(error, Exception) and run.launch["processes"] == 1):
        path = run.folder / "summary.json"  # not through the record: perhaps this is not the process that writes it
        with contextlib.suppress(OSError, ValueError):
            summary = json.loads(path.read_text()) | {"status": "failed"}
            with replacing(path, suffix=f".{os.environ.get('RANK', 0)}.partial") as file:
                json.dump(summary, file, indent=2)
                file.write("\n")


class Run:
    """One run: its accelerator, its folder and its place in time.

    Making one creates nothing on disk; `open` does, once everything the user gave has been checked.

    Args:
        args: resolved options.
        task: "cls", "det" or "diffusion".

    Raises:
        InputError: the folder cannot be written or holds something else, nothing to resume, a tracker missing.
        Finished: `--resume` of a complete run.
    """

    opened: ClassVar["Run | None"] = None  # and not yet ended: whose status call_main answers for

    def __init__(self, args, task: str) -> None:
        self.args, self.task = args, task
        self.name = args.name
        self.keeps = not (args.dry_run or args.eval_only)
        self.folder = Path(args.output) / args.name
        trackers = check_trackers(args.log_with) if self.keeps else None
        logging.getLogger("accelerate").setLevel(logging.WARNING)
        self.accelerator = accelerate.Accelerator(
            mixed_precision=default_precision(),
            log_with=trackers,
            project_config=ProjectConfiguration(str(self.folder), logging_dir=str(self.folder / "tensorboard")),
        )
        self.device = self.accelerator.device
        self.is_main = self.accelerator.is_main_process
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = task != "det"  # whose shapes change from batch to batch
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.clock = Clock(torch.cuda.synchronize if self.device.type == "cuda" else lambda: None)
        self.checkpoint, self.state = None, None  # to continue from
        self.tracker_id = uuid.uuid4().hex[:8]
        self.record: RunRecord | None = None
        self._log_file, self._lines = None, []
        self._signal, self._bad = None, torch.zeros((), device=self.device)
        self.launch = {
            "processes": self.accelerator.num_processes,
            "mixed_precision": self.accelerator.mixed_precision,
        }
        if self.keeps:
            self.checkpoint, self.state = locate(self.folder, args, self.launch, self.log)

    def open(self, record: Callable[..., RunRecord], **facts: object) -> None:
        """Create the folder, write args.yaml, start the log, the trackers, the signals and the record.

        Args:
            record: makes the RunRecord from (folder, facts, log).
            facts: what summary.json shall hold beside the metrics.
        """
        accelerator = self.accelerator
        accelerator.wait_for_everyone()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        facts = {
            "task": self.task,
            "name": self.name,
            "status": "running",
            "seed": self.args.seed,
            "kd_control": self.args.kd_control,
            "environment": environment(accelerator),
            **facts,
        }
        self.args.group = self.args.group or default_group(self.args, self.task)
        writes = self.keeps and self.is_main
        if writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.checkpoint and not (self.folder / "best").exists():  # taken up in another folder
                best = self.checkpoint.resolve().parent.parent / "best"
                if best.is_dir():
                    shutil.copytree(best, self.folder / "best")
            with replacing(self.folder / "args.yaml") as file:
                yaml.safe_dump(plain(vars(self.args)), file, sort_keys=True)
            self._log_file = open(self.folder / "log.txt", "a")  # noqa: SIM115 - lives as long as the run
            self._log_file.writelines(f"{line}\n" for line in self._lines)
            self._log_file.flush()
        if self.state:
            self.clock.load_state_dict(self.state["clock"])
            self.tracker_id = self.state["tracker_id"]
        if accelerator.log_with:
            options = plain(vars(self.args))
            start_trackers(accelerator, self.task, self.name, self.tracker_id, self.folder, options)
        self.record = record(self.folder if writes else None, facts, accelerator.log if accelerator.trackers else None)
        self.record.rewrite(self.state["rows"] if self.state else None)
        self.record.write_summary()
        Run.opened = self

    def log(self, message: str) -> None:
        """A line to the terminal and log.txt, from the main process only."""
        if not self.is_main:
            return
        from tqdm import tqdm

        tqdm.write(message, file=sys.stderr)
        if self._log_file:
            self._log_file.write(f"{message}\n")
            self._log_file.flush()
        else:
            self._lines.append(message)

    # ---- randomness and decisions ----

    def seed(self) -> None:
        """Seed all generators alike on all processes, before a model is built."""
        accelerate.utils.set_seed(self.args.seed)

    def seed_update(self, update: int) -> None:
        """Make the randomness of an update (dropout, mixup, noise) a function of (seed, update, process) alone."""
        seed = mix_seed(self.args.seed, update, self.accelerator.process_index)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def _on_signal(self, number: int, frame: object) -> None:
        self._signal = number
        if number == signal.SIGINT:  # a second Ctrl-C does not wait
            signal.signal(number, signal.default_int_handler)

    def watch(self, loss: torch.Tensor) -> None:
        """Remember whether a loss was ever not finite, without waiting for the device."""
        self._bad += ~torch.isfinite(loss.detach())

    def should_stop(self, update: int, now: bool = False) -> bool:
        """Whether a signal asks the run to stop; all processes get the same answer after the same update.

        Waiting for a GPU after every update would slow it down, so there the question is put every 10 updates, and
        `now` (before an evaluation or checkpoint).

        Raises:
            NonFiniteLoss: on all processes, if a watched loss of any of them was not finite.
        """
        if not now and self.device.type != "cpu" and update % 10:
            return False
        flags = torch.stack([self._bad, torch.full_like(self._bad, float(self._signal is not None))])
        bad, stop = self.accelerator.reduce(flags, "sum").tolist()
        if bad:
            self.fail(f"the loss is not finite at update {update}")
        return stop > 0

    def fail(self, reason: str) -> NoReturn:
        """End a run that has gone wrong, on all processes; its last good checkpoint stays.

        Raises:
            NonFiniteLoss: always.
        """
        self.record.write_summary(status="failed")
        kept = max((self.folder / "checkpoints").glob("update-*"), default=None) if self.keeps else None
        rest = f"The last good checkpoint is {kept}" if kept else "No checkpoint had been written"
        raise NonFiniteLoss(f"{reason}; try a lower --lr, --clip-grad or bf16. {rest}")

    def mean(self, values: torch.Tensor) -> list[float]:
        """The mean of a tensor over all processes, as floats."""
        return self.accelerator.reduce(values, "mean").tolist()

    def share_buffers(self, model: nn.Module) -> None:
        """Give all processes the BatchNorm statistics of the first: each has seen its own batches."""
        if self.accelerator.num_processes > 1:
            for buffer in model.buffers():
                buffer.copy_(broadcast(buffer))

    def save(self, update: int, ema: nn.Module | None, **state: object) -> None:
        """Write a checkpoint with the clock, the rows and `state`; called by all processes."""
        if self.keeps:
            state |= {
                "clock": self.clock.state_dict(),
                "rows": self.record.rows,
                "tracker_id": self.tracker_id,
                "args": plain(vars(self.args)),
                **self.launch,
            }
            root = self.folder / "checkpoints"
            save_checkpoint(root, update, state, self.accelerator, ema, self.args.checkpoint_hist)

    def load(self, ema: nn.Module | None) -> None:
        """Bring what was prepared, and the EMA, to the checkpoint that was found."""
        load_checkpoint(self.checkpoint, self.accelerator, ema)
        self.log(f"resumed from {self.checkpoint}")

    def finish(self, status: str) -> None:
        """Write the final status, close trackers and log."""
        self.record.write_summary(status=status)
        Run.opened = None
        facts = {"status": status, "metric": self.record.metric, "mode": self.record.mode}
        close_trackers(self.accelerator, self.record.tracker_summary() | facts)
        if self._log_file:
            self._log_file.close()
            self._log_file = None


def default_precision() -> str | None:
    """bf16 on GPUs that have it, unless a launcher has decided."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ or not torch.cuda.is_available():
        return None
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else None


def environment(accelerator: accelerate.Accelerator) -> dict:
    """Versions and hardware, for summary.json."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {os.cpu_count()} cores"
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
        "device": name,
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "git": git,
    }
