#!/usr/bin/env bash
# Are data, targets and boxes right? A small RetinaNet learns 16 images of COCO by heart, from nothing, and must find at
# least 90 AP50 on them: the first training images whose objects are all 20 px or more on each side and none a crowd.
#
#     bash recipes/coco_overfit.sh FOLDER      FOLDER has train2017/ and annotations/; OUTPUT chooses where the run goes
#
# Safe to run again: what was interrupted goes on.
set -euo pipefail
folder=$(cd "${1:?usage: coco_overfit.sh FOLDER, which has train2017/ and annotations/}" && pwd)
set --  # setup.sh would install its arguments
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
