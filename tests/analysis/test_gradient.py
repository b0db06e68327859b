"""The properties of the gradient against Eq. 8 written out in mpmath, the loss itself, and Table 1 as printed."""
import math

import mpmath
import pytest
import torch
from torch.testing import assert_close

from mmasl import AsymmetricLoss
from mmasl.analysis.gradient import Setting, analyse_gradient, loss_and_gradient

forms = pytest.mark.parametrize('detach', [False, True], ids=['eq8', 'constant'])
P = torch.tensor([1e-12, 0.01, 0.049, 0.051, 0.21, 0.5, 0.9, 0.999, 1 - 1e-12], dtype=torch.float64)


def eq8(p, gamma, m, detach):
    """d(-L-)/dz of Eq. 8, or with the focusing weight constant."""
    p_m = p - m
    if p_m <= 0:
        return mpmath.mpf(0)
    weight_term = 0 if detach else gamma * mpmath.log(1 - p_m) / p_m
    return p_m**gamma * (1 / (1 - p_m) - weight_term) * p * (1 - p)


def stationary_point(gamma, m, detach, near):
    """Root of d/dp of Eq. 8 beside ``near``, in 40 digits."""
    with mpmath.workdps(40):
        gamma, m, near = map(mpmath.mpf, (gamma, m, near))
        width = min(near - m, 1 - near) / 3
        return float(mpmath.findroot(lambda p: mpmath.diff(lambda x: eq8(x, gamma, m, detach), p),
                                     (near - width, near + width), solver='anderson', tol=1e-20))


def marks(setting):
    found = analyse_gradient(setting)
    return ''.join('-+'[sign] for sign in (found.hard_threshold, found.soft_threshold, found.discards_mislabelled,
                                           found.continuous))


# --- curves

@forms
@pytest.mark.parametrize('gamma, clip', [(0, 0), (0, 0.2), (2, 0), (4, 0.05), (0.3, 0.05)])
def test_negatives_over_p(gamma, clip, detach):
    loss, gradient = loss_and_gradient(P, Setting(1, gamma, clip, None, detach))
    with mpmath.workdps(40):
        exact = [mpmath.mpf(p) for p in P.tolist()]
        p_m = [max(p - mpmath.mpf(clip), 0) for p in exact]
        expected = [float(-x**gamma * mpmath.log(1 - x)) if x else 0. for x in p_m]
        expected_gradient = [float(eq8(p, gamma, mpmath.mpf(clip), detach)) for p in exact]
    # The logit of 1 - 1e-12 has lost four digits of 1 - p.
    assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-3, atol=0)
    assert_close(gradient, torch.tensor(expected_gradient, dtype=torch.float64), rtol=1e-3, atol=0)
    assert_close(gradient[:-1], torch.tensor(expected_gradient[:-1], dtype=torch.float64), rtol=1e-9, atol=0)


@forms
def test_positives_over_p(detach):
    setting = Setting(2, 4, 0.05, 0.25, detach)
    loss, gradient = loss_and_gradient(P, setting, positive=True)
    q = 1 - P
    assert_close(loss, -0.25 * q**2 * P.log(), rtol=1e-3, atol=0)
    assert_close(gradient, -0.25 * q**2 * (q - (0 if detach else 2) * P * P.log()), rtol=1e-3, atol=0)


def test_curves_need_no_gradient_mode_and_any_shape():
    with torch.no_grad():
        loss, gradient = loss_and_gradient(torch.full((2, 3), 0.5), Setting(0, 0, 0))
    assert_close(loss, torch.full((2, 3), math.log(2), dtype=torch.float64))
    assert_close(gradient, torch.full((2, 3), 0.5, dtype=torch.float64))


@pytest.mark.parametrize('p', [0., 1., 1.5, math.nan])
def test_probabilities_out_of_range(p):
    with pytest.raises(ValueError, match=r'must be in \(0, 1\)'):
        loss_and_gradient(torch.tensor([0.5, p]), Setting())


# --- Table 1

@forms
@pytest.mark.parametrize('gamma', [0.05, 0.5, 2, 4, 40])
@pytest.mark.parametrize('clip', [1e-6, 0.05, 0.2, 0.9])
def test_table_1(gamma, clip, detach):
    """CE, AF, CE+PS and ASL as printed, whatever the focusing and the margin; focal loss is AF for negatives."""
    assert marks(Setting(0, gamma, clip, None, detach)) == '++++'
    if gamma == 2:
        assert marks(Setting(0, 0, clip, None, detach)) == '+-+-'
    if clip == 0.05:
        assert marks(Setting(0, gamma, 0, None, detach)) == '-+-+'
        assert marks(Setting(gamma, gamma, 0, None, detach)) == '-+-+'


@forms
def test_cross_entropy(detach):
    found = analyse_gradient(Setting(0, 0, 0, None, detach))
    assert marks(Setting(0, 0, 0, None, detach)) == '---+'
    assert found.p_star is None and found.regimes == {'soft threshold': (0, 1)}
    assert (found.peak, found.remaining, found.order) == pytest.approx((1, 1, 0), abs=1e-12)


@forms
@pytest.mark.parametrize('gamma, clip', [(0, 0), (0, 0.2), (0, 0.9), (0.05, 0), (0.3, 0.05), (2, 0.2), (4, 0.05),
                                         (20, 0)])
def test_properties_against_the_loss(gamma, clip, detach):
    """Threshold, order, jump, peak and both sides of p*, read off the gradient of the loss itself."""
    setting = Setting(0, gamma, clip, 0.25, detach)
    found = analyse_gradient(setting)

    def gradient(*p):
        return loss_and_gradient(torch.tensor(p, dtype=torch.float64), setting)[1]

    near, far, above = gradient(clip + 1e-5, clip + 2e-5, clip + 1e-12)
    if clip:
        assert not gradient(clip / 2, clip - 1e-12).any() and found.threshold == clip
        assert above.item() / found.peak == pytest.approx(found.jump, rel=1e-6, abs=1e-3)
    relative = (far / (clip + 2e-5)) / (near / (clip + 1e-5))
    assert relative.log2().item() == pytest.approx(found.order, abs=1e-3)
    grid = gradient(*torch.linspace(-12, 30, 4001, dtype=torch.float64).sigmoid().tolist())
    largest = max(grid.max(), above).item()
    assert (1 - 1e-4) * found.peak < largest < (1 + 1e-9) * found.peak
    assert grid[-1].item() / found.peak == pytest.approx(found.remaining, abs=0.02 if gamma == 0.05 else 1e-6)
    turn = 4000 if found.p_star is None else int(grid.argmax())
    rounding = 1e-12 * found.peak
    assert (grid[:turn + 1].diff() > -rounding).all() and (grid[turn:].diff() < rounding).all()


@pytest.mark.parametrize('gamma', [0.3, 2, 4, 20])
def test_asymmetric_focusing_keeps_a_gradient_of_1(gamma):
    """What is left of the peak is 1 / peak: less than all under Eq. 8, and the peak itself with the weight constant."""
    eq8, constant = (analyse_gradient(Setting(0, gamma, 0, None, detach)) for detach in (False, True))
    assert eq8.peak > 1.001 and eq8.remaining == pytest.approx(1 / eq8.peak)
    assert constant.p_star is None and constant.remaining == pytest.approx(1)
    assert list(eq8.regimes) == ['soft threshold', 'mislabelled'] and list(constant.regimes) == ['soft threshold']


# --- p*

@pytest.mark.parametrize('setting, p_star, peak', [
    (Setting(0, 4, 0.05, None, False), 0.900, 0.733),
    (Setting(0, 4, 0.05, None, True), 0.928, 0.325),
    (Setting(0, 2, 0.2, None, False), 0.839, 0.329),
    (Setting(0, 2, 0.2, None, True), 0.860, 0.154)])
def test_p_star_of_the_papers_settings(setting, p_star, peak):
    found = analyse_gradient(setting)
    assert (found.p_star, found.peak) == pytest.approx((p_star, peak), abs=5e-4)
    assert found.regimes == {'hard threshold': (0, found.threshold), 'soft threshold': (found.threshold, found.p_star),
                             'mislabelled': (found.p_star, 1)}


@forms
@pytest.mark.parametrize('gamma, clip', [(2, 0.2), (4, 0.05), (7, 0.05), (4, 1e-6), (100, 0.05), (4, 0.999),
                                         (0.3, 0.05), (0.01, 0.6), (0.01, 0.7), (2, 0), (4, 0), (20, 0), (0.3, 0)])
def test_p_star(gamma, clip, detach):
    found = analyse_gradient(Setting(0, gamma, clip, None, detach)).p_star
    if not clip and detach:
        assert found is None
    else:
        assert found == pytest.approx(stationary_point(gamma, clip, detach, found), abs=5e-9)


@pytest.mark.parametrize('clip', [1e-6, 0.05, 0.2, 0.6, 0.617])
def test_p_star_of_the_margin_alone(clip):
    expected = 1 + clip - math.sqrt(clip * (1 + clip))
    assert analyse_gradient(Setting(0, 0, clip)).p_star == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize('clip', [0.62, 0.9])
def test_p_star_at_the_jump(clip):
    """Beyond a margin of (sqrt(5) - 1) / 2 = 0.618 nothing is stationary: the gradient falls from its jump on."""
    found = analyse_gradient(Setting(0, 0, clip))
    assert found.p_star == found.threshold == pytest.approx(clip)
    assert found.jump == pytest.approx(1, rel=1e-6)
    assert list(found.regimes) == ['hard threshold', 'mislabelled']


# --- settings

def test_properties_do_not_depend_on_static_weights():
    plain, weighted = analyse_gradient(Setting()), analyse_gradient(Setting(alpha=0.25))
    assert (weighted.p_star, weighted.remaining) == pytest.approx((plain.p_star, plain.remaining))
    assert weighted.peak == pytest.approx(0.75 * plain.peak)


def test_defaults_are_those_of_the_loss():
    loss, setting = AsymmetricLoss(), Setting()
    for name in ('gamma_pos', 'gamma_neg', 'clip'):
        assert getattr(setting, name) == pytest.approx(getattr(loss, name).item())
    assert (setting.alpha, setting.detach_focusing) == (loss.alpha, loss.detach_focusing)


@pytest.mark.parametrize('setting, name', [
    ((0, 0, 0), 'CE'), ((0, 0, 0.2), 'CE+PS'), ((2, 2, 0), 'focal'), ((2, 2, 0.2), 'focal+PS'), ((0, 4, 0), 'AF'),
    ((0, 4, 0.05), 'ASL')])
def test_names(setting, name):
    assert Setting(*setting).name == name


@pytest.mark.parametrize('arguments, message', [
    (dict(gamma_neg=-1.), 'gamma_neg=-1.0'), (dict(clip=1.), r'clip=1.0 must be a number in \[0, 1\)'),
    (dict(gamma_neg=[4., 5.]), 'one value per class'), (dict(alpha=2.), 'alpha=2.0')])
def test_refused_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        Setting(**arguments)


def test_a_loss_without_negatives_is_refused():
    with pytest.raises(ValueError, match='no gradient at any negative'):
        analyse_gradient(Setting(alpha=1.))
