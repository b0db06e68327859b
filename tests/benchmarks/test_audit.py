"""benchmarks/audit/audit.py: ours is right in every fact, the suite finds known faults, and the page shows the rows."""
import math

import pytest
import torch
from torch import nn

from benchmarks.audit import audit
from mmasl.ops.reference import asymmetric_loss as reference
from mmasl.reproduce.runs import read_rows

OURS, NAIVE, CLAMPED = audit.IMPLEMENTATIONS[:3]
SLOW = [audit.compiles]


@pytest.mark.parametrize('fact', [pytest.param(fact, marks=[pytest.mark.slow] * (fact in SLOW))
                                  for fact in audit.FACTS], ids=lambda fact: fact.__name__)
def test_ours_is_right(fact):
    row = audit.check(OURS, fact)
    assert row['right'] == '1', row


@pytest.mark.parametrize('setting', audit.ASL + audit.FOCAL, ids=str)
def test_the_expected_values_are_those_of_the_equations(setting):
    logits, target = audit.grid(20)
    named = dict(zip(('gamma_pos', 'gamma_neg', 'clip', 'alpha'), setting))
    expected = audit.differentiate(lambda z, y: reference(z, y, **named), logits.double(), target)
    found = audit.differentiate(lambda z, y: audit.exact(z, y, setting), logits.double(), target)
    assert max(audit.error(*pair) for pair in zip(found, expected)) < 1e-8


class Faulty(nn.Module):
    """A loss with faults that published code has had."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = None

    def forward(self, pred, target):
        torch.set_grad_enabled(False)
        target.clamp_(min=0.01)
        torch.set_grad_enabled(True)
        self.kept = pred * torch.rand(())  # neither a leaf nor deterministic
        return self.kept + target


def test_known_faults_are_found():
    faulty = audit.Implementation('faulty', '', lambda setting, reduction: Faulty(), audit.ASL)
    for fact in (audit.value, audit.grad_mode, audit.deepcopies, audit.reductions, audit.deterministic):
        assert audit.check(faulty, fact)['right'] == '0', fact


def test_the_equations_as_printed_are_wrong_where_the_page_says_so():
    assert audit.value(NAIVE)[1] and audit.gradient(NAIVE)[1] and audit.soft_labels(NAIVE)[1]
    assert not audit.value_at_extremes(NAIVE)[1]
    assert audit.gradient_at_extremes(CLAMPED)[0] == pytest.approx(1)  # no gradient at all
    assert not audit.float16(CLAMPED)[1] and not audit.negative_labels(CLAMPED)[1]


def test_an_error_that_is_nan_is_wrong():
    assert math.isnan(audit.error(torch.tensor([0., math.nan]), torch.ones(2)))
    assert not audit.below(math.nan)[1]


def test_the_page_shows_what_was_measured():
    text = audit.PAGE.read_text()
    assert audit.fill_page(text) == text
    rows = read_rows(audit.ROWS)
    assert len(rows) == len(audit.IMPLEMENTATIONS) * len(audit.FACTS)
    assert all(row['right'] == '1' for row in rows if row['implementation'] == 'mmasl')
