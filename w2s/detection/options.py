"""The options of detection, group by group: data, detector, optimiser, training and augmentation.

Beside each group stands what reads it.
"""

import argparse
from pathlib import Path

from torchvision.transforms import v2

from w2s.detection.annotations import AnnotatedImages
from w2s.detection.config import DETECTOR_KINDS, DetectorConfig
from w2s.detection.data import DetectionData, open_detection, reporting_split, split_detection
from w2s.detection.loading import DetectionSplit, detection_transform
from w2s.engine.errors import InputError
from w2s.engine.options import (
    add_optimizer_options,
    add_training_options,
    add_weights_options,
    add_worker_option,
    switch_fraction,
)
from w2s.engine.parsing import (
    KeyValues,
    Parser,
    add_switch,
    natural_int,
    not_empty,
    positive,
    positive_int,
    probability,
)

SMALLEST_CANVAS = 64  # pixels of --lsj: shrunk to a tenth, even the shorter side of a wide image has some left
SMALLEST_SIDE = 32  # pixels of --scale-jitter: of the coarsest features one is left


def add_detection_data_options(parser: Parser) -> None:
    """Where the annotated images are, and how they are read and checked."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", metavar="FOLDER", help="COCO's layout (train2017/ val2017/ annotations/), digits_det, hfds/..."
    )
    group.add_argument("--train-images", metavar="DIR", help="in place of --data, with the next three options")
    group.add_argument("--train-json", metavar="FILE", help="annotations of --train-images")
    group.add_argument("--val-images", metavar="DIR", help="images to report on")
    group.add_argument("--val-json", metavar="FILE", help="annotations of --val-images")
    group.add_argument("--train-split", default="train", metavar="NAME", help="of hfds/...")
    group.add_argument("--val-split", default="validation", metavar="NAME", help="of hfds/...")
    group.add_argument("--input-key", metavar="KEY", help="column of the image (default: image)")
    group.add_argument("--target-key", metavar="KEY", help="column of the objects (default: objects)")
    group.add_argument("--bbox-format", choices=["xywh", "xyxy"], default="xywh", help="of hfds/...")
    group.add_argument("--train-samples", type=positive_int, metavar="N", help="a seeded subset (default: all)")
    add_switch(group, "--fix-boxes", "drop boxes without area and clip those that reach outside, instead of stopping")
    add_switch(group, "--keep-empty", "train on images without boxes, too")
    group.add_argument(
        "--check-images", type=int, default=2000, metavar="N", help="decode N a split first, spread evenly; -1: all"
    )
    add_worker_option(group)


def open_training_data(args: argparse.Namespace, first_label: int) -> DetectionData:
    """The splits of a training. Beside the options of the data this reads those of the augmentation, --switch-split,
    --switch-seed and --seed; a dry run evaluates few images.

    Raises:
        InputError: see `open_detection` and `split_detection`.
    """
    train, report = _open_images(args, with_train=True)
    return split_detection(
        train,
        report,
        first_label=first_label,
        transform=build_augmentation(args),
        seed=args.seed,
        switch_fraction=switch_fraction(args.switch_split),
        switch_seed=args.switch_seed,
        keep_empty=args.keep_empty,
        samples=args.train_samples,
        check_images=args.check_images,
        limit=_evaluation_limit(args),
    )


def open_report(args: argparse.Namespace, first_label: int) -> DetectionSplit:
    """The split to report on, without the training images.

    Raises:
        InputError: see `open_detection` and `reporting_split`.
    """
    _, report = _open_images(args, with_train=False)
    return reporting_split(
        report, first_label=first_label, check_images=args.check_images, limit=_evaluation_limit(args)
    )


def _evaluation_limit(args: argparse.Namespace) -> int | None:
    return 4 * args.batch_size if args.dry_run else None


def _open_images(args: argparse.Namespace, with_train: bool) -> tuple[AnnotatedImages | None, AnnotatedImages]:
    return open_detection(
        args.data,
        train_images=args.train_images,
        train_json=args.train_json,
        val_images=args.val_images,
        val_json=args.val_json,
        output=Path(args.output),
        train_split=args.train_split,
        val_split=args.val_split,
        image_key=args.input_key or "image",
        objects_key=args.target_key or "objects",
        bbox_format=args.bbox_format,
        fix_boxes=args.fix_boxes,
        with_train=with_train,
    )


def add_detector_options(parser: Parser) -> None:
    """The student, and how its weights are averaged, laid out and compiled."""
    group = parser.add_argument_group("model (timm backbone, torchvision detector)")
    group.add_argument("--detector", choices=list(DETECTOR_KINDS), default="retinanet", help="kind of the student")
    group.add_argument("--model", default="resnet50", metavar="NAME", help="timm backbone")
    add_switch(group, "--pretrained-backbone", "start from timm's pretrained weights")
    group.add_argument(
        "--initial-checkpoint", type=not_empty, metavar="PATH", help="start from a run folder or a weights file"
    )
    group.add_argument("--norm", metavar="KIND", help="frozen_bn, bn or gn (default: frozen_bn if pretrained, else bn)")
    group.add_argument(
        "--trainable-layers",
        type=natural_int,
        metavar="N",
        help="last stages to train (default: 3 if pretrained, else all)",
    )
    group.add_argument(
        "--strides",
        type=positive_int,
        nargs="+",
        metavar="N",
        help="of the levels (default: 8 16 32 for RetinaNet, 4 8 16 32 for Faster R-CNN)",
    )
    group.add_argument(
        "--extra-levels",
        type=natural_int,
        metavar="N",
        help="above them (default: 2 for RetinaNet, 1 for Faster R-CNN)",
    )
    group.add_argument(
        "--anchor-scale",
        type=positive,
        metavar="X",
        help="anchor side over stride (default: 4 for RetinaNet, 8 for Faster R-CNN)",
    )
    group.add_argument(
        "--fpn-channels", type=positive_int, default=256, metavar="N", help="width of the feature pyramid"
    )
    group.add_argument("--min-size", type=positive_int, metavar="PX", help="shorter side of the images (default: 800)")
    group.add_argument("--max-size", type=positive_int, metavar="PX", help="longer side at most (default: 1333)")
    group.add_argument(
        "--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V", help="arguments of the backbone"
    )
    group.add_argument(
        "--detector-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="K=V",
        help="arguments of torchvision's detector",
    )
    add_weights_options(group, compiled="the backbone")


def detector_config(args: argparse.Namespace) -> DetectorConfig:
    """The student's config from the resolved options of the detector. Its classes follow from the data.

    Raises:
        InputError: see `DetectorConfig`.
    """
    return DetectorConfig(
        detector=args.detector,
        backbone=args.model,
        classes=[],
        norm=args.norm,
        strides=args.strides or [],
        extra_levels=args.extra_levels,
        anchor_scale=args.anchor_scale,
        fpn_channels=args.fpn_channels,
        min_size=args.min_size,
        max_size=args.max_size,
        trainable_layers=args.trainable_layers,
        model_kwargs=args.model_kwargs,
        detector_kwargs=args.detector_kwargs,
    )


def add_detection_optimizer_options(parser: Parser) -> None:
    """timm's optimiser and schedule, with the settings of torchvision's reference as the defaults.

    The learning rate depends on the detector: see `DetectorKind.lr`. For the warm-up see `reference_warmup`.
    """
    add_optimizer_options(parser)
    parser.set_defaults(
        opt="momentum",
        lr_base=None,
        lr_base_size=16,
        weight_decay=1e-4,
        sched="multistep",
        decay_milestones=[16.0, 22.0],
        warmup_epochs=None,
        warmup_lr=None,
    )
    parser.describe_defaults(
        lr="from --lr-base",
        lr_base="0.01 for RetinaNet, 0.02 for Faster R-CNN",
        warmup_epochs="1,000 updates, but at most one epoch",
        warmup_lr="a thousandth of the rate",
    )


def reference_warmup(args: argparse.Namespace, lr: float, updates_per_epoch: int) -> dict[str, float]:
    """torchvision's warm-up where the options give none: from lr / 1000, over 1,000 updates or the first epoch.

    Returns:
        `warmup` in epochs and `warmup_lr`, as far as they are not given, as arguments of `build_optimizer`.
    """
    warmup = {}
    if args.warmup_epochs is None:
        warmup["warmup"] = min(1000, updates_per_epoch - 1) / updates_per_epoch
    if args.warmup_lr is None:
        warmup["warmup_lr"] = lr / 1000
    return warmup


def add_detection_training_options(parser: Parser) -> None:
    """Length, batches and evaluations of a training."""
    group = add_training_options(parser, epochs=26, batch_size=2)
    group.add_argument(
        "--switch-metric", choices=["AP50", "AP"], default="AP50", help="of --target, --teacher-score and switch-off"
    )
    add_switch(group, "--group-aspect", "batches of images of one aspect ratio", default=True)


def add_detection_augmentation_options(parser: Parser) -> None:
    """torchvision's transforms of images with boxes."""
    group = parser.add_argument_group("augmentation (torchvision)")
    group.add_argument("--hflip", type=probability, default=0.5, metavar="P", help="of a mirror image")
    group.add_argument("--scale-jitter", type=positive_int, nargs=2, metavar="PX", help="shorter side from LOW to HIGH")
    group.add_argument("--lsj", type=positive_int, metavar="PX", help="large-scale jitter on a canvas of this size")
    add_switch(group, "--photometric", "distort colours, as SSD does")


def check_augmentation(args: argparse.Namespace) -> None:
    """Check the options of the augmentation.

    Raises:
        InputError: an impossible value, or options that exclude each other.
    """
    if args.lsj and args.lsj < SMALLEST_CANVAS:
        raise InputError(f"--lsj {args.lsj}: images shrink to a tenth of it; give at least {SMALLEST_CANVAS} pixels")
    if args.scale_jitter and args.scale_jitter[0] < SMALLEST_SIDE:
        raise InputError(f"--scale-jitter {args.scale_jitter[0]}: give at least {SMALLEST_SIDE} pixels")
    if args.lsj and args.scale_jitter:
        raise InputError("--lsj and --scale-jitter exclude each other")
    if args.scale_jitter and args.scale_jitter[0] > args.scale_jitter[1]:
        raise InputError(f"--scale-jitter takes LOW and HIGH, got {args.scale_jitter[0]} {args.scale_jitter[1]}")


def build_augmentation(args: argparse.Namespace) -> v2.Transform:
    """The transform that the options of the augmentation ask for."""
    return detection_transform(
        hflip=args.hflip,
        photometric=args.photometric,
        lsj=args.lsj,
        scale_jitter=args.scale_jitter,
        max_size=args.max_size,
    )
