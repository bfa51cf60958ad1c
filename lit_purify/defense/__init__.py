"""Purifiers, the masks that steer them, and the classifier behind them."""

from lit_purify.defense.defended import DefendedClassifier
from lit_purify.defense.masks import (
    Inverse,
    Mask,
    MinMaxThreshold,
    Ones,
    RandomArea,
    SoftmaxThreshold,
    TopFraction,
    Zeros,
)
from lit_purify.defense.purifiers import (
    HeterogeneousPurifier,
    NoPurifier,
    Purifier,
    Trace,
    UniformPurifier,
    VariableIntensityPurifier,
)

__all__ = [
    "DefendedClassifier",
    "HeterogeneousPurifier",
    "Inverse",
    "Mask",
    "MinMaxThreshold",
    "NoPurifier",
    "Ones",
    "Purifier",
    "RandomArea",
    "SoftmaxThreshold",
    "TopFraction",
    "Trace",
    "UniformPurifier",
    "VariableIntensityPurifier",
    "Zeros",
]
