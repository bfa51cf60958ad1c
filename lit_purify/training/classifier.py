"""Training a classifier, plainly or adversarially."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lit_purify.attacks import Attack
from lit_purify.data.base import Batch, ImageDataModule
from lit_purify.errors import InputError
from lit_purify.functional.noise import EVALUATION, KeyedNoise, Noise
from lit_purify.models import Classifier
from lit_purify.training.task import TrainingTask

_AUGMENT = 0


class ClassifierTask(TrainingTask):
    """Cross entropy; with an attack, on adversarial images (Madry et al., ICLR 2018): the baseline for purification.

    Args:
        classifier: What is trained.
        attack: Makes the training images adversarial; ``None`` trains on clean ones.
        label_smoothing: Of the cross entropy.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Of AdamW.
        warmup: Steps of linear warm-up.
        shift_pixels: Augmentation: move images by up to so many pixels.
        mirror: Augmentation: mirror half of the images.
        seed: Of the attack's random start and of augmentation.
    """

    def __init__(
        self,
        classifier: Classifier,
        attack: Attack | None = None,
        label_smoothing: float = 0.0,
        learning_rate: float = 2e-3,
        weight_decay: float = 5e-2,
        warmup: int = 100,
        shift_pixels: int = 0,
        mirror: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(learning_rate, weight_decay, warmup, shift_pixels, mirror, seed)
        if not 0.0 <= label_smoothing < 1.0:
            raise InputError(f"label_smoothing = {label_smoothing} is outside [0, 1)")
        self.classifier, self.attack, self.label_smoothing = classifier, attack, label_smoothing

    @property
    def network(self) -> Classifier:
        """The classifier."""
        return self.classifier

    def loss(self, batch: Batch, noise: KeyedNoise) -> Tensor:
        """Cross entropy on the (adversarial) images."""
        image = self.augmented(batch["image"], noise, _AUGMENT)
        if self.attack is not None:
            image = self._attacked(self.attack, image, batch["label"], noise)
        return cross_entropy(self.classifier(image), batch["label"], label_smoothing=self.label_smoothing)

    def _attacked(self, attack: Attack, image: Tensor, label: Tensor, noise: Noise) -> Tensor:
        """Adversarial images against the network as it evaluates, with its batch statistics left alone."""
        training = self.classifier.training
        self.classifier.eval()
        try:
            return attack(self.classifier, image, label, noise, chunk=len(image))
        finally:
            self.classifier.train(training)

    def check(self, data: ImageDataModule) -> None:
        """Sizes and classes."""
        self.classifier.check_image(data.cached_split("train")[0]["image"][None])
        self.classifier.check_classes(data.classes)
        if self.attack is not None:
            # What rows of a table can be made of others is known with the data.
            self.attack.prepare((), data.domain)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Clean accuracy, and accuracy under the training attack when there is one."""
        images = {"clean": batch["image"]}
        if self.attack is not None:
            noise = KeyedNoise(self.seed, batch["index"], torch.zeros_like(batch["index"]), EVALUATION)
            images["robust"] = self._attacked(self.attack, batch["image"], batch["label"], noise)
        for name, image in images.items():
            self.measure(f"{name}_accuracy", (self.classifier(image).argmax(dim=1) == batch["label"]).float())

    def on_fit_end(self) -> None:
        """Says how good it is."""
        found = {name: self.trainer.callback_metrics.get(f"val/{name}_accuracy") for name in ("clean", "robust")}
        said = ", ".join(f"{name} {100 * float(value):.1f} %" for name, value in found.items() if value is not None)
        if said and self.trainer.is_global_zero:
            print(f"Accuracy at the last validation: {said}")
