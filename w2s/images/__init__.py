"""Classification: images, their loaders, timm models and classifier teachers."""
