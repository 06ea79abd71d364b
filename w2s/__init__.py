"""Weak-to-strong distillation: a weaker teacher starts a stronger student off, then falls silent."""

from w2s.losses import kl_sigmoid, kl_softmax
from w2s.schedule import EarlyPhase

__version__ = "0.1.0"
__all__ = ["EarlyPhase", "kl_sigmoid", "kl_softmax"]
