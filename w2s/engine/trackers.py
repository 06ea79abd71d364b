"""Trackers beside metrics.csv, those of Accelerate: checked before a run begins, started, and closed with its summary.

W&B gets more than the others: the axes of its curves, a run that goes on after a resume, and the final values.
"""

import netrc
import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import accelerate
import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from PIL import Image

from w2s.engine.card import data_name
from w2s.engine.errors import InputError, first_line
from w2s.record import TRACKER_AXES

TRACKERS = tuple(LOGGER_TYPE_TO_CLASS)
ONE_IMAGE = ("aim", "clearml")  # whose `log_images` takes one image under a name, where the others take a batch


def check_trackers(choice: list[str] | None) -> list[str] | None:
    """The names that `--log-with` means, as Accelerate knows them; `all` is every one that is installed.

    Raises:
        InputError: a package is missing.
    """
    installed = sorted(str(tracker) for tracker in get_available_trackers())
    names = installed if "all" in (choice or ()) else list(dict.fromkeys(choice or ()))
    if choice and not names:
        raise InputError("--log-with all: no tracker is installed; pip install tensorboard")
    for name in names:
        if name not in installed:
            raise InputError(f"--log-with {name}: not installed; pip install {name}")
    return names or None


def check_login(names: list[str]) -> None:
    """Make sure that the trackers of these names will find their keys; only the main process talks to them.

    Raises:
        InputError: a key is missing.
    """
    online = "wandb" in names and os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun")
    if online and not _wandb_logged_in():
        raise InputError("--log-with wandb: no API key; run `wandb login`, or go offline with WANDB_MODE=offline")


def _wandb_logged_in() -> bool:
    """Whether W&B will find credentials, in the environment, its settings or a netrc file, without asking for them."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        from wandb.sdk import wandb_setup

        settings = wandb_setup.singleton().settings  # its files included; starts no service
        key, address = settings.api_key, settings.base_url
    except (ImportError, AttributeError):  # another W&B than we know: it says itself what it lacks
        return True
    except Exception:  # settings that it does not take
        key, address = None, os.environ.get("WANDB_BASE_URL", "")
    places = [os.environ.get("NETRC")] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    path = next(filter(os.path.exists, map(os.path.expanduser, places)), None)
    try:
        known = netrc.netrc(path) if path else None
    except (OSError, ValueError, netrc.NetrcParseError):
        known = None
    server = urlsplit(address)
    # its own cloud has more than one address, and the key of one is taken for the other
    hosts = (server.netloc, server.hostname or "", "api.wandb.ai")
    return bool(key or (known and any((known.authenticators(host) or ("",) * 3)[2] for host in hosts)))


def default_group(options: dict, task: str) -> str:
    """What the runs of one comparison have in common: task, data and student."""
    return "-".join(filter(None, (task, data_name(options), Path(options["model"]).name)))[:128]


def arm_of(options: dict) -> str:
    """The arm that a run belongs to, by its options: baseline, w2s or its control, and when distillation ends."""
    if not options["teacher"]:
        return "baseline"
    off = options["kd_off"]
    when = {"surpass": "", "running": "-running", "never": "-never-off"}.get(off)
    if when is None:
        when = f"-off-at-{off:g}"
    return (options["kd_control"] or "w2s") + when


def start_trackers(
    accelerator: accelerate.Accelerator,
    *,
    task: str,
    name: str,
    run_id: str,
    resumed: bool,
    folder: Path,
    options: dict,
) -> None:
    """Open the trackers of a run. In W&B and trackio a resumed run goes on where it was.

    In W&B the arm is the job type; arm, task and seed are tags.

    Raises:
        InputError: a tracker refuses.
    """
    config = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in options.items()}
    arm, group = arm_of(options), options["group"]
    wandb_options = {"name": name, "id": run_id, "resume": "allow", "dir": str(folder), "group": group}
    wandb_options |= {"job_type": arm, "tags": [arm, task, f"seed-{options['seed']}"]}
    own_options = {
        "wandb": wandb_options,
        "trackio": {"name": name, "group": group, "resume": "allow" if resumed else "never"},
        "mlflow": {"run_name": name},
        "clearml": {"task_name": name},
        "swanlab": {"experiment_name": name, "logdir": str(folder / "swanlab")},
        "dvclive": {"dir": str(folder / "dvclive"), "resume": resumed},
    }
    try:
        accelerator.init_trackers(options["project"], config, own_options)
    except Exception as error:  # a wrong key, no network
        if accelerator.is_main_process and not resumed and not (folder / "metrics.csv").exists():  # frees the name
            shutil.rmtree(folder, ignore_errors=True)
        names = ", ".join(map(str, accelerator.log_with))
        hint = "; WANDB_MODE=offline needs no server" if "wandb" in names else ""
        raise InputError(f"--log-with {names}: {first_line(error, limit=200)}{hint}") from None
    if accelerator.is_main_process and "wandb" in [tracker.name for tracker in accelerator.trackers]:
        board = accelerator.get_tracker("wandb", unwrap=True)
        for axis in TRACKER_AXES:
            board.define_metric(axis, hidden=True)
            board.define_metric("eval/*" if axis == "epoch" else f"by_{axis}/*", step_metric=axis)


def log_picture(accelerator: accelerate.Accelerator, name: str, path: Path, update: int) -> None:
    """Hand a picture to the trackers that take one through Accelerate, under `name`; from the main process."""
    for tracker in accelerator.trackers if accelerator.is_main_process else ():
        if hasattr(tracker, "log_images"):
            pixels = np.asarray(Image.open(path).convert("RGB"))
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: pixels if tracker.name in ONE_IMAGE else pixels[None]}, step=update, **layout)


def close_trackers(accelerator: accelerate.Accelerator, summary: dict) -> None:
    """Hand over the final values of a run (we write them: W&B's own min and max break after a resume), and close."""
    if accelerator.is_main_process:
        for tracker in accelerator.trackers:
            if tracker.name == "wandb":
                tracker.tracker.summary.update(summary)
    accelerator.end_training()
