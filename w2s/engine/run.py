"""One run: its processes, its folder, its log, its seeds, and how it stops."""

import logging
import shutil
import sys
import uuid
from pathlib import Path
from typing import ClassVar, NoReturn

import accelerate
import torch
from tqdm import tqdm

from w2s.crossing import Clock
from w2s.engine.checkpoint import check_readable, load_checkpoint, locate, plain, rewrite_state, save_checkpoint
from w2s.engine.errors import InputError, NonFiniteLoss, Preempted
from w2s.engine.files import LOCK, lock_folder
from w2s.engine.launch import build_accelerator, decide_on_main, environment, share_batch, wait_for_device
from w2s.engine.randomness import mix_seed, seed_generators
from w2s.engine.sharding import settle_options
from w2s.engine.sharing import check_hub, push_at_the_end
from w2s.engine.stopping import Stopping
from w2s.engine.tensors import Trained
from w2s.engine.trackers import check_login, check_trackers, close_trackers, default_group, start_trackers
from w2s.record import RunRecord


class Run:
    """One run: its accelerator, its folder, and the checkpoint it continues from.

    Making one creates nothing on disk. `open` does, once everything that the user gave has been checked.

    Args:
        args: resolved options; this reads those of the group "run".
        task: "cls", "det" or "diffusion".

    Attributes:
        options: the options as args.yaml holds them.
        keeps: whether the run leaves anything behind; a dry run and --eval-only do not.
        checkpoint, state: what the run continues from; None for a new run.
        record: rows and summary, once the run is open.

    Raises:
        InputError: the folder cannot be written or holds something else, there is nothing to resume, a tracker is
            missing, or the hub refuses --push-to-hub.
        Finished: --resume of a complete run.
    """

    opened: ClassVar["Run | None"] = None  # the run whose status must be set if this process ends early

    def __init__(self, args, task: str) -> None:
        self.options, self.task, self.name, self.seed = plain(vars(args)), task, args.name, args.seed
        self.checkpoint_hist = args.checkpoint_hist
        self.keeps = not (args.dry_run or args.eval_only)
        self.folder = Path(args.output) / args.name
        trackers = check_trackers(args.log_with) if self.keeps else None
        logging.getLogger("accelerate").setLevel(logging.WARNING)
        self.accelerator = build_accelerator(self.folder, trackers, timeout=args.ddp_timeout)
        self.shards = self.accelerator.is_fsdp2 and not args.eval_only  # a model that is only evaluated stays whole
        if self.shards:
            settle_options(args, self.accelerator)
        if trackers:
            decide_on_main(lambda: check_login(trackers))
        self.device = self.accelerator.device
        self.placement = {"device": self.device, "autocast": self.accelerator.autocast}  # for what is never prepared
        self.is_main = self.accelerator.is_main_process
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = task != "det"  # whose shapes change from batch to batch
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.clock = Clock(wait_for_device(self.device))
        self.stopping = Stopping(self.accelerator)
        self.checkpoint, self.state = None, None
        self.tracker_id = uuid.uuid4().hex[:8]
        self.record: RunRecord | None = None
        self._log_file, self._early_lines, self._lock = None, [], None
        self._saved: int | None = None  # the update of the checkpoint that was written last
        self.sizes = [self.accelerator.num_processes]  # the numbers of processes that the run has had
        if self.keeps:
            self.checkpoint, self.state, self.options = decide_on_main(lambda: self._locate(args.resume))
            if self.checkpoint:
                check_readable(self.checkpoint, self.state)
                self._resize(args)
            if args.push_to_hub:
                decide_on_main(lambda: check_hub(args.push_to_hub, option="--push-to-hub"))

    def _locate(self, resume: str | None) -> tuple[Path | None, dict | None, dict]:
        """`locate` for this run, whose folder is locked if it is there already."""
        if (self.folder / LOCK).exists():
            self._lock = lock_folder(self.folder, self.log)
        precision = self.accelerator.mixed_precision
        return locate(self.folder, options=self.options, resume=resume, precision=precision, log=self.log)

    def _resize(self, args) -> None:
        """Have an update hold the images that it held before, if the run goes on with another number of processes."""
        self.sizes = self.state["sizes"]
        before, now = self.sizes[-1], self.accelerator.num_processes
        if args.batch_size * args.grad_accum_steps * now != (batch := self.state["batch"]):
            args.batch_size, args.grad_accum_steps = share_batch(batch, processes=now, batch_size=args.batch_size)
        if now != before:
            self.sizes = [*self.sizes, now]
            self.log(
                f"{before} process(es) have written {self.checkpoint}: the {now} of now make the same updates of "
                f"{batch} images, as {args.grad_accum_steps} micro-batch(es) of {args.batch_size} each"
            )

    def open(self, *, metric: str, mode: str, targets: list[float], reported: tuple[str, ...], facts: dict) -> None:
        """Create the folder, write args.yaml, and start the log, the trackers, the signal handlers and the record.

        Args:
            metric: the reported metric that targets and the best model refer to.
            mode: "max" or "min".
            targets: tau values.
            reported: names of all reported metrics.
            facts: what summary.json holds beside the metrics.

        Raises:
            InputError: another run has begun in the folder, or a tracker refuses.
        """
        accelerator = self.accelerator
        self.stopping.listen()
        self.settle(group=self.options["group"] or default_group(self.options, self.task))
        if self.keeps:
            decide_on_main(self._create_folder)
        writes = self.keeps and self.is_main
        if self.state:
            self.clock.load_state_dict(self.state["clock"])
            self.tracker_id = self.state["tracker_id"]
        if accelerator.log_with:
            start_trackers(
                accelerator,
                task=self.task,
                name=self.name,
                run_id=self.tracker_id,
                resumed=self.state is not None,
                folder=self.folder,
                options=self.options,
            )
        facts = {
            "task": self.task,
            "name": self.name,
            "status": "running",
            "seed": self.seed,
            "kd_control": self.options["kd_control"],
            "environment": environment(accelerator, earlier=self.sizes[:-1]),
            **facts,
        }
        self.record = RunRecord(
            self.folder if writes else None,
            metric=metric,
            mode=mode,
            targets=targets,
            reported=reported,
            facts=facts,
            log=accelerator.log if accelerator.trackers else None,
        )
        self.record.start(self.options, rows=self.state["rows"] if self.state else None)
        Run.opened = self

    @property
    def fuses(self) -> bool:
        """Whether the optimiser may be one kernel for all tensors: not under a scaler, nor on sharded weights."""
        return self.accelerator.scaler is None and not self.shards

    @property
    def student_device(self) -> torch.device:
        """Where the student is built: a student that is sharded may fit on no single GPU, and gets there in parts."""
        return torch.device("cpu") if self.shards else self.device

    def settle(self, **choices: object) -> None:
        """Record what options that leave something open came to, such as --cache auto; args.yaml gets these values."""
        self.options = {**self.options, **choices}

    def _create_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            began = (self.folder / LOCK).exists()
            self._lock = lock_folder(self.folder, self.log)
            if began:
                raise InputError(f"another run has begun in {self.folder}; choose another --name")
        if self.checkpoint and not (self.folder / "best").exists():  # resumed into another folder
            best = self.checkpoint.resolve().parent.parent / "best"
            if best.is_dir():
                shutil.copytree(best, self.folder / "best")
        self._log_file = open(self.folder / "log.txt", "a")  # noqa: SIM115 - it is open as long as the run
        self._log_file.writelines(f"{line}\n" for line in self._early_lines)
        self._log_file.flush()

    def log(self, message: str) -> None:
        """Write a line to the terminal and to log.txt, from the main process only."""
        if not self.is_main:
            return
        tqdm.write(message, file=sys.stderr)
        if self._log_file:
            self._log_file.write(f"{message}\n")
            self._log_file.flush()
        else:
            self._early_lines.append(message)

    # ---- randomness and decisions ----

    def seed_all(self) -> None:
        """Seed all generators alike on all processes, before a model is built."""
        accelerate.utils.set_seed(self.seed)

    def seed_micro_batch(self, update: int, micro: int = 0) -> None:
        """Make the randomness of a micro-batch (dropout, mixup) a function of (seed, update, place) alone.

        The place is that of its images in the update: the second of two processes draws what the second micro-batch of
        a single one does.
        """
        place = micro * self.accelerator.num_processes + self.accelerator.process_index
        seed_generators(self.seed, update, place)

    def seed_step(self, update: int) -> None:
        """Make what the optimiser draws in a step (PSGD Kron does) the same on all processes."""
        torch.manual_seed(mix_seed(self.seed, update))

    def should_stop(self, update: int, now: bool = False) -> bool:
        """Whether a signal asks the run to stop; all processes get the same answer after the same update.

        Args:
            update: updates done.
            now: whether to wait for the device in any case, see `Stopping.ask`.

        Raises:
            NonFiniteLoss: on all processes, if the losses of any of them are broken.
        """
        stop, broken = self.stopping.ask(update, now)
        if broken:
            self.fail(f"the loss is not finite at update {update}")
        return stop

    def preempt(self) -> NoReturn:
        """End a run that a signal has asked to stop, on all processes.

        Raises:
            Preempted: always.
        """
        self.finish("preempted")
        saved = "" if self._saved is None else f" and saved at update {self._saved}; go on with --resume auto"
        raise Preempted(f"stopped by a signal{saved}")

    def fail(self, reason: str) -> NoReturn:
        """End a run that has gone wrong, on all processes; its last good checkpoint stays.

        Raises:
            NonFiniteLoss: always.
        """
        self.record.write_summary(status="failed")
        newest = max((self.folder / "checkpoints").glob("update-*"), default=None) if self.keeps else None
        rest = f"The last good checkpoint is {newest}" if newest else "No checkpoint had been written"
        raise NonFiniteLoss(f"{reason}; try a lower --lr, --clip-grad or bf16. {rest}")

    # ---- checkpoints and the end ----

    def save(self, update: int, trained: Trained, **state: object) -> None:
        """Write a checkpoint with the clock, the rows and `state`. All processes call this.

        Where the last one is of the same update, its weights stand and only its state is written anew.
        """
        if self.keeps:
            state |= {
                "clock": self.clock.state_dict(),
                "rows": self.record.rows,
                "tracker_id": self.tracker_id,
                "args": self.options,
                "sizes": self.sizes,
                "mixed_precision": self.accelerator.mixed_precision,
            }
            if update == self._saved:
                rewrite_state(self.folder / "checkpoints", update=update, state=state, accelerator=self.accelerator)
                return
            save_checkpoint(
                self.folder / "checkpoints",
                update=update,
                state=state,
                accelerator=self.accelerator,
                trained=trained,
                keep=self.checkpoint_hist,
            )
            self._saved = update

    def load(self, trained: Trained) -> None:
        """Bring what is trained to the checkpoint that the run continues from."""
        load_checkpoint(self.checkpoint, trained)
        self.log(f"resumed from {self.checkpoint}")

    def finish(self, status: str) -> None:
        """Write the final status, close the trackers, share the run if that is asked for, and close the log."""
        self.record.write_summary(status=status)
        Run.opened = None
        facts = {"status": status, "metric": self.record.metric, "mode": self.record.mode}
        close_trackers(self.accelerator, self.record.tracker_summary() | facts)
        if status == "finished" and self.options["push_to_hub"] and self.keeps and self.is_main:
            self.log(push_at_the_end(self.folder, self.options["push_to_hub"]))
        if self._log_file:
            self._log_file.close()
            self._log_file = None
