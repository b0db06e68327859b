"""metafile.yml: current, complete, read by OpenMMLab's readers, and true to the configs and the result files."""
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from shutil import copytree

import pytest
from mmengine.config import Config
from mmengine.config.utils import _get_cfg_metainfo
from mmpretrain.apis import ModelHub
from modelindex.load_model_index import load
from modelindex.models.Model import Model

ROOT = Path(__file__).parents[1]
spec = spec_from_file_location('tools_model_index', ROOT / 'benchmarks' / 'model_index.py')
model_index = module_from_spec(spec)
spec.loader.exec_module(model_index)


@pytest.fixture(scope='module')
def models() -> dict[str, Model]:
    index = load(str(ROOT / 'model-index.yml'))
    assert index.check(silent=True) == []
    index.build_models_with_collections()
    return {model.name: model for model in index.models}


def test_current():
    assert (ROOT / 'metafile.yml').read_text() == model_index.render(), 'run python benchmarks/model_index.py'


def test_lists_every_config(models):
    configs = {path.stem: f'configs/{path.name}' for path in (ROOT / 'configs').glob('*.py')}
    assert {name: model.config for name, model in models.items()} == configs
    assert {model.full_model.paper['URL'] for model in models.values()} == {'https://arxiv.org/abs/2009.14119'}
    assert not any(model.weights for model in models.values()), 'nothing was trained whose weights are to be had'


def test_results(models):
    """Those that a config states are published, those of the demo are ours, and no column has both."""
    columns = {name: dict(model.results[0].metrics) for name, model in models.items() if model.results}
    for name, metrics in columns.items():
        assert len({'published' in key for key in metrics}) == 1, name
    stating = {path.stem for path in (ROOT / 'configs').glob('*.py') if 'released = dict(' in path.read_text()}
    assert stating == {name for name, metrics in columns.items() if 'mAP (published)' in metrics}
    for name in stating:
        released = Config.fromfile(ROOT / 'configs' / f'{name}.py').released
        assert columns[name] == {f'{key} (published)': value for key, value in released.items() if key != 'checkpoint'}
    ours = columns['resnet_asl_digits']
    line = next(line for line in (ROOT / 'README.md').read_text().splitlines() if line.startswith('| ASL |'))
    assert line.split(' | ')[2:5] == [str(ours[key]) for key in ('mAP', 'CF1', 'OF1')]
    assert line.endswith(f' {columns["fcos_asl_digits"]["box AP"]} |')


def test_data_and_task_are_those_of_the_config(models):
    """A config of each ending. Detectors extend MMDetection's configs, which take long to find: their names say it."""
    kinds = {'data/digits': 'digits', 'data/glyphs': 'glyphs', 'mmasl.CocoMultiLabel': 'MS-COCO 2014',
             'mmasl.VOCMultiLabel': 'Pascal VOC 2007', 'mmasl.NUSWide': 'NUS-WIDE',
             'mmasl.OpenImages': 'Open Images V6', 'mmasl.Herbarium2020': 'Herbarium 2020'}
    endings = {}
    for name, model in models.items():
        data = model.metadata.data['Training Data']
        if name.split('_')[0] in model_index.DETECTORS:
            assert data == ('digits' if 'digits' in name else 'COCO 2017')
        else:
            endings[name.rpartition('_')[2]] = name, model, data
    assert len(endings) > 10
    for name, model, data in endings.values():
        cfg = Config.fromfile(ROOT / model.config)
        dataset = cfg.train_dataloader.dataset
        while 'dataset' in dataset or 'datasets' in dataset:
            dataset = dataset.get('dataset') or dataset.datasets[0]
        root = dataset.data_root.rstrip('/').removesuffix('_hard')
        assert data.split(',')[0] == kinds[root if root in kinds else dataset.type], name
        assert cfg.default_scope == 'mmpretrain', name


def test_readers_of_mmpretrain_and_mmengine(models, tmp_path, monkeypatch):
    monkeypatch.setattr(ModelHub, '_models_dict', {})
    ModelHub.register_model_index(ROOT / 'model-index.yml')
    found = ModelHub.get('resnet_asl_digits')
    assert found.config.model.head.loss.type == 'mmasl.AsymmetricLoss'
    mim = copytree(ROOT / 'configs', tmp_path / '.mim' / 'configs').parent  # as MIM installs a package
    for name in ('model-index.yml', 'metafile.yml'):
        (mim / name).write_text((ROOT / name).read_text())
    assert _get_cfg_metainfo(str(tmp_path), 'resnet_asl_digits.py')['Name'] == 'resnet_asl_digits'


def test_names_that_say_nothing():
    assert model_index.describe('fcos_tresnet-m_asl_coco') == dict(
        loss='ASL', data='COCO 2017', task='Object Detection')
    assert model_index.describe('resnet_adaptive_digits_hard')['data'] == 'digits, long tail and missing labels'
    assert model_index.describe('tresnet-l_paper_asl_voc-from-coco')['data'] == 'Pascal VOC 2007'
    for name in ('resnet_asl', 'resnet_coco', 'resnet_asl_cocoa'):
        with pytest.raises(ValueError, match=f'configs/{name}.py: its name must'):
            model_index.describe(name)


def test_results_of_no_config(monkeypatch):
    monkeypatch.setattr(model_index, 'measured', lambda: {'resnet_lost_digits': {'mAP': 1.}})
    with pytest.raises(ValueError, match='results of resnet_lost_digits, and no such config'):
        list(model_index.models())
