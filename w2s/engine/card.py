"""The model card of a finished run: how to load it, first@tau, what its teacher did, what it cost, and its command."""

from pathlib import Path
from typing import NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from w2s.crossing import AXES

PIPELINES = {"cls": "image-classification", "det": "object-detection", "diffusion": "unconditional-image-generation"}
AXIS_TITLES = ("epoch", "update", "samples", "train seconds", "total seconds", "PFLOPs")
# options of the method beside its weight and temperature, and what they are where nobody has asked for them
METHOD_DEFAULTS = {
    "kd_off": "surpass",
    "kd_fade": True,
    "kd_term": None,
    "kd_term_weight": 1.0,
    "kd_target": None,
}
KD_OFF_REASONS = {
    "surpass": "the student had beaten it on held-out data",
    "running": "the student had beaten it on the batches of training",
    "window": "its window had ended",
    "fixed": "as --kd-off said",
    "passed before it taught": "the student had beaten it before it taught",
}
# how the exported model of each task is loaded
LOADING = {
    "cls": """```python
import timm
{stem}
model = timm.create_model("{timm_name}", pretrained=True)
```""",
    "det": """```bash
python train_det.py --eval-only --initial-checkpoint FOLDER --data DATA
```""",
    "diffusion": """```python
from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained("{place}")
```""",
    "own denoiser": """```python
from w2s.diffusion.exports import load_denoiser

model, process, _ = load_denoiser("FOLDER")
```""",
}


class FinishedRun(NamedTuple):
    """What a finished run has left behind.

    Attributes:
        folder: the run folder.
        summary: of summary.json.
        options: of args.yaml.
        rows: of metrics.csv.
    """

    folder: Path
    summary: dict
    options: dict
    rows: list[dict]


def data_name(options: dict) -> str:
    """What the data of a run is called, without the path to it."""
    given = (options.get(name) for name in ("dataset", "data", "data_dir", "train_json"))
    return Path(next(filter(None, given), "")).name


def model_card(run: FinishedRun, repo: str | None) -> ModelCard:
    """The card of a run.

    Args:
        run: a finished run.
        repo: the repository that it will lie in, where that is known.
    """
    text = "\n\n".join((_introduction(run), _use(run, repo), _results(run), _teacher(run), _cost(run), _command(run)))
    return ModelCard(f"---\n{_metadata(run).to_yaml()}\n---\n\n{text}\n")


def _metadata(run: FinishedRun) -> ModelCardData:
    summary, options = run.summary, run.options
    metric, data = summary["metric"], data_name(options)
    hub_data = str(options.get("dataset") or "").removeprefix("hfds/")
    from_hub = str(options.get("dataset")).startswith("hfds/") and not Path(hub_data).exists()
    result = EvalResult(
        task_type=PIPELINES[summary["task"]],
        dataset_type=hub_data if from_hub else data,
        dataset_name=data,
        metric_type="accuracy" if metric == "top1" else metric,
        metric_name=metric,
        metric_value=summary["last"],
    )
    tags = ["w2s", "knowledge-distillation", "weak-to-strong"] if summary["teacher"] else ["w2s"]
    return ModelCardData(
        library_name=_library(run),
        pipeline_tag=PIPELINES[summary["task"]],
        datasets=[hub_data] if from_hub else None,
        tags=tags,
        model_name=summary["name"],
        eval_results=[result],
    )


def _library(run: FinishedRun) -> str | None:
    """The library of others that loads the exported model."""
    if run.summary["task"] == "cls":
        return "timm"
    return "diffusers" if (run.folder / "model" / "model_index.json").is_file() else None


def _introduction(run: FinishedRun) -> str:
    summary, options = run.summary, run.options
    kind = f"{options['detector']} on {options['model']}" if options.get("detector") else options["model"]
    params, data, teacher = f"{summary['params'] / 1e6:.2f} M parameters", data_name(options), summary["teacher"]
    text = f"# {summary['name']}\n\n{kind} ({params}), trained on {data} with w2s, "
    if teacher is None:
        return text + "without a teacher."
    rungs = summary.get("teachers")
    taught = [teacher] if rungs is None else [rung for rung in rungs if rung["updates"]]
    if not taught or (summary["kd_off"] and summary["kd_off"]["update"] == 0):
        return text + f"with a {teacher['model']} as its teacher, which never taught."
    models = " and then a ".join(rung["model"] for rung in taught)
    if control := summary.get("kd_control"):
        return text + f"with `--kd-control {control}` in the place of a frozen {models}."
    return text + f"taught early in its training by a frozen {models} (weak to strong, arXiv:2604.15451)."


def _use(run: FinishedRun, repo: str | None) -> str:
    """The lines that load the model, from the hub if `repo` is known and else from a folder."""
    kind = run.summary["task"] if run.summary["task"] != "diffusion" or _library(run) else "own denoiser"
    code = LOADING[kind].format(
        timm_name=f"hf-hub:{repo}" if repo else "local-dir:FOLDER",
        stem="import w2s.images.models  # registers its stem with timm\n" if run.options.get("small_stem") else "",
        place=repo or "FOLDER",
    )
    download = f"`hf download {repo} --local-dir FOLDER` gets the files. " if repo else ""
    return f"## Use\n\n{code}\n\n{download}The folder is also what `--teacher` of w2s takes."


def _results(run: FinishedRun) -> str:
    summary = run.summary
    better = "higher" if summary["mode"] == "max" else "lower"
    last, best = _number(summary["last"]), _number(summary["best"])
    lines = [f"{summary['metric']} ({better} is better): {last} at the end, with these weights, and {best} at best."]
    if summary["targets"]:
        rows = []
        for target, crossing in summary["targets"].items():
            first = crossing["first"]
            rows.append([target, *(_number(first.get(axis)) if first else "not reached" for axis in AXES)])
        lines.append("When a target was first reached (first@tau):")
        lines.append(_table(["target", *AXIS_TITLES], rows))
    return "## Results\n\n" + "\n\n".join(lines)


def _teacher(run: FinishedRun) -> str:
    teacher, metric = run.summary["teacher"], run.summary["metric"]
    if not teacher:
        return "## Teacher\n\nNone: the model was trained alone."
    if rungs := run.summary.get("teachers"):
        text = "They taught one after the other, each in a window of its own that began at the hand-over."
        tables = (_rungs_table(rungs, metric, run.options), _table(["", ""], _method_rows(run)))
        return "\n\n".join(("## Teachers", text, *tables))
    rows = [
        ["model", teacher["model"]],
        ["parameters", f"{teacher['params'] / 1e6:.2f} M"],
        [f"{metric} on the switch split", _number(teacher["switch"])],
        [f"{metric} on the reported split", _number(teacher["report"])],
        *_method_rows(run),
        ["silent from", _silence(run.summary["kd_off"], run.options)],
    ]
    return "## Teacher\n\n" + _table(["", ""], rows)


def _method_rows(run: FinishedRun) -> list[list[str]]:
    """How strongly and how softly the teacher spoke, and the further options of the method that were given."""
    options = run.options
    rows = [
        ["weight lambda", _number(options["kd_weight"])],
        ["temperature", " to ".join(_number(value) for value in options["kd_temperature"])],
    ]
    if control := run.summary.get("kd_control"):
        rows.append(["in its place (control)", control])
    defaults = METHOD_DEFAULTS | {"kd_balance": run.summary["task"] == "diffusion"}
    given = {name: options.get(name, default) for name, default in defaults.items()}
    if chosen := [_option(name, value) for name, value in given.items() if value != defaults[name]]:
        rows.append(["other options", f"`{' '.join(chosen)}`"])
    return rows


def _rungs_table(rungs: list[dict], metric: str, options: dict) -> str:
    """Teachers that handed over to one another, a row each."""
    header = ["teacher", "parameters", f"{metric} on the switch split", "on the reported split"]
    header += ["since epoch", "silent from", "updates", "seconds", "PFLOPs"]
    rows = []
    for rung in rungs:
        scores = [_number(rung["switch"]), _number(rung["report"]), _number(rung["since"]["epoch"])]
        bill = [str(rung["updates"]), _number(rung["seconds"]), _number(rung["pflops"])]
        rows.append([rung["model"], f"{rung['params'] / 1e6:.2f} M", *scores, _silence(rung["off"], options), *bill])
    return _table(header, rows)


def _silence(off: dict | None, options: dict) -> str:
    """Where and why a teacher fell silent."""
    if off is None:
        return "never: it taught to the end"
    reason = "running" if off["reason"] == "surpass" and options["kd_off"] == "running" else off["reason"]
    return f"epoch {_number(off['epoch'])}, update {off['update']}: {KD_OFF_REASONS.get(reason, reason)}"


def _option(name: str, value: object) -> str:
    """An option as it is given on the command line; one that is True or False is a switch."""
    word = name.replace("_", "-")
    if value is False:
        return f"--no-{word}"
    return f"--{word}" if value is True else f"--{word} {value}"


def _cost(run: FinishedRun) -> str:
    row, environment = run.rows[-1], run.summary["environment"]
    cost = [["train seconds", _number(row["train_seconds"])], ["total seconds", _number(row["total_seconds"])]]
    cost += [["of these in the teacher", _number(row["teacher_seconds"])], ["PFLOPs", _number(row["pflops"])]]
    cost += [[name, str(value)] for name, value in environment.items() if value is not None]
    sizes = ", ".join(f"{size} {part}" for part, size in run.summary["data"].items())
    return f"## Cost, data and environment\n\nData: {data_name(run.options)} ({sizes}).\n\n" + _table(["", ""], cost)


def _command(run: FinishedRun) -> str:
    environment = run.summary["environment"]
    launch = f"--num_processes {environment['processes']} --mixed_precision {environment['mixed_precision']}"
    command = f"accelerate launch {launch} train_{run.summary['task']}.py -c args.yaml"
    return (
        f"## Command\n\n```bash\n{command}\n```\n\n`args.yaml` in this folder holds every option that shaped the run, "
        "`metrics.csv` every evaluation and `summary.json` what follows from them: `python -m w2s.compare` reads them."
    )


def _number(value: float | None) -> str:
    if value is None:
        return "n/a"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
