"""Sharing a finished run: a folder with its weights, its record and a model card, and the push of it to the hub."""

import json
import os
import shutil
from pathlib import Path

import yaml
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from w2s.engine.card import FinishedRun, model_card
from w2s.engine.errors import InputError, first_line
from w2s.engine.files import replacing_folder
from w2s.record import BOOKKEEPING_OPTIONS, read_metrics


def check_hub(repo: str, option: str) -> None:
    """Find out now, rather than after the training, whether `repo` can be pushed to.

    Raises:
        InputError: `repo`, the value of `option`, is no name, nobody is logged in, or the hub refuses the token.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{option} {repo}: {first_line(error)}") from None
    if get_token() is None:
        raise InputError(f"{option} {repo}: not logged in; run `hf auth login`, or set HF_TOKEN")
    if int(os.environ.get("RANK", 0)) == 0:  # the hub does not want to be asked by every process
        try:
            account = HfApi().whoami()
        except Exception as error:  # no network, offline mode, a token that is not valid
            raise InputError(f"{option} {repo}: cannot log in to the hub: {first_line(error)}") from None
        if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise InputError(f"{option} {repo}: the token may only read; log in with one that may write")


def share_folder(run: Path, repo: str | None = None) -> Path:
    """Write `hub/` into a run folder: the exported model, args.yaml, metrics.csv, summary.json and the card README.md.

    Args:
        run: the folder of a finished run.
        repo: the repository it will lie in, for the card.

    Raises:
        InputError: the run is not finished, or something of it is missing or damaged.
    """
    finished = read_finished(run)
    with replacing_folder(run / "hub") as beside:
        shutil.copytree(run / "model", beside, dirs_exist_ok=True)
        for name in ("metrics.csv", "summary.json"):
            shutil.copy(run / name, beside)
        options = {name: value for name, value in finished.options.items() if name not in BOOKKEEPING_OPTIONS}
        (beside / "args.yaml").write_text(yaml.safe_dump(options, sort_keys=True))
        (beside / "README.md").write_text(str(model_card(finished, repo)), encoding="utf-8")
    return run / "hub"


def read_finished(run: Path) -> FinishedRun:
    """What a finished run has left behind.

    Raises:
        InputError: it is not finished, or something of it is missing or damaged.
    """
    try:
        summary = json.loads((run / "summary.json").read_text())
        options = yaml.safe_load((run / "args.yaml").read_text())
        rows = read_metrics(run / "metrics.csv")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{run} is no run folder: {first_line(error)}") from None
    if summary.get("status") != "finished" or not rows:
        raise InputError(f"{run} is not finished (it is {summary.get('status')}); go on with --resume auto")
    if not (run / "model").is_dir():
        raise InputError(f"{run} holds no exported model (model/)")
    return FinishedRun(run, summary, options, rows)


def push(run: Path, repo: str) -> str:
    """Write `hub/` and push it to a repository, which is made if it is not there. Returns the repository's address.

    Raises:
        InputError: see `share_folder`, or the hub refuses.
    """
    api = HfApi()
    try:
        address = api.create_repo(repo, exist_ok=True)
        folder = share_folder(run, address.repo_id)
        message = f"w2s: {run.name}"
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message=message)
    except InputError:
        raise
    except Exception as error:  # the network, the hub, the disk
        raise InputError(f"cannot push {run} to {repo}: {first_line(error)}") from None
    return str(address)


def push_at_the_end(run: Path, repo: str) -> str:
    """Push a run that has just finished. Returns one line that says where it is, or how to push it later."""
    try:
        return f"pushed to {push(run, repo)}"
    except InputError as error:
        return f"warning: {error}. The run is complete; push it later: python -m w2s.share {run} --repo {repo}"
