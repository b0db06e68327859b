from .asymmetric_loss import AsymmetricLoss
from .asymmetric_softmax_loss import AsymmetricSoftmaxLoss
from .probability_sums import ProbabilitySums

__all__ = ['AsymmetricLoss', 'AsymmetricSoftmaxLoss', 'ProbabilitySums']
