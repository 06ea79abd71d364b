"""The options of diffusion: data, denoiser and training. Those of the process and of the judge stand beside these."""

import torch

from w2s.diffusion.process import add_process_options
from w2s.engine.options import add_batch_options, add_data_options, add_weights_options
from w2s.engine.parsing import KeyValues, Parser, add_switch, not_empty, positive_int, probability


def add_diffusion_data_options(parser: Parser) -> None:
    """Images to generate."""
    group = add_data_options(parser, "digits, hfds/NAME_OR_FOLDER, torch/...", "image folder with train/")
    group.add_argument("--img-size", type=positive_int, metavar="N", help="pixels a side (default: 32; 8 for digits)")
    group.add_argument("--in-chans", type=positive_int, metavar="N", help="channels (default: 3; 1 for digits)")
    group.add_argument("--hflip", type=probability, metavar="P", help="of a mirror image (default: 0.5; 0 for digits)")


def add_denoiser_options(parser: Parser) -> None:
    """The student, the diffusion process, and how the weights are averaged, laid out and compiled."""
    group = parser.add_argument_group("denoiser and process")
    group.add_argument("--model", default="nc128-rb3", metavar="NAME", help="ncN-rbM, or a timm VisionTransformer")
    group.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="K=V",
        help="ncN-rbM: channel_mult, attention, dropout, head_dim; else timm's: patch_size, embed_dim, depth, ...",
    )
    group.add_argument(
        "--initial-checkpoint", type=not_empty, metavar="PATH", help="start from a run folder or pipeline folder"
    )
    add_switch(group, "--class-cond", "condition on the class; otherwise no labels are needed")
    add_process_options(group)
    # on a CPU, NHWC makes an update of a U-Net up to 2.8 times as long (recipes/results/speed)
    add_weights_options(group, sync_bn=False, ema=True, ema_decay=0.999, channels_last=torch.cuda.is_available())


def add_diffusion_training_options(parser: Parser) -> None:
    """Length, batches and evaluations of a training."""
    group = parser.add_argument_group("training")
    group.add_argument("--updates", type=positive_int, default=100_000, metavar="N", help="length of the run")
    group.add_argument(
        "--eval-interval", type=positive_int, default=1000, metavar="N", help="updates between evaluations"
    )
    add_batch_options(group, batch_size=128)
