"""Detection: timm backbones under torchvision's detectors, COCO data and metric, and detector teachers."""

from w2s import require

require("det", "accelerate", "datasets", "faster_coco_eval", "timm", "torchvision")
