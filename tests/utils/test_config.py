"""Types of a config: names, scopes, dotted paths, classes and subclasses are the same to every tool."""
from fractions import Fraction

import mmengine
import pytest
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import LoadEmptyAnnotations
from mmengine.config import Config, ConfigDict
from mmengine.hooks import EMAHook
from mmengine.optim import AmpOptimWrapper, OneCycleLR, OptimWrapper
from mmengine.registry import DATASETS, HOOKS, TRANSFORMS
from mmpretrain.models import ImageClassifier, MultiLabelLinearClsHead

from mmasl.apis.detection import name_type
from mmasl.apis.model_files import inference_dataset, use_calibrated_head
from mmasl.datasets.validation import check_annotation_files
from mmasl.engine.hooks import CheckDataHook
from mmasl.errors import ConfigError, DataError
from mmasl.utils.config import is_kind, iter_dataset_configs, metainfo_classes, resolve_type
from mmasl.utils.tools import TEST_HOOKS, add_hooks, check_data, drop_pretrained, is_classification
from tools.train import enable_amp, enable_auto_scale_lr


class Animals(CocoDataset):
    METAINFO = dict(classes=('cat', 'dog'))


class Mixture:
    """A wrapper that nobody knows."""

    def __getitem__(self, index):
        return index

    def __len__(self):
        return 1


class Checks(CheckDataHook):
    pass


@pytest.mark.parametrize('kind, scope', [
    ('CocoDataset', 'mmdet'), ('mmdet.CocoDataset', 'mmpretrain'), ('mmdet.CocoDataset', None),
    ('mmdet.datasets.CocoDataset', None), (CocoDataset, None)])
def test_every_way_to_name_a_class(kind, scope):
    assert resolve_type(kind, DATASETS, scope) is CocoDataset and is_kind(kind, CocoDataset, DATASETS, scope)


@pytest.mark.parametrize('kind', ['Unknown', 'mmdet.Unknown', '.*fc', None, '', 'no.such.Class'])
def test_what_is_no_class(kind):
    assert resolve_type(kind, DATASETS, 'mmdet') is None and not is_kind(kind, CocoDataset, DATASETS)


def test_data_sets_inside_all_wrappers():
    inner = dict(type='CocoDataset', pipeline=[dict(type='LoadImageFromFile')], metainfo=dict(type='CocoDataset'))
    config = dict(type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=[
        inner, dict(type='mmpretrain.KFoldDataset', dataset=inner), dict(type='MultiImageMixDataset', dataset=inner,
                                                                         pipeline=[dict(type='Mosaic')]),
        dict(type=Mixture, first=inner, others=[dict(type=Animals)])]))
    found = list(iter_dataset_configs(config, 'data', 'mmdet'))
    assert [key for key, _ in found] == [
        'data.dataset.datasets.0', 'data.dataset.datasets.1.dataset', 'data.dataset.datasets.2.dataset',
        'data.dataset.datasets.3.first', 'data.dataset.datasets.3.others.0']
    assert all(dataset is inner for _, dataset in found[:4])
    assert list(iter_dataset_configs(inner, 'data', 'mmdet')) == [('data', inner)]


@pytest.mark.parametrize('metainfo, classes', [
    ({}, None), (dict(classes=[]), None), (dict(CLASSES=('a', 'b')), ('a', 'b')),
    ([dict(classes=('a', 'b'), palette=1), dict(classes=['a', 'b'])], ('a', 'b')),
    ([dict(classes=('a', 'b')), dict(classes=('b', 'a'))], None), ([dict(classes=('a', )), {}], None), ([], None)])
def test_classes_of_one_or_several_metainfos(metainfo, classes):
    assert metainfo_classes(metainfo) == classes


def test_the_first_of_several_test_sets_has_the_pipeline():
    data = ConfigDict(type='ConcatDataset', datasets=[dict(type='Data', pipeline=[1]), dict(type='Data')])
    assert inference_dataset(Config(dict(test_dataloader=dict(dataset=data)))).pipeline == [1]


def test_the_family_of_a_config():
    for scope, kind, answer in (('mmpretrain', 'Any', True), ('mmdet', 'Any', False), (None, ImageClassifier, True),
                                ('mine', 'mmpretrain.ImageClassifier', True), (None, 'mmdet.FCOS', False)):
        assert is_classification(Config(dict(default_scope=scope, model=dict(type=kind)))) is answer
    lora = dict(type='mmpretrain.LoRAModel', module=dict(type=ImageClassifier))
    assert is_classification(Config(dict(model=lora)))


@pytest.mark.parametrize('place', ['custom_hooks', 'default_hooks'])
@pytest.mark.parametrize('kind', ['mmasl.CheckDataHook', CheckDataHook, Checks, 'object'])
def test_a_hook_is_added_once(place, kind):
    hook = CheckDataHook(3) if kind == 'object' else dict(type=kind, skip_unreadable=3)
    cfg = Config({place: [hook] if place == 'custom_hooks' else dict(check=hook, timer=None)})
    add_hooks(cfg, *TEST_HOOKS)
    added = [hook for hook in cfg.custom_hooks if not isinstance(hook, CheckDataHook)]
    assert sum(is_kind(hook.type, CheckDataHook, HOOKS) for hook in added) == (
        place == 'custom_hooks' and kind != 'object')
    assert [hook.type for hook in added][-2:] == list(TEST_HOOKS[1:])


@pytest.mark.parametrize('kind, becomes', [
    ('OptimWrapper', 'AmpOptimWrapper'), (OptimWrapper, 'AmpOptimWrapper'), ('AmpOptimWrapper', 'AmpOptimWrapper'),
    (AmpOptimWrapper, AmpOptimWrapper), ('mmengine.OptimWrapper', 'AmpOptimWrapper'), (EMAHook, None)])
def test_mixed_precision(kind, becomes):
    wrapper = ConfigDict(type=kind)
    if becomes is None:
        with pytest.raises(ConfigError, match="optim_wrapper.type is 'EMAHook'"):
            enable_amp(wrapper)
    else:
        enable_amp(wrapper)
        assert wrapper == dict(type=becomes, loss_scale='dynamic')


@pytest.mark.parametrize('schedule', [
    dict(type='OneCycleLR'), dict(type=OneCycleLR), [dict(type='mmengine.OneCycleLR')],
    dict(backbone=[dict(type=OneCycleLR)], head=dict(type='StepLR'))])
def test_scaling_the_rate_of_one_cycle(schedule):
    cfg = Config(dict(auto_scale_lr=dict(base_batch_size=16), param_scheduler=schedule))
    with pytest.raises(ConfigError, match='no effect on OneCycleLR'):
        enable_auto_scale_lr(cfg)


@pytest.mark.parametrize('kind', ['CocoDataset', 'mmdet.CocoDataset', CocoDataset, Animals])
def test_files_of_every_coco_data_set_are_checked(kind, tmp_path):
    file = tmp_path / 'a.json'
    file.write_text('{"images": [{"id": 0, "file_name": "a.jpg", "width": 9, "height": 9}], "annotations": [], '
                    '"categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]}')
    data = dict(type=kind, ann_file=str(file))
    if kind is not Animals:
        data['metainfo'] = dict(classes=('cat', 'dog'))
    wrapped = dict(type='RepeatDataset', times=2, dataset=dict(type=Mixture, inner=data))
    cfg = Config(dict(default_scope='mmdet', train_dataloader=dict(dataset=wrapped)))
    with pytest.raises(DataError, match="(?i)class 0 of train_dataloader.dataset.dataset.inner is 'cat', but 'dog'"):
        check_annotation_files(cfg, 'train')


@pytest.mark.parametrize('content', [dict(annotations=[]), {}], ids=['no boxes', 'no annotations'])
@pytest.mark.parametrize('kind', ['LoadEmptyAnnotations', 'mmdet.LoadEmptyAnnotations', LoadEmptyAnnotations])
def test_unlabelled_images_of_a_semi_supervised_training(kind, content, tmp_path):
    mmengine.dump(content | dict(images=[dict(id=0, file_name='a.jpg', width=9, height=9)],
                                 categories=[dict(id=1, name='dog')]), str(file := tmp_path / 'a.json'))
    data = dict(type='CocoDataset', ann_file=str(file), metainfo=dict(classes=('dog', )),
                pipeline=[dict(type='LoadImageFromFile'), dict(type=kind)])
    joined = dict(type='ConcatDataset', datasets=[data])
    cfg = Config(dict(default_scope='mmdet', train_dataloader=dict(dataset=joined)))
    check_annotation_files(cfg, 'train')
    cfg.train_dataloader.dataset.datasets[0].pipeline[1].type = 'LoadAnnotations'
    with pytest.raises(DataError, match="None of the 0 boxes|lacks .'annotations'."):
        check_annotation_files(cfg, 'train')


def test_metrics_of_several_data_sets(tmp_path):
    """MultiDatasetsEvaluator has one metric for each part of a ConcatDataset."""
    paths, parts = [str(tmp_path / f'{number}.json') for number in range(2)], []
    for number, path in enumerate(paths):
        box = dict(id=0, image_id=number, category_id=1, bbox=[1, 1, 4, 4], area=16, iscrowd=0)
        mmengine.dump(dict(images=[dict(id=number, file_name='a.jpg', width=9, height=9)], annotations=[box],
                           categories=[dict(id=1, name='dog')]), path)
        parts.append(dict(type='CocoDataset', ann_file=path, metainfo=dict(classes=('dog', )), test_mode=True))
    metrics = [dict(type='CocoMetric', ann_file=path) for path in paths]
    cfg = Config(dict(default_scope='mmdet', val_dataloader=dict(dataset=dict(type='ConcatDataset', datasets=parts)),
                      val_evaluator=dict(type='MultiDatasetsEvaluator', metrics=metrics)))
    check_annotation_files(cfg, 'val')
    mmengine.dump(mmengine.load(paths[1]) | dict(annotations=[]), paths[1])
    with pytest.raises(DataError, match='1.json of val_evaluator.metrics.1 has no annotations'):
        check_annotation_files(cfg, 'val')
    cfg.val_evaluator.metrics[1].ann_file = 'missing.json'
    with pytest.raises(DataError, match='missing.json   <- val_evaluator.metrics.1.ann_file'):
        check_data(cfg, 'val')


def test_calibrated_heads():
    for kind in ('MultiLabelLinearClsHead', 'mmpretrain.MultiLabelLinearClsHead', MultiLabelLinearClsHead):
        cfg = Config(dict(default_scope='mmpretrain', model=dict(head=dict(type=kind))))
        use_calibrated_head(cfg)
        assert cfg.model.head.type == 'mmasl.MultiLabelLinearClsHead'
    use_calibrated_head(cfg)
    assert cfg.model.head.type == 'mmasl.MultiLabelLinearClsHead'
    with pytest.raises(ConfigError, match='LinearClsHead, which predicts no calibrated score'):
        use_calibrated_head(Config(dict(default_scope='mmpretrain', model=dict(head=dict(type='LinearClsHead')))))
    cfg = Config(dict(default_scope='mmdet', model=dict(type='FCOS', bbox_head=dict(type='FCOSHead', num_classes=4))))
    for _ in range(2):  # the second time, there is nothing to replace
        use_calibrated_head(cfg)
        assert cfg.model.bbox_head == dict(type='mmasl.CalibratedDenseHead', head_type='FCOSHead', num_classes=4)


def test_weights_that_a_checkpoint_replaces():
    timm = dict(type='mmpretrain.TIMMBackbone', pretrained=True, checkpoint_path='a.pth')
    for model, dropped in (
            (dict(type='ImageClassifier', backbone=timm), True),
            (dict(type='SemiBaseDetector', detector=dict(type='FCOS', backbone=timm)), True),
            (dict(type='ImageClassifier', backbone=dict(type='LoRAModel', module=timm)), False)):
        cfg = Config(dict(default_scope='mmpretrain', model=model))
        drop_pretrained(cfg)
        assert ("'pretrained': True" not in str(cfg.model)) is ("'a.pth'" not in str(cfg.model)) is dropped


def test_names_for_mmdetections_inferencer():
    loader = resolve_type('LoadImageFromFile', TRANSFORMS)
    for kind in ('mmcv.LoadImageFromFile', loader, 'LoadImageFromFile', type('Mine', (loader, ), {})):
        assert name_type(ConfigDict(type=kind, to_float32=True), 'mmdet') == dict(
            type='LoadImageFromFile', to_float32=True)
    assert name_type(ConfigDict(type=Fraction), 'mmdet') == dict(type='fractions.Fraction')
    assert name_type(ConfigDict(type='PackDetInputs'), 'mmdet') == dict(type='PackDetInputs')
