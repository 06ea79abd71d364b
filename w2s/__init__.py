"""Weak-to-strong distillation: a weaker teacher starts a stronger student off, then falls silent."""

from importlib.util import find_spec

from w2s.losses import kl_sigmoid, kl_softmax
from w2s.schedule import EarlyPhase

__version__ = "0.1.0"
__all__ = ["EarlyPhase", "kl_sigmoid", "kl_softmax"]


def require(extra: str, *modules: str) -> None:
    """Check that the libraries of a part of the package are installed, before it is imported.

    Raises:
        ModuleNotFoundError: one of them is missing; the message names the extra that installs it.
    """
    for module in modules:
        if find_spec(module) is None:
            raise ModuleNotFoundError(f"{module} is not installed; pip install 'w2s[{extra}]'", name=module)
