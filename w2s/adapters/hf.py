"""transformers' Trainer with an early teacher.

    run = TaughtRun("output/taught", metric="accuracy", targets=(90,), phase=EarlyPhase(...), teacher=teacher)
    trainer = EarlyTrainer(model=student, args=args, train_dataset=train, compute_metrics=compute_metrics,
        eval_dataset={"report": test, "switch": held_out}, run=run)
    trainer.train()

`compute_metrics` gives the run's metric. Loss, evaluation, distribution and checkpoints stay the Trainer's own: the
state of the method is a part of its `trainer_state.json`, so `resume_from_checkpoint` continues it.
"""

import math

import torch
from torch import nn
from torch.utils.data import DataLoader

from w2s import require
from w2s.adapters.taught import TaughtRun
from w2s.teacher import Teacher

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError:
    require("transformers", "accelerate", "transformers")  # says which extra installs it
    raise

STATE = "w2s"  # the key in the Trainer's state
PLACES = (  # arguments that say where a run goes and what is shown of it, in which the arms of a comparison may differ
    *("output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "report_to", "disable_tqdm", "logging_steps"),
    *("hub_model_id", "push_to_hub", "seed", "data_seed"),
)


class EarlyTrainer(Trainer):
    """A Trainer whose loss is `task loss + lambda(u) T(u)^2 KL(teacher || student)` until the teacher falls silent.

    Args:
        run: the run; its metric is the name that `compute_metrics` gives it, without the prefix "eval_report_".
        options: those of `transformers.Trainer`. `eval_dataset` is a dict with "report", the split that is reported,
            and "switch", a held-out slice of the training data that decides the switch-off.

    Raises:
        ValueError: `eval_dataset` lacks one of the two.
    """

    def __init__(self, *, run: TaughtRun, **options: object) -> None:
        super().__init__(**options)
        if not isinstance(self.eval_dataset, dict) or not {"report", "switch"} <= set(self.eval_dataset):
            raise ValueError('eval_dataset must be {"report": the reported split, "switch": a held-out training slice}')
        self.run = run
        self._answering: Teacher | None = None  # in the student's place, while the teacher is measured
        self.add_callback(_Watch(self))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, object]:
        """See `Trainer.compute_loss`; an evaluation has the task loss alone."""
        images = inputs[self.model.main_input_name]
        if self._answering:
            logits = self._answering(images)
            loss = logits.new_zeros(())
            return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            logits = outputs["logits"] if isinstance(outputs, dict) else outputs[1]
            loss = loss + self.run.term(logits, images) / self._micro_batches(num_items_in_batch)
            self.run.saw(len(images) * self.args.world_size)
        return (loss, outputs) if return_outputs else loss

    def _micro_batches(self, num_items_in_batch: torch.Tensor | int | None) -> int:
        """What the term is divided by under gradient accumulation, as far as the Trainer will not do it itself."""
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_model or self.compute_loss_func is not None
        return self.current_gradient_accumulation_steps if scaled else 1

    def measure(self, teacher: Teacher) -> dict[str, float]:
        """The teacher's metric on both splits, through the Trainer's own evaluation."""
        self._answering = teacher
        try:
            with torch.random.fork_rng():
                found = {
                    split: self.predict(self.eval_dataset[split], metric_key_prefix=split).metrics
                    for split in ("report", "switch")
                }
        finally:
            self._answering = None
        return {split: self.metric_of(metrics, split) for split, metrics in found.items()}

    def metric_of(self, metrics: dict[str, float], prefix: str) -> float:
        """The run's metric among those of an evaluation; raises ValueError where `compute_metrics` does not give it."""
        name = f"{prefix}_{self.run.metric}"
        if name not in metrics:
            given = ", ".join(sorted(key.removeprefix(f"{prefix}_") for key in metrics if key.startswith(f"{prefix}_")))
            raise ValueError(f"compute_metrics gives no {self.run.metric!r}, which the run reports; there is: {given}")
        return metrics[name]


class _Watch(TrainerCallback):
    """Tells the run where the training is. It has no state of its own: that is kept in the Trainer's."""

    def __init__(self, trainer: EarlyTrainer) -> None:
        self.trainer, self.run, self.found = trainer, trainer.run, {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: DataLoader,
        **kwargs: object,
    ) -> None:
        if args.eval_strategy == "no":
            raise ValueError("set eval_strategy: the switch-off and first@tau are decided at evaluations")
        if saved := state.stateful_callbacks.get(STATE):
            self.run.load_state_dict(saved)
        options = {name: value for name, value in args.to_sanitized_dict().items() if name not in PLACES}
        self.run.begin(
            updates_per_epoch=math.ceil(len(train_dataloader) / args.gradient_accumulation_steps),
            device=args.device,
            processes=args.world_size,
            is_main=state.is_world_process_zero,
            score=self.trainer.measure,
            params=sum(p.numel() for p in self.trainer.model.parameters()),
            options=options,
            autocast=self.trainer.accelerator.autocast,  # the Trainer's own is around the student alone
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.run.advance(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if control.should_evaluate or control.should_save:
            self.run.clock.pause()
            self._keep(state)

    on_epoch_end = on_step_end

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict, **kwargs: object
    ) -> None:
        if not self.trainer.is_in_train:
            return
        self.found |= metrics  # the Trainer evaluates one split after the other
        if not all(any(key.startswith(f"eval_{split}_") for key in self.found) for split in ("report", "switch")):
            return
        report, switch = (self.trainer.metric_of(self.found, f"eval_{split}") for split in ("report", "switch"))
        self.found = {}
        lr = self.trainer.optimizer.param_groups[0]["lr"]
        self.run.evaluated(state.global_step, report=report, switch=switch, lr=lr)
        self._keep(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.run.finish()

    def _keep(self, state: TrainerState) -> None:
        state.stateful_callbacks[STATE] = self.run.state_dict()
