"""A student whose weights are shared out among the processes: FSDP2 (`fully_shard`) through Accelerate.

Each process keeps a part of every weight, of its gradient, of the optimiser's state and of the moving average. The
weights of a block are gathered for its forward and backward, and dropped again. The teacher stays whole everywhere.
"""

import copy
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import accelerate
import torch
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
    convert_outputs_to_fp32,
    fsdp2_prepare_model,
    send_to_device,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor

from w2s.engine.errors import InputError

CONFIG = "accelerate launch --config_file recipes/accelerate/fsdp.yaml"
# timm's optimisers whose updates of parts of the weights were seen to be those of whole ones
OPTIMIZERS = (
    *("sgd", "sgdw", "nesterov", "nesterovw", "momentum", "adam", "adamw", "nadam", "nadamw", "radam", "radamw"),
    *("adamax", "adabelief", "adagrad", "adadelta", "adan", "adanw", "adopt", "adoptw", "lamb", "lambw", "laprop"),
    *("lars", "larc", "lion", "madgrad", "madgradw", "rmsprop", "rmsproptf"),
)
LAYERS = (nn.Linear, nn.Conv2d, nn.Sequential, nn.ModuleList)  # no blocks, however often they are repeated


def asked_for() -> bool:
    """Whether the launch asks for FSDP2.

    Raises:
        InputError: it asks for FSDP1, for DeepSpeed, or for a part of FSDP that is not supported here.
    """
    if _says_yes("ACCELERATE_USE_DEEPSPEED"):
        raise InputError(f"DeepSpeed is not supported; for a student that does not fit, use FSDP2: {CONFIG}")
    if not _says_yes("ACCELERATE_USE_FSDP"):
        return False
    if os.environ.get("FSDP_VERSION") != "2":
        raise InputError(f"FSDP1 is not supported; use FSDP2 (fsdp_version: 2): {CONFIG}")
    if _says_yes("FSDP_ACTIVATION_CHECKPOINTING"):
        raise InputError("fsdp_activation_checkpointing is not supported; use --grad-checkpointing instead")
    if _says_yes("FSDP_OFFLOAD_PARAMS"):
        raise InputError("fsdp_offload_params is not supported; take more processes instead")
    return True


def _says_yes(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def build_plugin() -> FullyShardedDataParallelPlugin:
    """What Accelerate needs to know. Weights are gathered in float32 and autocast, as under DDP: BatchNorm needs it."""
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        mixed_precision_policy=MixedPrecisionPolicy(),
        auto_wrap_policy=transformer_auto_wrap_policy,
        cpu_ram_efficient_loading=False,
    )


def shard_on_cpu(accelerator: accelerate.Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Have processes on CPUs shard, too: Accelerate asks for an accelerator, but torch can do it over gloo."""
    if accelerator.device.type == "cpu" and accelerator.num_processes > 1:
        for state in (accelerate.PartialState(), accelerator.state):  # the one overwrites the other now and then
            state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin


def settle_options(args, accelerator: accelerate.Accelerator) -> None:
    """Refuse what sharded weights do not go with, and leave out the memory format.

    Raises:
        InputError: fp16, AGC, an optimiser that needs whole weights, or what was not tried.
    """
    if accelerator.scaler is not None:
        raise InputError("fp16 is not supported under FSDP2; use --mixed_precision bf16")
    if args.clip_grad is not None and args.clip_mode != "norm":
        raise InputError(f"--clip-mode {args.clip_mode} needs whole gradients, which FSDP2 does not have; use norm")
    if args.opt not in OPTIMIZERS:
        raise InputError(f"--opt {args.opt} does not go with FSDP2; these do: {', '.join(OPTIMIZERS)}")
    if args.torchcompile:
        raise InputError("--torchcompile was not tried under FSDP2; leave one of the two out")
    for option in ("kd_term", "kd_target"):
        if getattr(args, option, None):
            raise InputError(f"--{option.replace('_', '-')} was not tried under FSDP2; leave one of the two out")
    if isinstance(getattr(args, "teacher", None), list):
        raise InputError("several teachers were not tried under FSDP2; give one --teacher")
    args.channels_last = False  # weights in NHWC are not contiguous and cannot be cut into parts


def shard(
    accelerator: accelerate.Accelerator, student: nn.Module, ema: nn.Module | None, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Shard a student, the module of its moving average and the optimiser, in place; returns them prepared."""
    plugin = accelerator.state.fsdp_plugin
    plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or block_classes(student)
    model, optimizer = accelerator.prepare(student, optimizer)
    if ema is not None:
        fsdp2_prepare_model(accelerator, ema)
    if accelerator.native_amp:  # Accelerate leaves this to the policy
        model.forward = convert_outputs_to_fp32(accelerator.autocast()(model.forward))
    return model, optimizer


def block_classes(model: nn.Module) -> list[str]:
    """The names of the classes that a model repeats in sequence: its blocks, which are gathered one at a time."""
    names = set()
    for parent in model.modules():
        if isinstance(parent, nn.Sequential | nn.ModuleList):
            counts = Counter(type(child) for child in parent if any(True for _ in child.parameters()))
            names |= {kind.__name__ for kind, count in counts.items() if count > 1 and kind not in LAYERS}
    return sorted(names)


def weights_norm(module: nn.Module) -> torch.Tensor:
    """The norm of all weights, whole ones or parts of them; called by all processes."""
    norm = torch.nn.utils.get_total_norm(module.parameters())
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def exporting_whole(
    export: Callable[[nn.Module, Path], None], student: nn.Module, is_main: bool
) -> Callable[[nn.Module, Path], None]:
    """`export` for sharded models, to be called by all processes: the main one gets all weights, in memory of the CPU.

    Args:
        export: writes a whole model into a folder.
        student: before it is sharded.
        is_main: whether this is the main process.
    """
    skeleton = copy.deepcopy(student).to("meta").eval()

    def export_whole(model: nn.Module, folder: Path) -> None:
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if is_main:
            skeleton.load_state_dict(weights, assign=True)
            export(skeleton, folder)

    return export_whole


class InStep:
    """Keeps the evaluations of a sharded model in step: each forward gathers weights from all processes.

    Before each of its forwards a process says that it has one. Those that are done take part with a forward of their
    last inputs, which nobody counts. A signal that one process has received reaches the others by the same way.

    Args:
        accelerator: gives the processes.
        model: whose evaluations are kept in step, sharded.
        signalled: whether a signal asks this process to stop.
        stop: called where one asks another process.
    """

    def __init__(
        self,
        accelerator: accelerate.Accelerator,
        model: nn.Module,
        *,
        signalled: Callable[[], bool],
        stop: Callable[[], None],
    ) -> None:
        self.accelerator, self.model, self.signalled, self.stop = accelerator, model, signalled, stop
        self.inputs: tuple | None = None  # of the last forward
        self._idle = False
        model.register_forward_pre_hook(self._before_forward, prepend=True)  # before the one that gathers weights

    def _before_forward(self, model: nn.Module, inputs: tuple) -> None:
        if not (model.training or self._idle):
            self.inputs = inputs
            self._someone_goes_on(True)

    def finish(self) -> None:
        """Take part until all processes are done. All of them call this after their last forward."""
        self._idle = True
        while self._someone_goes_on(False):
            self.model(*self.inputs)
        self._idle = False

    def _someone_goes_on(self, has_one: bool) -> bool:
        """Whether any process has a forward left to do; tells the others whether this one has."""
        rank, world, device = self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device
        said = torch.zeros(3, world, device=device)
        mine = (has_one, self.inputs is not None, self.signalled())
        said[:, rank] = torch.tensor(mine, dtype=said.dtype, device=device)
        going, informed, signalled = self.accelerator.reduce(said, "sum").tolist()
        if any(signalled):
            self.stop()
        if any(going) and not all(informed):  # fewer batches than processes: one has never seen any
            source = going.index(1.0)
            (inputs,) = broadcast_object_list([send_to_device(self.inputs, "cpu")], from_process=source)
            if self.inputs is None:
                self.inputs = send_to_device(inputs, device)
        return any(going)
