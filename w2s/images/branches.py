"""A student with what a term needs of it: its features, and branches that turn them into the teacher's form.

The branches are trained with the student and are in the optimiser and in the checkpoints. They are no part of the model
that is evaluated, averaged, counted and exported.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from w2s.engine.plan import count_flops

STAGES = 4  # of the student that OFA projects to logits, as its authors do


class StudentBranches(nn.Module):
    """A student, and what a term trains and keeps beside it: branches, centres, a moving target.

    A taught forward in training also fills `outputs`. Any other one is that of the student alone.

    Args:
        student: a timm model that passed `find_features`.
        wanted: says whether the update under way is taught.
        pooled: whether the term takes the pooled features (B, D_s).
        projection: maps these to the teacher's width; None where they have it.
        heads: by the index of an intermediate feature (B, C, H, W), what turns it into logits.
        state: what else belongs into the checkpoints.

    Attributes:
        outputs: of the last taught forward: the projected features (B, D_t) or None, and the logits of each head.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        wanted: Callable[[], bool],
        pooled: bool = False,
        projection: nn.Module | None = None,
        heads: dict[int, nn.Module] | None = None,
        state: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.student, self.wanted, self.pooled, self.state = student, wanted, pooled, state
        self.projection, self.stages = projection, list(heads or {})
        self.heads = nn.ModuleList((heads or {}).values())
        self.outputs: tuple[Tensor | None, list[Tensor]] = (None, [])

    def branches(self) -> nn.ModuleList:
        """What is trained beside the student."""
        return nn.ModuleList([self.heads] if self.projection is None else [self.heads, self.projection])

    def no_weight_decay(self) -> set[str]:
        """What timm's optimisers leave without weight decay: as the student says."""
        names = self.student.no_weight_decay() if hasattr(self.student, "no_weight_decay") else set()
        return {f"student.{name}" for name in names}

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of the student."""
        self.outputs = (None, [])
        if not (self.pooled or self.stages) or not self.wanted():
            logits = self.student(images)
            # processes that train together wait for the gradient of every parameter, also of those that have no part
            unused = [parameter.flatten()[0] for parameter in self.branches().parameters()]
            return logits + 0 * torch.stack(unused).sum() if unused else logits
        if self.stages:
            features, intermediates = self.student.forward_intermediates(images, indices=self.stages)
        else:
            features, intermediates = self.student.forward_features(images), []
        pooled = self.student.forward_head(features, pre_logits=True)
        projected = self.projection(pooled) if self.projection is not None else pooled
        self.outputs = projected, [head(part) for head, part in zip(self.heads, intermediates, strict=True)]
        return self.student.get_classifier()(pooled)


def find_features(model: nn.Module, image_shape: tuple[int, int, int]) -> tuple[int, dict[int, tuple[int, ...]]] | None:
    """The pooled features of a timm model and its last intermediate ones, found by running it on an empty image.

    Args:
        model: any module; it is run in eval mode and left as it was.
        image_shape: (C, H, W).

    Returns:
        The number of pooled features, which the classifier takes, and (C, H, W) of up to `STAGES` intermediate features
        by their index, empty where the model gives none. None where the pooled features cannot be told from the logits.
    """
    weight, training = next(model.parameters()), model.training
    images = torch.zeros(1, *image_shape, device=weight.device)
    model.eval()
    try:
        with torch.no_grad():
            pooled = model.forward_head(model.forward_features(images), pre_logits=True)
            same = torch.allclose(model.get_classifier()(pooled), model(images), atol=1e-4)
        return (pooled.shape[1], _intermediates(model, images)) if pooled.ndim == 2 and same else None
    except (AttributeError, TypeError, NotImplementedError, RuntimeError):  # no such methods, or other shapes
        return None
    finally:
        model.train(training)


def _intermediates(model: nn.Module, images: Tensor) -> dict[int, tuple[int, ...]]:
    """(C, H, W) of the intermediate features that a model gives at the ends of its stages."""
    try:
        with torch.no_grad():
            _, features = model.forward_intermediates(images)
    except (AttributeError, TypeError, NotImplementedError):
        return {}
    count = len(features)
    if count <= STAGES + 2:  # a hierarchy, whose first entries are its stem
        indices = range(max(count - STAGES, 0), count)
    else:  # equal blocks: at a quarter of the depth, at a half, ...
        indices = [round(count * k / STAGES) - 1 for k in range(1, STAGES + 1)]
    found = {index: tuple(features[index].shape[1:]) for index in indices}
    return found if all(len(shape) == 3 for shape in found.values()) else {}


class LogitHead(nn.Sequential):
    """From intermediate features (B, C, H, W) to logits: a separable convolution, pooling and a linear layer.

    Args:
        shape: (C, H, W).
        width: channels behind the convolution.
        num_classes: outputs.
    """

    def __init__(self, shape: tuple[int, int, int], width: int, num_classes: int) -> None:
        channels, height, side = shape
        stride = 2 if min(height, side) > 4 else 1
        super().__init__(
            nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
            nn.Conv2d(channels, width, 1, bias=False),
            nn.GroupNorm(1, width),  # no statistics of the batch, which processes would have to share
            nn.GELU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, num_classes),
        )


def branch_flops(model: StudentBranches, pooled: int, shapes: dict[int, tuple[int, ...]], batch: int) -> int:
    """FLOPs of forward and backward of the branches on a batch.

    Args:
        model: has the branches.
        pooled: number of the student's pooled features.
        shapes: (C, H, W) of its intermediate features by index.
        batch: how many images.
    """
    branches = [(head, shapes[stage]) for head, stage in zip(model.heads, model.stages, strict=True)]
    if model.projection is not None:
        branches.append((model.projection, (pooled,)))

    def step() -> None:
        for branch, shape in branches:
            inputs = torch.empty(2, *shape, device="meta", requires_grad=True)
            copy.deepcopy(branch).to("meta")(inputs).sum().backward()

    return count_flops(step) * batch // 2
