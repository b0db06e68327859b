from .asymmetric_loss import asymmetric_loss
from .asymmetric_softmax import asymmetric_softmax_loss
from .calibration import inverse_posterior, posterior, posterior_cap, posterior_log_odds
from .linear_asymmetric_loss import linear_asymmetric_loss

__all__ = ['asymmetric_loss', 'asymmetric_softmax_loss', 'inverse_posterior', 'linear_asymmetric_loss', 'posterior',
           'posterior_cap', 'posterior_log_odds']
