"""From the options of the method to a `Distillation`: its phase, its control, its teacher and the teacher's score."""

import copy
import math
from collections.abc import Callable
from functools import partial

import torch

from w2s.controls import Control
from w2s.distillation import Distillation
from w2s.engine.errors import InputError
from w2s.engine.ladder import Introduce, Ladder, check_ladder
from w2s.engine.plan import Plan
from w2s.engine.randomness import mix_seed, own_randomness
from w2s.engine.run import Run
from w2s.running import GradientBalance, RunningScores
from w2s.schedule import EarlyPhase
from w2s.teacher import Teacher

FEW_IMAGES = 50  # one of so many is worth 2 points
RANDOM_TEACHER = 0x756E7472  # keeps the seed of an untrained teacher apart from the run's other seeds


def kd_window(args, length: float) -> tuple[float, float, float]:
    """Warm-up, hold and decay of lambda; 5 %, 55 % and 20 % of a run of this `length` where they are not given."""
    given = (args.kd_warmup, args.kd_hold, args.kd_decay)
    return tuple(
        share * length if value is None else value for value, share in zip(given, (0.05, 0.55, 0.2), strict=True)
    )


def early_phase(args, length: float, mode: str, running: str | None = None) -> EarlyPhase | None:
    """The EarlyPhase of a run of `length` epochs (or updates), None without a teacher.

    Args:
        args: resolved options; this reads those of the group "distillation".
        length: of the run.
        mode: "max" or "min", what is better in the metric that is compared.
        running: the same for what --kd-off running compares; `mode` if None.

    Raises:
        InputError: the window is longer than the run, an option is out of range or not for several teachers, or
            --kd-control has no teacher to stand in for or no other example in the batch to change places with.
    """
    if args.kd_control and not args.teacher:
        raise InputError(
            f"--kd-control {args.kd_control} takes a teacher's place and its schedule: give --teacher, too"
        )
    _refuse_shuffling_one(args)
    if not args.teacher:
        return None
    if isinstance(args.teacher, list):
        check_ladder(args)
    is_running = args.kd_off == "running"
    for option, value in (("kd-control", args.kd_control), ("teacher-score", args.teacher_score)):
        if is_running and value is not None:
            raise InputError(
                f"--kd-off running compares the teacher itself, on the batches of training: leave out --{option}"
                + (", or give --kd-off the epoch at which the taught run fell silent" if args.kd_control else "")
            )
    if len(args.kd_temperature) > 2:
        raise InputError(f"--kd-temperature takes START and END, got {len(args.kd_temperature)} values")
    window = args.kd_warmup + args.kd_hold + args.kd_decay
    if args.kd_off != "never" and window > length * (1 + 1e-9):
        raise InputError(
            f"the distillation window of {window:g} (--kd-warmup {args.kd_warmup:g} + --kd-hold {args.kd_hold:g} + "
            f"--kd-decay {args.kd_decay:g}) is longer than the run of {length:g}; shorten it"
        )
    try:
        return EarlyPhase(
            weight=args.kd_weight,
            warmup=args.kd_warmup,
            hold=args.kd_hold,
            decay=args.kd_decay,
            temperature=(args.kd_temperature[0], args.kd_temperature[-1]),
            patience=args.kd_patience,
            mode=running or mode if is_running else mode,
            off="surpass" if is_running else args.kd_off,
            fade=args.kd_fade,
        )
    except ValueError as error:
        raise InputError(f"distillation schedule: {error}") from None


def _refuse_shuffling_one(args) -> None:
    if args.kd_control == "shuffled" and args.batch_size < 2:
        raise InputError(
            "--kd-control shuffled exchanges the examples of a batch, and a batch of 1 has none to exchange: give a "
            "--batch-size of at least 2, or resume with fewer processes"
        )


def build_control(args, process: int, processes: int = 1) -> Control | None:
    """The control that `--kd-control` asks of this one of the processes, None without it.

    Raises:
        InputError: a run that is resumed by more processes has only one image left for each of them.
    """
    _refuse_shuffling_one(args)
    if not args.kd_control:
        return None

    def seed_of(update: int, micro: int) -> int:
        return mix_seed(args.seed, update, 0, micro * processes + process)

    return Control(kind=args.kd_control, seed_of=seed_of)


def build_measures(args, run: Run) -> dict:
    """What `--kd-balance` and `--kd-off running` measure in training, as arguments of `Distillation`."""
    mean = partial(run.accelerator.reduce, reduction="mean")
    return {
        "balance": GradientBalance(mean) if args.kd_balance else None,
        "running": RunningScores(mean) if args.kd_off == "running" else None,
    }


def start_distillation(
    args,
    run: Run,
    plan: Plan,
    *,
    phase: EarlyPhase | None,
    load: Callable[[str], Teacher],
    count_flops: Callable[[Teacher], int],
    evaluate: Callable[[object, object], float],
    report: object,
    switch: object | None,
    metric: str,
    switch_images: int | None = None,
) -> Distillation:
    """The method of a run, continued from its checkpoint. A teacher is loaded only while its phase lasts.

    Args:
        args: resolved options; this reads those of the group "distillation".
        phase: from `early_phase`.
        load: makes the teacher of a name in --teacher, fitted to the student.
        count_flops: gives those of a teacher's forward in an update.
        evaluate: gives the metric of a student, or of what takes its place, on a split.
        report, switch, metric: both splits, as `evaluate` takes them, and the name of what it gives.
        switch_images: how many images the switch split has; None where the metric is no share of images in percent.
            With them come the standard error of a score, and the warnings of one that is too good to be true and of
            a split that is too small to decide anything.

    Raises:
        InputError: no switch split, a teacher that does not fit, one whose score is not finite, or one without a loss
            to compare with --kd-off running.
    """
    is_running = args.kd_off == "running"
    if phase and switch is None and not is_running:
        raise InputError("--switch-split 0 leaves no images to score the teacher on; give more, or --kd-off running")

    def fitting(spec: str) -> Teacher:
        teacher = load(spec)
        if is_running:
            _refuse_unknown_classes(phase, teacher)
        return teacher

    def introduce(spec: str, score: dict | None) -> tuple[Teacher, dict]:
        teacher = fitting(spec)
        if score is None:
            splits = {"report": report, "switch": None if is_running else switch, "images": switch_images}
            given = {"metric": metric, "mode": phase.mode, "known_score": args.teacher_score}
            score = score_teacher(teacher, run, evaluate=partial(evaluate, teacher.evaluated), **splits, **given)
        if args.kd_control == "random":
            untrain(teacher, seed=run.seed)
        return teacher, score

    kd = _build(args, run, plan, phase, introduce=introduce, measure=lambda model: evaluate(model, switch))
    if run.state:
        kd.load_state_dict(run.state)
    if isinstance(kd, Ladder):
        kd.start(fitting, count=(lambda teacher: 0) if args.kd_control == "uniform" else count_flops)
    elif kd.active:
        kd.teacher, kd.score = introduce(args.teacher, kd.score)
    kd.restart_timer()  # to score it was not to teach
    return kd


def _build(
    args,
    run: Run,
    plan: Plan,
    phase: EarlyPhase | None,
    *,
    introduce: Introduce,
    measure: Callable[[object], float],
) -> Distillation:
    """The method of a run before its first update, for one teacher or for several."""
    processes = {"process": run.accelerator.process_index, "processes": run.accelerator.num_processes}
    control = build_control(args, **processes)
    options = {"control": control, "unit": plan.unit, "updates_per_epoch": plan.updates_per_epoch}
    if not isinstance(args.teacher, list):
        return Distillation(phase, **build_measures(args, run), **options)

    def renew(last: bool) -> dict:
        renewed = copy.copy(phase)
        if phase.off == "never" and not last:
            renewed.off = "surpass"
        return {"phase": renewed, **build_measures(args, run)}

    return Ladder(args.teacher, renew=renew, introduce=introduce, measure=measure, log=run.log, **options)


def _refuse_unknown_classes(phase: EarlyPhase, teacher: Teacher) -> None:
    """Refuse to compare losses in training with a teacher that does not know all classes."""
    if phase.mode == "min" and getattr(teacher, "known", None) is not None:
        raise InputError(
            "--kd-off running compares losses, which are infinite for classes that the teacher does not know; leave it "
            "out, and the two are compared on the switch split"
        )


def score_teacher(
    teacher: Teacher,
    run: Run,
    *,
    metric: str,
    mode: str,
    evaluate: Callable[[object], float],
    report: object,
    switch: object,
    known_score: float | None = None,
    images: int | None = None,
) -> dict:
    """Measure a teacher on both splits, say what it scores, and return what summary.json holds of it.

    Args:
        switch: None where it is not looked at, with --kd-off running.
        known_score: from --teacher-score; takes the place of the score on the switch split.
        images: see `switch_images` of `start_distillation`.

    Raises:
        InputError: a score is not finite: the teacher's weights are broken, and nothing could ever beat it.
    """
    reported = evaluate(report)
    score = known_score
    if switch is not None and known_score is None:
        score = evaluate(switch)
    if not all(value is None or math.isfinite(value) for value in (reported, score)):
        decisive = "" if score is None else f", {score:g} on the switch split"
        raise InputError(f"the teacher from {teacher.source} scores {metric} {reported:g}{decisive}")
    if score is None:
        rival = "it on the batches of training"
    elif known_score is not None:
        rival = f"{score:.4g}, given by --teacher-score"
    elif images:
        error = f"with a standard error of {_error(score, images):.2g}"
        rival = f"{score:.4g}, measured on the {images} images of the switch split, {error}"
    else:
        rival = f"{score:.4g}, measured for the switch-off alone"
    run.log(
        f"teacher {teacher.name} ({teacher.params / 1e6:.2f} M parameters) from {teacher.source}: {metric} "
        f"{reported:.4g} on the reporting split; the student has to beat {rival}"
    )
    if teacher.note:
        run.log(teacher.note)
    if score is None:
        return teacher.facts(switch=None, report=reported)
    lead = score - reported if mode == "max" else reported - score
    if known_score is None and images and lead > abs(reported) / 50 + 2 * _error(score, images):
        run.log(
            "warning: the teacher scores clearly better on the switch split than on the reporting split; if it was "
            "trained on that data the student may never pass it: give its held-out score with --teacher-score"
        )
    if images and (doubts := _doubts(score, images)):
        run.log(
            f"warning: {', and '.join(doubts)}; hold out more images with --switch-split, or give a known held-out "
            "score with --teacher-score"
        )
    return teacher.facts(switch=score, report=reported)


def _error(percent: float, images: int) -> float:
    """The standard error of a share of so many images; of AP roughly, as if it were the share that is right."""
    return math.sqrt(max(percent, 0) * (100 - percent) / images)


def _doubts(score: float, images: int) -> list[str]:
    """Why the comparison on a switch split can hardly decide anything."""
    doubts = []
    if score >= 100:
        doubts.append(f"no student can beat a teacher of {score:g}, so that only the end of the window silences it")
    if images < FEW_IMAGES:
        doubts.append(f"on {images} images of the switch split a single one is worth {100 / images:.2g} points")
    return doubts


def untrain(teacher: Teacher, seed: int) -> None:
    """Give a teacher that has been scored the weights of a model that was never trained, drawn from `seed` alone."""
    with own_randomness():
        torch.random.default_generator.manual_seed(mix_seed(seed, RANDOM_TEACHER))
        untrained = teacher.rebuild()
    teacher.model.load_state_dict(untrained.state_dict())
