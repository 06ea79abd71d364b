"""timm's transforms and losses, built from the options of a classifier."""

from collections.abc import Callable

import torch
from timm.data import Mixup, create_transform, resolve_data_config
from timm.data.random_erasing import RandomErasing
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from torchvision import transforms

from w2s.engine.errors import InputError, on_one_line
from w2s.images.pixels import DeviceTransform, to_pixels


def build_data_config(args, pretrained_cfg: dict) -> dict:
    """timm's data config of a run: input_size (C, H, W), mean, std, interpolation, crop_pct and crop_mode.

    Args:
        args: options; this reads those of the group "augmentation", and the size and the channels of the images.
        pretrained_cfg: timm's description of the model, which says what is not given.

    Raises:
        InputError: a mean or std of another number of channels, or of another scale.
    """
    given = {name: getattr(args, name) for name in ("img_size", "in_chans", "interpolation", "crop_pct")}
    config = resolve_data_config(given, pretrained_cfg=pretrained_cfg)
    config["input_size"] = (args.in_chans, *config["input_size"][-2:])
    for name in ("mean", "std"):
        values = getattr(args, name)
        if values and len(values) not in (1, args.in_chans):
            raise InputError(f"--{name} takes 1 or {args.in_chans} values, one a channel, got {len(values)}")
        if values and not 0 <= min(values) <= max(values) <= 1:
            hint = "; divide by 255" if max(values) > 2 else ""
            raise InputError(f"--{name} {' '.join(map(str, values))}: pixels lie in 0 to 1{hint}")
        values = tuple(values or config[name])
        if len(values) != args.in_chans:  # one value for all channels, or RGB statistics averaged for grey images
            values = (sum(values) / len(values),) * args.in_chans
        config[name] = values
    if args.crop_pct is None and max(config["input_size"][-2:]) <= 64:
        config["crop_pct"] = 1.0
    return config


def classification_transform(args, data_config: dict) -> Callable:
    """timm's training transform, from a PIL image to pixels (H, W, C), uint8; `device_transform` does the rest.

    With `--pad-crop` timm's random resized crop gives way to that of small images: pad, random crop, flip.

    Args:
        args: resolved options; this reads those of the group "augmentation".
        data_config: timm's data config: input_size, mean, std, interpolation.

    Raises:
        InputError: timm does not know one of the values.
    """
    for option, (low, high) in {"--scale": args.scale, "--ratio": args.ratio}.items():
        if low > high:
            raise InputError(f"{option} {low:g} {high:g}: the lower one comes first")
    try:
        stages = create_transform(
            data_config["input_size"],
            is_training=True,
            no_aug=args.no_aug,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            vflip=args.vflip,
            color_jitter=args.color_jitter or None,  # 0 would still cost its random draws
            auto_augment=args.aa,
            interpolation=args.train_interpolation or data_config["interpolation"],
            mean=data_config["mean"],
            use_prefetcher=True,  # which leaves the normalisation out
            separate=not args.no_aug,
        )
    except Exception as error:  # timm checks --aa and the like by assertion and look-up
        names = {"--aa": "aa", "--train-interpolation": "train_interpolation", "--interpolation": "interpolation"}
        raise _cannot_build(error, {option: getattr(args, name) for option, name in names.items()}) from None
    if args.no_aug:
        return _with_pixels(stages)
    crop, colour, _ = stages
    if args.pad_crop is not None:
        size = list(data_config["input_size"][-2:])
        crop = transforms.Compose(
            [
                _resize(args, data_config),
                transforms.RandomCrop(size, padding=args.pad_crop),
                transforms.RandomHorizontalFlip(args.hflip),
                transforms.RandomVerticalFlip(args.vflip),
            ]
        )
    return transforms.Compose([crop, colour, to_pixels])


def eval_transform(data_config: dict) -> Callable:
    """timm's evaluation transform, from a PIL image to pixels (H, W, C), uint8.

    Raises:
        InputError: timm does not know one of the values.
    """
    keys = ("input_size", "interpolation", "crop_pct", "crop_mode")
    options = {k: data_config[k] for k in keys if k in data_config}
    try:
        return _with_pixels(create_transform(is_training=False, use_prefetcher=True, **options))
    except Exception as error:
        raise _cannot_build(error, {"--interpolation": data_config["interpolation"]}) from None


def cached_transform(args, data_config: dict) -> Callable:
    """What `--cache` keeps of a training image: pixels (H, W, C), uint8, before they are cropped and flipped."""
    if args.no_aug:
        return classification_transform(args, data_config)
    return transforms.Compose([_resize(args, data_config), to_pixels])


def _resize(args, data_config: dict) -> transforms.Resize:
    """What gives --pad-crop an image of the size of the run. Raises InputError for "random" interpolation."""
    mode = args.train_interpolation or data_config["interpolation"]
    try:
        interpolation = transforms.InterpolationMode(mode)
    except ValueError as error:
        raise _cannot_build(error, {"--train-interpolation": mode}) from None
    return transforms.Resize(list(data_config["input_size"][-2:]), interpolation)


def _with_pixels(transform: transforms.Compose) -> transforms.Compose:
    """A transform of timm's that ends in pixels in the order of their decoding, in place of timm's own tensors."""
    return transforms.Compose([*transform.transforms[:-1], to_pixels])


def device_transform(args, data_config: dict, device: torch.device, *, training: bool = False) -> DeviceTransform:
    """What happens to the pixels on the device: normalisation, and `--reprob` in training.

    Args:
        args: resolved options; this reads --reprob, --remode, --no-aug, --channels-last and --seed.
        data_config: timm's data config: mean and std.
        device: where it happens.
        training: whether the images are trained on.
    """
    erasing = None
    if training and args.reprob and not args.no_aug:
        # noise is drawn on the CPU, from the generator that is seeded for each image
        erasing = RandomErasing(args.reprob, mode=args.remode, device="cpu")
    return DeviceTransform(
        data_config["mean"],
        data_config["std"],
        device=device,
        channels_last=args.channels_last,
        erasing=erasing,
        seed=args.seed,
    )


def cached_crop_and_flip(args) -> dict:
    """The augmentation that `--cache` does by itself, as arguments of `cache_split`."""
    return {} if args.no_aug else {"pad": args.pad_crop, "hflip": args.hflip, "vflip": args.vflip}


def cache_obstacle(args) -> str | None:
    """The augmentation that `--cache` cannot do, None if it can do all that is asked for."""
    if args.no_aug:
        return None
    if args.pad_crop is None:
        return "random resized crops (--pad-crop N crops small images)"
    if args.aa:
        return f"--aa {args.aa}"
    if args.color_jitter:
        return f"--color-jitter {args.color_jitter:g}"
    return None


def build_mixup(args, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix, which then smooth the labels, too; None if neither is asked for."""
    if not (args.mixup or args.cutmix):
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def build_criterion(args) -> nn.Module:
    """The task's own loss, chosen as in timm's train.py; mixup and cutmix smooth the labels themselves."""
    mixes = args.mixup > 0 or args.cutmix > 0
    if args.bce_loss:
        return BinaryCrossEntropy(smoothing=0.0 if mixes else args.smoothing, target_threshold=args.bce_target_thresh)
    if mixes:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


def _cannot_build(error: Exception, given: dict[str, object]) -> InputError:
    """What timm or torchvision raised over options with these values."""
    words = ", ".join(f"{option} {value}" for option, value in given.items() if value is not None)
    return InputError(f"cannot build the transforms ({words}): {type(error).__name__}: {on_one_line(error)}")
