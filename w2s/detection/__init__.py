"""Detection: timm backbones under torchvision's detectors, COCO data and metric, and detector teachers."""
