"""Purifiers, the masks that steer them, and the classifier behind them."""

from lit_purify.defense.around import OneHotPurifier, ResizedPurifier
from lit_purify.defense.defended import DefendedClassifier, ForeignDefense, defend
from lit_purify.defense.freqpure import FreqPurePurifier
from lit_purify.defense.graded import OtherAttention, Proportional, Votes
from lit_purify.defense.gradients import (
    BPDA,
    Approximate,
    Attacked,
    BareClassifier,
    Exact,
    Gradient,
    OtherPurifier,
    Surrogate,
)
from lit_purify.defense.guided import GuidedPurifier
from lit_purify.defense.heterogeneous import HeterogeneousPurifier, VariableIntensityPurifier
from lit_purify.defense.inputs import FirstLayer, GradientTimesInput
from lit_purify.defense.likelihood import LikelihoodPurifier
from lit_purify.defense.lorid import LoRIDPurifier
from lit_purify.defense.masks import (
    Inverse,
    Mask,
    MinMaxThreshold,
    Ones,
    RandomArea,
    Renormalized,
    Rolled,
    SoftmaxThreshold,
    TopFraction,
    Zeros,
)
from lit_purify.defense.purifiers import (
    GradualPurifier,
    NoPurifier,
    Purifier,
    Trace,
    UniformPurifier,
)

__all__ = [
    "BPDA",
    "Approximate",
    "Attacked",
    "BareClassifier",
    "DefendedClassifier",
    "Exact",
    "FirstLayer",
    "ForeignDefense",
    "FreqPurePurifier",
    "Gradient",
    "GradientTimesInput",
    "GradualPurifier",
    "GuidedPurifier",
    "HeterogeneousPurifier",
    "Inverse",
    "LikelihoodPurifier",
    "LoRIDPurifier",
    "Mask",
    "MinMaxThreshold",
    "NoPurifier",
    "OneHotPurifier",
    "Ones",
    "OtherAttention",
    "OtherPurifier",
    "Proportional",
    "Purifier",
    "RandomArea",
    "Renormalized",
    "ResizedPurifier",
    "Rolled",
    "SoftmaxThreshold",
    "Surrogate",
    "TopFraction",
    "Trace",
    "UniformPurifier",
    "VariableIntensityPurifier",
    "Votes",
    "Zeros",
    "defend",
]
