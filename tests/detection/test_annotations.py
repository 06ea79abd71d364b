"""Annotations in COCO's format: what is made of them, and what is refused."""

import json

import pytest
from detection.annotated import annotated, changed, truth, write_coco
from PIL import Image

from w2s.detection.annotations import read_coco
from w2s.engine.errors import InputError


def test_labels_follow_the_category_ids_and_crowds_are_not_trained_on():
    source = annotated(truth())
    assert source.classes == ["plane", "spoon", "brush"] and source.category_ids == [4, 50, 90]
    assert [labels.tolist() for labels in source.labels] == [[2, 0], [0], []]
    assert source.boxes[0].tolist() == [[2, 3, 12, 15], [0, 0, 40, 30]]
    assert source.boxes[2].shape == (0, 4)
    assert [a["iscrowd"] for a in source.annotations[1]] == [0, 1]  # the metric knows of the crowd
    ground_truth = source.ground_truth([1])
    assert ground_truth["images"][0]["id"] == 3 and len(ground_truth["annotations"]) == 2


def test_outlines_and_addresses_are_not_kept(tmp_path):
    """They are most of COCO's JSON, and nobody reads them."""
    data = truth()
    for entry in data["annotations"]:
        entry["segmentation"] = [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]
    for number, entry in enumerate(data["images"]):
        entry |= {"file_name": f"{number}.png", "coco_url": "http://images/0.png", "license": 1}
        Image.new("RGB", (entry["width"], entry["height"])).save(tmp_path / entry["file_name"])
    (tmp_path / "truth.json").write_text(json.dumps(data))
    source = read_coco(tmp_path, tmp_path / "truth.json", fix_boxes=False)
    assert {key for image in source.images for key in image} == {"id", "width", "height", "file_name"}
    assert "segmentation" not in {key for rows in source.annotations for entry in rows for key in entry}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("categories"), "not in COCO's format: KeyError: 'categories'"),
        (lambda d: d["images"][0].pop("width"), "not in COCO's format"),
        (lambda d: d["categories"][0].pop("name"), "not in COCO's format: KeyError: 'name'"),
        (lambda d: d["images"].clear(), "has no images"),
        (lambda d: d["categories"].clear(), "has no categories"),
        (lambda d: d["images"][0].update(id=3), "image id 3 is there twice"),
        (lambda d: d["annotations"][0].update(id=2), "annotation id 2 is there twice"),
        (lambda d: d["categories"][0].update(id=4), "category id 4 is there twice"),
        (lambda d: d["images"][0].update(width=None), r"image 7 has no width and height in pixels, but \(None, 30\)"),
        (lambda d: d["images"][1].update(height="30"), "image 3 has no width and height"),
        (lambda d: d["annotations"][0].update(iscrowd="no"), "annotation 1 has iscrowd 'no'"),
        (lambda d: d["annotations"][0].update(area="big"), "annotation 1 has iscrowd 0 and area 'big'"),
        (lambda d: d["annotations"][0].update(image_id=8), "annotation 1 has unknown image_id 8"),
        (lambda d: d["annotations"][0].update(category_id=1), "annotation 1 has unknown category_id 1"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, 3]), "annotation 1 has no bbox of four numbers"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, 3, float("nan")]), "no bbox of four numbers"),
        (
            lambda d: d["annotations"][0].update(bbox=[1, 2, 0, 5]),
            r"1 of \d boxes have no area.*annotation 1.*--fix-",
        ),
        (lambda d: d["annotations"][0].update(bbox=[30, 2, 20, 5]), "reach outside their image"),
        (lambda d: d["annotations"][0].update(bbox=[50, 2, 9, 5]), "reach outside their image"),
        (lambda d: [a.update(bbox=[0.1, 0.2, 0.5, 1.0]) for a in d["annotations"]], "shares of the image, not pixels"),
    ],
)
def test_bad_annotations_are_refused_in_one_line(change, message):
    with pytest.raises(InputError, match=message) as error:
        annotated(changed(change))
    assert "\n" not in str(error.value)


def test_boxes_are_fixed_on_request_and_the_metric_still_sees_them_as_they_are(capsys):
    def change(data):
        for annotation, box in zip(data["annotations"], ([30, 2, 20, 5], [50, 2, 9, 5], [1, 1, 0, 4]), strict=False):
            annotation["bbox"] = box

    source = annotated(changed(change), fix_boxes=True)
    assert "boxes have no area or reach outside their image; they are dropped or clipped" in capsys.readouterr().err
    assert [boxes.tolist() for boxes in source.boxes] == [[[30, 2, 40, 7]], [], []]
    assert [a["bbox"] for a in source.annotations[0]] == [[30, 2, 20, 5], [50, 2, 9, 5]]


def test_a_value_of_null_counts_as_not_given():
    source = annotated(changed(lambda d: d["annotations"][0].update(iscrowd=None, area=None)))
    assert source.annotations[0][0]["iscrowd"] == 0 and source.annotations[0][0]["area"] == 120


def test_rounding_at_the_border_is_no_mistake():
    source = annotated(changed(lambda d: d["annotations"][0].update(bbox=[-0.4, 0, 40.6, 30.5])))
    assert source.boxes[0][0].tolist() == pytest.approx([0, 0, 40, 30])


def test_images_are_read_from_the_folder_and_missing_ones_are_counted(tmp_path):
    folder = write_coco(tmp_path / "set")
    images, annotations = folder / "train2017", folder / "annotations" / "instances_train2017.json"
    source = read_coco(images, annotations, fix_boxes=False)
    assert source.read(0).size == (40, 30) and len(source.images) == 3
    Image.new("L", (40, 30)).save(images / "9.png")
    assert source.read(2).mode == "RGB"
    (images / "3.png").unlink()
    with pytest.raises(InputError, match=r"1 images of .*instances_train2017.json are not in .*: 3.png"):
        read_coco(images, annotations, fix_boxes=False)
    with pytest.raises(InputError, match="cannot read image folder"):
        read_coco(folder / "nowhere", annotations, fix_boxes=False)


def test_files_that_hold_no_annotations_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot read annotations .*none\.json: No such file"):
        read_coco(tmp_path, tmp_path / "none.json", fix_boxes=False)
    (tmp_path / "half.json").write_text('{"images": [')
    with pytest.raises(InputError, match=r"half\.json is no JSON: ") as error:
        read_coco(tmp_path, tmp_path / "half.json", fix_boxes=False)
    assert "\n" not in str(error.value)
