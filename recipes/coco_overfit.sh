#!/usr/bin/env bash
# Checks that data, targets and boxes are right: a small RetinaNet is trained from scratch to learn 16 COCO images by
# heart, and must reach an AP50 of at least 90 on them. The images are the first training images whose objects all
# measure at least 20 px on each side and are not crowds.
#
#     bash recipes/coco_overfit.sh FOLDER
#
# FOLDER contains train2017/ and annotations/. OUTPUT chooses another folder for the run.
#
# Safe to run again: an interrupted run goes on.
set -euo pipefail
folder=$(cd "${1:?usage: coco_overfit.sh FOLDER, which has train2017/ and annotations/}" && pwd)
set --  # setup.sh would pass the arguments on to pip install
. "$(dirname "$0")/setup.sh"
output=${OUTPUT:-output}
mkdir -p "$output"

python - "$folder/annotations/instances_train2017.json" "$output/coco_overfit.json" << 'PYTHON'
import json
import sys

truth, objects = json.load(open(sys.argv[1])), {}
for annotation in truth["annotations"]:
    objects.setdefault(annotation["image_id"], []).append(annotation)
clear = {k for k, own in objects.items() if all(min(a["bbox"][2:]) >= 20 and not a["iscrowd"] for a in own)}
truth["images"] = [image for image in truth["images"] if image["id"] in clear][:16]
truth["annotations"] = [a for image in truth["images"] for a in objects[image["id"]]]
json.dump(truth, open(sys.argv[2], "w"))
PYTHON

data=(--train-images "$folder/train2017" --train-json "$output/coco_overfit.json" --fix-boxes --workers 0)
data+=(--val-images "$folder/train2017" --val-json "$output/coco_overfit.json" --validation-batch-size 4)
python train_det.py "${data[@]}" --output "$output" --name coco_overfit --resume auto --target 50 90 \
    --detector retinanet --model resnet18 --norm gn --fpn-channels 64 --strides 8 16 32 --anchor-scale 3 \
    --extra-levels 1 --min-size 256 --max-size 320 --switch-split 0 --hflip 0 \
    --opt adamw --lr 5e-4 --sched cosine --warmup-epochs 4 --batch-size 4 --epochs 40
python train_det.py "${data[@]}" --output "$output" --name coco_overfit --eval-only |
    tee "$output/coco_overfit/numbers.json"
python - "$output/coco_overfit/numbers.json" << 'PYTHON'
import json
import sys

ap50 = json.load(open(sys.argv[1]))["AP50"]
print(f"AP50 {ap50:.1f} on the 16 images it was trained on; 90 are wanted")
sys.exit(ap50 < 90)
PYTHON
