"""Training with the Asymmetric Loss (arXiv 2009.14119) in MMDetection and MMPretrain."""
from .hooks import AdaptiveAsymmetryHook, ProbabilityGapHook
from .losses import AsymmetricLoss
from .metrics import MultiLabelReport
from .softmax_loss import AsymmetricSoftmaxLoss

__version__ = '0.1.0'
__all__ = ['AdaptiveAsymmetryHook', 'AsymmetricLoss', 'AsymmetricSoftmaxLoss', 'MultiLabelReport', 'ProbabilityGapHook']
