from .asymmetric_loss import AsymmetricLoss
from .asymmetric_softmax_loss import AsymmetricSoftmaxLoss

__all__ = ['AsymmetricLoss', 'AsymmetricSoftmaxLoss']
