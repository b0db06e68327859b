"""Training with the Asymmetric Loss (arXiv 2009.14119) in MMDetection and MMPretrain."""
from mmasl.engine.hooks.adaptive_asymmetry import AdaptiveAsymmetryHook
from mmasl.engine.hooks.probability_gap import ProbabilityGapHook
from mmasl.evaluation.metrics import MultiLabelMetric
from mmasl.models.losses.asymmetric_loss import AsymmetricLoss
from mmasl.models.losses.asymmetric_softmax_loss import AsymmetricSoftmaxLoss

__version__ = '0.1.0'
__all__ = ['AdaptiveAsymmetryHook', 'AsymmetricLoss', 'AsymmetricSoftmaxLoss', 'MultiLabelMetric', 'ProbabilityGapHook']
