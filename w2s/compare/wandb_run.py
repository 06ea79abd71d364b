"""A comparison as a W&B run of its own (--log-with wandb): its table of speedups, its curves and its page."""

import importlib.util
import os
from pathlib import Path

WITHOUT_ACCOUNT = ("offline", "dryrun", "disabled")  # values of WANDB_MODE


def check_wandb() -> None:
    """Check that W&B can be used, before any work is done; in a terminal W&B may ask for the key itself.

    Raises:
        ValueError: it is not installed, or it has no credentials and is not offline.
    """
    if importlib.util.find_spec("wandb") is None:
        raise ValueError("--log-with wandb: not installed; pip install wandb")
    if os.environ.get("WANDB_MODE") in WITHOUT_ACCOUNT:
        return
    import wandb

    try:
        wandb.login(verify=False)
    except wandb.Error as error:
        raise _refusal(error) from None


def log_to_wandb(result: dict, *, out: Path, project: str, group: str) -> None:
    """Log a comparison as a run of job type `compare`.

    Args:
        result: as `compare_arms` returns it.
        out: the folder of the comparison, which holds its files.
        project: W&B project.
        group: W&B group, that of the runs compared.

    Raises:
        ValueError: W&B refuses.
    """
    import wandb

    columns = ["target", "arm", "axis", "speedup", "lower_bound", "geometric_mean", "low", "high", "p"]
    table, summary = wandb.Table(columns=columns), {}
    for target, entry in result["targets"].items():
        for arm, axes in entry["versus"].items():
            for axis, versus in axes.items():
                low, high = versus["interval"] or (None, None)
                numbers = [versus["speedup"], versus["lower_bound"], versus["geometric_mean"], low, high, versus["p"]]
                table.add_data(target, arm, axis, *numbers)
                if versus["geometric_mean"]:
                    summary[f"speedup@{target}/{arm}/{axis}"] = versus["geometric_mean"]
    try:
        run = wandb.init(project=project, group=group, job_type="compare", name=out.name, dir=str(out))
        curves, page = wandb.Image(str(out / "curves.png")), wandb.Html(str(out / "report.html"))
        run.log({"speedups": table, "curves": curves, "report": page})
        run.summary.update(summary)
        run.finish()
    except wandb.Error as error:
        raise _refusal(error) from None


def _refusal(error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200]
    return ValueError(f"--log-with wandb: {reason} (WANDB_MODE=offline needs no account)")
