"""Lightning: python recipes/elsewhere/lightning_loop.py output/lightning/taught --taught [--resume]"""

import torch
import torch.nn.functional as F
from digits import accuracy, arguments, splits, student, weak_teacher
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from w2s import EarlyPhase
from w2s.adapters.lightning import EarlyTeaching
from w2s.adapters.taught import TaughtRun


class Student(LightningModule):
    """A student like any other, but for the term in its loss and the second split that it is validated on."""

    def __init__(self, run: TaughtRun) -> None:
        super().__init__()
        self.run, self.model = run, student()

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, targets = batch
        logits = self.model(images)
        return F.cross_entropy(logits, targets) + self.run.term(logits, images)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        images, targets = batch
        found = 100 * (self.model(images).argmax(1) == targets).float().mean()
        self.log(("report", "switch")[dataloader_idx], found, add_dataloader_idx=False, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 3e-3)


args = arguments()

seed_everything(args.seed)
data = splits()
phase = EarlyPhase(weight=3, warmup=0.5, hold=5, decay=2, temperature=(6, 1), patience=2)
taught = {"phase": phase, "teacher": weak_teacher(), "teacher_source": "digits"} if args.taught else {}
run = TaughtRun(args.folder, metric="top1", targets=(80, 90), seed=args.seed, **taught)
teaching = EarlyTeaching(run, score=lambda model: {name: accuracy(model, data[name]) for name in ("report", "switch")})
saving = ModelCheckpoint(args.folder / "checkpoints", filename="last", enable_version_counter=False)
trainer = Trainer(max_epochs=args.epochs, callbacks=[teaching, saving], logger=False, enable_progress_bar=False)
trainer.fit(
    Student(run),
    DataLoader(data["train"], batch_size=64, shuffle=True),
    [DataLoader(data[name], batch_size=64) for name in ("report", "switch")],
    ckpt_path=args.folder / "checkpoints" / "last.ckpt" if args.resume else None,
)
