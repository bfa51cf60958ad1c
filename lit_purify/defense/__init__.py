"""Purifiers, mask rules, and the classifier behind a purifier."""

from lit_purify.defense.around import OneHotPurifier, ResizedPurifier
from lit_purify.defense.defended import DefendedClassifier, ForeignDefense, defend
from lit_purify.defense.freqpure import FreqPurePurifier
from lit_purify.defense.graded import AverageMask, ExternalAttention, QuantizedSaliency
from lit_purify.defense.gradients import (
    BPDA,
    Approximate,
    AttackView,
    BareClassifier,
    Exact,
    Gradient,
    Surrogate,
    SurrogatePurifier,
)
from lit_purify.defense.guided import GuidedPurifier
from lit_purify.defense.heterogeneous import HeterogeneousPurifier, VariableIntensityPurifier
from lit_purify.defense.inputs import FirstLayer, GradientTimesInput
from lit_purify.defense.likelihood import LikelihoodPurifier
from lit_purify.defense.lorid import LoRIDPurifier
from lit_purify.defense.masks import (
    EmptyMask,
    FullMask,
    InvertedMask,
    Mask,
    MinMaxThreshold,
    RandomArea,
    RenormalizedInput,
    ShiftedMask,
    SoftmaxThreshold,
    TopFraction,
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
    "AttackView",
    "AverageMask",
    "BareClassifier",
    "DefendedClassifier",
    "EmptyMask",
    "Exact",
    "ExternalAttention",
    "FirstLayer",
    "ForeignDefense",
    "FreqPurePurifier",
    "FullMask",
    "Gradient",
    "GradientTimesInput",
    "GradualPurifier",
    "GuidedPurifier",
    "HeterogeneousPurifier",
    "InvertedMask",
    "LikelihoodPurifier",
    "LoRIDPurifier",
    "Mask",
    "MinMaxThreshold",
    "NoPurifier",
    "OneHotPurifier",
    "Purifier",
    "QuantizedSaliency",
    "RandomArea",
    "RenormalizedInput",
    "ResizedPurifier",
    "ShiftedMask",
    "SoftmaxThreshold",
    "Surrogate",
    "SurrogatePurifier",
    "TopFraction",
    "Trace",
    "UniformPurifier",
    "VariableIntensityPurifier",
    "defend",
]
