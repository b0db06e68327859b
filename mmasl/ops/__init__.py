"""The asymmetric losses as functions, and calibrated probabilities in closed form. Needs torch alone."""
from .calibration import posterior, posterior_log_odds, posterior_threshold, posterior_upper_bound
from .functional import asymmetric_loss, asymmetric_softmax_loss, use_implementation
from .linear import linear_asymmetric_loss

__all__ = ['asymmetric_loss', 'asymmetric_softmax_loss', 'linear_asymmetric_loss', 'posterior', 'posterior_log_odds',
           'posterior_threshold', 'posterior_upper_bound', 'use_implementation']
