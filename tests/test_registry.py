"""Every public name resolves by its scope, under every default scope."""
import subprocess
import sys

import pytest
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS, DefaultScope

NAMES = {
    MODELS: ['AsymmetricLoss', 'AsymmetricSoftmaxLoss', 'MultiLabelClsHead', 'MultiLabelLinearClsHead', 'CSRAClsHead',
             'CalibratedDenseHead', 'OFA595'],
    DATASETS: ['CocoMultiLabel', 'VOCMultiLabel', 'NUSWide', 'OpenImages', 'Herbarium2020'],
    METRICS: ['MultiLabelMetric', 'MacroF1'],
    HOOKS: ['ProbabilityGapHook', 'AdaptiveAsymmetryHook', 'ResumeHook', 'CheckDataHook', 'CheckFiniteHook']}


@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', 'mmpretrain', 'mmasl'])
@pytest.mark.parametrize('registry', NAMES, ids=lambda registry: registry.name)
def test_resolves(registry, scope):
    with DefaultScope.overwrite_default_scope(scope):
        for name in NAMES[registry]:
            found = registry.get(f'mmasl.{name}')
            assert found.__name__ == name and found.__module__.startswith('mmasl.')


@pytest.mark.slow
@pytest.mark.parametrize('scope, custom_imports', [('mmdet', ''), ('mmpretrain', 'import mmasl')])
def test_the_loss_resolves_in_a_fresh_process(scope, custom_imports):
    """MMEngine imports mmasl.registry at the lookup; ``custom_imports`` imports mmasl, which registers nothing."""
    code = f"""
{custom_imports}
from mmengine.registry import DefaultScope
from {scope}.registry import MODELS
with DefaultScope.overwrite_default_scope('{scope}'):
    print(MODELS.build(dict(type='mmasl.AsymmetricLoss', gamma_neg=2)))
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.startswith('AsymmetricLoss(gamma_pos=0.0, gamma_neg=2.0'), done.stderr[-2000:]


@pytest.mark.slow
def test_a_model_built_under_another_default_device():
    """The first use imports the operator, whose constants stay on the CPU."""
    code = """
import torch, mmasl
with torch.device('meta'):
    loss = mmasl.AsymmetricLoss()
print(loss(torch.zeros(2, 2), torch.ones(2, 2)).item())
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert float(done.stdout) > 0, done.stderr[-2000:]
