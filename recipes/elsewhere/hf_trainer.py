"""transformers' Trainer: python recipes/elsewhere/hf_trainer.py output/hf/taught --taught [--resume]"""

from digits import arguments, splits, weak_teacher
from torch.utils.data import Dataset
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification, set_seed
from transformers.trainer_utils import get_last_checkpoint

from w2s import EarlyPhase
from w2s.adapters.hf import EarlyTrainer
from w2s.adapters.taught import TaughtRun


class AsDicts(Dataset):
    """A split as the Trainer takes it."""

    def __init__(self, split: Dataset) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict:
        image, label = self.split[index]
        return {"pixel_values": image, "labels": label}


args = arguments()

set_seed(args.seed)
data = {name: AsDicts(split) for name, split in splits().items()}
last = get_last_checkpoint(args.folder / "checkpoints") if args.resume else None
size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **size))
if last:  # transformers 5 saves a ViT under the names of the hub, and its Trainer does not translate them back
    model = ViTForImageClassification.from_pretrained(last)
phase = EarlyPhase(weight=3, warmup=0.5, hold=5, decay=2, temperature=(6, 1), patience=2)
taught = {"phase": phase, "teacher": weak_teacher(), "teacher_source": "digits"} if args.taught else {}
trainer = EarlyTrainer(
    run=TaughtRun(args.folder, metric="top1", targets=(80, 90), seed=args.seed, **taught),
    model=model,
    train_dataset=data["train"],
    eval_dataset={"report": data["report"], "switch": data["switch"]},
    compute_metrics=lambda found: {"top1": 100 * (found.predictions.argmax(1) == found.label_ids).mean().item()},
    args=TrainingArguments(
        output_dir=str(args.folder / "checkpoints"), num_train_epochs=args.epochs, per_device_train_batch_size=64,
        learning_rate=3e-3, lr_scheduler_type="constant", seed=args.seed, report_to="none",
        eval_strategy="epoch", save_strategy="epoch",
    ),
)  # fmt: skip
trainer.train(resume_from_checkpoint=last)
