"""What an update of a detector costs."""

from detection.annotated import white_boxes
from detection.detectors import student_and_teacher

from w2s.detection.flops import detection_flops
from w2s.detection.loading import DetectionSplit
from w2s.detection.teacher import DetectorTeacher


def test_the_teacher_may_be_on_another_device_than_the_student():
    """As it is on GPUs under FSDP2, where the student is built on the CPU."""
    student, teacher = student_and_teacher("retinanet")
    split = DetectionSplit(white_boxes(), list(range(6)), first_label=0)
    together = detection_flops(student, teacher, split, batch=2)
    assert together["teacher_forward"] > 0
    elsewhere = DetectorTeacher(teacher.model, source="somewhere", device="meta", student=student)
    assert detection_flops(student, elsewhere, split, batch=2) == together
