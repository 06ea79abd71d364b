"""What every run does alike, whatever the task."""

from w2s import require

require("cls", "accelerate", "huggingface_hub", "safetensors", "timm", "tqdm", "yaml")
