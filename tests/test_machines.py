"""Two machines of one run: what the one does when the other fails, and how both go on."""

import signal
import time

from helpers import DIGITS, RESNET, Machine, free_port, read_summary, start_script, words


def errors_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_when_a_machine_fails_the_other_ends_with_one_line_and_both_resume_to_the_end(tmp_path):
    command = words(DIGITS, RESNET, "--batch-size 16 --epochs 6 --recovery-interval 2")
    command += words("--name run --resume auto --output", tmp_path)

    def start(*more: object) -> list[Machine]:
        port = free_port()
        return [Machine(k, port, tmp_path / f"log{k}", "train_cls", command, *more) for k in range(2)]

    main, other = start()
    end = time.monotonic() + 120
    while not list(tmp_path.glob("run/checkpoints/update-*")):
        assert main.process.poll() is None and time.monotonic() < end, main.log.read_text()
        time.sleep(0.05)
    other.fail()
    assert main.wait(60) == 1, main.log.read_text()
    (line,) = errors_in(main.log.read_text())
    assert line.startswith("error: process 0 has lost another one (") and "--resume auto" in line
    script = main.log.read_text().partition("torch/distributed/elastic")[0]  # the launcher's own words follow
    assert "Traceback" not in script
    assert read_summary(tmp_path / "run")["status"] == "running"  # to be started again, as slurm.sh does

    assert [machine.wait() for machine in start()] == [0, 0], main.log.read_text()
    assert "resumed from" in main.log.read_text()
    assert read_summary(tmp_path / "run")["status"] == "finished"


def test_a_process_that_does_not_answer_is_given_up_after_the_timeout(tmp_path):
    """As when the network between two machines breaks."""
    command = words(DIGITS, RESNET, "--batch-size 16 --epochs 500")
    command += words("--ddp-timeout 4 --name run --output", tmp_path)
    both = start_script("train_cls", tmp_path / "log", command, processes=2)
    assert both.wait_for(lambda: list(tmp_path.glob("run/checkpoints/update-*"))), both.text
    both.kill(signal.SIGSTOP, rank=1)
    begun, main = time.monotonic(), both.processes[0]
    main.join(60)
    both.kill()
    assert main.exitcode == 1 and 2 < time.monotonic() - begun < 30, both.text
    (line,) = errors_in(both.text)
    assert "process 0 has lost another one" in line and "4000ms" in line and "Traceback" not in both.text
