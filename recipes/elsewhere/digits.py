"""What the examples share: their options, scikit-learn's digits in three splits, a student, and a weak teacher."""

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from w2s.teacher import Teacher

NORMALISATION = {"mean": (0.5,), "std": (0.5,)}


def arguments() -> argparse.Namespace:
    """Where the run goes, whether the student is taught, for how long it trains, and whether the run is resumed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="the run folder")
    parser.add_argument("--taught", action="store_true")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint; plain.py has none")
    return parser.parse_args()


def splits() -> dict[str, TensorDataset]:
    """Images (1, 8, 8) in -1 to 1 and labels: 1,088 to train, 112 to switch off by, and 597 to report."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).split([1088, 112, 597])
    targets = torch.tensor(digits.target)
    return {
        name: TensorDataset(images[rows], targets[rows])
        for name, rows in zip(("train", "switch", "report"), order, strict=True)
    }


def student() -> nn.Module:
    """A small vision transformer."""
    shape = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
    size = {"embed_dim": 64, "depth": 2, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", **shape, **size, pretrained_cfg_overlay=NORMALISATION)


def weak_teacher() -> nn.Module:
    """A small perceptron, trained for a moment. The caller's random numbers are left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(2):
            for images, targets in DataLoader(splits()["train"], batch_size=64, shuffle=True):
                F.cross_entropy(model(images), targets).backward()
                optimizer.step()
                optimizer.zero_grad()
    model.pretrained_cfg = NORMALISATION  # which timm's task looks at
    return model


@torch.no_grad()
def accuracy(model: nn.Module | Teacher, split: TensorDataset) -> float:
    """Top-1 in percent, of a model in eval mode or of a teacher, which always is."""
    images, targets = split.tensors
    device = model.device if isinstance(model, Teacher) else next(model.parameters()).device
    return 100 * (model(images.to(device)).argmax(1).cpu() == targets).float().mean().item()
