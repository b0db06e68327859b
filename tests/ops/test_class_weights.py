"""Weights by class against values computed by hand, limits, and refusals."""
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mmasl import AsymmetricLoss, effective_number_weights, inverse_frequency_weights, positive_weights, posterior
from mmasl.errors import ConfigError, DataError

# Classes of 10 images: rare, common, without positives, and without negatives.
POSITIVES, NEGATIVES = [1, 4, 0, 10], [9, 6, 10, 0]


@pytest.mark.parametrize('form', [list, np.array, torch.tensor], ids=['list', 'array', 'tensor'])
def test_inverse_frequency(form):
    assert_close(inverse_frequency_weights(form([1, 2, 4])), torch.tensor([12 / 7, 6 / 7, 3 / 7]))
    assert_close(inverse_frequency_weights(form([0, 1, 4])), torch.tensor([4 / 3, 4 / 3, 1 / 3]))


def test_effective_number():
    # E is 1, 1.5 and 1.75.
    assert_close(effective_number_weights([1, 2, 3], beta=0.5), torch.tensor([63 / 47, 42 / 47, 36 / 47]))
    assert_close(effective_number_weights([0, 2, 3], beta=0.5), effective_number_weights([1, 2, 3], beta=0.5))
    # (1 - 0.999^n) / 0.001 for 1 and 10,000 positives is 1 and 999.954827.
    assert_close(effective_number_weights([1, 10_000]), torch.tensor([1.998002, 0.001998]), rtol=1e-6, atol=1e-6)


def test_limits_of_beta():
    assert effective_number_weights(POSITIVES, beta=0).tolist() == [1, 1, 1, 1]
    assert_close(effective_number_weights(POSITIVES, beta=1 - 1e-12), inverse_frequency_weights(POSITIVES), rtol=1e-4,
                 atol=0)


@pytest.mark.parametrize('options, expected', [
    ({}, [9, 1.5, 10, 0.1]), (dict(temperature=2), [3, 1.5**0.5, 10**0.5, 0.1**0.5]),
    (dict(cap=3), [3, 1.5, 3, 0.1]), (dict(temperature=2, cap=3), [3, 1.5**0.5, 3, 0.1**0.5]),
    (dict(temperature=1e9), [1, 1, 1, 1])], ids=str)
def test_positive_weights(options, expected):
    assert_close(positive_weights(POSITIVES, NEGATIVES, **options), torch.tensor(expected, dtype=torch.float32))


def test_positives_and_negatives_weigh_the_same():
    """With T = 1 the gradients of all labels of a class at p = 1/2 cancel, and the posterior there is its frequency."""
    target = torch.zeros(10, 2)
    target[:1, 0], target[:4, 1] = 1, 1
    weights = positive_weights(target.sum(0), (1 - target).sum(0))
    logits = torch.zeros(10, 2, requires_grad=True)
    AsymmetricLoss(gamma_neg=0, clip=0, pos_weight=weights)(logits, target).backward()
    assert_close(logits.grad.sum(0), torch.zeros(2))
    assert_close(posterior(logits, gamma_neg=0, clip=0, pos_weight=weights)[0], target.mean(0))


@pytest.mark.parametrize('call, error, message', [
    (lambda: inverse_frequency_weights([1, -1]), DataError, r'counts=\[1, -1\] must be numbers >= 0'),
    (lambda: inverse_frequency_weights(3), DataError, 'one per class'),
    (lambda: effective_number_weights([]), DataError, 'one per class'),
    (lambda: effective_number_weights([1], beta=1), ConfigError, r'beta=1 must be in \[0, 1\)'),
    (lambda: positive_weights([1], [float('nan')]), DataError, 'negatives='),
    (lambda: positive_weights([1], [1, 2]), DataError, '1 counts of positives and 2'),
    (lambda: positive_weights([1], [1], temperature=0), ConfigError, 'temperature=0 must be'),
    (lambda: positive_weights([1], [1], cap=-1), ConfigError, 'cap=-1 must be')])
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
