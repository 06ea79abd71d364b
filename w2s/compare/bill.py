"""What a comparison says of the cost of teachers."""

from w2s.compare.runs import RunFolder
from w2s.compare.speedup import teacher_share
from w2s.compare.text import number_text, ratio_text


def cost_facts(result: dict, arms: dict[str, list[RunFolder]]) -> list[str]:
    """What the teachers of each arm cost: in the updates that they taught, and in their own training.

    Args:
        result: as `compare_arms` returns it.
        arms: the runs of each arm, the reference first.
    """
    facts = []
    for arm, group in arms.items():
        costs = result["costs"][arm]
        if not costs["overhead"]:  # no teacher
            continue
        for run, overhead in zip(group, costs["overhead"], strict=True):
            facts.append(_teacher_fact(run, overhead))
        if bound := costs["flops_bound"]:  # none where the teacher is not asked, or FLOPs were not counted
            facts.append(f"{arm}: by FLOPs, an update with the teacher takes {ratio_text(bound)} of one without")
        if training := costs["teacher_training"]:
            facts.append(
                f"{arm}: the teacher's own training ({training['run']}) took {number_text(training['train_seconds'])} "
                f"train seconds, {number_text(training['total_seconds'])} in total, "
                f"{number_text(training['pflops'])} PFLOPs"
            )
        else:
            facts.append(f"{arm}: the teacher's own training is not in the bill: its run folder is not at hand")
    return facts or ["no arm had a teacher"]


def _teacher_fact(run: RunFolder, overhead: float | None) -> str:
    """The teachers of one run: what they were, how well they score and what their updates cost."""
    summary = run.summary
    share, switch_off = teacher_share(run.rows[-1]), summary["kd_off"]
    share_text = "n/a" if share is None else f"{share:.1%}"
    end = "never switched off"
    if switch_off:
        end = f"switched off at epoch {number_text(switch_off['epoch'])} ({switch_off['reason']})"
    if several := summary["teachers"]:
        who = f"{len(several)} teachers, {'; '.join(_rung_text(rung, summary['metric']) for rung in several)}"
    else:
        who = _scores_text(summary["teacher"], summary["metric"])
    return (
        f"{summary['name']}: {who}; {share_text} of train seconds; {end}; "
        f"an update with the teacher took {ratio_text(overhead)} of one without"
    )


def _scores_text(teacher: dict, metric: str) -> str:
    return (
        f"teacher {teacher.get('model')}, {number_text(teacher.get('params'))} parameters, {metric} "
        f"{number_text(teacher.get('switch'))} on the switch split and {number_text(teacher.get('report'))} on the "
        "reporting split"
    )


def _rung_text(rung: dict, metric: str) -> str:
    """One of several teachers: its scores, when it taught, why it fell silent, and what its forwards cost."""
    since, off = number_text(rung["since"]["epoch"]), rung["off"]
    until = f"{number_text(off['epoch'])} ({off['reason']})" if off else "the end"
    return (
        f"{_scores_text(rung, metric)}, from epoch {since} to {until}: {rung['updates']} updates, "
        f"{number_text(rung['seconds'])} seconds, {number_text(rung['pflops'])} PFLOPs"
    )
