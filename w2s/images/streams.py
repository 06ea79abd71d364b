"""Streams: datasets whose shards are read in sequence, for large data on slow disks or on the hub."""

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from w2s.engine.errors import InputError
from w2s.engine.loading import loader_options
from w2s.engine.randomness import mix_seed
from w2s.images.datasets import create_checked

STREAMS = ("wds", "hfids", "tfds")  # what `--dataset` begins with


def is_stream(dataset: str) -> bool:
    """Whether a name of `--dataset` means shards that can only be read in sequence."""
    return dataset.partition("/")[0] in STREAMS


def open_stream(
    dataset: str,
    split: str,
    *,
    data_dir: str | None,
    mode: str,
    batch_size: int,
    seed: int,
    input_key: str | None = None,
    target_key: str | None = None,
    samples: int | None = None,
    training: bool = False,
) -> Dataset:
    """Open a split whose shards are read in sequence.

    Args:
        dataset, split, data_dir, mode, input_key, target_key: see `w2s.images.datasets.open_dataset`.
        batch_size, seed: of the run.
        samples: the length of the split, where its reader does not know it.
        training: shuffle. Otherwise each process reads its own shards once; `total` is the length of the whole split.

    Raises:
        InputError: the split cannot be opened, or not be evaluated exactly once by all processes together.
    """
    options = {"batch_size": batch_size, "num_samples": samples, "seed": seed, "is_training": training}
    options |= {"input_key": input_key, "target_key": target_key}
    opened = create_checked(dataset, split, data_dir=data_dir, mode=mode, **options)
    opened.split_name = split  # for errors
    if not training:
        _read_each_sample_once(opened, dataset, split)
    return opened


def _read_each_sample_once(stream: Dataset, dataset: str, split: str) -> None:
    """Have each process read its own shards, every sample once.

    timm's reader makes all processes read the same number of samples, repeating some and leaving out others.
    """
    reader = stream.reader
    world, rank = PartialState().num_processes, PartialState().process_index
    stream.total = getattr(reader, "num_samples", 0)
    if not stream.total:
        raise InputError(f"the length of split '{split}' is not known; write it as 'SHARDS|LENGTH'")
    if world > 1:
        if not hasattr(getattr(reader, "split_info", None), "filenames"):
            raise InputError(f"--dataset {dataset}: only wds/ streams can be evaluated by several processes")
        files = tuple(reader.split_info.filenames)
        if len(files) < world:
            raise InputError(f"split '{split}' has {len(files)} shards, fewer than {world} processes")
        reader.split_info = dataclasses.replace(reader.split_info, filenames=files[rank::world])
        reader.dist_rank, reader.dist_num_replicas = 0, 1


def with_known_labels(batches: Iterable[tuple[Tensor, Tensor]], stream: IterableDataset) -> Iterator:
    """The same batches (images, labels), as long as all labels are among the classes of the run.

    Those of other datasets are looked at before the training.

    Raises:
        InputError: a label is not.
    """
    for images, labels in batches:
        low, high = labels.min().item(), labels.max().item()
        if low < 0 or high >= stream.num_classes:
            wrong = low if low < 0 else high
            raise InputError(
                f"label {wrong} in split '{stream.split_name}' is out of range: --num-classes {stream.num_classes} is "
                f"0..{stream.num_classes - 1}"
            )
        yield images, labels


def stream_batches(
    stream: IterableDataset,
    accelerator: Accelerator,
    *,
    batch_size: int,
    batches_per_epoch: int,
    start: int,
    seed: int,
    workers: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of a stream, epoch by epoch; a resumed run reads past the first batches of its epoch."""
    epoch, skip = divmod(start, batches_per_epoch)
    # at least one worker, made anew for every epoch: its seed decides on all of the shuffling and augmentation
    readers = max(workers, 1)
    options = loader_options(workers=readers, device=accelerator.device) | {"persistent_workers": False}
    stream.set_loader_cfg(num_workers=readers)
    while True:
        left = batches_per_epoch
        stream.set_epoch(epoch)
        generator = torch.Generator().manual_seed(mix_seed(seed, epoch, accelerator.process_index))
        batches = DataLoader(stream, batch_size=batch_size, drop_last=True, generator=generator, **options)
        for batch in with_known_labels(batches, stream):
            left -= 1
            if skip:
                skip -= 1
            else:
                yield batch
            if left == 0:
                break
        if left == batches_per_epoch:
            raise InputError(f"split '{stream.split_name}' gives no batch: too few shards for {workers} workers?")
        epoch += 1
