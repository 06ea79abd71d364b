"""What an update of a detector costs."""

from detection.annotated import white_boxes
from detection.detectors import student_and_teacher

from w2s.detection.flops import detection_flops
from w2s.detection.loading import DetectionSplit, detection_transform
from w2s.detection.teacher import DetectorTeacher


def test_the_teacher_may_be_on_another_device_than_the_student():
    """As it is on GPUs under FSDP2, where the student is built on the CPU."""
    student, teacher = student_and_teacher("retinanet")
    split = DetectionSplit(white_boxes(), list(range(6)), first_label=0)
    together = detection_flops(student, teacher, split, batch=2)
    assert together["teacher_forward"] > 0
    elsewhere = DetectorTeacher(teacher.model, source="somewhere", device="meta", student=student)
    assert detection_flops(student, elsewhere, split, batch=2) == together


def test_a_jitter_of_the_size_costs_the_same_in_runs_of_all_seeds():
    student, teacher = student_and_teacher("retinanet")
    student.transform._skip_resize = True  # as train_det.py has it
    transform, counts = detection_transform(hflip=0.5, scale_jitter=(30, 130), max_size=200), []
    for seed in range(4):
        split = DetectionSplit(white_boxes(), list(range(6)), first_label=0, transform=transform, seed=seed)
        counts.append(detection_flops(student, teacher, split, batch=2))
    assert counts == [counts[0]] * 4
