"""Trackers (W&B, TensorBoard) beside metrics.csv: checked before a run begins, started, and closed with its summary."""

import importlib.util
import os
from pathlib import Path

import accelerate
import numpy as np
from PIL import Image

from w2s.crossing import TRACKER_AXES
from w2s.options import InputError


def check_trackers(choice: str | None) -> list[str] | None:
    """The names that `--log-with` means, as Accelerate knows them.

    Raises:
        InputError: a package or a key is missing.
    """
    names = ["wandb", "tensorboard"] if choice == "all" else [choice] if choice else []
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"--log-with {name}: not installed; pip install {name}")
    if "wandb" in names and os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun"):
        import wandb

        if not (os.environ.get("WANDB_API_KEY") or _wandb_key(wandb)):
            raise InputError("--log-with wandb: no API key; run `wandb login`, or go offline with WANDB_MODE=offline")
    return names or None


def _wandb_key(wandb) -> str | None:
    try:
        return wandb.api.api_key
    except Exception:  # no settings file, no netrc: the same as no key
        return None


def start_trackers(accelerator: accelerate.Accelerator, project: str, name: str, key: str, folder: Path, options: dict):
    """Open the trackers of a run; a resumed one, known by `key`, goes on where it was.

    Raises:
        InputError: a tracker refuses.
    """
    config = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in options.items()}
    wandb_options = {"name": name, "id": key, "resume": "allow", "dir": str(folder)}
    try:
        accelerator.init_trackers(project, config, {"wandb": wandb_options})
    except Exception as error:  # wandb: a wrong key, no network
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise InputError(f"trackers: {reason}; WANDB_MODE=offline needs no server") from None
    if accelerator.is_main_process and "wandb" in [tracker.name for tracker in accelerator.trackers]:
        board = accelerator.get_tracker("wandb", unwrap=True)
        for axis in TRACKER_AXES:
            board.define_metric(axis, hidden=True)
            board.define_metric("eval/*" if axis == "epoch" else f"by_{axis}/*", step_metric=axis)


def log_picture(accelerator: accelerate.Accelerator, name: str, path: Path, update: int) -> None:
    """Show the picture in a file in all trackers, from the main process."""
    if not accelerator.is_main_process:
        return
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            pixels = np.asarray(Image.open(path).convert("RGB"))[None]
            tracker.log_images({name: pixels}, step=update, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: [Image.open(path)]}, step=update)


def close_trackers(accelerator: accelerate.Accelerator, summary: dict) -> None:
    """Hand over the final values of a run (we write them: W&B's own min and max break after a resume), and close."""
    if accelerator.is_main_process:
        for tracker in accelerator.trackers:
            if tracker.name == "wandb":
                tracker.tracker.summary.update(summary)
    accelerator.end_training()
