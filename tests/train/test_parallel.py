"""Two processes, by gloo on the CPU: one curve with one process on the whole batch, and checkpoints that pass between them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_support import Killed, assert_close_weights, killed_after, run, weights_of

from vit_fast.terminal import CommandError
from vit_fast.train import parallel

ROOT = Path(__file__).parents[2]

# Both arrangements in one pair of processes: starting it takes longer than training.
SCRIPT = """
import json, sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch
import torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
from train_support import Killed, killed_after, run
from vit_fast.terminal import CommandError

options = json.loads({options!r})
for how in ("ddp", "fsdp"):
    result = run({folder!r} + "/" + how, parallel=how, **options)
    if dist.get_rank() == 0:
        print(json.dumps([how, result.accuracy, result.loss]), flush=True)
    # Stopped, to be resumed by others; and what one process has begun.
    try:
        run({folder!r} + "/stopped-" + how, parallel=how, after_step=killed_after(9), **options)
    except Killed:
        pass
    run({folder!r} + "/begun-for-" + how, parallel=how, resume=True, **options)
try:
    run({folder!r} + "/odd", batch=15)
except CommandError as error:
    print("refused:", error, flush=True)
dist.barrier()
dist.destroy_process_group()
"""

OPTIONS = dict(clip=0.5, accumulate=2, mixup=0.3, rotate=10.0, flip=True, ema=0.9, log_every=1, label_smoothing=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    run(folder / "alone", **OPTIONS)
    for how in ("ddp", "fsdp"):
        with pytest.raises(Killed):
            run(folder / f"begun-for-{how}", after_step=killed_after(9), **OPTIONS)
    script = folder / "two.py"
    script.write_text(
        SCRIPT.format(tests=str(Path(__file__).parent), root=str(ROOT), folder=str(folder), options=json.dumps(OPTIONS))
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TRITON_INTERPRET": "0"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    (folder / "printed").write_text(result.stdout)
    return folder


def weights(folder):
    from vit_fast import checkpoints

    return checkpoints.read_state_dict(folder / "model.safetensors")


def assert_close(a, b):
    assert_close_weights(a, b, rtol=2e-3, atol=2e-4)


def curve(folder, what):
    from vit_fast.train.log import _rows

    return [row[what] for row in _rows(folder / "log.csv")]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_one_curve(folder, how):
    alone, together = curve(folder / "alone", "loss"), curve(folder / how, "loss")
    assert len(alone) == len(together) == 24 and max(alone) > 1.1 * min(alone)
    assert together == pytest.approx(alone, rel=2e-3)
    assert curve(folder / how, "grad_norm") == pytest.approx(curve(folder / "alone", "grad_norm"), rel=5e-3)
    assert_close(weights(folder / how), weights(folder / "alone"))
    printed = [json.loads(line) for line in (folder / "printed").read_text().splitlines() if line.startswith(f'["{how}"')]
    from vit_fast.train.log import _rows

    last = _rows(folder / "alone" / "log.csv")[-1]
    assert len(printed) == 1 and printed[0][1] == pytest.approx(last["val_accuracy"], abs=1e-5)
    assert printed[0][2] == pytest.approx(last["val_loss"], rel=2e-3)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_one_process_resumes_what_two_began(folder, how):
    result = run(folder / f"stopped-{how}", resume=True, **OPTIONS)
    assert_close(weights_of(result), weights(folder / "alone"))
    assert result.rows[0]["step"] == 1 and result.steps == 24


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_resume_what_one_began(folder, how):
    assert_close(weights(folder / f"begun-for-{how}"), weights(folder / "alone"))


def test_checkpoints_are_alike(folder):
    """The same names and shapes whoever wrote them: no process's part, no wrapper's prefix."""
    kept = {how: torch.load(folder / how / "checkpoint-00000024.pt", weights_only=True) for how in ("alone", "ddp", "fsdp")}
    shapes = [
        {part: {name: tuple(t.shape) for name, t in content[part].items()} for part in ("model", "averages")}
        for content in kept.values()
    ]
    assert shapes[0] == shapes[1] == shapes[2]
    states = [{n: {k: tuple(t.shape) for k, t in s.items()} for n, s in c["optimizer"].items()} for c in kept.values()]
    assert states[0] == states[1] == states[2] and all(len(state) == 3 for state in states[0].values())
    assert [content["processes"] for content in kept.values()] == [1, 2, 2]


def test_a_batch_that_cannot_be_shared(folder):
    assert (folder / "printed").read_text().count("refused: a batch of 15 can't be shared evenly by 2 processes") == 2


def test_a_gpu_for_each(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(CommandError, match="process 1 of this machine has no GPU of its own"):
        parallel.local_device(torch.device("cuda", 0))
