"""What an update of a detector costs in floating-point operations."""

import copy

from accelerate.utils import send_to_device
from torch import Tensor

from w2s.detection.loading import DetectionSplit, collate_detection
from w2s.detection.models import FasterRCNN, RetinaNet
from w2s.detection.teacher import DetectorTeacher
from w2s.engine.plan import count_flops

DRAWS = 8  # of the augmentation, of which those are counted that give other sizes


def detection_flops(
    student: RetinaNet | FasterRCNN, teacher: DetectorTeacher | None, train: DetectionSplit, *, batch: int
) -> dict[str, int]:
    """FLOPs of one update of `batch` images, counted on two training images.

    Where the augmentation changes their size it is the mean over some draws, the same in all runs. The student may be
    on another device than the teacher, as it is before it is sharded.

    Returns:
        `student_update`: forward and backward of the student. `teacher_forward`: 0 without a teacher.
    """
    seed = None if train.seed is None else 0  # not the run's: what its updates cost does not depend on it
    counted = DetectionSplit(train.source, train.rows, train.first_label, train.transform, seed)
    model, device = copy.deepcopy(student).train(), next(student.parameters()).device
    positions, draws, found = range(min(2, len(train))), [], {}
    for epoch in range(DRAWS):
        images, targets = collate_detection(counted.__getitems__([(epoch, position) for position in positions]))
        draws.append(tuple(image.shape for image in images))
        if draws[-1] not in found:
            found[draws[-1]] = _count(model, teacher, *send_to_device((images, targets), device))
    sums = [sum(found[draw][part] for draw in draws) for part in (0, 1)]
    student_update, teacher_forward = (total * batch // (DRAWS * len(positions)) for total in sums)
    return {"student_update": student_update, "teacher_forward": teacher_forward}


def _count(
    model: RetinaNet | FasterRCNN, teacher: DetectorTeacher | None, images: list[Tensor], targets: list[dict]
) -> tuple[int, int]:
    """FLOPs of forward and backward of the student, and of the teacher's forward, on a batch."""
    views = []

    def update() -> None:
        losses, view = model(images, targets)
        sum(losses.values()).backward()
        views.append(view)

    student_update = count_flops(update)
    return student_update, count_flops(lambda: teacher(send_to_device(views[0], teacher.device))) if teacher else 0
