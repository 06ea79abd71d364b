"""Classification: images, their loaders, timm models and classifier teachers."""

from w2s import require

require("cls", "accelerate", "datasets", "sklearn", "timm", "torchvision")
