"""torchvision's own detectors, in the form of those that `build_detector` builds."""

from timm.layers import freeze_batch_norm_2d
from torch import Tensor
from torchvision.models import detection, get_model, get_model_weights, list_models
from torchvision.ops.misc import FrozenBatchNorm2d

from w2s.detection.config import DetectorConfig
from w2s.detection.models import ASPECT_RATIOS, FasterRCNN, Float32Anchors, RetinaNet
from w2s.engine.errors import InputError, did_you_mean, first_line
from w2s.images.classes import Classes
from w2s.images.foreign import TORCHVISION

COCO_LABELS = 91  # torchvision's detectors have COCO's ids as labels, of which 80 are classes
NO_CLASS = ("__background__", "N/A")


def torchvision_builders() -> list[str]:
    """The names of torchvision's detectors."""
    return list_models(module=detection)


def torchvision_detector(
    name: str, *, model_kwargs: dict, weights: dict[str, Tensor] | None = None, trained: bool = True
) -> tuple[RetinaNet | FasterRCNN, Classes]:
    """A detector of torchvision and its classes, with random weights if `weights` are to be loaded into it.

    Args:
        name: `torchvision/MODEL`, or `torchvision/MODEL.TAG` for one of torchvision's own weights, such as COCO_V1.
        model_kwargs: further arguments of torchvision's model.
        weights: those that will be loaded, which say how many classes there are. Without them: torchvision's own, which
            are downloaded.
        trained: whether to download them.

    Returns:
        The detector, and its classes: COCO's by their ids if there are 91, the background among them; else without
        names, and without the background of Faster R-CNN.

    Raises:
        InputError: torchvision has no such detector, or no student has its kind or anchors.
    """
    builder, _, tag = name.removeprefix(TORCHVISION).partition(".")
    if builder not in torchvision_builders():
        hint = did_you_mean(builder, torchvision_builders(), most=2)
        raise InputError(f"torchvision has no detector '{builder}'{hint}")
    entries = get_model_weights(builder)
    if tag and tag not in entries.__members__:
        raise InputError(f"torchvision's {builder} has no weights '{tag}', it has {', '.join(entries.__members__)}")
    entry = entries[tag] if tag else entries.DEFAULT
    outputs = COCO_LABELS if weights is None else _count_outputs(weights, name)
    try:
        model = get_model(builder, weights=None, weights_backbone=None, num_classes=outputs, **model_kwargs)
        config = _config_of(model, name=f"{TORCHVISION}{builder}", outputs=outputs, model_kwargs=model_kwargs)
        if weights is None and trained:  # downloaded once the detector is known to fit
            model = get_model(builder, weights=entry, progress=False, **model_kwargs)
    except InputError:
        raise
    except Exception as error:  # constructors and the download raise many kinds
        reason = f"{type(error).__name__}: {first_line(error, limit=200)}"
        raise InputError(f"cannot build torchvision's {builder}: {reason}") from None
    # torchvision freezes BatchNorm where it starts from trained weights; frozen, it does not count batches
    is_counted = any(key.endswith("num_batches_tracked") for key in weights) if weights else builder.endswith("_v2")
    if not is_counted:
        model.backbone = freeze_batch_norm_2d(model.backbone)
        if tag == "COCO_V1" or weights is None:  # these weights are used without an epsilon
            for layer in model.modules():
                if isinstance(layer, FrozenBatchNorm2d):
                    layer.eps = 0.0
    if outputs == COCO_LABELS:
        categories = entry.meta["categories"]
        return _adopt(model, config), Classes(outputs, (tuple(None if c in NO_CLASS else c for c in categories),))
    return _adopt(model, config), Classes(len(config.classes))


def _count_outputs(weights: dict[str, Tensor], name: str) -> int:
    """What torchvision calls num_classes of the detector whose weights these are; Faster R-CNN counts the background.

    Raises:
        InputError: they are not those of a RetinaNet or Faster R-CNN.
    """
    if (scores := weights.get("roi_heads.box_predictor.cls_score.bias")) is not None:
        return len(scores)
    if (logits := weights.get("head.classification_head.cls_logits.bias")) is not None:
        return len(logits) // 9  # nine anchors at each place
    raise InputError(f"these are not the weights of {name}: no RetinaNet or Faster R-CNN")


def _config_of(model: object, *, name: str, outputs: int, model_kwargs: dict) -> DetectorConfig:
    """The config of a student with the heads and anchors of a detector of torchvision.

    Raises:
        InputError: no student has them.
    """
    fitting = "retinanet_resnet50_fpn, fasterrcnn_resnet50_fpn and their _v2 do"
    kinds = {detection.RetinaNet: "retinanet", detection.FasterRCNN: "fasterrcnn"}
    if type(model) not in kinds:
        raise InputError(f"{name} is neither RetinaNet nor Faster R-CNN, so it has no student; {fitting}")
    kind = kinds[type(model)]
    generator = model.anchor_generator if kind == "retinanet" else model.rpn.anchor_generator
    config = DetectorConfig(
        kind,
        backbone=name,
        classes=[str(label) for label in range(outputs - (kind == "fasterrcnn"))],
        detector_kwargs={key: value for key, value in model_kwargs.items() if key == "bbox_reg_weights"},
    )
    ratios = {tuple(level) for level in generator.aspect_ratios}
    if tuple(map(tuple, generator.sizes)) != config.anchors() or ratios != {ASPECT_RATIOS}:
        raise InputError(f"{name} has anchors of {generator.sizes}, which no student has; {fitting}")
    return config


def _adopt(model: detection.RetinaNet | detection.FasterRCNN, config: DetectorConfig) -> RetinaNet | FasterRCNN:
    """A detector of torchvision with the same parts, and what this project asks of detectors.

    Args:
        model: torchvision's; its parts are taken over.
        config: of a student with the same heads and anchors.
    """
    sizes = config.anchors()
    anchors = Float32Anchors(sizes, aspect_ratios=(ASPECT_RATIOS,) * len(sizes))
    transform = model.transform
    options = {"image_mean": transform.image_mean, "image_std": transform.image_std}
    if config.detector == "retinanet":
        ours = RetinaNet(
            model.backbone, num_classes=len(config.classes), anchor_generator=anchors, head=model.head, **options
        )
    else:
        heads = model.roi_heads
        ours = FasterRCNN(
            model.backbone,
            rpn_anchor_generator=anchors,
            rpn_head=model.rpn.head,
            box_roi_pool=heads.box_roi_pool,
            box_head=heads.box_head,
            box_predictor=heads.box_predictor,
            bbox_reg_weights=heads.box_coder.weights,
            **options,
        )
    ours.config = config
    return ours
