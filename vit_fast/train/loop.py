"""The training loop.

Whatever is random in a step is a function of the run's seed and the number of the step (and of the process, for dropout): the
order of the images, what happens to them, torch's own generators. So a checkpoint holds no generator's state, and a run that
goes on from one computes what it would have computed without the stop; on a CPU, with the same number of threads, bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_fast import backends, checkpoints
from vit_fast.configs import CONFIGS
from vit_fast.inputs import Recognised, device_for, load_into, random_model, recognise
from vit_fast.modeling import VisionTransformer
from vit_fast.terminal import CommandError, note, one_line
from vit_fast.train import log, parallel
from vit_fast.train.augment import mixed, moved
from vit_fast.train.data import Data, Pictures, open_data
from vit_fast.train.schedule import make_optimizer, make_schedule
from vit_fast.train.settings import AMP, Settings
from vit_fast.train.state import Checkpoints, prepare_folder


@dataclass(frozen=True)
class Result:
    """What came out of a run."""

    model: VisionTransformer  # in eval mode; its weights are the running mean, where there is one
    weights: Path  # the same, in a file
    steps: int
    loss: float  # of the validation images
    accuracy: float  # of them, 0 to 1
    seconds: float
    skipped: dict[str, str]  # files that could not be read, and why
    rows: list[dict]  # of the log


def train(
    settings: Settings,
    *,
    data: Data | None = None,
    model: VisionTransformer | None = None,
    resume: bool = False,
    quiet: bool = True,
    after_step: Callable[[int], None] | None = None,
) -> Result:
    """Trains by the settings, and writes everything into their folder ``output``.

    :param data: in place of ``settings.data``. :param model: in place of the one that the settings describe; it is trained in
        place. :param resume: go on from the newest checkpoint in the folder; without one, begin. :param quiet: print nothing.
    :param after_step: called with the number of steps done, after each.
    :raises CommandError: whatever a user can mend, before training begins; a loss that is not a number, with its step.
    """
    device = parallel.local_device(device_for(settings.device))
    devices = [device] if device.type == "cuda" else []
    selected = settings.implementation or backends.selected()
    with backends.use(selected), parallel.processes(device) as processes, torch.random.fork_rng(devices=devices):
        data = data or open_data(settings.data, settings.hold_out, settings.workers)
        if model is None:
            model = build(settings, data)
        run = _Run(settings, data, model, device, processes, resume, quiet)
        with contextlib.closing(run):
            return run.fit(after_step)


def build(settings: Settings, data: Data) -> VisionTransformer:
    """The model that the settings describe, with random weights or those of a file."""
    name = settings.model or (None if settings.weights else "ViT-Ti_16")
    if settings.weights is not None:
        found = recognise(settings.weights, name)
    else:
        found = Recognised(name, CONFIGS[name], None, None)
    found = dataclasses.replace(found, config=settings.config(found.config))
    size = settings.img_size or found.size or data.train.size or (224, 224)
    classes = max(2, len(data.classes))
    model = random_model(found, size, classes, settings.seed)
    if settings.weights is not None:
        keep_head = found.classes == classes
        load_into(model, settings.weights, "strict" if keep_head else "drop")
        if not keep_head:  # other classes: the head starts from nothing, as in the paper
            nn.init.zeros_(model.head.weight)
            nn.init.zeros_(model.head.bias)
    return model


def _generator(settings: Settings, *place: int) -> np.random.Generator:
    return np.random.default_rng([settings.seed, *place])


def _torch_seed(settings: Settings, *place: int) -> int:
    digest = hashlib.blake2b(repr((settings.seed, *place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _memory_trimmer(device: torch.device) -> Callable[[], object]:
    """A function that joins freed memory and gives it back to the system, where the C library is glibc; else it does nothing.

    What glibc cuts off to align a block it may keep where it is not joined with its free neighbours (its bug 30723); the block
    is then too small for the next request of its own size, and tensors are aligned. A small ViT's run grew by 5 MB a step, to
    14 GB; trimmed every ten steps it stays at 0.4 GB, and is no slower (AMD EPYC, glibc 2.36, 2 threads, 2026-11-25).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" and device.type == "cpu" else None
    return (lambda: None) if trim is None else functools.partial(trim, 0)


_ORDER, _CHANGES = 1, 2  # the two things that numpy's generators draw


class _Run:
    def __init__(self, settings, data, model, device, processes, resume, quiet):
        s = self.settings = settings
        self.device, self.processes, self.quiet = device, processes, quiet or not processes.first
        self.data = data.resized(model.transformer.embeddings.img_size)
        self.bare = model
        if len(data.train) < 2 or len(data.validation) < 1:
            raise CommandError(f"{len(data.train)} images to train on and {len(data.validation)} to judge by are too few")
        self.share = self._share()
        self.steps = s.steps or max(1, round(s.epochs * len(data.train) / s.batch))
        epoch = max(1, round(len(data.train) / s.batch))
        self.evaluate_every = s.evaluate_every or min(epoch, self.steps)
        self.checkpoint_every = s.checkpoint_every or self.evaluate_every
        self.folder = Path(s.output)
        if not s.output:
            raise CommandError("a run needs a folder for its results: name one with --output")
        if processes.first:
            # Weights, two moments or one, the running mean; the file that is being written; the final weights.
            size = sum(p.numel() * p.element_size() for p in model.parameters())
            prepare_folder(self.folder, resume, (4 * (s.keep + 1) + 1) * size)
        self.checkpoints = Checkpoints(self.folder, s.keep)
        self._prepare_model(model)
        self.optimizer = make_optimizer(model, s)
        self.schedule = make_schedule(self.optimizer, s, self.steps)
        self.scaler = torch.amp.GradScaler(device.type, enabled=s.amp == "float16")
        self.averages = {n: p.detach().clone() for n, p in model.named_parameters()} if s.ema else {}
        self.step, self.seconds = 0, 0.0
        self.validation: tuple[float, float] | None = None
        self._orders: dict[int, np.ndarray] = {}
        kept = self.checkpoints.newest() if resume else None
        if kept is not None:
            self._restore(kept)
        self.log = log.Log(self.folder, self.step, s.tensorboard) if processes.first else None
        # Pictures are decoded, and a GPU is fed, while the step before is computed. Two cores have nothing to spare for it.
        ahead = isinstance(self.data.train, Pictures) or device.type == "cuda"
        self._worker = ThreadPoolExecutor(1) if ahead else None
        self._next: tuple[tuple[int, int], Future] | None = None
        self._trim_memory = _memory_trimmer(device)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)
        if self.log is not None:
            self.log.close()

    def _share(self) -> int:
        """How many images this process takes in one pass."""
        s, count = self.settings, self.processes.count
        if s.batch % (s.accumulate * count):
            what = f"{s.accumulate} passes of {count} processes" if s.accumulate > 1 else f"{count} processes"
            raise CommandError(f"a batch of {s.batch} can't be shared evenly by {what}")
        return s.batch // (s.accumulate * count)

    def _prepare_model(self, model: nn.Module) -> None:
        s = self.settings
        model.transformer.encoder.gradient_checkpointing = s.gradient_checkpointing
        self._skeleton = None
        if self.processes.count > 1 and s.parallel == "fsdp":
            if s.amp == "float16":
                raise CommandError("--parallel fsdp trains in float32 or bfloat16: torch can't scale losses across its parts")
            self._skeleton = copy.deepcopy(model).to("meta")  # what the whole weights are put into, at the end
            parallel.shard(model, self.device)  # moves each part to the device itself
        model.to(self.device)
        self.model = model
        if self.processes.count > 1 and s.parallel == "ddp":
            ids = [self.device] if self.device.type == "cuda" else None
            self.model = nn.parallel.DistributedDataParallel(model, device_ids=ids)
        if s.compile:
            self.model = torch.compile(self.model)

    # ---- Batches ----

    def _indices(self, step: int) -> np.ndarray:
        """The images of a step: the epochs' random orders one behind another, cut into batches."""
        count, batch = len(self.data.train), self.settings.batch
        places = np.arange(step * batch, (step + 1) * batch)
        epochs, rests = places // count, places % count
        for epoch in set(epochs.tolist()) - set(self._orders):
            self._orders = {e: order for e, order in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = _generator(self.settings, _ORDER, epoch).permutation(count)
        return np.array([self._orders[e][r] for e, r in zip(epochs.tolist(), rests.tolist(), strict=True)])

    def _read(self, step: int, part: int):
        """This process's images of one pass."""
        start = (part * self.processes.count + self.processes.rank) * self.share
        rows = slice(start, start + self.share)
        indices = self._indices(step)[rows]
        draw = self.settings.augmentation().draw(_generator(self.settings, _CHANGES, step), self.settings.batch).rows(rows)
        pixels, readable, draw = self.data.train.batch(indices, draw)
        if not bool(readable.any()) and len(self.data.train.skipped) >= len(self.data.train):
            raise CommandError(f"none of the {len(self.data.train)} images to train on can be read")
        share = draw.share.copy()
        damaged = ~readable.numpy()
        if damaged.any():  # its neighbour is not mixed with it
            partner = np.minimum(np.arange(len(share)) ^ 1, len(share) - 1)
            share[damaged | damaged[partner]] = 1.0
        return pixels, self.data.train.labels[torch.from_numpy(indices)], readable, draw.theta, share

    def _batch(self, step: int, part: int):
        """Images, targets, and how much each counts, on the device."""
        if self._worker is None:
            pixels, labels, readable, theta, share = self._read(step, part)
        else:
            ready = self._next is not None and self._next[0] == (step, part)
            future = self._next[1] if ready else self._worker.submit(self._read, step, part)
            following = (step, part + 1) if part + 1 < self.settings.accumulate else (step + 1, 0)
            self._next = (following, self._worker.submit(self._read, *following)) if following[0] < self.steps else None
            pixels, labels, readable, theta, share = future.result()
        images = moved(pixels.to(self.device).float(), theta)
        targets: Tensor = labels.to(self.device)
        if self.settings.mixup:
            targets = F.one_hot(targets, self.bare.num_classes).float()
            images, targets = mixed(images, targets, share)
        return self._normalised(images), targets, readable.to(self.device, torch.float32)

    def _normalised(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (self.settings.mean, self.settings.std))
        images = images.div_(255).sub(mean).div_(std)
        return images.expand(-1, self.bare.transformer.embeddings.in_channels, -1, -1)

    def _autocast(self):
        dtype = AMP[self.settings.amp]
        return torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext()

    # ---- One step ----

    def _train_step(self, step: int) -> tuple[Tensor, Tensor]:
        """Sums over the step's images (loss, right ones, images that counted), and the gradients' norm."""
        s = self.settings
        torch.manual_seed(_torch_seed(s, step, self.processes.rank))
        self.model.train()
        sums = torch.zeros(3, device=self.device)
        for part in range(s.accumulate):
            images, targets, counts = self._batch(step, part)
            with parallel.last_pass(self.model, part == s.accumulate - 1):
                with self._autocast():
                    logits = self.model(images)[0]
                losses = F.cross_entropy(logits.float(), targets, label_smoothing=s.label_smoothing, reduction="none")
                # Processes' gradients are averaged: times their number, the average is the sum.
                total = (losses * counts).sum()
                self.scaler.scale(total * (self.processes.count / s.batch)).backward()
            with torch.no_grad():
                hits = logits.argmax(-1) == (targets if targets.dim() == 1 else targets.argmax(-1))
                sums += torch.stack([total, (hits * counts).sum(), counts.sum()])
        self.scaler.unscale_(self.optimizer)
        norm = self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        if self.averages:
            # A young mean forgets its beginning, random weights, faster.
            decay = min(s.ema, (1 + step) / (10 + step))
            update = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
            update(list(self.averages.values()), [p.detach() for p in self.bare.parameters()], None)
        return self.processes.summed(sums.detach()), norm

    def _clip(self) -> Tensor:
        gradients = [p.grad for p in self.bare.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.settings.clip:
            nn.utils.clip_grads_with_norm_(self.bare.parameters(), self.settings.clip, norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _check(self, step: int, sums: Tensor, norm: Tensor) -> None:
        """CommandError for a step that went wrong; the checkpoints are from before it."""
        loss, norm = float(sums[0]), float(norm)
        if math.isfinite(loss) and math.isfinite(norm):
            return
        # With scaled losses an infinite gradient is ordinary: the scaler leaves the step out, and scales less, until nothing
        # is left to scale.
        if math.isfinite(loss) and self.scaler.is_enabled() and self.scaler.get_scale() > 1:
            return
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradients' norm is {norm}"
        kept = self.checkpoints.paths()
        last = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint had been written yet"
        raise CommandError(f"step {step + 1}: {what}; training stops, {last}; try a lower --lr, --amp bfloat16 or a --clip")

    # ---- The whole run ----

    def fit(self, after_step) -> Result:
        s = self.settings
        unchecked: list[tuple[int, Tensor, Tensor]] = []
        sums, logged = torch.zeros(3, device=self.device), self.step
        since = time.perf_counter()
        self.started = since - self.seconds  # as if what was done before a stop had just been done
        with log.live(self.steps, self.step, self.quiet) as show, warnings.catch_warnings():
            # The scaler may leave the first step out; and DDP copies the class token's gradient, which is D numbers.
            for text in ("Detected call of `lr_scheduler.step", "Grad strides do not match bucket view strides"):
                warnings.filterwarnings("ignore", text)
            for step in range(self.step, self.steps):
                lr = self.optimizer.param_groups[0]["lr"]
                step_sums, norm = self._train_step(step)
                # A step behind: reading a number from a GPU waits until it has computed everything before it.
                for one in unchecked:
                    self._check(*one)
                unchecked = [(step, step_sums, norm)]
                sums += step_sums
                done = self.step = step + 1
                last = done == self.steps
                if done % 10 == 0:
                    self._trim_memory()
                evaluates, keeps = (last or done % every == 0 for every in (self.evaluate_every, self.checkpoint_every))
                if evaluates or keeps or done % s.log_every == 0:
                    self._check(*unchecked.pop())
                    self.seconds = time.perf_counter() - self.started
                    rate = (done - logged) * s.batch / (time.perf_counter() - since)
                    row = self._row(lr, sums, float(norm), rate)
                    sums, logged = torch.zeros_like(sums), done
                    if evaluates:
                        row["val_loss"], row["val_accuracy"] = self.validation = self.evaluate()
                    if keeps:
                        self._keep()
                    self._say(row, show, evaluates)
                    since = time.perf_counter()
                if after_step is not None:
                    after_step(done)
        return self._finish()

    def _row(self, lr: float, sums: Tensor, norm: float, rate: float) -> dict:
        loss, right, images = sums.tolist()
        return {
            "step": self.step,
            "epoch": self.step * self.settings.batch / len(self.data.train),
            "seconds": self.seconds,
            "lr": lr,
            "loss": loss / max(images, 1),
            "accuracy": right / max(images, 1),
            "grad_norm": norm,
            "images_per_second": rate,
        }

    def _say(self, row: dict, show, evaluated: bool) -> None:
        if self.log is not None:
            self.log.write(row)
        rate = f"{row['images_per_second']:.0f} images/s"
        show(row["step"], f"loss {row['loss']:.3f}  right {100 * row['accuracy']:.1f} %  {rate}")
        if evaluated and not self.quiet:
            print(
                f"step {row['step']:>6}/{self.steps}  epoch {row['epoch']:6.1f}  {row['seconds']:7.1f} s"
                f"  loss {row['loss']:.4f}  validation: loss {row['val_loss']:.4f}, {100 * row['val_accuracy']:.2f} % right",
                flush=True,
            )

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Mean loss and part of right answers on the validation images, which the processes share."""
        images, count = self.data.validation, self.processes.count
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        model = self.model if self._skeleton is not None else self.bare  # FSDP's wrapper gathers; DDP's has nothing to do
        model.eval()
        size = max(self.share, 1 if self.settings.gradient_checkpointing else 64)
        with self._averaged():
            # As many passes in every process; the last ones of some hold images again, which don't count.
            for start in range(0, -(-len(images) // count), size):
                places = self.processes.rank + count * np.arange(start, start + size)
                new = torch.from_numpy(places < len(images))
                pixels, readable, _ = images.batch(places % len(images))
                labels = images.labels[torch.from_numpy(places % len(images))].to(self.device)
                with self._autocast():
                    logits = model(self._normalised(pixels.to(self.device).float()))[0].float()
                counts = (new & readable).to(self.device, torch.float64)
                losses = F.cross_entropy(logits, labels, reduction="none").double()
                sums += torch.stack([(losses * counts).sum(), ((logits.argmax(-1) == labels) * counts).sum(), counts.sum()])
        loss, right, judged = self.processes.summed(sums).tolist()
        if judged == 0:
            raise CommandError(f"none of the {len(images)} images to judge by can be read")
        return loss / judged, right / judged

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The running means in the parameters' place, where there are any."""
        if not self.averages:
            yield
            return
        parameters = dict(self.bare.named_parameters())
        with torch.no_grad():
            own = {name: p.detach().clone() for name, p in parameters.items()}
            for name, p in parameters.items():
                p.copy_(self.averages[name])
            try:
                yield
            finally:
                for name, p in parameters.items():
                    p.copy_(own[name])

    # ---- Checkpoints ----

    def _keep(self) -> None:
        content = {
            "settings": self.settings.as_dict(),
            "steps": self.steps,
            "data": self.data.fingerprint(),
            "classes": list(self.data.classes),
            "processes": self.processes.count,
            "model": parallel.model_state(self.bare),
            "averages": {name: parallel.whole(mean) for name, mean in self.averages.items()},
            "optimizer": parallel.optimizer_state(self.bare, self.optimizer),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self._skipped(),
            "seconds": self.seconds,
            "validation": list(self.validation) if self.validation else None,
        }
        if self.processes.first:
            self.checkpoints.write(self.step, content)

    def _restore(self, kept: dict) -> None:
        where = f"{self.folder} can't be resumed"
        if differences := self.settings.differences(kept["settings"]):
            raise CommandError(f"{where} with other settings: {'; '.join(differences)}")
        if kept["data"] != self.data.fingerprint():
            raise CommandError(f"{where} with other data: {kept['data']} then, {self.data.fingerprint()} now")
        if kept["steps"] != self.steps:
            raise CommandError(f"{where}: it was to take {kept['steps']} steps, now {self.steps}")
        shapes = {name: tuple(tensor.shape) for name, tensor in self.bare.state_dict().items()}
        if shapes != {name: tuple(tensor.shape) for name, tensor in kept["model"].items()}:
            raise CommandError(f"{where}: its model is another one")
        parallel.put_model_state(self.bare, kept["model"])
        parallel.put_optimizer_state(self.bare, self.optimizer, kept["optimizer"])
        for name, mean in self.averages.items():
            parallel.put(mean, kept["averages"][name])
        self.schedule.load_state_dict(kept["schedule"])
        for group, lr in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = lr
        self.scaler.load_state_dict(kept["scaler"])
        self.step, self.seconds = kept["step"], kept["seconds"]
        self.validation = tuple(kept["validation"]) if kept["validation"] else None
        if self.processes.first:
            self.data.train.skipped.update(kept["skipped"])

    def _skipped(self) -> dict[str, str]:
        ours = {**self.data.train.skipped, **self.data.validation.skipped}
        return functools.reduce(lambda a, b: {**a, **b}, self.processes.collected(ours))

    def _finish(self) -> Result:
        skipped = self._skipped()
        self.seconds = time.perf_counter() - self.started
        if self.validation is None:
            self.validation = self.evaluate()
        model = self.bare
        if self._skeleton is not None:
            state = parallel.model_state(self.bare)
            state.update({name: parallel.whole(mean) for name, mean in self.averages.items()})
            model = self._skeleton.to_empty(device="cpu")
            model.load_state_dict(state)
        else:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(self.averages.get(name, p))
        model.eval()
        path = self.folder / "model.safetensors"
        if self.processes.first:
            try:
                checkpoints.save(model, path, self._about())
                log.draw_curve(self.log.rows, self.folder / "curve.png")
            except OSError as error:
                raise CommandError(f"{one_line(error)}; the checkpoints are whole: go on with --resume") from None
            if skipped:
                note(f"{len(skipped)} image{'s' * (len(skipped) > 1)} could not be read and had no part in training")
        rows = [] if self.log is None else self.log.rows
        return Result(model, path, self.step, *self.validation, self.seconds, skipped, rows)

    def _about(self) -> dict[str, str]:
        """What the file of weights says of itself: how it was made, and what its outputs mean. Files are given to others: of
        paths only the last part is in them.
        """
        s = self.settings
        names = {name: Path(getattr(s, name) or "").name for name in ("data", "output", "weights")}
        public = dataclasses.replace(s, **{name: value for name, value in names.items() if value})
        return {
            "command": shlex.join(["vit-fast", "train", *public.as_arguments()]),
            "seed": str(s.seed),
            "classes": json.dumps(self.data.classes, ensure_ascii=False),
            "mean": ",".join(map(str, s.mean)),
            "std": ",".join(map(str, s.std)),
            "accuracy": f"{self.validation[1]:.4f}",
        }
