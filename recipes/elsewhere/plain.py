"""A training loop in plain PyTorch: python recipes/elsewhere/plain.py output/plain/taught --taught"""

import torch
import torch.nn.functional as F
from digits import accuracy, arguments, splits, student, weak_teacher
from torch.utils.data import DataLoader

from w2s import EarlyPhase, kl_softmax
from w2s.crossing import Clock
from w2s.distillation import Distillation
from w2s.record import RunRecord
from w2s.teacher import Teacher

args = arguments()
torch.manual_seed(args.seed)
data, model = splits(), student()
loader = DataLoader(data["train"], batch_size=64, shuffle=True)
optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
phase = EarlyPhase(weight=3, warmup=0.5, hold=5, decay=2, temperature=(6, 1), patience=2) if args.taught else None
kd = Distillation(phase, updates_per_epoch=len(loader))
if args.taught:
    kd.teacher = Teacher(weak_teacher(), name="perceptron", source="digits", device="cpu")
    kd.score = kd.teacher.facts(**{name: accuracy(kd.teacher, data[name]) for name in ("switch", "report")})

facts = {"task": "cls", "name": args.folder.name, "seed": args.seed, "teacher": kd.score}
record = RunRecord(args.folder, metric="top1", mode="max", targets=[80, 90], reported=("top1",), facts=facts)
record.start({"epochs": args.epochs, "batch_size": 64, "lr": 3e-3})
clock, update = Clock(), 0

for epoch in range(args.epochs):
    model.train()
    clock.start()
    for images, targets in loader:
        kd.advance(update)
        logits = model(images)
        loss = F.cross_entropy(logits, targets)
        if kd.weight > 0:  # L = L_task + lambda(u) L_kd(T(u))
            loss = loss + kd.weight * kl_softmax(logits, kd.teach(images), kd.temperature)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update += 1
    clock.pause()
    model.eval()
    if kd.active:
        kd.observe(accuracy(model, data["switch"]), update=update)
    clock.teacher_seconds += kd.take_seconds()
    record.add(
        epoch=epoch + 1,
        update=update,
        samples=(epoch + 1) * len(data["train"]),
        train_seconds=clock.train_seconds,
        total_seconds=clock.total_seconds,
        teacher_seconds=clock.teacher_seconds,
        top1=accuracy(model, data["report"]),
        **kd.take_evaluation(),
    )
record.write_summary(status="finished", kd_off=kd.off)
print(record.summary()["targets"])
