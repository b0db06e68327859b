"""The posterior against the stationarity of the loss, in 60 digits at extremes, and its inverse."""
from itertools import product

import mpmath
import pytest
import torch
from torch.testing import assert_close

from mmasl.ops import asymmetric_loss, posterior, posterior_log_odds, posterior_threshold, posterior_upper_bound

# gamma_neg, clip, gamma_pos, alpha
SETTINGS = {
    'ce': (0., 0., 0., None),
    'ce+margin': (0., 0.05, 0., None),
    'focal': (2., 0., 2., None),
    'focal+alpha': (2., 0., 2., 0.25),
    'focal+margin': (2., 0.3, 2., None),
    'asl': (4., 0.05, 0., None),
    'detection': (2., 0., 1., 0.25),
    'fractional': (0.3, 0.05, 0.5, 0.7),
    'more positive': (1., 0.1, 6., None),
    'tiny margin': (2., 1e-4, 0., None),
}
settings = pytest.mark.parametrize('setting', SETTINGS.values(), ids=SETTINGS)
detach = pytest.mark.parametrize('detach', [False, True], ids=['eq8', 'detached'])
GRID = tuple(product((0., 0.3, 1., 4., 9.), (0., 1e-4, 0.05, 0.5), (0., 0.3, 1., 4., 9.)))


def keywords(setting, detach):
    return dict(zip(('gamma_neg', 'clip', 'gamma_pos', 'alpha'), setting), detach_focusing=detach)


def log_odds_in_60_digits(z, detach, gamma_neg, clip, gamma_pos, alpha):
    """log (1 - a) G- - log a G+, the gradients of the loss as its equations give them."""
    with mpmath.workdps(60 + int(abs(z))):  # 1 - p keeps its digits at logits of 1000
        p = 1 / (1 + mpmath.exp(-mpmath.mpf(z)))
        m, g, h = map(mpmath.mpf, (clip, gamma_neg, gamma_pos))
        w, v = p - m, 1 - p
        if w < 0:
            return -mpmath.inf
        negative = w**g * p * v / (1 - w)
        positive = v**h * v
        if not detach:
            negative -= g * w**(g - 1) * p * v * mpmath.log(1 - w)
            positive -= h * v**h * p * mpmath.log(p)
        a = mpmath.mpf('0.5' if alpha is None else alpha)
        return mpmath.log((1 - a) * negative) - mpmath.log(a * positive)


@settings
@detach
def test_expected_loss_is_stationary(setting, detach):
    """Where a label is positive with the posterior of a logit, the loss has no gradient at that logit."""
    logits = torch.linspace(-12, 12, 241, dtype=torch.float64).requires_grad_()
    kwargs = keywords(setting, detach)
    beyond = logits.detach().sigmoid() >= kwargs['clip']

    def gradient(y):
        return torch.autograd.grad(asymmetric_loss(logits, y, **kwargs).sum(), logits)[0][beyond]

    # pi G+ = (1 - pi) G-: in logarithms, since 1 - pi may be below the resolution of pi.
    log_odds = posterior_log_odds(logits, **kwargs)
    up, down = -gradient(torch.ones_like(logits)), gradient(torch.zeros_like(logits))
    assert_close(log_odds[beyond], down.log() - up.log(), rtol=1e-9, atol=1e-9)
    assert (log_odds[~beyond] == -torch.inf).all()
    balance = gradient(posterior(logits, **kwargs)) / torch.maximum(up, down)
    assert_close(balance, torch.zeros_like(balance), rtol=0, atol=1e-9)


@settings
@detach
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-13), (torch.float32, 5e-6), (torch.float16, 5e-6),
                                              (torch.bfloat16, 5e-6)], ids=lambda x: str(x)[6:])
def test_exact_at_any_logit(setting, detach, dtype, tolerance):
    logits = torch.tensor([-1000, -104, -90, -20, -8.5, -3, -2.9, -0.5, 0, 1e-3, 0.7, 2, 8, 17, 20, 40, 90, 104, 750,
                           1000], dtype=dtype)
    kwargs = keywords(setting, detach)
    actual = posterior_log_odds(logits, **kwargs)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The margin as the arithmetic has it, or p close to it would count as the function's error.
    exact = {**kwargs, 'clip': torch.tensor(kwargs['clip'], dtype=actual.dtype).item()}
    del exact['detach_focusing']
    expected = [float(log_odds_in_60_digits(z, detach, **exact)) for z in logits.tolist()]
    assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance)
    assert_close(posterior(logits, **kwargs), actual.sigmoid(), rtol=0, atol=0)


@detach
def test_increases_with_the_logit_for_all_parameters(detach):
    logits = torch.linspace(-30, 30, 1201, dtype=torch.float64)
    for gamma_neg, clip, gamma_pos in GRID:
        log_odds = posterior_log_odds(logits, gamma_pos=gamma_pos, gamma_neg=gamma_neg, clip=clip,
                                      detach_focusing=detach)
        log_odds = log_odds[log_odds > -torch.inf]
        assert len(log_odds) == (logits.sigmoid() >= clip).sum()
        # It grows with e^-z toward the cap, and is constant there in float64.
        step = log_odds.diff()
        assert (step >= -1e-14).all() and (step[:-400] > 0).all(), (gamma_neg, clip, gamma_pos)
        if clip == 0 or gamma_pos > 0:
            assert (step > 0).all(), (gamma_neg, clip, gamma_pos)


def test_cross_entropy_needs_no_calibration():
    logits = torch.linspace(-100, 100, 2001)
    for detach in (False, True):
        log_odds = posterior_log_odds(logits, gamma_neg=0., clip=0., detach_focusing=detach)
        assert_close(log_odds, logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('gamma', [0.5, 1., 2., 5.])
def test_focal_loss_as_charoenphakdee_et_al(gamma):
    """arXiv 2011.09172: pi = h(p) / (h(p) + h(1 - p)), h(v) = v / ((1 - v)^g - g (1 - v)^(g - 1) v log v)."""
    def h(v):
        return v / ((1 - v)**gamma - gamma * (1 - v)**(gamma - 1) * v * v.log())

    logits = torch.linspace(-15, 15, 301, dtype=torch.float64)
    p, q = logits.sigmoid(), (-logits).sigmoid()
    found = posterior(logits, gamma_pos=gamma, gamma_neg=gamma, clip=0.)
    assert_close(found, h(p) / (h(p) + h(q)), rtol=1e-8, atol=1e-12)


def test_the_official_thresholds():
    """infer.py of the official code decides at 0.7 and validate.py at 0.8: the two gradients' posterior 1/2."""
    assert posterior_threshold(detach_focusing=False).sigmoid().item() == pytest.approx(0.684, abs=5e-4)
    assert posterior_threshold(detach_focusing=True).sigmoid().item() == pytest.approx(0.799, abs=5e-4)
    assert posterior_upper_bound(detach_focusing=False).item() == pytest.approx(0.964, abs=5e-4)
    assert posterior_upper_bound(detach_focusing=True).item() == pytest.approx(0.942, abs=5e-4)


@settings
@detach
def test_cap(setting, detach):
    kwargs = keywords(setting, detach)
    cap, high = posterior_upper_bound(**kwargs), torch.tensor([30., 1000.], dtype=torch.float64)
    assert_close(posterior(high, **kwargs)[1], cap, rtol=1e-13, atol=0)
    assert (cap < 1) == (kwargs['clip'] > 0 and kwargs['gamma_pos'] == 0)


@settings
@detach
def test_inverse(setting, detach):
    kwargs = keywords(setting, detach)
    cap, wanted = posterior_upper_bound(**kwargs), torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    logits = posterior_threshold(wanted, **kwargs)
    assert (logits.isposinf() == (wanted >= cap)).all()
    wanted, logits = wanted[wanted < cap], logits[wanted < cap]
    got = posterior(logits, **kwargs)
    # Without focusing the posterior jumps at the margin, and less than the jump has the logit of the margin.
    jumped = logits.sigmoid() <= kwargs['clip'] + 1e-15
    assert kwargs['gamma_neg'] == 0 or not jumped.any()
    assert_close(got[~jumped], wanted[~jumped], rtol=0, atol=1e-12)
    assert (got >= wanted - 1e-12).all()


def test_inverse_below_the_jump_of_a_margin_without_focusing():
    m = 0.05
    jump = m / (1 + m)
    settings = dict(gamma_neg=0., clip=m)
    thresholds = posterior_threshold(torch.tensor([1e-6, jump * 0.999]), **settings).sigmoid()
    assert_close(thresholds, torch.full((2, ), m).double())
    assert posterior_threshold(jump * 1.001, **settings).sigmoid() > m
    above = torch.tensor(m, dtype=torch.float64).logit() + 1e-9
    assert posterior(above, **settings).item() == pytest.approx(jump, rel=1e-6)


def test_inverse_at_the_ends():
    ends = torch.tensor([0., 1.])
    for setting in SETTINGS.values():
        assert posterior_threshold(ends, **keywords(setting, False)).tolist() == [-torch.inf, torch.inf]
    # A probability so close to an end that p rounds to 0 or 1 still has its logit.
    tiny = posterior_threshold(1e-300, gamma_neg=0., clip=0.).item()
    assert tiny == pytest.approx(torch.tensor(1e-300, dtype=torch.float64).log().item(), rel=1e-14)


def test_one_parameter_a_class():
    gamma_neg, clip, gamma_pos = torch.tensor([0., 4., 2.]), torch.tensor([0.1, 0.05, 0.]), torch.tensor([0., 0.5, 1.])
    logits = torch.linspace(-4, 4, 12).view(4, 3)
    parameters = dict(gamma_pos=gamma_pos, gamma_neg=gamma_neg, clip=clip)
    shared = dict(alpha=0.3, detach_focusing=True)
    thresholds, bounds = posterior_threshold(**parameters, **shared), posterior_upper_bound(**parameters, **shared)
    probabilities = posterior(logits, **parameters, **shared)
    assert thresholds.shape == bounds.shape == (3, )
    for c in range(3):
        own = {name: value[c] for name, value in parameters.items()} | shared
        assert_close(probabilities[:, c], posterior(logits[:, c], **own), rtol=0, atol=0)
        assert_close(thresholds[c], posterior_threshold(**own), rtol=0, atol=0)
        assert_close(bounds[c], posterior_upper_bound(**own), rtol=0, atol=0)
    table = posterior_threshold(torch.tensor([[0.2], [0.5]]), **parameters, **shared)
    assert table.shape == (2, 3)
    assert_close(table[1], thresholds, rtol=0, atol=0)


@detach
@pytest.mark.parametrize('setting', ['asl', 'detection', 'ce'])
def test_weights_by_class_and_the_minimum_of_the_expected_loss(setting, detach):
    """Where a label is positive with probability pi, the logit of least expected loss has the posterior pi."""
    weights = dict(alpha=[.25, .5, .9], pos_weight=[8., 1., .2])
    kwargs = {**keywords(SETTINGS[setting], False), **weights}
    pi = torch.tensor([[.1, .3, .6], [.4, .5, .2]], dtype=torch.float64)
    pi = torch.minimum(pi, 0.9 * posterior_upper_bound(**kwargs))

    def gradient(z):
        z = z.clone().requires_grad_()
        return torch.autograd.grad(asymmetric_loss(z, pi, **kwargs, class_weight=[3., 1., .1], detach_focusing=detach,
                                                   reduction='sum'), z)[0]

    del kwargs['detach_focusing']
    low, high = torch.full_like(pi, -2.9), torch.full_like(pi, 30.)  # p > m, where the loss has one minimum
    for _ in range(60):
        middle = (low + high) / 2
        rising = gradient(middle) > 0
        low, high = torch.where(rising, low, middle), torch.where(rising, middle, high)
    assert_close(posterior(high, **kwargs, detach_focusing=detach), pi, rtol=1e-9, atol=0)
    thresholds = posterior_threshold(pi, **kwargs, detach_focusing=detach)
    assert_close(thresholds, high, rtol=1e-9, atol=1e-9)


def test_has_no_gradient():
    assert not posterior(torch.zeros(3, requires_grad=True)).requires_grad


def test_refusals():
    logits = torch.zeros(2, 3)
    with pytest.raises(TypeError, match='logits must be floating point, got torch.int64'):
        posterior(logits.long())
    with pytest.raises(ValueError, match=r'gamma_neg of shape \(2,\) does not fit logits of shape \(2, 3\)'):
        posterior(logits, gamma_neg=torch.ones(2))
    for function in (lambda alpha: posterior(logits, alpha=alpha), lambda alpha: posterior_upper_bound(alpha=alpha)):
        for alpha in (0., 1.):
            with pytest.raises(ValueError, match=f'alpha={alpha} leaves one kind of label without weight'):
                function(alpha)
    for function in (lambda x: posterior(logits, pos_weight=x), lambda x: posterior_threshold(pos_weight=x)):
        with pytest.raises(ValueError, match=r'pos_weight=\[1.0, 0.0, 1.0\] leaves one kind of label without weight'):
            function([1., 0., 1.])
    with pytest.raises(ValueError, match=r'value=\[0.5, 70.0\] must be a probability'):
        posterior_threshold(torch.tensor([0.5, 70.]))
