"""What the options of other training scripts are called here, for those who bring their habits or their recipes."""

PRECISION = "precision is chosen by the launcher: accelerate launch --mixed_precision bf16 train_... (or fp16, or no)"
DATA = "the folder of the data is"
EVALUATIONS = ("give --evals-per-epoch, which is 0.5 for every second epoch", "give --eval-interval, in updates")
LAUNCHED = "devices and processes are chosen by the launcher: see accelerate launch --help"

# options of timm's train.py, of torchvision's references and of the other scripts here, without the dashes, and what to
# do instead; of several texts, a script gives the first one whose options it has
REMEDIES = {
    **dict.fromkeys(("amp", "amp-dtype", "fp16", "bf16", "model-dtype", "mixed-precision", "precision"), PRECISION),
    **dict.fromkeys(("device", "local-rank", "world-size", "gpus", "num-gpus", "multi-gpu", "dist-url"), LAUNCHED),
    "aug-repeats": "repeated augmentation is not there; an image is seen once an epoch",
    "aug-splits": "augmentation splits and the JSD loss are not there",
    "dataset-download": "nothing is downloaded on its own: fetch the dataset first, and name its folder",
    **dict.fromkeys(("data-dir", "data-path", "dataset"), (f"{DATA} --data", f"{DATA} --data-dir")),
    "dist-bn": "before each evaluation all processes get the BatchNorm statistics of the first one; see also --sync-bn",
    "epochs": "the length of the run is --updates",
    "eval-metric": "the reported metric is fixed for each task; see --target",
    **dict.fromkeys(("eval-interval", "evals-per-epoch", "val-interval"), EVALUATIONS),
    "experiment": "the name of a run is --name",
    "fast-norm": "it is not there; --torchcompile fuses normalisation layers",
    "input-size": (
        "give --img-size N, and --in-chans N where the images are grey",
        "give --img-size N",
        "give --min-size N and --max-size N",
    ),
    "kd-model-name": "the teacher is --teacher",
    "log-wandb": "write --log-with wandb",
    "lr-steps": "give --sched multistep and --decay-milestones",
    "output-dir": "the folder of all runs is --output",
    "pin-mem": "memory is pinned wherever there is a GPU",
    "print-freq": "the number of updates between two log lines is --log-interval",
    "no-prefetcher": "batches are copied to a GPU while it computes; there is nothing to switch off",
    "start-epoch": "--resume auto goes on where the newest checkpoint stands",
    "sched-on-updates": "the schedule always runs on updates",
    "test-only": "write --eval-only",
    "wandb-project": "the project of a tracker is --project",
}


def remedies(option: str) -> tuple[str, ...]:
    """What may be done instead of an option, given without its dashes, that is known elsewhere but not here."""
    found = REMEDIES.get(option.replace("_", "-"), ())
    return (found,) if isinstance(found, str) else found
