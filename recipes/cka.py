#!/usr/bin/env python
"""What does the teacher change inside its student? Layers of two runs compared, and the noise of the gradient.

python train_cls.py -c recipes/digits_baseline.yaml --checkpoint-hist 99    # keeps the checkpoint of every evaluation
python train_cls.py -c recipes/digits_w2s.yaml --checkpoint-hist 99
python recipes/cka.py --runs output/digits_baseline-seed0 output/digits_w2s-seed0 --out cka.png

The runs are one of the student alone and one of the same student with a teacher, of train_cls.py. For every update of
which both have a checkpoint (the moving average of the weights where they have one), it computes

cka        the similarity of each of --layers between both students, and of each of them with the teacher's layer in the
           same place, see `linear_cka`, on --images images of the reporting split
variance   the share of the gradient's variance that the teacher removes, see `variance_removed`, at the weights of the
           run with the teacher

and it draws both against the epochs.
"""

import argparse
import copy
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from choose_teacher import Choice

import train_cls
from w2s.engine.errors import InputError
from w2s.engine.main import call_main
from w2s.engine.parsing import positive_int
from w2s.engine.teaching import early_phase
from w2s.engine.tensors import read_part
from w2s.images.loading import eval_loader
from w2s.images.teacher import ImageTeacher
from w2s.losses import kl_softmax

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# ---- similarity of features ----


def linear_cka(features: Tensor, others: Tensor) -> float:
    """Centred kernel alignment with a linear kernel, debiased.

    Kornblith et al. 2019 (arXiv 1905.00414), with the unbiased estimator of HSIC (Song et al. 2007) as Nguyen et al.
    2021 (arXiv 2010.15327) have it. The plain estimator is near 1 for any two networks where there are more features
    than images; this one is 0 in expectation for independent features, and may be a little below.

    Args:
        features, others: (N, any shape) of the same N >= 4 images; the sizes may differ.

    Returns:
        1 for features that are equal up to a rotation and one factor.
    """
    gram, other = (_without_diagonal(part.flatten(1).double()) for part in (features, others))
    return float(_hsic(gram, other) / (_hsic(gram, gram) * _hsic(other, other)).sqrt())


def _without_diagonal(features: Tensor) -> Tensor:
    features = features - features.mean(0)
    gram = features @ features.T
    return gram.fill_diagonal_(0)


def _hsic(gram: Tensor, other: Tensor) -> Tensor:
    """The unbiased estimator for Gram matrices (N, N) whose diagonals are 0, up to the factor 1 / (N (N - 3))."""
    count = len(gram)
    sums, other_sums = gram.sum(0), other.sum(0)
    return (
        (gram * other).sum()
        + sums.sum() * other_sums.sum() / ((count - 1) * (count - 2))
        - 2 / (count - 2) * (sums @ other_sums)
    )


@torch.no_grad()
def features_of(model: nn.Module, layers: Sequence[str], batches: Sequence[Tensor], forward=None) -> list[Tensor]:
    """The outputs (N, ...) of some layers for all images of `batches`, on the CPU.

    Args:
        model: has the layers; it is put into eval mode.
        forward: what to call for a batch, the model itself if it is None.
    """
    found = [[] for _ in layers]

    def keep(outputs: list) -> object:
        return lambda module, inputs, output: outputs.append(output.float().cpu())

    hooks = [
        model.get_submodule(layer).register_forward_hook(keep(outputs))
        for layer, outputs in zip(layers, found, strict=True)
    ]
    model.eval()
    for images in batches:
        (forward or model)(images)
    for hook in hooks:
        hook.remove()
    return [torch.cat(outputs) for outputs in found]


def check_layers(model: nn.Module, layers: Sequence[str] | None, option: str) -> list[str]:
    """The names of the layers, those at the end of the first and of the last stage where none are given.

    Raises:
        InputError: the model has no such layer, or names no stages.
    """
    names = dict(model.named_modules())
    stages = [stage["module"] for stage in getattr(model, "feature_info", None) or []]
    stages = [stage for stage in stages if stage in names]
    if layers is None and not stages:
        raise InputError(f"{option}: name the layers; this model has no list of its stages")
    layers = list(layers or (stages[0], stages[-1]))
    for layer in layers:
        if layer not in names:
            raise InputError(f"{option}: no layer '{layer}'; there are {', '.join(stages or list(names)[1:6])}")
    return layers


# ---- variance of the gradient ----


def variance_removed(alone: Tensor, taught: Tensor) -> float:
    """The share of the gradient's variance that the teacher removes.

    Partial variance reduction (Safaryan et al. 2023, arXiv 2305.17581) explains distillation by it: the gradient with a
    teacher is the one without, plus a bias, minus a part of its noise.

    With g_i the gradient of L_task on batch i of K, and d_i that of L_task + lambda L_kd on the same batch and at the
    same weights, it is

        1 - [mean_i |d_i - d|^2 / |d|^2] / [mean_i |g_i - g|^2 / |g|^2]

    where g and d are the means over the batches, the variances are unbiased (divided by K - 1), and V / K is taken off
    |g|^2 and |d|^2, which the noise makes too large by that. Each variance is divided by the squared length of its
    mean, since the term also makes the gradient longer. 1: no noise is left; 0: as much as without a teacher; negative:
    more. NaN where a mean gradient is not distinguishable from 0.

    Args:
        alone, taught: (K, parameters), g_i and d_i.
    """
    noises = [_relative_variance(gradients.double()) for gradients in (alone, taught)]
    return float(1 - noises[1] / noises[0])


def _relative_variance(gradients: Tensor) -> Tensor:
    """Variance over squared length of the mean, NaN where that cannot be told from 0."""
    variance = gradients.var(0).sum()
    length = gradients.mean(0).square().sum() - variance / len(gradients)
    return variance / length if length > 0 else torch.full_like(variance, torch.nan)


def gradients_of(
    choice: Choice, student: nn.Module, teacher: ImageTeacher, batches: Sequence, *, weight: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """g_i and d_i of `variance_removed`, (K, parameters) each, in training mode.

    L_kd is the KL of the logits and lambda the plateau, --kd-weight, also for a run whose lambda faded or was a ratio
    of gradients, or that learnt more than logits: what a teacher removes at full weight, not what it did in that run.
    """
    alone, taught = [], []
    for images, targets in batches:
        if choice.mixup:
            images, targets = choice.mixup(images, targets)
        model = copy.deepcopy(student).train()
        logits = model(images)
        task_loss = choice.criterion(logits.float(), targets)
        kd_loss = kl_softmax(logits, teacher(images), temperature, teacher.known)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for loss, found in ((task_loss, alone), (task_loss + weight * kd_loss, taught)):
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
            found.append(torch.cat([gradient.flatten() for gradient in gradients]).cpu())
    return torch.stack(alone), torch.stack(taught)


# ---- two runs ----


def checkpoints(run: Path) -> dict[int, Path]:
    """The complete checkpoints of a run by their update."""
    return {int(path.name[7:]): path for path in sorted((run / "checkpoints").glob("update-*"))}


def load_student(student: nn.Module, checkpoint: Path) -> nn.Module:
    """The student with the weights of a checkpoint; branches beside it are left out."""
    weights = read_part(checkpoint, "ema") or read_part(checkpoint, "student")
    if any(name.startswith("student.") for name in weights):
        weights = {name[8:]: tensor for name, tensor in weights.items() if name.startswith("student.")}
    student.load_state_dict(weights)
    return student


def open_runs(options: argparse.Namespace) -> tuple[Choice, dict[int, tuple[Path, Path]]]:
    """The data and models of the taught run, and both checkpoints of each update that both runs have.

    Raises:
        InputError: a folder holds no run, the second one has no teacher, or they have no update in common.
    """
    for run in options.runs:
        if not (run / "args.yaml").is_file():
            raise InputError(f"--runs: {run} holds no run of train_cls.py")
    args = train_cls.build_parser().parse_recipe(["-c", str(options.runs[1] / "args.yaml")])
    if not args.teacher:
        raise InputError(f"--runs: {options.runs[1]} has no teacher; the run of the student alone comes first")
    if isinstance(args.teacher, list):
        raise InputError(f"--runs: {options.runs[1]} has several teachers; this compares with one")
    alone, taught = map(checkpoints, options.runs)
    if not (common := sorted(alone.keys() & taught.keys())):
        raise InputError("--runs: no update of which both have a checkpoint; train them with --checkpoint-hist 999")
    args.dry_run, args.log_with = True, None
    return Choice(args), {update: (alone[update], taught[update]) for update in common}


def measure(options: argparse.Namespace) -> dict:
    """All figures that --json writes."""
    choice, updates = open_runs(options)
    run, args = choice.run, choice.args
    run.seed_all()
    student, teacher = choice.build_student().to(run.device), choice.build_teacher(None)
    layers = check_layers(student, options.layers, "--layers")
    theirs = check_layers(teacher.model, options.teacher_layers, "--teacher-layers")
    if len(theirs) != len(layers):
        raise InputError(f"{len(theirs)} layers of the teacher for {len(layers)} of the student: see --teacher-layers")
    loader = eval_loader(choice.data.report, run.accelerator, batch_size=args.batch_size, workers=0)
    images, seen = [], 0
    for batch, _ in loader:
        images.append(batch[: options.images - seen].to(run.device))
        seen += len(images[-1])
        if seen >= options.images:
            break
    of_teacher = features_of(teacher.model, theirs, images, forward=teacher)
    endless = choice.batches()
    batches = [next(endless) for _ in range(options.batches)]
    phase = early_phase(args, length=args.epochs, mode="max")
    rows = []
    for update, paths in updates.items():
        epoch = update / choice.plan.updates_per_epoch
        alone, taught = (features_of(load_student(student, path), layers, images) for path in paths)
        row = {"update": update, "epoch": epoch, "layers": {}}
        for layer, a, b, t in zip(layers, alone, taught, of_teacher, strict=True):
            pairs = {"between": (a, b), "alone_teacher": (a, t), "taught_teacher": (b, t)}
            row["layers"][layer] = {name: linear_cka(*pair) for name, pair in pairs.items()}
        weights = {"weight": args.kd_weight, "temperature": phase.temperature(epoch)}
        row["variance_removed"] = variance_removed(*gradients_of(choice, student, teacher, batches, **weights))
        rows.append(row)
    names = [str(path) for path in options.runs]
    return {"runs": names, "layers": layers, "teacher_layers": theirs, "images": seen, "rows": rows}


def draw(figures: dict, file: Path) -> None:
    """One panel for each layer and one for the variance, against the epochs."""
    layers, rows = figures["layers"], figures["rows"]
    epochs = [row["epoch"] for row in rows]
    figure, axes = plt.subplots(1, len(layers) + 1, figsize=(4 * len(layers) + 4, 3.4), layout="constrained")
    labels = {
        "between": "alone and taught",
        "alone_teacher": "alone and teacher",
        "taught_teacher": "taught and teacher",
    }
    for axis, layer in zip(axes, layers, strict=False):
        for name, label in labels.items():
            axis.plot(epochs, [row["layers"][layer][name] for row in rows], marker=".", label=label)
        axis.set(title=layer, xlabel="epoch", ylabel="CKA", ylim=(min(0, *axis.get_ylim()), 1.02))
    axes[0].legend(frameon=False)
    axes[-1].plot(epochs, [row["variance_removed"] for row in rows], marker=".", color="black")
    axes[-1].axhline(0, color="grey", linewidth=0.8)
    axes[-1].set(title="gradient", xlabel="epoch", ylabel="share of its variance removed")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs=2, required=True, metavar=("ALONE", "TAUGHT"), help="run folders")
    parser.add_argument("--layers", nargs="+", metavar="NAME", help="of the student (default: first and last stage)")
    parser.add_argument("--teacher-layers", nargs="+", metavar="NAME", help="in the same places (default: the same)")
    parser.add_argument("--images", type=positive_int, default=512, metavar="N", help="of the reporting split (512)")
    parser.add_argument("--batches", type=positive_int, default=16, metavar="K", help="of the gradient (16)")
    parser.add_argument("--out", type=Path, default=Path("cka.png"), metavar="FILE", help="the picture (cka.png)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args(argv)
    for option, file in (("--out", options.out), ("--json", options.json)):
        if file and not file.resolve().parent.is_dir():
            raise InputError(f"{option} {file}: no such folder")
    if options.images < 4 or options.batches < 2:
        raise InputError("CKA needs at least 4 --images, and a variance at least 2 --batches")
    figures = measure(options)
    for row in figures["rows"]:
        values = "; ".join(
            f"{layer}: between {c['between']:.2f}, with the teacher {c['alone_teacher']:.2f} alone, "
            f"{c['taught_teacher']:.2f} taught"
            for layer, c in row["layers"].items()
        )
        print(f"epoch {row['epoch']:.4g}: {values}; variance removed {row['variance_removed']:.2f}")
    draw(figures, options.out)
    if options.json:
        for row in figures["rows"]:  # NaN is no JSON
            row["variance_removed"] = None if math.isnan(row["variance_removed"]) else row["variance_removed"]
        options.json.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    call_main(main)
