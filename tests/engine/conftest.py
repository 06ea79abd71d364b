"""Runs and accelerators for the tests of the engine."""

import signal

import accelerate
import pytest

from train_cls import build_parser, resolve
from w2s.engine.run import Run


@pytest.fixture
def accelerator():
    """Accelerate keeps the options of the first accelerator made in a process."""
    accelerate.state.AcceleratorState._reset_state(True)
    yield accelerate.Accelerator(cpu=True)
    accelerate.state.AcceleratorState._reset_state(True)


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    """A Run of the script's options in tmp_path/run."""
    accelerate.state.AcceleratorState._reset_state(True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def make(**changes: object) -> Run:
        words = f"--dataset digits --model resnet10t --output {tmp_path} --name run".split()
        args = build_parser().parse_recipe(words)
        vars(args).update(changes)
        resolve(args)
        run = Run(args, task="cls")
        run.parsed = args  # for what is built with it
        return run

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield make
    for number, handler in handlers.items():
        signal.signal(number, handler)
    accelerate.state.AcceleratorState._reset_state(True)
