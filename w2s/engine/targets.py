"""The values of --target and --teacher-score, checked against the metric that they mean."""

from w2s.engine.errors import InputError


def parse_targets(values: list[str], metric: str, low: float, high: float, option: str = "--target") -> list[float]:
    """`["65", "top1=80"]` as numbers.

    Raises:
        InputError: no number, another metric's name, outside (low, high], or a share where percent are expected.
    """
    targets = []
    for value in values:
        name, _, number = value.rpartition("=")
        if name and name != metric:
            raise InputError(f"{option} {value}: the reported metric of this run is {metric}")
        try:
            targets.append(float(number))
        except ValueError:
            raise InputError(f"{option} {value}: not a number") from None
        if not low < targets[-1] <= high:
            raise InputError(f"{option} {value}: {metric} lies above {low:g} and up to {high:g}")
        if high == 100 and targets[-1] < 1 and not name:
            meant = f", or {metric}={number} if that is meant" if option == "--target" else ""
            raise InputError(f"{option} {value}: {number} percent? Write {100 * targets[-1]:g}{meant}")
    return targets


def check_targets(args, metric: str, low: float, high: float) -> list[float]:
    """The values of --target; --teacher-score is checked beside them.

    Raises:
        InputError: see `parse_targets`.
    """
    if args.teacher_score is not None:
        parse_targets([str(args.teacher_score)], metric, low, high, option="--teacher-score")
    return parse_targets(args.target, metric, low, high)
