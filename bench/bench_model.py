"""Whole models, ours and other packages': pytest bench/bench_model.py [-k "forward and freeze"] [--models B] [--batch 1,8]"""

import functools

import pytest
import torch
from conftest import DEVICE

from vit_fast.benchmarks import models


def test_forward(shape, dtype, contender, time_it):
    torch._dynamo.reset()
    subject = models.subject_of(shape, dtype, DEVICE)
    try:
        ready = models.prepare(contender, subject)
    except models.Missing as missing:
        pytest.skip(str(missing))
    images = subject.bytes[: shape.batch] if ready.raw else subject.images(0, shape.batch)
    with torch.no_grad():
        time_it([functools.partial(ready.run, images)], f"{shape.label} {dtype} forward", rounds=10)


def test_training_step(shape, dtype, contender, time_it):
    torch._dynamo.reset()
    subject = models.subject_of(shape, dtype, DEVICE)
    try:
        step = models.prepare_training(contender, subject)
    except models.Missing as missing:
        pytest.skip(str(missing))
    time_it([step.take], f"{shape.label} {dtype} training step", rounds=5)
