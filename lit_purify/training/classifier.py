"""Standard or adversarial training of a classifier."""

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
    """Trains with cross entropy; with an attack, adversarially (Madry et al., ICLR 2018), as baseline for purification.

    Args:
        classifier: The classifier to train.
        attack: The attack on training images; ``None`` trains on clean images.
        label_smoothing: Label smoothing of the cross entropy, in [0, 1).
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        warmup: Steps of linear warm-up.
        shift_pixels: Augmentation: shift images by up to this many pixels.
        mirror: Augmentation: mirror half of the images.
        seed: Seed of the attack's random start and of augmentation.
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
            raise InputError(f"label_smoothing = {label_smoothing} is outside [0, 1): use e.g. 0.1")
        self.classifier, self.attack, self.label_smoothing = classifier, attack, label_smoothing

    @property
    def network(self) -> Classifier:
        """The classifier to train."""
        return self.classifier

    def loss(self, batch: Batch, noise: KeyedNoise) -> Tensor:
        """Cross entropy on the (adversarial) images."""
        image = self.augmented(batch["image"], noise, _AUGMENT)
        if self.attack is not None:
            image = self._attacked(self.attack, image, batch["label"], noise)
        return cross_entropy(self.classifier(image), batch["label"], label_smoothing=self.label_smoothing)

    def _attacked(self, attack: Attack, image: Tensor, label: Tensor, noise: Noise) -> Tensor:
        """Adversarial images for the network in evaluation mode, so batch statistics stay unchanged."""
        training = self.classifier.training
        self.classifier.eval()
        try:
            return attack(self.classifier, image, label, noise, chunk=len(image))
        finally:
            self.classifier.train(training)

    def check(self, data: ImageDataModule) -> None:
        """Raises an ``InputError`` if sizes or classes of classifier and data differ."""
        self.classifier.check_image(data.cached_split("train")[0]["image"][None])
        self.classifier.check_classes(data.classes)
        if self.attack is not None:
            # For table rows, the data defines which perturbations are feasible.
            self.attack.prepare((), data.domain)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measures clean accuracy, and accuracy under the training attack if there is one."""
        images = {"clean": batch["image"]}
        if self.attack is not None:
            noise = KeyedNoise(self.seed, batch["index"], torch.zeros_like(batch["index"]), EVALUATION)
            images["robust"] = self._attacked(self.attack, batch["image"], batch["label"], noise)
        for name, image in images.items():
            self.measure(f"{name}_accuracy", (self.classifier(image).argmax(dim=1) == batch["label"]).float())

    def on_fit_end(self) -> None:
        """Prints the accuracies of the last validation."""
        found = {name: self.trainer.callback_metrics.get(f"val/{name}_accuracy") for name in ("clean", "robust")}
        text = ", ".join(f"{name} {100 * float(value):.1f} %" for name, value in found.items() if value is not None)
        if text and self.trainer.is_global_zero:
            print(f"Accuracy at the last validation: {text}")
