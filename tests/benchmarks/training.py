"""A training step through Lightning, against the same step in a bare loop, and its share of the peak."""

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from measuring import row, target, timed
from networks import classifier, denoiser, images, needs, peak
from torch.nn.utils import clip_grad_norm_

from lit_purify.data.base import ImageDataModule, ImageDataset
from lit_purify.defense import TopFraction
from lit_purify.training import DenoiserTask
from lit_purify.training.checkpoints import Averaging

DECAY = 0.999


class Random(ImageDataModule):
    """Images in memory, of 8 bits as those of files are."""

    def split(self, name):
        return ImageDataset.of(images(4096, "cpu").mul(255.0).round().div(255.0), torch.zeros(4096, dtype=torch.long))


class Watch(Callback):
    """Notes when steps are over, the first ones left out."""

    def __init__(self, now, steps):
        self.now, self.steps, self.times = now, steps, []

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step in self.steps:
            self.times.append(self.now())


def measure(device, now, quick):
    """Rows: through Lightning / bare loop; the bare loop's share of the peak."""
    gpu = device.type == "cuda"
    size, batch = ("full", 256) if gpu else ("small", 16)
    skipped, steps = (10, 40 if quick else 200) if gpu else (2, 4)
    flops = 3 * batch * needs(size)[0]

    def task():
        network = denoiser(size, device).requires_grad_(True)
        shares = {"constant": 0.5, "attention": 0.3, "shapes": 0.2}
        rule = TopFraction(0.25)
        return DenoiserTask(network, classifier(device), rule, max_level=450, mirror=True, **shares).to(device)

    def lightning():
        watch = Watch(now, (skipped, skipped + steps))
        L.Trainer(
            accelerator="gpu" if gpu else "cpu",
            devices=1,
            max_steps=skipped + steps,
            gradient_clip_val=1.0,
            precision="bf16-mixed" if gpu else "32-true",
            callbacks=[Averaging(DECAY), watch],
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(task(), Random(batch))
        return watch.times[1] - watch.times[0]

    def loop():
        ours = task()
        ours.network.train().to(memory_format=torch.channels_last)
        weights = list(ours.network.parameters())
        average = [weight.detach().clone() for weight in weights]
        optimizer = torch.optim.AdamW(weights, 1e-3, weight_decay=ours.weight_decay, fused=gpu)
        data = {"image": images(batch, device), "index": torch.arange(batch, device=device)}

        def step():
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
                loss = ours.loss(data, ours.keyed(data))
            loss.backward()
            clip_grad_norm_(weights, 1.0)
            optimizer.step()
            torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1.0 - DECAY)

        for _ in range(skipped):
            step()
        return timed(lambda: [step() for _ in range(steps)], now)

    seconds = [(lightning(), loop()) for _ in range(1 if quick else 3)]
    yield row("training step / bare loop", seconds, per=steps, limit=1.05)
    bound = steps * flops / peak(device, now, "bf16" if gpu else "float32")[0]
    found = row("bare loop / matrix peak", [(bare, bound) for _, bare in seconds], per=steps, images_s=batch)
    yield {**found, **target("training step: share of the peak", 1.0 / found["ratio"], least=0.25)}
