"""A training step through Lightning, against the same step in a bare loop and against the network alone."""

import lightning as L
import torch
from calls import networks
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from measuring import clock, row
from torch.nn.utils import clip_grad_norm_

from lit_purify.data.base import ImageDataModule, ImageDataset
from lit_purify.defense import TopFraction
from lit_purify.training import DenoiserTask

STEPS, SKIPPED, DECAY = 8, 2, 0.999


class Random(ImageDataModule):
    """Images in memory."""

    images = torch.rand(2048, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def split(self, name):
        return ImageDataset.whole(self.images.__getitem__, [0] * len(self.images), ["a", "b"])


class Watch(Callback):
    """Notes when steps are over, the first ones left out."""

    def __init__(self, now):
        self.now, self.times = now, []

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step in (SKIPPED, SKIPPED + STEPS):
            self.times.append(self.now())


def measure(size, device, batch, pairs):
    """Rows of one network."""
    now, data = clock(device), Random(batch)

    def task():
        denoiser, classifier = networks(size, device)
        denoiser.requires_grad_(True)
        shares = {"constant": 0.5, "attention": 0.3, "shapes": 0.2}
        made = DenoiserTask(denoiser, classifier, TopFraction(0.25), max_level=450, mirror=True, **shares)
        made.to(device)
        return made

    def lightning():
        watch = Watch(now)
        L.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            max_steps=SKIPPED + STEPS,
            gradient_clip_val=1.0,
            callbacks=[EMAWeightAveraging(decay=DECAY, use_buffers=False, update_starting_at_step=0), watch],
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(task(), Random(batch))
        return watch.times[1] - watch.times[0]

    def loop(loss):
        ours = task()
        ours.network.train().to(memory_format=torch.channels_last)
        weights = list(ours.network.parameters())
        average = [weight.detach().clone() for weight in weights]
        optimizer = torch.optim.AdamW(weights, 1e-3, weight_decay=ours.weight_decay)
        batches = iter(data.train_dataloader())
        for k in range(SKIPPED + STEPS):
            if k == SKIPPED:
                started = now()
            optimizer.zero_grad()
            loss(ours, {name: values.to(device) for name, values in next(batches).items()}).backward()
            clip_grad_norm_(weights, 1.0)
            optimizer.step()
            torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1.0 - DECAY)
        return now() - started

    def same(ours, batch):
        return ours.training_step(batch, 1)

    def alone(ours, batch):
        """No noise, no levels, no masks drawn."""
        image = batch["image"]
        return (ours.network(image, levels) - image).square().mean()

    levels = torch.full((batch, 1, 32, 32), 100, device=device)
    levels[..., :16] = 200
    # Outside of a trainer there is nowhere to log to.
    DenoiserTask.log, log = lambda self, *args, **kwargs: self._trainer and log(self, *args, **kwargs), DenoiserTask.log
    try:
        seconds = [(lightning(), loop(same), loop(alone)) for _ in range(pairs)]
    finally:
        del DenoiserTask.log
    yield row(
        "training step / bare loop",
        [(a, b) for a, b, _ in seconds],
        per=STEPS,
        limit=1.03 if device.type == "cuda" else 1.05,
    )
    yield row("training step / network alone", [(a, c) for a, _, c in seconds], per=STEPS)
