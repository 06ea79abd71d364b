"""The options of classification, group by group: data, model, loss and augmentation, under timm's names."""

from w2s.engine.options import add_data_options, add_training_options, add_weights_options
from w2s.engine.parsing import (
    KeyValues,
    Parser,
    add_switch,
    finite,
    natural_int,
    not_empty,
    not_negative,
    part,
    positive,
    positive_int,
    probability,
    share,
)
from w2s.images.terms import TERMS


def add_classification_data_options(parser: Parser) -> None:
    """Labelled images, and how much of a stream is read."""
    group = add_data_options(
        parser, "digits, hfds/NAME_OR_FOLDER, wds/..., torch/...", "image folder with train/ and val/"
    )
    group.add_argument(
        "--val-split",
        metavar="NAME",
        help="reported on; switch: the switch split, to tune on (default: validation, which decides nothing)",
    )
    group.add_argument(
        "--class-map", metavar="FILE", help=".txt: names of the folders to take, in order of their labels"
    )
    group.add_argument("--train-num-samples", type=positive_int, metavar="N", help="length of a streamed train split")
    group.add_argument("--val-num-samples", type=positive_int, metavar="N", help="length of a streamed val split")


def add_classifier_options(parser: Parser) -> None:
    """The student, and how its weights are averaged, laid out and compiled."""
    group = parser.add_argument_group("model (timm)")
    group.add_argument("--model", default="resnet50", metavar="NAME", help="timm architecture of the student")
    add_switch(group, "--pretrained", "start from timm's pretrained weights")
    group.add_argument(
        "--initial-checkpoint", type=not_empty, metavar="PATH", help="start from a run folder or a weights file"
    )
    group.add_argument("--num-classes", type=positive_int, metavar="N", help="outputs (default: from the data)")
    group.add_argument("--img-size", type=positive_int, metavar="N", help="pixels a side (default: the model's own)")
    group.add_argument("--in-chans", type=positive_int, default=3, metavar="N", help="channels of the images: 1 or 3")
    group.add_argument(
        "--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V", help="arguments of the architecture"
    )
    add_switch(group, "--small-stem", "3x3 stride 1 and no pooling in the stem, for small images")
    group.add_argument("--gp", metavar="POOL", help="global pooling: avg, max, token, ... (default: the model's)")
    group.add_argument("--drop", type=probability, metavar="P", help="dropout of the classifier (default: the model's)")
    group.add_argument("--drop-path", type=probability, metavar="P", help="stochastic depth (default: the model's)")
    add_switch(group, "--grad-checkpointing", "compute activations again in the backward, to save memory")
    add_weights_options(group)


def add_term_options(parser: Parser) -> None:
    """Which knowledge of the teacher the term holds, see w2s/images/terms.py."""
    group = parser.add_group_needing("teacher", "knowledge that is distilled (default: the teacher's logits)")
    group.add_argument(
        "--kd-term", choices=TERMS, help="beside the logits: nd, norm and direction of features; ofa; features"
    )
    group.add_argument(
        "--kd-term-weight", type=not_negative, default=1.0, metavar="X", help="of --kd-term, relative to the logits"
    )
    group.add_argument("--kd-target", choices=["taid"], help="moves from the student's own distribution (taid)")


def add_classifier_training_options(parser: Parser) -> None:
    """Length, batches, evaluations and the task's own loss."""
    group = add_training_options(parser, epochs=100, batch_size=128)
    group.add_argument("--smoothing", type=share, default=0.1, metavar="X", help="of the labels")
    add_switch(group, "--bce-loss", "binary cross entropy instead of softmax cross entropy")
    group.add_argument(
        "--bce-target-thresh", type=probability, metavar="X", help="binarise targets above X for --bce-loss"
    )


def add_augmentation_options(parser: Parser) -> None:
    """Crops, flips, colours, erasing and mixing of images."""
    group = parser.add_argument_group("augmentation (timm)")
    add_switch(group, "--no-aug", "no augmentation at all")
    group.add_argument("--pad-crop", type=natural_int, metavar="N", help="for small images: pad by N, crop, flip")
    group.add_argument(
        "--scale", type=part, nargs=2, default=[0.08, 1.0], metavar="X", help="area of a random crop: LOW HIGH"
    )
    group.add_argument(
        "--ratio", type=positive, nargs=2, default=[3 / 4, 4 / 3], metavar="X", help="its aspect (default: 3/4 to 4/3)"
    )
    group.add_argument(
        "--hflip", type=probability, metavar="P", help="of a horizontal flip (default: 0.5; 0 for digits)"
    )
    group.add_argument("--vflip", type=probability, default=0.0, metavar="P", help="of a vertical flip")
    group.add_argument(
        "--color-jitter", type=not_negative, default=0.4, metavar="X", help="strength of the colour jitter"
    )
    group.add_argument("--aa", metavar="POLICY", help="AutoAugment or RandAugment, e.g. rand-m9-mstd0.5")
    group.add_argument("--reprob", type=probability, default=0.0, metavar="P", help="of random erasing")
    group.add_argument(
        "--remode", choices=["const", "rand", "pixel"], default="pixel", help="what fills what was erased"
    )
    group.add_argument("--mixup", type=not_negative, default=0.0, metavar="ALPHA", help="0: no mixup")
    group.add_argument("--cutmix", type=not_negative, default=0.0, metavar="ALPHA", help="0: no cutmix")
    group.add_argument("--mixup-prob", type=probability, default=1.0, metavar="P", help="of mixing a batch at all")
    group.add_argument(
        "--mixup-switch-prob", type=probability, default=0.5, metavar="P", help="of cutmix, where both are on"
    )
    group.add_argument(
        "--mixup-mode", choices=["batch", "pair", "elem"], default="batch", help="what shares one mixing ratio"
    )
    group.add_argument(
        "--mixup-off-epoch", type=natural_int, default=0, metavar="N", help="no mixing from there on; 0: never"
    )
    group.add_argument("--train-interpolation", metavar="MODE", help="of training images (default: as --interpolation)")
    group.add_argument("--interpolation", metavar="MODE", help="of resized images (default: the model's)")
    group.add_argument("--crop-pct", type=part, metavar="X", help="of evaluation (default: the model's; 1 up to 64 px)")
    group.add_argument("--mean", type=finite, nargs="+", metavar="X", help="of the pixels (default: the model's)")
    group.add_argument("--std", type=positive, nargs="+", metavar="X", help="of the pixels (default: the model's)")
