#!/usr/bin/env python
"""Which of several teachers should teach this student?

python recipes/choose_teacher.py -c recipes/digits_w2s.yaml --teacher RUN_A RUN_B
python recipes/choose_teacher.py -c RECIPE --teacher A B C --probe-updates 500 --json choice.json

It prints one line for each candidate, measured with the student, the data and the options of a recipe of train_cls.py,
and then one recommendation. Nothing is kept on disk but --json. The columns:

switch     top-1 on the switch split
label      share of augmented training images whose label the teacher gives the highest probability
ECE        expected calibration error of its distribution at the first and at the last temperature, on the switch split
           (15 bins of equal width, Guo et al. 2017, arXiv 1706.04599), in percent
DisWOT     the score of the pair at initialisation, see `diswot`; higher is better
bound      FLOPs of an update with the teacher over one without
cost       the same in measured seconds
pays at    the share of the epochs to a target that it must save to pay in seconds: 1 - 1 / cost
probe      top-1 of the student on the switch split after --probe-updates with the teacher at the full --kd-weight and
           the first temperature, on the same batches from the same weights
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from scipy.stats import spearmanr
from timm.utils import AverageMeter
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import Bench, median_ratio
from bench_tasks import Classification

import train_cls
from w2s.engine.errors import InputError
from w2s.engine.main import call_main
from w2s.engine.parsing import positive_int
from w2s.engine.plan import plan_updates
from w2s.engine.run import Run
from w2s.images.augmentation import build_criterion, build_mixup
from w2s.images.data import load_data
from w2s.images.loading import eval_loader
from w2s.images.teacher import ImageTeacher

BINS = 15  # of the calibration error
PAIR_BATCH = 32  # images of `diswot`
CLASSES = 16  # of its class activation maps, at most
ROUNDS, ROUND_UPDATES = 5, 5  # of the measured cost


class Choice(Classification):
    """The recipe, whose splits are whole although the run keeps nothing.

    Args:
        args: parsed options with --dry-run.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.data_config = train_cls.resolve(args)
        self.run = Run(args, task=self.name)
        args.dry_run = False
        self.data = load_data(args, self.data_config, self.run.accelerator, cache=args.cache)
        self.cache = self.data.cache
        self.plan = plan_updates(args, self.run, self.data.samples, epochs=args.epochs)
        self.criterion = build_criterion(args)
        self.mixup = build_mixup(args, self.data.num_classes)

    def top1(self, model) -> float:
        """Of a model on the switch split, in percent."""
        return train_cls.validate(self.args, self.run, model, self.data.switch)["top1"]

    def probe(self, updates: int, taught: bool) -> float:
        """top1 of a student on the switch split after so many updates."""
        job = self.job(taught=taught)
        self.train(job, stop=updates, batches=self.batches())
        top1 = self.top1(job.student.eval())
        del job
        self.run.accelerator.free_memory()  # the accelerator holds on to what it has prepared
        return top1


# ---- what is measured of a candidate ----


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """The expected calibration error in 0-1: the mean gap between confidence and accuracy over `BINS` equal bins.

    Args:
        probabilities: (N, classes).
        labels: (N,).
    """
    confidence, guess = probabilities.max(-1)
    hits = (guess == labels).to(confidence)
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    gaps = torch.zeros(BINS, dtype=confidence.dtype).index_add_(0, bins, hits - confidence)
    return float(gaps.abs().sum() / len(labels))


def diswot(teacher: nn.Module, student: nn.Module, images: tuple[Tensor, Tensor]) -> float:
    """The training-free score of a pair of untrained networks, after DisWOT (Dong et al. 2023, arXiv 2303.15678).

    Minus the sum of two distances (Frobenius norms) between teacher and student, so that 0 is the highest score:

    semantics  of the Gram matrices of the class activation maps (Grad-CAM of up to `CLASSES` classes, before the ReLU;
               classes x classes, mean over the images), each row of length 1
    relations  of the Gram matrices of the images' last feature maps (images x images), each row of length 1

    The size of these matrices does not depend on the widths, so that any two of timm's models can be compared. The
    score knows nothing of a teacher's training: teachers of one architecture all get the same.

    Args:
        teacher, student: timm models at initialisation.
        images: the same images as each of them takes them.
    """
    pairs = [_maps(model.eval(), batch) for model, batch in zip((teacher, student), images, strict=True)]
    (semantics_t, relations_t), (semantics_s, relations_s) = pairs
    return -float((semantics_t - semantics_s).norm() + (relations_t - relations_s).norm())


def _maps(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The two Gram matrices of `diswot` of a model."""
    with torch.no_grad():
        features = model.forward_features(images)
    features.requires_grad_()
    channels_first = features.ndim == 4 and features.shape[1] == model.num_features
    space = (2, 3) if channels_first else tuple(range(1, features.ndim - 1))
    logits = model.forward_head(features)
    maps = []
    for label in range(min(logits.shape[1], CLASSES)):
        (gradient,) = torch.autograd.grad(logits[:, label].sum(), features, retain_graph=True)
        weighted = gradient.mean(space, keepdim=True) * features.detach()
        maps.append(weighted.sum(1 if channels_first else -1).flatten(1))
    maps = torch.stack(maps, 1)  # (B, classes, places)
    semantics = nn.functional.normalize(maps @ maps.transpose(1, 2), dim=-1).mean(0)
    flat = features.detach().flatten(1)
    return semantics, nn.functional.normalize(flat @ flat.T, dim=-1)


@torch.no_grad()
def switch_logits(choice: Choice, teacher: ImageTeacher) -> tuple[Tensor, Tensor]:
    """Its logits and the labels of the switch split, on the CPU; classes that it does not know are left out."""
    loader = eval_loader(choice.data.switch, choice.run.accelerator, batch_size=choice.args.batch_size, workers=0)
    batches = [(teacher(images.to(choice.run.device)).float().cpu(), labels.cpu()) for images, labels in loader]
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def agreement(choice: Choice, teacher: ImageTeacher) -> float:
    """The share of a few batches of training images whose label it gives the highest probability, in percent."""
    hits, batches = AverageMeter(), choice.batches()
    for _ in range(max(1, min(choice.plan.updates_per_epoch, 1000 // choice.args.batch_size))):
        images, labels = next(batches)
        hits.update((teacher(images).argmax(-1) == labels).float().mean().item(), len(labels))
    return 100 * hits.avg


def pair_score(choice: Choice, teacher: ImageTeacher) -> float:
    """`diswot` of the pair on training images; NaN for a teacher that gives no features."""
    images, _ = next(choice.batches())
    images = images[:PAIR_BATCH].contiguous()
    choice.run.seed_all()
    untrained = teacher.rebuild().to(choice.run.device)
    choice.run.seed_all()
    student = choice.build_student().to(choice.run.device)
    if not (hasattr(untrained, "forward_head") and hasattr(student, "forward_head")):
        return math.nan
    fitted = images if teacher.same_range else images * teacher.scale + teacher.shift
    if tuple(fitted.shape[-2:]) != teacher.size:
        fitted = nn.functional.interpolate(fitted, teacher.size, mode="bicubic", antialias=True)
    return diswot(untrained, student, (fitted, images))


def costs(choice: Choice, bench: Bench) -> tuple[float, float]:
    """FLOPs and seconds of an update with the teacher, over those of one without."""
    source = bench.loaded_batches()
    plain, taught = choice.job(taught=False), choice.job(taught=True)
    timers = {"plain": bench.job_timer(plain, source), "teacher": bench.job_timer(taught, source)}
    seconds = bench.take_turns(timers, rounds=ROUNDS, count=ROUND_UPDATES)
    bound = 1 + taught.flops["teacher_forward"] / taught.flops["student_update"]
    del plain, taught, timers
    choice.run.accelerator.free_memory()
    return bound, median_ratio(seconds["plain"], seconds["teacher"])


def measure(choice: Choice, bench: Bench, probe_updates: int) -> dict:
    """All columns of the candidate that the options name."""
    teacher = choice.build_teacher(None)
    logits, labels = switch_logits(choice, teacher)
    temperatures = (choice.args.kd_temperature[0], choice.args.kd_temperature[-1])
    bound, cost = costs(choice, bench)
    return {
        "switch": 100 * (logits.argmax(-1) == labels).float().mean().item(),
        "label": agreement(choice, teacher),
        "ece_first": 100 * calibration_error((logits / temperatures[0]).softmax(-1), labels),
        "ece_last": 100 * calibration_error((logits / temperatures[1]).softmax(-1), labels),
        "diswot": pair_score(choice, teacher),
        "bound": bound,
        "cost": cost,
        "pays_at": max(1 - 1 / cost, 0.0),
        "probe": choice.probe(probe_updates, taught=True),
    }


# ---- the choice ----


def recommend(candidates: dict[str, dict], alone: float, images: int) -> str:
    """One sentence. Of all candidates whose student is within a standard error of the best one, the cheapest is taken.

    Args:
        candidates: the columns by the candidate's name.
        alone: the probe of the student alone.
        images: of the switch split.
    """
    best = max(columns["probe"] for columns in candidates.values())
    error = math.sqrt(max(best * (100 - best), 0) / images)
    if best <= alone + error:
        return (
            f"none of them: after the probe no student is clearly ahead of the student alone ({best:.1f} against "
            f"{alone:.1f}, standard error {error:.1f}); a longer --probe-updates may show more"
        )
    close = {name: columns for name, columns in candidates.items() if columns["probe"] >= best - error}
    name = min(close, key=lambda name: (close[name]["cost"], -close[name]["probe"]))
    chosen = close[name]
    return (
        f"{name}: {chosen['probe']:.1f} after the probe, {chosen['probe'] - alone:+.1f} against the student alone; it "
        f"pays in seconds if it saves more than {100 * chosen['pays_at']:.0f} % of the epochs (at least "
        f"{100 * (1 - 1 / chosen['bound']):.0f} % by FLOPs)"
    )


def table(candidates: dict[str, dict], alone: float, updates: int) -> str:
    """The candidates for a terminal."""
    width = max(map(len, [*candidates, "the student alone"]))
    head = "switch  label  ECE first/last   DisWOT  bound   cost  pays at  probe"
    lines = [f"{'teacher':<{width}}  {head}"]
    for name, c in candidates.items():
        lines.append(
            f"{name:<{width}}  {c['switch']:>6.1f} {c['label']:>6.1f}  {c['ece_first']:>6.1f}/{c['ece_last']:<7.1f} "
            f"{c['diswot']:>7.2f} {c['bound']:>6.3f} {c['cost']:>6.3f} {100 * c['pays_at']:>6.1f} % {c['probe']:>6.1f}"
        )
    return "\n".join([*lines, f"{'the student alone':<{width}}  {alone:>{len(head)}.1f}", f"probe: {updates} updates"])


def correlations(candidates: dict[str, dict], measured: list[float]) -> dict[str, float]:
    """Spearman's rank correlation of each column with measured speedups, in the order of the candidates.

    A column in which the candidates do not differ has none.
    """
    columns = ("switch", "label", "ece_first", "ece_last", "diswot", "probe")
    values = {name: [c[name] for c in candidates.values()] for name in columns}
    differing = {name: column for name, column in values.items() if len(set(column)) > 1}
    return {name: float(spearmanr(column, measured).statistic) for name, column in differing.items()}


def parse_options(argv: list[str]) -> tuple[argparse.Namespace, dict[str, object]]:
    """The options with the first candidate as the teacher, and what --teacher is for each of the candidates by name.

    Raises:
        InputError: an option is wrong, or fewer than two candidates.
    """
    several = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    several.add_argument("--teacher", nargs="+", action="extend", default=[])
    candidates, rest = several.parse_known_args(argv)
    parser = train_cls.build_parser()
    parser.description = __doc__
    group = parser.add_argument_group("choice")
    group.add_argument("--probe-updates", type=positive_int, metavar="N", help="of each probe (300, or the whole run)")
    group.add_argument("--measured", type=float, nargs="+", metavar="X", help="known speedups, for rank correlations")
    group.add_argument("--json", metavar="FILE", help="write all figures there")
    parsed = {spec: parser.parse_recipe([*rest, "--teacher", spec]) for spec in candidates.teacher}
    if len(parsed) < 2:
        parser.parse_recipe(rest)  # --help, and what is wrong with other options
        raise InputError(f"{'only one candidate' if parsed else 'no candidates'}: give at least two with --teacher")
    args = next(iter(parsed.values()))
    if args.measured and len(args.measured) != len(parsed):
        raise InputError(f"--measured gives {len(args.measured)} speedups for {len(parsed)} candidates")
    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise InputError(f"--json {args.json}: no such folder")
    args.dry_run, args.kd_control, args.kd_term, args.kd_target = True, None, None, None
    args.log_interval, args.log_with = 10**9, None
    args.kd_off, args.kd_warmup, args.kd_hold, args.kd_decay = "never", 0.0, 0.0, 0.0
    return args, {spec: other.teacher for spec, other in parsed.items()}


def main(argv: list[str] | None = None) -> None:
    args, teachers = parse_options(sys.argv[1:] if argv is None else argv)
    choice = Choice(args)
    if choice.run.accelerator.num_processes > 1:
        raise InputError("the candidates are measured by one process: start this without accelerate launch")
    if choice.data.switch is None:
        raise InputError("--switch-split 0 leaves no images to compare the candidates on; give a share above 0")
    probe_updates = args.probe_updates or min(300, choice.plan.total)
    if probe_updates > choice.plan.total:
        raise InputError(f"--probe-updates {probe_updates}: this recipe trains for {choice.plan.total} updates")
    bench = Bench(choice)
    for teacher in teachers.values():
        args.teacher = teacher
        choice.build_teacher(None)  # whatever is wrong with any of them is said before the first is measured
    alone = choice.probe(probe_updates, taught=False)
    candidates = {}
    for name, teacher in teachers.items():
        args.teacher = teacher
        candidates[name] = measure(choice, bench, probe_updates)
    images = choice.data.sizes["switch"]
    print(table(candidates, alone, probe_updates))
    print("recommended:", recommendation := recommend(candidates, alone, images))
    figures = {"candidates": candidates, "alone": alone, "switch_images": images, "recommended": recommendation}
    if args.measured:
        figures |= {"measured": args.measured, "spearman": correlations(candidates, args.measured)}
        found = ", ".join(f"{name} {value:.2f}" for name, value in figures["spearman"].items())
        print(f"rank correlation with the measured speedups: {found}")
    if args.json:
        Path(args.json).write_text(json.dumps(figures | {"probe_updates": probe_updates}, indent=2) + "\n")


if __name__ == "__main__":
    call_main(main)
