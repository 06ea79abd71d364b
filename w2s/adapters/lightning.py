"""Lightning with an early teacher.

    run = TaughtRun("output/taught", metric="accuracy", targets=(90,), phase=EarlyPhase(...), teacher=teacher)
    trainer = Trainer(callbacks=[EarlyTeaching(run, score=score)], ...)

The LightningModule adds the term, and logs the run's metric on the reported split and on the switch split:

    def training_step(self, batch, batch_idx):
        images, targets = batch
        logits = self(images)
        return F.cross_entropy(logits, targets) + run.term(logits, images)

Lightning's checkpoints keep the state of the method, so `ckpt_path` continues it.
"""

import math
from collections.abc import Callable

from w2s import require
from w2s.adapters.taught import TaughtRun
from w2s.teacher import Teacher

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities.data import extract_batch_size
except ModuleNotFoundError:
    require("lightning", "lightning")  # says which extra installs it
    raise


class EarlyTeaching(Callback):
    """Moves lambda(u) and T(u) on, compares student and teacher after each validation, and keeps the record.

    Args:
        run: the run.
        score: measures the teacher once, on both splits as the student is measured: {"switch": ..., "report": ...}.
            It is not called for a student alone.
        report, switch: under which names the module logs the student's metric on the reported split and on the switch
            split, which is a held-out slice of the training data.
    """

    def __init__(
        self,
        run: TaughtRun,
        *,
        score: Callable[[Teacher], dict[str, float]] | None = None,
        report: str = "report",
        switch: str = "switch",
    ) -> None:
        self.run, self.score, self.report, self.switch = run, score, report, switch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `lightning.pytorch.Callback`; a checkpoint has been read by now."""
        self.run.begin(
            updates_per_epoch=math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches),
            device=pl_module.device,
            processes=trainer.world_size,
            is_main=trainer.is_global_zero,
            score=self.score,
            params=sum(p.numel() for p in pl_module.parameters()),
            options={
                **pl_module.hparams,
                "precision": trainer.precision,
                "accumulate_grad_batches": trainer.accumulate_grad_batches,
            },
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """See `lightning.pytorch.Callback`; the micro-batches of an update have the same lambda."""
        self.run.advance(trainer.global_step)
        self.run.saw(extract_batch_size(batch) * trainer.world_size)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `lightning.pytorch.Callback`."""
        self.run.clock.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `lightning.pytorch.Callback`.

        Raises:
            ValueError: the module does not log a metric of that name.
        """
        if trainer.sanity_checking or not self.run.begun:
            return
        found = {}
        for name in (self.report, self.switch):
            if name not in trainer.callback_metrics:
                raise ValueError(f"nothing is logged as '{name}'; there is: {', '.join(trainer.callback_metrics)}")
            found[name] = trainer.strategy.broadcast(trainer.callback_metrics[name].item())  # one decision for all
        self.run.evaluated(
            trainer.global_step,
            report=found[self.report],
            switch=found[self.switch],
            lr=trainer.optimizers[0].param_groups[0]["lr"],
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `lightning.pytorch.Callback`."""
        self.run.finish()

    def state_dict(self) -> dict:
        """What Lightning's checkpoints keep of the method."""
        return self.run.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue from a checkpoint; a teacher that was off stays off and is not touched."""
        self.run.load_state_dict(state_dict)
