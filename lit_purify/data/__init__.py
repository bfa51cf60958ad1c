"""Data modules of image and table datasets."""

from lit_purify.data.base import ImageDataModule, ImageDataset
from lit_purify.data.digits import Digits
from lit_purify.data.folder import ImageFolder
from lit_purify.data.intrusion import NSLKDD, UNSWNB15
from lit_purify.data.known_folders import CIFAR10Folder, ImageNet
from lit_purify.data.subset import Balanced, First, IndexFile, RandomChoice, RandomDraws, Subset
from lit_purify.data.table import Table
from lit_purify.data.torchvision_files import CIFAR10, SVHN

__all__ = [
    "CIFAR10",
    "NSLKDD",
    "SVHN",
    "UNSWNB15",
    "Balanced",
    "CIFAR10Folder",
    "Digits",
    "First",
    "ImageDataModule",
    "ImageDataset",
    "ImageFolder",
    "ImageNet",
    "IndexFile",
    "RandomChoice",
    "RandomDraws",
    "Subset",
    "Table",
]
