"""timm's train.py, in short: python recipes/elsewhere/timm_train.py output/timm/taught --taught [--resume]"""

import torch
from digits import arguments, splits, student, weak_teacher
from timm.task import resume_task_checkpoint
from timm.utils import CheckpointSaver
from torch.utils.data import DataLoader

from w2s import EarlyPhase
from w2s.adapters.taught import TaughtRun
from w2s.adapters.timm_task import EarlyDistillationTask

args = arguments()
torch.manual_seed(args.seed)
loaders = {name: DataLoader(split, batch_size=64, shuffle=name == "train") for name, split in splits().items()}
phase = EarlyPhase(weight=3, warmup=0.5, hold=5, decay=2, temperature=(6, 1), patience=2)
taught = {"phase": phase, "teacher": weak_teacher(), "teacher_source": "digits"} if args.taught else {}
run = TaughtRun(args.folder, metric="top1", targets=(80, 90), seed=args.seed, **taught)

# in place of LogitDistillationTask
task = EarlyDistillationTask(student(), run, batches_per_epoch=len(loaders["train"]), eval_loaders=loaders)
optimizer = torch.optim.AdamW(task.get_trainable_module().parameters(), 3e-3)
checkpoints = args.folder / "checkpoints"
checkpoints.mkdir(parents=True, exist_ok=True)
saver = CheckpointSaver(
    task.get_trainable_module(), optimizer, checkpoint_dir=checkpoints, recovery_dir=checkpoints, task=task
)
start = resume_task_checkpoint(task, str(checkpoints / "last.pth.tar"), optimizer) if args.resume else 0

for epoch in range(start, args.epochs):
    torch.manual_seed(1000 * args.seed + epoch)  # so that a resumed run sees the batches that it would have seen
    task.get_trainable_module().train()
    for images, targets in loaders["train"]:
        task(images, targets)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    evaluator = task.create_evaluator()
    task.get_eval_model().eval()
    with torch.inference_mode():
        for images, targets in loaders["report"]:
            evaluator.update(task.get_eval_model()(images), targets)
    eval_metrics = evaluator.compute()

    task.evaluated(eval_metrics, lr=optimizer.param_groups[0]["lr"])  # the line to add after train.py's validate
    saver.save_checkpoint(epoch, metric=eval_metrics["top1"])
task.finish()
