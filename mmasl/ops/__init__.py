"""The asymmetric losses as functions, calibrated probabilities in closed form, and weights by class. Needs torch alone.
"""
from .calibration import posterior, posterior_log_odds, posterior_threshold, posterior_upper_bound
from .class_weights import effective_number_weights, inverse_frequency_weights, positive_weights
from .functional import asymmetric_loss, asymmetric_softmax_loss, use_implementation
from .linear import linear_asymmetric_loss

__all__ = ['asymmetric_loss', 'asymmetric_softmax_loss', 'effective_number_weights', 'inverse_frequency_weights',
           'linear_asymmetric_loss', 'positive_weights', 'posterior', 'posterior_log_odds', 'posterior_threshold',
           'posterior_upper_bound', 'use_implementation']
