"""A run that is stopped at any moment goes on to the same weights, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from train_support import Killed, assert_equal_weights, killed_after, run, small, small_data, weights_of

from vit_fast import checkpoints
from vit_fast.terminal import CommandError
from vit_fast.train import Settings, train
from vit_fast.train.state import Checkpoints

ROOT = Path(__file__).parents[2]

EVERYTHING = dict(
    dropout=0.1,
    attention_dropout=0.1,
    stochastic_depth=0.2,
    label_smoothing=0.1,
    mixup=0.4,
    crop=0.5,
    flip=True,
    rotate=10.0,
    shift=0.1,
    zoom=0.1,
    shear=5.0,
    ema=0.9,
    accumulate=2,
    clip=0.5,
)


@pytest.mark.parametrize("changes", [EVERYTHING, dict(optimizer="sgd", schedule="linear", amp="bfloat16"), dict(amp="float16")])
@pytest.mark.parametrize("after", [8, 13])
def test_resumed_is_as_uninterrupted(tmp_path, changes, after):
    whole = run(tmp_path / "whole", **changes)
    with pytest.raises(Killed):
        run(tmp_path / "broken", after_step=killed_after(after), **changes)
    torch.rand(3)  # whatever the generators have been used for meanwhile
    resumed = run(tmp_path / "broken", resume=True, **changes)
    assert_equal_weights(weights_of(resumed), weights_of(whole))
    last = [torch.load(tmp_path / name / "checkpoint-00000024.pt", weights_only=True) for name in ("whole", "broken")]
    for key in ("model", "averages"):
        assert_equal_weights(last[0][key], last[1][key])
    for name, state in last[0]["optimizer"].items():
        assert_equal_weights(state, last[1]["optimizer"][name])
    assert last[0]["scaler"] == last[1]["scaler"] and last[0]["schedule"] == last[1]["schedule"]
    curves = [[(row["step"], row["loss"], row["lr"]) for row in result.rows if row["step"] > 8] for result in (whole, resumed)]
    # Only where a log's interval began before the stop is there a difference: part of its steps are not in the sums.
    assert curves[0][-1] == curves[1][-1] and [c[0] for c in curves[0]] == [c[0] for c in curves[1]]


def test_the_weights_do_move(tmp_path):
    """Equal bits above would also come from a run that changes nothing."""
    begun = weights_of(run(tmp_path / "a", steps=1))
    ended = weights_of(run(tmp_path / "b", steps=24))
    assert all(not torch.equal(begun[name], ended[name]) for name in begun)


KILLED = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch
torch.set_num_threads(1)
from train_support import run
run({folder!r}, steps=200, checkpoint_every=3, evaluate_every=100, dropout=0.1, ema=0.9)
"""


def test_killed_process_resumes(tmp_path):
    """SIGKILL while it trains and writes: whatever is named as a checkpoint is whole, and the run ends as if undisturbed."""
    folder = tmp_path / "broken"
    code = KILLED.format(tests=str(Path(__file__).parent), root=str(ROOT), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while len(list(folder.glob("checkpoint-*.pt"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, process.stderr.read().decode()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    (folder / ".checkpoint-00000099.pt.1.tmp").write_bytes(b"half of a checkpoint")
    written = Checkpoints(folder, 2).paths()
    assert written and all(torch.load(path, weights_only=True)["step"] % 3 == 0 for path in written)
    settings = dict(steps=200, checkpoint_every=3, evaluate_every=100, dropout=0.1, ema=0.9)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        resumed, whole = run(folder, resume=True, **settings), run(tmp_path / "whole", **settings)
    finally:
        torch.set_num_threads(threads)
    assert_equal_weights(weights_of(resumed), weights_of(whole))
    assert not list(folder.glob(".*.tmp"))


def test_the_last_ones_are_kept(tmp_path):
    run(tmp_path / "a", checkpoint_every=4, keep=3)
    assert [path.name for path in sorted((tmp_path / "a").glob("*.pt"))] == [f"checkpoint-{n:08d}.pt" for n in (16, 20, 24)]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    whole = run(tmp_path / "a")
    newest = tmp_path / "a" / "checkpoint-00000024.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    resumed = run(tmp_path / "a", resume=True)
    assert "can't be read, the one before is taken" in capsys.readouterr().err
    assert_equal_weights(weights_of(resumed), weights_of(whole))


def test_a_pickle_is_not_run(tmp_path):
    class Bad:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "made by the pickle"),))

    folder = tmp_path / "a"
    folder.mkdir()
    torch.save({"format": 1, "step": 1, "bad": Bad()}, folder / "checkpoint-00000001.pt")
    with pytest.raises(CommandError, match="none of the 1 checkpoints"):
        run(folder, resume=True)
    assert not (tmp_path / "made by the pickle").exists()


def test_resume_without_a_checkpoint_begins(tmp_path):
    assert_equal_weights(weights_of(run(tmp_path / "a", resume=True)), weights_of(run(tmp_path / "b")))


def test_a_finished_run_resumes_to_itself(tmp_path):
    first = run(tmp_path / "a", ema=0.9)
    again = run(tmp_path / "a", ema=0.9, resume=True)
    assert again.steps == 24 and again.accuracy == first.accuracy and again.loss == first.loss
    assert_equal_weights(weights_of(first), weights_of(again))


def test_the_log_goes_on(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path / "a", after_step=killed_after(21), log_every=2)
    rows = run(tmp_path / "a", resume=True, log_every=2).rows
    assert [row["step"] for row in rows] == list(range(2, 25, 2))
    assert [line.split(",")[0] for line in (tmp_path / "a" / "log.csv").read_text().split()[1:]] == [
        str(row["step"]) for row in rows
    ]


# ---- Refusals -------------------------------------------------------------------------------------------------------


def test_an_old_run_is_not_written_over(tmp_path):
    run(tmp_path / "a", steps=1)
    with pytest.raises(CommandError, match="holds a run already: go on with it by --resume"):
        run(tmp_path / "a", steps=1)


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(lr=1e-3), "lr: 0.003 then, 0.001 now"),
        (dict(steps=30), "steps: 24 then, 30 now"),
        (dict(ema=0.5), "ema: 0.0 then"),
    ],
)
def test_other_settings_are_refused(tmp_path, changes, says):
    run(tmp_path / "a")
    with pytest.raises(CommandError, match=says):
        run(tmp_path / "a", resume=True, **changes)


def test_other_data_are_refused(tmp_path):
    run(tmp_path / "a")
    with pytest.raises(CommandError, match="other data: 96 images"):
        run(tmp_path / "a", resume=True, data=small_data(seed=5))


def test_a_loss_that_is_not_a_number(tmp_path):
    """Named with its step; the checkpoint from before is whole and finite."""
    data = small_data()
    settings = small(tmp_path / "a", steps=40, optimizer="sgd", lr=1e-3, clip=0.0)
    from vit_fast.train import build

    model = build(settings, data)

    def poison(done):
        if done == 13:
            with torch.no_grad():
                model.head.weight[0, 0] = float("nan")

    with pytest.raises(CommandError, match=r"step 14: the loss is nan; .*checkpoint-00000008\.pt"):
        train(settings, data=data, model=model, after_step=poison)
    kept = torch.load(tmp_path / "a" / "checkpoint-00000008.pt", weights_only=True)
    assert all(bool(tensor.isfinite().all()) for tensor in kept["model"].values())


def test_gradients_that_are_not_numbers_reach_no_checkpoint(tmp_path):
    data = small_data()
    settings = small(tmp_path / "a", clip=0.0, checkpoint_every=1)
    from vit_fast.train import build

    model = build(settings, data)
    calls = []

    def hook(gradient):
        calls.append(1)
        return gradient * float("inf") if len(calls) == 5 else gradient

    model.head.bias.register_hook(hook)
    with pytest.raises(CommandError, match="step 5: the gradients' norm is (nan|inf)"):
        train(settings, data=data, model=model)
    assert Checkpoints(tmp_path / "a", 9).paths()[-1].name == "checkpoint-00000004.pt"


def test_scaled_losses_survive_what_overflows(tmp_path):
    """float16: a step whose gradients overflow is left out, and the scale goes down."""
    data = small_data()
    settings = small(tmp_path / "a", amp="float16", steps=10, evaluate_every=10)
    from vit_fast.train import build

    model = build(settings, data)
    calls = []

    def hook(gradient):
        calls.append(1)
        return gradient * float("inf") if len(calls) == 3 else gradient

    model.head.bias.register_hook(hook)
    result = train(settings, data=data, model=model)
    kept = torch.load(tmp_path / "a" / "checkpoint-00000010.pt", weights_only=True)
    assert kept["scaler"]["scale"] == 32768.0  # half of what torch begins with
    assert kept["optimizer"]["head.bias"]["step"] == 9
    assert all(bool(p.isfinite().all()) for p in result.model.parameters())


def test_scaled_losses_do_not_hide_what_never_works(tmp_path):
    """After as many halvings as make the scale 1 it is the gradients themselves that are too large."""
    data = small_data()
    settings = small(tmp_path / "a", amp="float16")
    from vit_fast.train import build

    model = build(settings, data)
    model.head.bias.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(CommandError, match="step 1[56]: the gradients' norm is"):
        train(settings, data=data, model=model)


FULL = """
import resource, sys
sys.path[:0] = [{tests!r}, {root!r}]
from train_support import run
from vit_fast.terminal import CommandError

def after(done):
    if done == 10:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))  # as a disk that is full: writing fails part of the way

try:
    run({folder!r}, after_step=after)
except CommandError as error:
    print(error)
"""


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(tmp_path):
    folder = tmp_path / "a"
    code = FULL.format(tests=str(Path(__file__).parent), root=str(ROOT), folder=str(folder))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "checkpoint-00000016.pt can't be written" in result.stdout and "before it are whole" in result.stdout
    assert [path.name for path in Checkpoints(folder, 2).paths()] == ["checkpoint-00000008.pt"] and not list(folder.glob(".*"))
    assert_equal_weights(weights_of(run(folder, resume=True)), weights_of(run(tmp_path / "whole")))


def test_a_full_disk_is_said_before(tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CommandError, match="the disk has 0 MB left; keep fewer"):
        run(tmp_path / "a")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CommandError, match="can't be written to: Not a directory"):
        run(tmp_path / "file" / "run")


def test_weights_load_again(tmp_path):
    """The final file: the same numbers through `vit_fast.checkpoints`, and through what the commands use."""
    from vit_fast import inputs

    result = run(tmp_path / "a")
    loaded = inputs.load(None, str(result.weights), None)
    assert_equal_weights(dict(loaded.model.state_dict()), weights_of(result))
    assert loaded.heads == 2 and loaded.size == (8, 8) and loaded.name == "ViT of 2 layers, 24 channels"
    images = torch.from_numpy(np.random.default_rng(0).random((2, 3, 8, 8), dtype=np.float32))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images)[0], result.model(images)[0])
    assert isinstance(Settings(), Settings) and checkpoints.read_state_dict(result.weights).keys() == weights_of(result).keys()
