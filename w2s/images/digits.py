"""The built-in images: scikit-learn's handwritten digits, which come with the package."""

from typing import ClassVar

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from w2s.engine.errors import InputError


class Digits(Dataset):
    """scikit-learn's handwritten digits: 1,797 real 8x8 images, 1,200 to train and 597 to test, the same every time."""

    class_to_idx: ClassVar = {str(digit): digit for digit in range(10)}

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        if split not in ("train", "test"):
            raise InputError(f"digits has the splits train and test, not '{split}'")
        digits = load_digits()
        parts = train_test_split(np.arange(1797), train_size=1200, random_state=0, stratify=digits.target)
        rows = parts[split == "test"]
        self.images = (digits.images[rows] * (255 / 16)).round().astype(np.uint8)
        self.targets = digits.target[rows]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.targets[index])
