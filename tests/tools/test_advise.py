"""tools/advise.py on small digits: reports for both families, findings and refusals."""
import logging
import math
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from torch import nn

from mmasl.analysis import probe_report
from mmasl.analysis.advice import drop_downloads
from mmasl.analysis.gradient import Setting
from mmasl.analysis.suggestion import LADDER
from mmasl.datasets.digits import DigitScenes
from tools import advise as tool

ROOT = Path(__file__).parents[2]

@pytest.fixture(scope='module')
def digits(tmp_path_factory) -> Path:
    return DigitScenes(train=12, val=1, colors=4).write(tmp_path_factory.mktemp('data') / 'digits')


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('LOCAL_RANK', '0')
    yield tmp_path
    assert logging.root.manager.disable == logging.NOTSET, 'the tool leaves logging as it was'


@pytest.fixture
def advise(digits, capsys):
    """Runs the tool on a config that inherits a shipped one, with changes; returns what it prints."""
    def run(base: str, text: str, *argv: str) -> str:
        Path('c.py').write_text(f"""
_base_ = {str(ROOT / 'configs/digits' / base)!r}
train_dataloader = dict(batch_size=4, dataset=dict(data_root={str(digits)!r}))
{text}
""")
        tool.main(['c.py', '--batches', '2', *argv])
        return capsys.readouterr().out
    return run


def refusal(advise, *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        advise(*args)
    return stop.value.code


def table(report: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in report.splitlines() if line[:1] == '|']
    return {name: cells for name, *cells in rows[2:]}


def snippet(report: str) -> Config:
    Path('suggested.py').write_text(report.split('```python\n')[1].split('```', maxsplit=1)[0])
    return Config.fromfile('suggested.py')


RANDOM = 'model = dict(backbone=dict(init_cfg=None))'


def test_classifier(advise):
    report = advise('resnet_asl_digits.py', RANDOM + "\nmodel['head'] = dict(init_cfg=None)")
    assert '12 images, 40 classes, multi-label' in report
    assert 'Gradient of the first 2 batches of 4 images' in report
    rows = table(report)
    assert list(rows) == ['the config', *LADDER, 'suggested below']
    # The config is the suggestion: the loss's own gradient is the ladder's arithmetic.
    assert rows['the config'] == rows['suggested below'] and rows['the config'][0] == '(0, 4, 0.05)'
    shares = [float(rows[name][1].rstrip('%')) for name in ('cross-entropy', 'asymmetric', 'more asymmetric')]
    assert shares == sorted(shares) and rows['cross-entropy'][-1] == '1'
    loss = snippet(report).model.head.loss
    assert (loss.type, loss.gamma_neg, loss.gamma_pos, loss.clip) == ('mmasl.AsymmetricLoss', 4, 0, 0.05)
    assert loss.detach_focusing is False
    assert '(0, 0, 0) -> focal loss (2, 2, 0) -> asymmetric (1, 2, 0)' in report and 'AdaptiveAsymmetryHook' in report
    # 12 images of 40 classes leave some out; nothing else is wrong.
    assert '## Findings: 1' in report and 'classes have no label' in report


def test_weights_by_class(advise):
    text = RANDOM + "\nmodel['head'] = dict(init_cfg=None, loss=dict(class_weight=2., pos_weight=3.))"
    report = advise('resnet_asl_digits.py', text, '--weights', 'positive', 'temperature=2', 'cap=2.5')
    assert re.search(r'- pos_weight: from [\d.]+ \([a-z]+ \d\) to 2.5 \([a-z]+ \d\); a count of 0 counts as 1', report)
    loss = snippet(report).model.head.loss
    assert len(loss.pos_weight) == 40 and max(loss.pos_weight) == 2.5 and 'class_weight' not in loss
    assert max(map(len, Path('suggested.py').read_text().splitlines())) <= 120
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        assert MODELS.build(loss).pos_weight.tolist() == pytest.approx(loss.pos_weight)


def test_classifier_with_every_mistake(advise):
    report = advise('resnet_bce_digits.py', """
model = dict(backbone=dict(init_cfg=dict(checkpoint='https://host/weights.pth')), head=dict(
    init_cfg=dict(type='Normal', layer='Linear', std=0.01, bias=-4.6),
    loss=dict(_delete_=True, type='AsymmetricLoss', gamma_pos=1., gamma_neg=4., clip=0.05)))
optim_wrapper = dict(optimizer=dict(_delete_=True, type='Adam', lr=1e-3, weight_decay=1e-4))
custom_hooks = [dict(type='EMAHook', momentum=3e-4)]
""", '--gpus', '2')
    assert 'Note: model.backbone.init_cfg.checkpoint = https://host/weights.pth is not a local file' in report
    assert '## Findings: 6' in report
    for number, where in enumerate(('train_dataloader.dataset.metainfo.classes', 'custom_hooks.0.momentum',
                                    'model.head.loss.type', 'model.head.loss.gamma_pos', 'model.head.loss.clip',
                                    'optim_wrapper.optimizer'), 1):
        assert f'\n{number}. ' in report and f'   where: {where}\n' in report
    # 3 batches an epoch are 2 iterations on 2 GPUs, for 8 epochs.
    assert 'for 16 iterations' in report
    assert table(report)['the config'][3] == '100%'
    assert snippet(report).model.head.loss.clip == 0


def test_labels_without_annotation(advise, tmp_path):
    """Of 40 labels an image has one that is there and one that is not; the other 38 are half a negative each."""
    ids = [f'{i:016x}' for i in range(8)]
    for i in ids:
        Image.new('RGB', (64, 64)).save(tmp_path / f'{i}.jpg')
    Path('classes.csv').write_text('\n'.join(f'/m/{c},Class {c}' for c in range(40)))
    Path('labels.csv').write_text('ImageID,Source,LabelName,Confidence\n' + ''.join(
        f'{i},verification,/m/{c},1\n{i},verification,/m/{c + 20},0\n' for c, i in enumerate(ids)))
    report = advise('resnet_asl_digits.py', RANDOM + f"""
model['head'] = dict(init_cfg=None, loss=dict(ignore_index=-1, weight_unannotated=0.5))
train_dataloader['dataset'] = dict(
    _delete_=True, type='mmasl.OpenImages', data_root={str(tmp_path)!r}, ann_file='labels.csv',
    class_file='classes.csv', description_file='classes.csv', unannotated='ignore', pipeline=[
        dict(type='LoadImageFromFile'), dict(type='PackInputs')])
""")
    assert '304 labels ignored' in report and 'negatives per positive: 1 without the ignored' in report
    assert '8 positives, 160 negatives (20 per positive)' in report
    assert 'each label without annotation counts as 0.5 negatives' in report
    assert '20 negatives per positive, where a label without annotation counts as 0.5: App. B' in report
    rows = table(report)
    assert rows['the config'] == rows['suggested below'] and rows['the config'][0] == '(0, 4, 0.05)'
    loss = snippet(report).model.head.loss
    assert (loss.ignore_index, loss.weight_unannotated) == (-1, 0.5)


def test_softmax_classifier(advise, tmp_path):
    glyphs = DigitScenes(train=12, val=1, size=32, single=True, labels_per_image=1).write(tmp_path / 'glyphs')
    report = advise('resnet_ce_glyphs.py', f"train_dataloader['dataset']['data_root'] = {str(glyphs)!r}")
    assert 'CrossEntropyLoss, softmax' in report and table(report)['the config'][1] == '50.0%'
    assert 'App. G' in report and snippet(report).model.head.loss.gamma_neg == 4


def test_detector(advise):
    report = advise('fcos_focal_digits.py', RANDOM, '--plot', 'classes.png')
    assert '12 images, 40 classes, detection' in report
    assert re.search(r'starts at p = 0\.(01|0098|0099);', report)  # FCOS' prior
    rows = table(report)
    assert rows['the config'] == rows['focal loss'] and rows['with a margin'][3] == '100%'
    loss = snippet(report).model.bbox_head.loss_cls
    assert loss == dict(type='mmasl.AsymmetricLoss', use_sigmoid=True, gamma_pos=1, gamma_neg=2, clip=0, alpha=0.25,
                        loss_weight=1)
    assert '## Findings: 1' in report and Path('classes.png').stat().st_size > 1000


def test_detector_with_every_mistake(advise):
    report = advise('fcos_focal_digits.py', RANDOM + """
model['bbox_head'] = dict(loss_cls=dict(
    _delete_=True, type='mmasl.AsymmetricLoss', gamma_pos=1., gamma_neg=4., clip=0.05))
""")
    assert '## Findings: 4' in report and 'predictions have 41' in report
    for key in ('use_sigmoid', 'alpha', 'clip'):
        assert f'where: model.bbox_head.loss_cls.{key}\n' in report


def test_the_suggestion_has_no_findings(advise):
    """What is suggested builds, and is what is suggested for it in turn."""
    report = advise('fcos_focal_digits.py', RANDOM)
    lines = report.split('```python\n')[1].split('```')[0].splitlines()
    again = advise('fcos_focal_digits.py', '\n'.join(lines[2:]) + "\nmodel['backbone'] = dict(init_cfg=None)")
    assert table(again)['the config'] == table(again)['asymmetric, suggested below']
    assert '## Findings: 1' in again


def test_weights_to_start_from(advise, digits):
    import torch
    torch.save({}, 'mine.pth')
    report = advise('resnet_bce_digits.py', RANDOM + "\nload_from = 'https://host/a.pth'")
    assert 'Note: load_from = https://host/a.pth is not a local file' in report
    report = advise('resnet_bce_digits.py', RANDOM + "\nload_from = 'mine.pth'")
    assert 'Note' not in report


@pytest.mark.parametrize('model, dropped', (
    (dict(backbone=dict(init_cfg=[dict(type='Kaiming'), dict(type='Pretrained', checkpoint='torchvision://r')])),
     'model.backbone.init_cfg.1.checkpoint'),
    (dict(backbone=dict(pretrained=True)), 'model.backbone.pretrained'),
    (dict(heads=[dict(init_cfg=dict(type='Pretrained', checkpoint='gone.pth'))]), 'model.heads.0.init_cfg.checkpoint')))
def test_downloads_are_dropped(model, dropped):
    assert [what.split(' = ')[0] for what in drop_downloads(model)] == [dropped]
    assert list(drop_downloads(model)) == []


def test_local_weights_are_kept():
    Path('here.pth').touch()
    model = dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='here.pth'), pretrained='here.pth'))
    assert list(drop_downloads(model)) == [] and model['backbone']['init_cfg']['checkpoint'] == 'here.pth'


@pytest.mark.parametrize('text, argv, message', (
    ('', ['--batches', '0'], '--batches 0: give 1'),
    ('', ['--weights', 'positive', 'cap=much'], '--weights positive cap=much: give options as KEY=NUMBER'),
    ('', ['--weights', 'positive', 'cap=0'], 'cap=0.0 must be a number > 0'),
    ('', ['--plot', 'x.txt'], 'give a .png, .svg or .pdf file'),
    ('', ['--cfg-options', 'train_dataloader.dataset.ann_file=gone.json'], 'gone.json'),
    ('train_dataloader = None', [], 'c.py has no train_dataloader'),
    ('model = dict(head=dict(num_classes=10))', [], 'model.head has num_classes=10, but the training data has 40'),
    ("train_dataloader['dataset']['classes'] = ['red 0', 'none']", [], 'none')),
    ids=('batches', 'weights', 'cap', 'plot', 'data', 'loader', 'classes', 'labels'))
def test_refusals(text, argv, message, advise):
    if text.startswith('model'):
        text += "\nmodel['backbone'] = dict(init_cfg=None)"
    assert message in refusal(advise, 'resnet_bce_digits.py', text, *argv)


# --- probe

@pytest.fixture(scope='module')
def probed(tmp_path_factory) -> Path:
    """A folder with digits and the weights of a classifier."""
    root = tmp_path_factory.mktemp('probed')
    DigitScenes(train=80, val=1).write(root / 'digits')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = Config.fromfile(ROOT / 'configs/digits/resnet_asl_digits.py').model
        model.backbone.pop('init_cfg')
        torch.save(dict(state_dict=MODELS.build(model).state_dict()), root / 'weights.pth')
    return root


def test_probe(advise, probed, monkeypatch):
    text = (f"{RANDOM}\nload_from = {str(probed / 'weights.pth')!r}\n"
            f"train_dataloader['dataset']['data_root'] = {str(probed / 'digits')!r}")
    args = ('resnet_asl_digits.py', text, '--probe', '--probe-images', '60')
    report = advise(*args).split('## Probe')[1]
    assert 'linear heads on frozen features of 60 training images' in report
    rows = table(report)
    assert list(rows) == list(probe_report.SETTINGS)
    best, = (name for name in rows if not rows[name][2])
    scores = {name: float(cells[1].split(' ± ')[0]) for name, cells in rows.items()}
    assert scores[best] == max(scores.values()) and all(re.fullmatch(r'[+-]\d+\.\d ± \d+\.\d', rows[name][2])
                                       for name in rows if name != best)
    assert rows['cross-entropy'][3:5] == rows['cross-entropy'][5:7], 'cross-entropy is calibrated'
    loss = snippet(report).model.head.loss
    assert f'({loss.gamma_pos:g}, {loss.gamma_neg:g}, {loss.clip:g})' == rows[best][0]
    assert loss.detach_focusing == ('constant weight' in best)
    assert "_base_ = './c.py'" in report, 'to save beside the config'
    second = max(scores.keys() - {best}, key=scores.__getitem__) if best == 'cross-entropy' else 'cross-entropy'
    assert f'Train {best} and {second} at several learning rates' in report
    # The features come from the cache.
    monkeypatch.setattr(probe_report, 'extract_features', None)
    assert advise(*args, '--probe-minutes', '1e-9').split('## Probe')[1].count('No time was left for: focal loss') == 1


def test_probe_goes_on_after_its_time(advise, probed, monkeypatch, tmp_path):
    """A second call computes the features that the first one had no time for, and a larger sample extends a smaller."""
    text = (f"{RANDOM}\nload_from = {str(probed / 'weights.pth')!r}\n"
            f"train_dataloader['dataset']['data_root'] = {str(probed / 'digits')!r}")
    monkeypatch.setattr(probe_report, 'SETTINGS', {'cross-entropy': Setting(0, 0, 0), 'focal loss': Setting(2, 2, 0)})
    search = probe_report.search
    monkeypatch.setattr(probe_report, 'search', lambda x, y, setting: (
        samples.append((x, y)), search(x, y, setting))[1])
    samples: list[tuple[torch.Tensor, torch.Tensor]] = []
    reports = [advise('resnet_asl_digits.py', text, '--probe', '--probe-cache', str(tmp_path / folder),
                      '--probe-images', images, '--probe-minutes', minutes)
               for folder, images, minutes in (
                   ('a', '60', '1e-9'), ('a', '70', '1e-9'), ('a', '70', '9'), ('a', '50', '9'), ('b', '70', '9'))]
    assert [len(x) for x, _ in samples] == [32, 64, 70, 70, 50, 50, 70, 70]
    assert 'ended after 32 of 60 images' in reports[0] and 'ended after 64 of 70 images' in reports[1]
    assert not any('The time for features' in report for report in reports[2:])
    for one, other in zip(samples[2], samples[-1], strict=True):
        torch.testing.assert_close(one, other)


def test_probe_takes_each_image_once(probed, monkeypatch):
    """Wrappers that repeat images would put one into two folds. The others remain, with the pipeline of the evaluation.
    """
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        cfg = Config.fromfile(ROOT / 'configs/digits/resnet_asl_digits.py')
        half = [dict(cfg.train_dataloader.dataset, data_root=str(probed / 'digits'), indices=list(part))
                for part in (range(40), range(40, 80))]
        cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=3, dataset=dict(type='ConcatDataset', datasets=[
            dict(type='ClassBalancedDataset', oversample_thr=0.9, dataset=dict(type='RepeatDataset', times=2,
                                                                               dataset=half[0])),
            dict(type='KFoldDataset', fold=1, num_splits=4, dataset=half[1])]))
        cfg.val_dataloader.dataset.pipeline = [dict(type='PackInputs', meta_keys=('img_path', ))]
        seen: list[str] = []

        def extract(model, batches, num_classes):
            assert num_classes == 40
            for batch in batches:
                seen.extend(sample.img_path for sample in batch['data_samples'])
                yield torch.zeros(1, 1), torch.zeros(1, 1)

        monkeypatch.setattr(probe_report, 'extract_features', extract)
        monkeypatch.setattr(probe_report.DATASETS, 'build', lambda data, build=probe_report.DATASETS.build: (
            built.append(data), build(data))[1])
        built: list = []
        probe_report.load_features(cfg, nn.Linear(1, 1), 1000, math.inf, Path('cache'), lambda items, what: items)
    assert len(seen) == len(set(seen)) == 40 + 30
    assert 'Repeat' not in str(built) and 'Balanced' not in str(built)


@pytest.mark.parametrize('base, argv, message', (
    ('fcos_focal_digits.py', (), 'not detectors'),
    ('resnet_asl_digits.py', (), 'has no pretrained weights'),
    ('resnet_asl_digits.py', ('--cfg-options', 'load_from=https://host/a.pth'), 'load_from = https://host/a.pth'),
    ('resnet_asl_digits.py', ('--probe-images', '10'), 'give 50 images or more')))
def test_probe_refuses(advise, base, argv, message):
    assert message in refusal(advise, base, RANDOM, '--probe', *argv)
