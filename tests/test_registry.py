"""Every public name resolves by its scope, under every default scope."""
import pytest
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS, DefaultScope

NAMES = {
    MODELS: ['AsymmetricLoss', 'AsymmetricSoftmaxLoss', 'MultiLabelClsHead', 'MultiLabelLinearClsHead', 'CSRAClsHead',
             'OFA595'],
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
