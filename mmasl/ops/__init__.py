from mmasl.ops.asymmetric_loss import asymmetric_loss
from mmasl.ops.asymmetric_softmax import asymmetric_softmax_loss
from mmasl.ops.calibration import inverse_posterior, posterior, posterior_cap, posterior_log_odds
from mmasl.ops.linear_asymmetric_loss import linear_asymmetric_loss

__all__ = ['asymmetric_loss', 'asymmetric_softmax_loss', 'inverse_posterior', 'linear_asymmetric_loss', 'posterior',
           'posterior_cap', 'posterior_log_odds']
