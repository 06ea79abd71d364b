"""What an update of a detector costs in floating-point operations."""

import copy

from accelerate.utils import send_to_device

from w2s.detection.loading import DetectionSplit, collate_detection
from w2s.detection.models import FasterRCNN, RetinaNet
from w2s.detection.teacher import DetectorTeacher
from w2s.engine.plan import count_flops


def detection_flops(
    student: RetinaNet | FasterRCNN, teacher: DetectorTeacher | None, train: DetectionSplit, *, batch: int
) -> dict[str, int]:
    """FLOPs of one update of `batch` images, counted on two training images.

    The student may be on another device than the teacher, as it is before it is sharded.

    Returns:
        `student_update`: forward and backward of the student. `teacher_forward`: 0 without a teacher.
    """
    items = train.__getitems__([(0, position) for position in range(min(2, len(train)))])
    images, targets = send_to_device(collate_detection(items), next(student.parameters()).device)
    model, views = copy.deepcopy(student).train(), []

    def update() -> None:
        losses, view = model(images, targets)
        sum(losses.values()).backward()
        views.append(view)

    student_update = count_flops(update)
    teacher_forward = count_flops(lambda: teacher(send_to_device(views[0], teacher.device))) if teacher else 0
    return {
        "student_update": student_update * batch // len(items),
        "teacher_forward": teacher_forward * batch // len(items),
    }
