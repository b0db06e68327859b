"""Bad data in tools/train.py and tools/test.py: every row of the section "Bad data" of docs/faults.md.

Each row of the table states the outcome and the words of the message, and the test holds the tools to both.
"""
import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdet.datasets import ConcatDataset
from mmengine.config import Config
from mmengine.dataset import BaseDataset, Compose
from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from mmpretrain.datasets import MultiTaskDataset
from PIL import Image
from torch import nn

from mmasl.datasets import validation
from mmasl.datasets.validation import check_same_classes, check_samples, iter_datasets
from mmasl.engine.hooks import checks
from mmasl.engine.hooks.adaptive_asymmetry import AdaptiveAsymmetryHook
from mmasl.engine.hooks.checks import (
    CheckDataHook,
    CheckFiniteHook,
    GuardedLoader,
    _GuardAgain,
    check_class_counts,
    describe_logits,
)
from mmasl.errors import ConfigError, DataError, NonFiniteError, UnreadableImageError
from mmasl.models.losses.asymmetric_loss import AsymmetricLoss
from mmasl.utils import distributed
from mmasl.utils.distributed import first_of_all_ranks
from mmasl.utils.tools import TEST_HOOKS, add_hooks, exit_on_user_error
from tools import test, train

ROOT = Path(__file__).parents[3]
NAMES = ['cat', 'dog', 'elk']


CONFIG = """
default_scope = 'mmpretrain'
custom_imports = dict(imports=['mmasl'], allow_failed_imports=False)
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
train_dataloader = dict(batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=dict(
    {dataset}, {train}pipeline=pipeline))
val_dataloader = dict(batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=dict(
    {dataset}, {val}test_mode=True, pipeline=pipeline))
val_evaluator = {evaluator}
test_dataloader, test_evaluator = val_dataloader, val_evaluator
model = dict(type='ImageClassifier', data_preprocessor=dict(num_classes={classes}, mean=[0.] * 3, std=[255.] * 3),
             backbone=dict(type='ResNet', depth=18, stem_channels=4, base_channels=4), neck=dict(
             type='GlobalAveragePooling'), head=dict(type='MultiLabelLinearClsHead', in_channels=32,
             num_classes={classes}, loss=dict(type='mmasl.AsymmetricLoss')))
train_cfg, val_cfg, test_cfg = dict(by_epoch=True, max_epochs=2), dict(), dict()
optim_wrapper = dict(optimizer=dict(type='SGD', lr=1e-3))
default_hooks = dict(logger=dict(type='LoggerHook', interval=1))
"""
DETECTION = """
_base_ = '{configs}/digits/fcos_asl_digits.py'
pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True), dict(type='PackDetInputs',
    meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
test_pipeline = [pipeline[0], dict(type='Resize', scale=(32, 32), keep_ratio=True), *pipeline[1:]]
train_dataloader = dict(batch_size=2, sampler=dict(shuffle=False), dataset=dict(
    metainfo=dict(_delete_=True, classes={names}), data_root='coco', ann_file='train.json',
    data_prefix=dict(img='images'), pipeline=pipeline))
val_dataloader = dict(batch_size=4, dataset=dict(
    metainfo=dict(_delete_=True, classes={names}), data_root='coco', ann_file='train.json',
    data_prefix=dict(img='images'), pipeline=test_pipeline))
val_evaluator = dict(ann_file='coco/train.json')
test_dataloader, test_evaluator = val_dataloader, val_evaluator
model = dict(backbone=dict(init_cfg=None), bbox_head=dict(num_classes=3))
train_cfg = dict(max_epochs=2, val_interval=1)
param_scheduler = None
default_hooks = dict(logger=dict(interval=1))
"""
COCO = "type='mmasl.CocoMultiLabel', data_root='coco', data_prefix=dict(img_path='images')"
REPORT = "dict(type='mmasl.MultiLabelMetric')"
OPEN_IMAGES = ("type='mmasl.OpenImages', data_root='open_images', data_prefix='images', class_file='classes.txt', "
               "unannotated='ignore', ann_file='labels.csv'")
CONFIGS = dict(
    coco=CONFIG.format(dataset=COCO, train="ann_file='train.json', ", val="ann_file='val.json', ", evaluator=REPORT,
                       classes=3),
    voc=CONFIG.format(dataset="type='mmasl.VOCMultiLabel', data_root='voc', difficult='ignore'", evaluator=REPORT,
                      train="split='trainval', ", val="split='trainval', ", classes=20),
    nus_wide=CONFIG.format(dataset="type='mmasl.NUSWide', data_root='nus_wide', ann_file='data.csv'", evaluator=REPORT,
                           train="split='train', ", val="split='val', ", classes=81),
    open_images=CONFIG.format(dataset=OPEN_IMAGES, train='', val='', evaluator=REPORT, classes=3),
    herbarium=CONFIG.format(dataset="type='mmasl.Herbarium2020', data_root='herbarium', ann_file='data.json'",
                            train="split='train', ", val="split='val', ", evaluator="dict(type='Accuracy')", classes=2
                            ).replace('MultiLabelLinearClsHead', 'LinearClsHead'),
    mmpretrain=CONFIG.format(dataset="type='MultiLabelDataset', data_root='mmpretrain', data_prefix='images', "
                             "ann_file='data.json'", train='', val='', evaluator=REPORT, classes=3),
    detection=DETECTION.format(configs=ROOT / 'configs', names=NAMES))
for name in ('voc', 'open_images'):
    CONFIGS[name] = CONFIGS[name].replace("'mmasl.AsymmetricLoss'", "'mmasl.AsymmetricLoss', ignore_index=-1")


def draw(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        Image.fromarray(np.random.default_rng(number).integers(256, size=(32, 32, 3), dtype=np.uint8)).save(
            folder / name)


def coco(images: range) -> dict:
    return dict(images=[dict(id=i, file_name=f'{i}.jpg', width=32, height=32) for i in images],
                categories=[dict(id=10 + i, name=name) for i, name in enumerate(NAMES)],
                annotations=[dict(id=i, image_id=i, category_id=10 + i % 3, bbox=[4, 4, 12, 12], area=144, iscrowd=0)
                             for i in images])


@pytest.fixture(scope='module')
def good(tmp_path_factory) -> Path:
    """A folder with four to six images in the format of each data set, and the configs."""
    root = tmp_path_factory.mktemp('good')
    draw(root / 'coco/images', *(f'{i}.jpg' for i in range(10)))
    (root / 'coco/train.json').write_text(json.dumps(coco(range(6))))
    (root / 'coco/val.json').write_text(json.dumps(coco(range(6, 10))))
    draw(root / 'voc/JPEGImages', *(f'{i}.jpg' for i in range(4)))
    for folder in ('Annotations', 'ImageSets/Main'):
        (root / 'voc' / folder).mkdir(parents=True)
    (root / 'voc/ImageSets/Main/trainval.txt').write_text('0\n1\n2\n3\n')
    for i, name in enumerate(('cat', 'dog', 'cow', 'person')):
        (root / f'voc/Annotations/{i}.xml').write_text(
            f'<annotation><object><name>{name}</name><difficult>0</difficult></object></annotation>')
    draw(root / 'nus_wide/images', *(f'{i}.jpg' for i in range(6)))
    (root / 'nus_wide/data.csv').write_text('filepath,label,split_name\n' + ''.join(
        f'images/{i}.jpg,"[\'sky\', \'sun\']",{"val" if i % 3 else "train"}\n' for i in range(6)))
    draw(root / 'open_images/images', *(f'{i:016x}.jpg' for i in range(4)))
    (root / 'open_images/classes.txt').write_text('/m/1\n/m/2\n/m/3\n')
    (root / 'open_images/labels.csv').write_text('ImageID,Source,LabelName,Confidence\n' + ''.join(
        f'{i:016x},verification,/m/{c},{(i + c) % 2}\n' for i in range(4) for c in (1, 2, 3)))
    draw(root / 'herbarium/images', *(f'{i}.jpg' for i in range(8)))
    (root / 'herbarium/data.json').write_text(json.dumps(dict(
        images=[dict(id=i, file_name=f'images/{i}.jpg') for i in range(8)],
        categories=[dict(id=i, name=f'species {i}') for i in range(2)],
        annotations=[dict(id=i, image_id=i, category_id=i % 2) for i in range(8)])))
    draw(root / 'mmpretrain/images', *(f'{i}.jpg' for i in range(4)))
    (root / 'mmpretrain/data.json').write_text(json.dumps(dict(
        metainfo=dict(classes=NAMES), data_list=[dict(img_path=f'{i}.jpg', gt_label=[i % 3]) for i in range(4)])))
    for name, text in CONFIGS.items():
        (root / f'{name}.py').write_text(text)
    return root


# --------------------------------------------------------------------------------------------------------- the faults

def edit(path: str, change) -> None:
    """Change a JSON file by what ``change`` does to its content, or a text by what it returns."""
    file = Path(path)
    if path.endswith('.json'):
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
    else:
        file.write_text(change(file.read_text()))


def cut(path: str, keep: float = 0.5) -> None:
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[:int(len(content) * keep)])


def write(path: str, text: str) -> None:
    Path(path).write_text(text)


def boxes(content: dict) -> None:
    content['annotations'][0]['bbox'] = [float('nan'), 4, 12, 12]
    content['annotations'][1]['bbox'] = [40, 4, 12, 12]
    content['annotations'][2]['bbox'] = [4, 4, 0, 12]
    content['annotations'][3]['bbox'] = [4, float('inf'), 12, 12]


def with_decimals(content: dict) -> None:
    for ann in content['annotations']:
        ann.update(image_id=float(ann['image_id']), category_id=float(ann['category_id']))


def recode(path: str, encoding: str) -> None:
    content = json.loads(Path(path).read_text())
    content['categories'][0]['name'] = 'cat' if encoding == 'utf-8-sig' else '老虎'
    Path(path).write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))


def deep() -> None:
    for i in range(6):
        Image.fromarray(np.full((32, 32), 300 * i, np.uint16)).save(f'coco/images/{i}.png')
    edit('coco/train.json', lambda x: [image.update(file_name=f'{image["id"]}.png') for image in x['images']])


def loosely() -> None:
    for i in range(4):
        Image.open(f'voc/JPEGImages/{i}.jpg').save(f'voc/JPEGImages/{i}.png')
        Path(f'voc/JPEGImages/{i}.jpg').unlink()
    write('voc/ImageSets/Main/trainval.txt', '0\r\n1 \n\n2\n3\n\n')
    edit('voc/Annotations/1.xml', lambda x: x.replace('<difficult>0</difficult>', '<difficult/>'))


def turn() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(6):
        Image.new('RGB', (40, 32)).save(f'coco/images/{i}.jpg', exif=exif.tobytes())
    edit('coco/train.json', lambda x: [image.update(width=40) for image in x['images']])


def without_labels(content: dict) -> None:
    del content['annotations'][4:]


def checkpoint(config: str, value: float, *classes: str) -> None:
    """Write a checkpoint of the config's model whose last weights are ``value``."""
    cfg = Config.fromfile(f'{config}.py')
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        state = MODELS.build(cfg.model).state_dict()
    for name in ('head.fc.weight', 'bbox_head.conv_cls.weight'):
        if name in state:
            state[name].fill_(value)
    torch.save(dict(meta=dict(dataset_meta=dict(classes=classes)), state_dict=state), 'weights.pth')


SKIP = "custom_hooks = [dict(type='mmasl.CheckDataHook', skip_unreadable=2)]\n"
WORKER = 'train_dataloader.update(num_workers=1)\n'
DIVERGE = "param_scheduler = [dict(type='MultiStepLR', milestones=[1], gamma=1e38)]\n"
HOOKS = "custom_hooks = [dict(type='EMAHook'), dict(type='mmasl.AdaptiveAsymmetryHook')]\n"
# Fault: config ('test' before it: tools/test.py), what spoils its data, what is added to the config.
FAULTS = {
    # images
    'truncated JPEG': ('coco', lambda: cut('coco/images/2.jpg'), ''),
    'empty image file': ('coco', lambda: write('coco/images/2.jpg', ''), ''),
    'text in place of an image': ('coco', lambda: write('coco/images/2.jpg', '<html>'), ''),
    'missing image': ('coco', lambda: Path('coco/images/2.jpg').unlink(), ''),
    'missing image, detection': ('detection', lambda: Path('coco/images/2.jpg').unlink(), ''),
    'truncated JPEG, detection': ('detection', lambda: cut('coco/images/2.jpg'), ''),
    'truncated JPEG, read by a worker': ('coco', lambda: cut('coco/images/2.jpg'), WORKER),
    'empty image file, `skip_unreadable=2`': ('coco', lambda: write('coco/images/2.jpg', ''), SKIP),
    'three of them, `skip_unreadable=2`': ('coco', lambda: [cut(f'coco/images/{i}.jpg') for i in range(3)], SKIP),
    'two truncated JPEGs, read by two workers, `skip_unreadable=2`': (
        'coco', lambda: [cut(f'coco/images/{i}.jpg') for i in (0, 2)], SKIP + WORKER.replace('1', '2')),
    'missing image, `skip_unreadable=2`': ('coco', lambda: Path('coco/images/2.jpg').unlink(), SKIP),
    'truncated JPEG of the validation set, `skip_unreadable=2`': (
        'coco', lambda: cut('coco/images/8.jpg'), SKIP),
    # annotation files
    'COCO labels: file cut off': ('coco', lambda: cut('coco/train.json'), ''),
    'COCO labels: image without a file name': (
        'coco', lambda: edit('coco/train.json', lambda x: x['images'][1].pop('file_name')), ''),
    'COCO labels: unknown category': (
        'coco', lambda: edit('coco/train.json', lambda x: x['annotations'][1].update(category_id=7)), ''),
    'COCO labels: class that the file lacks': (
        'coco', lambda: None, "train_dataloader['dataset'].update(classes=('cat', 'dog', 'eel'))"),
    'COCO labels: image id twice': (
        'coco', lambda: edit('coco/train.json', lambda x: x['images'][1].update(id=0)), ''),
    'COCO labels: image file twice': (
        'coco', lambda: edit('coco/train.json', lambda x: x['images'][1].update(file_name='0.jpg')), ''),
    'COCO labels: annotation id twice': (
        'coco', lambda: edit('coco/train.json', lambda x: x['annotations'].append(x['annotations'][0])), ''),
    'COCO labels: boxes outside, degenerate, NaN': ('coco', lambda: edit('coco/train.json', boxes), ''),
    'COCO labels: images without label': ('coco', lambda: edit('coco/train.json', without_labels), ''),
    'COCO labels: images without label, `keep_empty`': (
        'coco', lambda: edit('coco/train.json', without_labels), "train_dataloader['dataset'].update(keep_empty=True)"),
    'COCO labels: no label at all': ('coco', lambda: edit('coco/train.json', lambda x: x.update(annotations=[])), ''),
    'COCO labels: ids with decimals': ('coco', lambda: edit('coco/train.json', with_decimals), ''),
    'COCO labels: id as text in the annotations alone': (
        'coco', lambda: edit('coco/train.json', lambda x: x['annotations'][1].update(image_id='1')), ''),
    'COCO labels: two categories of one name': (
        'coco', lambda: edit('coco/train.json', lambda x: x['categories'][1].update(name='cat')), ''),
    'COCO labels: names in GBK': ('coco', lambda: recode('coco/train.json', 'gbk'), ''),
    'COCO labels: UTF-8 with a byte order mark': ('coco', lambda: recode('coco/train.json', 'utf-8-sig'), ''),
    'COCO labels: one class without a comma': (
        'coco', lambda: None, "train_dataloader['dataset'].update(metainfo=dict(classes=('cat')))"),
    'COCO labels: list of classes with an empty line': (
        'coco', lambda: write('classes.txt', 'cat\n\nelk\n'),
        "train_dataloader['dataset'].update(classes='classes.txt')"),
    'COCO labels: list of classes that ends in empty lines': (
        'coco', lambda: write('classes.txt', 'cat\ndog\nelk\n\n\n'),
        "train_dataloader['dataset'].update(classes='classes.txt')"),
    '16-bit image, read with Pillow': (
        'coco', deep, "pipeline[0].update(imdecode_backend='pillow')"),
    'VOC: .png images, empty lines, an empty `<difficult/>`': ('voc', loosely, ''),
    'VOC: annotation cut off': ('voc', lambda: cut('voc/Annotations/1.xml'), ''),
    'VOC: unknown class': ('voc', lambda: edit('voc/Annotations/1.xml', lambda x: x.replace('dog', 'elk')), ''),
    'VOC: image listed twice': ('voc', lambda: write('voc/ImageSets/Main/trainval.txt', '0\n1\n0\n'), ''),
    'VOC: images of difficult objects only': (
        'voc', lambda: [edit(f'voc/Annotations/{i}.xml', lambda x: x.replace('>0<', '>1<')) for i in range(2)], ''),
    'VOC: difficult objects only': (
        'voc', lambda: [edit(f'voc/Annotations/{i}.xml', lambda x: x.replace('>0<', '>1<')) for i in range(4)], ''),
    'NUS-WIDE: row cut off': ('nus_wide', lambda: cut('nus_wide/data.csv', 0.93), ''),
    'NUS-WIDE: row cut off in its last word': (
        'nus_wide', lambda: edit('nus_wide/data.csv', lambda x: x[:-2]), ''),
    'NUS-WIDE: image listed twice': (
        'nus_wide', lambda: edit('nus_wide/data.csv', lambda x: x.replace('1.j', '0.j')), ''),
    'NUS-WIDE: unknown concept': ('nus_wide', lambda: edit('nus_wide/data.csv', lambda x: x.replace('sun', 'son')), ''),
    'NUS-WIDE: no text': ('nus_wide', lambda: shutil.copy('coco/images/0.jpg', 'nus_wide/data.csv'), ''),
    'Open Images: row cut off': ('open_images', lambda: edit('open_images/labels.csv', lambda x: x[:-2]), ''),
    'Open Images: label out of range': (
        'open_images', lambda: edit('open_images/labels.csv', lambda x: x.replace('/m/2,0', '/m/2,2')), ''),
    'Open Images: no text': ('open_images', lambda: shutil.copy('coco/images/0.jpg', 'open_images/labels.csv'), ''),
    'Herbarium: annotation twice': (
        'herbarium', lambda: edit('herbarium/data.json', lambda x: x['annotations'].append(x['annotations'][0])), ''),
    'Herbarium: image without annotation': (
        'herbarium', lambda: edit('herbarium/data.json', lambda x: x['annotations'].pop()), ''),
    'Herbarium: image file twice': (
        'herbarium', lambda: edit('herbarium/data.json', lambda x: x['images'][1].update(file_name='images/0.jpg')),
        ''),
    "MMPretrain's data set: label out of range": (
        'mmpretrain', lambda: edit('mmpretrain/data.json', lambda x: x['data_list'][2].update(gt_label=[3])), ''),
    "MMPretrain's data set: labels as 0 and 1": ('mmpretrain', lambda: edit('mmpretrain/data.json', lambda x: [
        info.update(gt_label=[0, 1, 0]) for info in x['data_list']]), ''),
    "MMPretrain's data set: sample without gt_label": (
        'mmpretrain', lambda: edit('mmpretrain/data.json', lambda x: x['data_list'][2].pop('gt_label')), ''),
    "MMPretrain's data set: label twice": (
        'mmpretrain', lambda: edit('mmpretrain/data.json', lambda x: x['data_list'][2].update(gt_label=[2, 2])), ''),
    'detection: no `area`': (
        'detection', lambda: edit('coco/train.json', lambda x: x['annotations'][1].pop('area')), ''),
    'detection: no `iscrowd`': (
        'detection', lambda: edit('coco/train.json', lambda x: x['annotations'][1].pop('iscrowd')), ''),
    'detection: no annotations to evaluate': (
        'detection', lambda: [shutil.copy('coco/train.json', 'coco/all.json'), edit(
            'coco/train.json', lambda x: x.pop('annotations'))],
        "train_dataloader['dataset'].update(ann_file='all.json')"),
    'detection: UTF-8 with a byte order mark': ('detection', lambda: recode('coco/train.json', 'utf-8-sig'), ''),
    'detection: two categories of one name': (
        'detection', lambda: edit('coco/train.json', lambda x: x['categories'][1].update(name='cat')), ''),
    'detection: one class without a comma': (
        'detection', lambda: None, "train_dataloader['dataset']['metainfo'].update(classes=('cat'))"),
    'detection: list of classes that ends in an empty line': (
        'detection', lambda: write('classes.txt', 'cat\ndog\nelk\n\n'),
        "train_dataloader['dataset']['metainfo'].update(classes='classes.txt')"),
    'detection: boxes given as corners': ('detection', lambda: edit('coco/train.json', lambda x: [
        ann.update(bbox=[15, 15, 30, 30]) for ann in x['annotations']]), ''),
    'detection: image of another size than stated': (
        'detection', lambda: edit('coco/train.json', lambda x: x['images'][1].update(width=40)), ''),
    'detection: images turned by their EXIF orientation': ('detection', turn, ''),
    'detection: no workers, but persistent ones': (
        'detection', lambda: None, 'train_dataloader.update(num_workers=0, persistent_workers=True)'),
    'detection: file cut off': ('detection', lambda: cut('coco/train.json'), ''),
    'detection: unknown category': (
        'detection', lambda: edit('coco/train.json', lambda x: x['annotations'][1].update(category_id=7)), ''),
    'detection: unknown image': (
        'detection', lambda: edit('coco/train.json', lambda x: x['annotations'][1].update(image_id=7)), ''),
    'detection: class that the file lacks': (
        'detection', lambda: edit('coco/train.json', lambda x: x['categories'][0].update(name='eel')), ''),
    'detection: classes in another order': (
        'detection', lambda: edit('coco/train.json', lambda x: x['categories'].reverse()), ''),
    'detection: image id twice': (
        'detection', lambda: edit('coco/train.json', lambda x: x['images'][1].update(id=0)), ''),
    'detection: annotation id twice': (
        'detection', lambda: edit('coco/train.json', lambda x: x['annotations'][1].update(id=0)), ''),
    'detection: category id twice': (
        'detection', lambda: edit('coco/train.json', lambda x: x['categories'][1].update(id=10)), ''),
    'detection: boxes outside, degenerate, NaN': ('detection', lambda: edit('coco/train.json', boxes), ''),
    'detection: images without box': ('detection', lambda: edit('coco/train.json', without_labels), ''),
    'detection: no image left by `filter_cfg`': (
        'detection', lambda: None, "train_dataloader['dataset'].update(filter_cfg=dict(min_size=64))"),
    # counts
    'head of another number of classes': ('coco', lambda: None, "model['head'].update(num_classes=4)"),
    'head of another number of classes, detection': (
        'detection', lambda: None, "model['bbox_head'].update(num_classes=4)"),
    'gamma_neg of another number of classes': ('coco', lambda: None, "model['head']['loss'].update(gamma_neg=[4, 4])"),
    'preprocessor of another number of classes': (
        'coco', lambda: None, "model['data_preprocessor'].update(num_classes=4)"),
    'validation with classes in another order': (
        'coco', lambda: edit('coco/val.json', lambda x: x['categories'].reverse()), ''),
    'validation without one of the classes': ('coco', lambda: edit('coco/val.json', lambda x: x.update(
        categories=x['categories'][:2], annotations=x['annotations'][:1])), ''),
    'validation set without a label of one class': ('coco', lambda: edit(
        'coco/val.json', lambda x: [ann.update(category_id=10) for ann in x['annotations']]), ''),
    'more images in a batch than there are': (
        'coco', lambda: None, 'train_dataloader.update(batch_size=8, drop_last=True)'),
    'Open Images: no image left by `indices`': (
        'open_images', lambda: None, "train_dataloader['dataset'].update(indices=0)"),
    'detection: evaluator of another file': (
        'detection', lambda: None, "val_evaluator.update(ann_file='coco/val.json')"),
    'two metrics that report one name': (
        'coco', lambda: None, "val_evaluator = [dict(type='AveragePrecision'), dict(type='mmasl.MultiLabelMetric')]"),
    '`save_best` that no metric reports': (
        'coco', lambda: None, "default_hooks = dict(checkpoint=dict(type='CheckpointHook', save_best='mAP'))"),
    'threshold of an unknown class': ('coco', lambda: None, 'val_evaluator.update(threshold=dict(eel=0.3))'),
    'checkpoint with classes in another order': ('test coco', lambda: checkpoint('coco', 0., 'dog', 'cat', 'elk'), ''),
    'checkpoint with other names of classes': ('test coco', lambda: checkpoint('coco', 0., 'cat', 'hound', 'elk'), ''),
    # numbers
    'batch whose labels are all ignored': ('mmpretrain', lambda: edit('mmpretrain/data.json', lambda x: [
        x['data_list'][i].update(gt_score=[-1, -1, -1] if i < 2 else [0, 1, 0]) for i in range(4)]),
        "model['head']['loss'].update(ignore_index=-1)"),
    'score out of range': ('mmpretrain', lambda: edit('mmpretrain/data.json', lambda x: [
        x['data_list'][i].update(gt_score=[2 * i, 1, 0]) for i in range(4)]), ''),
    'loss of NaN': ('coco', lambda: None, DIVERGE),
    'loss of NaN, EMA and adaptive asymmetry': ('coco', lambda: None, DIVERGE + HOOKS),
    'loss of NaN, detection': ('detection', lambda: None, DIVERGE + 'optim_wrapper = dict(clip_grad=None)'),
    'weights of NaN after the last step of an epoch': (
        'coco', lambda: None, DIVERGE.replace('1e38', '3e41') + "train_dataloader.update(batch_size=6)\n"
        "model['head']['loss'].update(loss_weight=100.)"),
    'weights after the last step whose logits overflow': (
        'coco', lambda: None, DIVERGE + 'train_dataloader.update(batch_size=6)'),
    'checkpoint with weights of NaN': ('test coco', lambda: checkpoint('coco', float('nan')), ''),
    'checkpoint with weights of NaN, detection': ('test detection', lambda: checkpoint('detection', float('nan')), ''),
}


def table() -> dict[str, tuple[str, list[str]]]:
    """The rows of docs/faults.md: fault, outcome, and the words of the message, split at the dots."""
    section = (ROOT / 'docs' / 'faults.md').read_text().split('\n## Bad data\n')[1].split('\n## ')[0]
    rows = [[cell.strip() for cell in line.strip('|').split(' | ')] for line in section.splitlines()
            if line.startswith('| ')]
    return {fault: (what, [piece.strip() for piece in words.strip('`').split('…') if piece.strip()])
            for fault, what, words in rows[1:]}


TABLE = table()


def test_the_table_has_the_faults_that_are_tested():
    assert list(TABLE) == list(FAULTS)
    assert {what for what, _ in TABLE.values()} <= {'refused', 'stops', 'counted', 'harmless'}


@pytest.fixture(autouse=True)
def folder(good, tmp_path, monkeypatch) -> Path:
    """A copy of the good data as the current folder, and a runner without its slow printing."""
    shutil.copytree(good, tmp_path / 'run')
    monkeypatch.chdir(tmp_path / 'run')
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.delenv('RANK', raising=False)
    monkeypatch.setattr(Runner, '_log_env', lambda self, env: None)
    monkeypatch.setattr(Runner, 'dump_config', lambda self: None)
    torch.manual_seed(0)
    return tmp_path


def run(config: str, addition: str, *flags: str) -> None:
    """tools/train.py, or tools/test.py."""
    tool, config = (test, config.removeprefix('test ')) if config.startswith('test ') else (train, config)
    with open(f'{config}.py', 'a') as file:
        file.write(addition)
    # Runs of the same second without own names would share their log.
    tool.main([f'{config}.py', *['weights.pth'] * (tool is test), *flags, '--work-dir', 'work',
               '--cfg-options', f'experiment_name={os.getcwd().replace("/", "_")}'])


def log() -> str:
    return ''.join(path.read_text() for path in Path('work').glob('*/*.log'))


def one_of_each_kind() -> list:
    """All faults. The first of each data set and outcome is fast, the others are slow."""
    seen, faults = set(), []
    for fault, (config, *_) in FAULTS.items():
        kind = config, TABLE.get(fault, ('', ))[0]
        faults.append(pytest.param(fault, marks=[pytest.mark.slow] if kind in seen else []))
        seen.add(kind)
    return faults


@pytest.mark.parametrize('fault', one_of_each_kind())
def test_fault(fault, capsys):
    (config, spoil, addition), (what, words) = FAULTS[fault], TABLE[fault]
    spoil()
    message = ''
    try:
        run(config, addition)
    except SystemExit as stop:
        message = stop.code
    text = log() + capsys.readouterr().out
    assert bool(message) == (what in ('refused', 'stops')), message or text
    if what == 'refused':
        assert 'Epoch(' not in text, 'nothing has been trained yet, and nothing is lost'
    said = message or text
    for piece in words:
        assert piece in said
        said = said.split(piece, 1)[1]
    if 'weights.pth' not in os.listdir():
        for path in Path('work').glob('*.pth'):
            assert all(x.isfinite().all() for x in torch.load(path, weights_only=False)['state_dict'].values())


# ---------------------------------------------------------------------------------------- what the table does not show

def test_nan_reaches_neither_ema_nor_the_controlled_gamma(monkeypatch):
    seen = dict(ema=[], gap=[])
    monkeypatch.setattr(EMAHook, 'after_train_iter', lambda self, runner, *_, **__: seen['ema'].append(runner.iter))
    monkeypatch.setattr(AdaptiveAsymmetryHook, 'control', lambda self, number, gap, *_: seen['gap'].append(gap.item()))
    with pytest.raises(SystemExit, match='iteration 5: loss is nan'):
        run('coco', DIVERGE + HOOKS)
    assert seen['ema'] == [0, 1, 2, 3] and len(seen['gap']) == 4 and np.isfinite(seen['gap'][:3]).all()


@pytest.mark.slow
@pytest.mark.parametrize('bad, limit, message', [((0, 2), 2, ''), ((0, 2, 3), 2, 'nor 2 others')])
def test_workers_count_together_and_an_image_once(bad, limit, message):
    for i in bad:
        cut(f'coco/images/{i}.jpg')
    addition = SKIP + 'train_dataloader.update(num_workers=2)\ntrain_cfg.update(max_epochs=3)'
    if message:
        with pytest.raises(SystemExit, match=message):
            run('coco', addition)
    else:
        run('coco', addition)
        assert log().count(' of at most 2)') == 2 and '2 images of the training set cannot be read' in log()


class Listed(BaseDataset):
    """Ten images, of which one is missing; it counts the samples that are looked at."""
    METAINFO = dict(classes=('cat', 'dog', 'elk'))

    def load_data_list(self):
        self.looked = []
        return [dict(img_path=f'coco/images/{i if i != 7 else "none"}.jpg', gt_label=[i % 3]) for i in range(10)]

    def get_data_info(self, index):
        self.looked.append(index)
        return super().get_data_info(index)


def test_the_number_of_checked_samples_is_bounded():
    for limit, looked in ((3, [0, 4, 8]), (10, list(range(10))), (99, list(range(10))), (None, list(range(10)))):
        data = Listed()
        data.looked.clear()
        if 7 in looked:
            with pytest.raises(DataError, match=r'1 of 10 images of data are missing, the first is .*none.jpg'):
                check_samples(data, 3, 'data', 0, limit)
        else:
            check_samples(data, 3, 'data', 0, limit)
        assert data.looked == looked
    with pytest.raises(ConfigError, match='max_samples=0 must be a number of samples'):
        CheckDataHook(max_samples=0)


def test_progress_is_logged(monkeypatch):
    told = []
    monkeypatch.setattr(validation, 'SECONDS_PER_REPORT', 0)
    monkeypatch.setattr(validation, 'print_log', lambda text, *_: told.append(text))
    check_samples(Listed(), 3, 'data', 1)
    assert told[3].startswith('Checking the samples of data: 3 of 10.') and 'max_samples=N' in told[3]


def test_ranks_share_the_samples_and_the_first_error(monkeypatch):
    monkeypatch.setattr(validation, 'get_world_size', lambda: 2)
    results = {}
    for rank in range(2):
        monkeypatch.setattr(validation, 'get_rank', lambda rank=rank: rank)
        monkeypatch.setattr(
            validation, 'all_gather_object', lambda found, rank=rank: results.update({rank: found}) or [])
        data = Listed()
        data.looked.clear()
        check_samples(data, 2, 'data')  # two classes: label 2 is out of range
        assert data.looked == [[0, 2], [1, 3, 5]][rank]
    monkeypatch.setattr(validation, 'all_gather_object', lambda _: [results[1], results[0]])
    with pytest.raises(DataError, match=r'coco/images/2.jpg in data has gt_label=\[2\]'):
        check_samples(Listed(), 2, 'data')


def test_a_message_of_one_rank_reaches_all(monkeypatch):
    assert first_of_all_ranks('mine') == 'mine' and first_of_all_ranks('') == ''
    monkeypatch.setattr(distributed, 'get_world_size', lambda: 3)
    monkeypatch.setattr(distributed, 'all_gather_object', lambda text: [text, 'of rank 1', 'of rank 2'])
    monkeypatch.setattr(distributed, 'all_reduce', lambda flag, op: flag.fill_(1))
    assert first_of_all_ranks('') == 'of rank 1' and first_of_all_ranks('mine') == 'mine'
    monkeypatch.setattr(distributed, 'all_reduce', lambda flag, op: None)
    assert first_of_all_ranks('') == ''


def test_images_that_other_ranks_skipped_are_counted_and_named(monkeypatch):
    hook, told = CheckDataHook(skip_unreadable=2), []
    runner = SimpleNamespace(logger=SimpleNamespace(warning=told.append))
    hook.skipped = [(Listed(), torch.zeros(10, dtype=torch.bool))]
    hook.skipped[0][1][1] = True

    def reduce(total, op):
        total[[2, 3][:others]] = 1

    monkeypatch.setattr(checks, 'all_reduce', reduce)
    others = 1
    hook.after_train_epoch(runner)
    names = 'coco/images/1.jpg, coco/images/2.jpg'
    assert told == [f'2 images of the training set cannot be read and were replaced: {names}']
    others = 2
    with pytest.raises(UnreadableImageError, match=r'3 images cannot be read \(skip_unreadable=2\)'):
        hook.after_train_epoch(runner)


def test_pipelines_that_a_hook_replaces_are_guarded_again():
    from mmcv.transforms import LoadImageFromFile

    class Own(LoadImageFromFile):
        pass

    data = Listed(pipeline=[Own()])
    loops = dict(train=SimpleNamespace(dataloader=SimpleNamespace(dataset=data)))
    hook = CheckDataHook(skip_unreadable=2)
    for _ in range(3):
        hook._guard_all(loops)
        loader, = data.pipeline.transforms
        assert isinstance(loader, GuardedLoader) and isinstance(loader.loader, Own) and loader.limit == 2
    data.pipeline = Compose([LoadImageFromFile()])
    _GuardAgain(hook, loops).before_train_epoch(None)
    loader, = data.pipeline.transforms
    assert isinstance(loader, GuardedLoader) and loader.skipped is hook.skipped[0][1] and len(hook.skipped) == 1


def test_an_image_of_a_data_set_of_another_kind_is_named(tmp_path):
    """MMPretrain's MultiTaskDataset is no BaseDataset, and replaces no sample."""
    content = dict(metainfo=dict(tasks=['a']), data_list=[dict(img_path='away.jpg', gt_label=dict(a=0))])
    (tmp_path / 'tasks.json').write_text(json.dumps(content))
    data = MultiTaskDataset('tasks.json', data_root=str(tmp_path), pipeline=[dict(type='LoadImageFromFile')])
    CheckDataHook(skip_unreadable=2)._guard_all(dict(train=SimpleNamespace(dataloader=SimpleNamespace(dataset=data))))
    with pytest.raises(UnreadableImageError, match='away.jpg .* there is no such file.*annotation file.$'):
        data[0]


def test_the_weights_are_checked_at_the_end_of_a_resumed_epoch():
    """Its batches are fewer and numbered from 0; the runner's iteration is of the whole training."""
    hook, model = CheckFiniteHook(), nn.Linear(1, 1)
    runner = SimpleNamespace(cfg={}, model=model, iter=6, epoch=1, max_iters=9, train_dataloader=range(3), hooks=[],
                             message_hub=SimpleNamespace(log_scalars={}), work_dir='work')
    nn.init.constant_(model.weight, torch.nan)
    hook.after_train_iter(runner, 0)
    with pytest.raises(NonFiniteError, match='epoch 2, iteration 6: 1 of 2 weights are not finite: weight'):
        hook.after_train_epoch(runner)


def test_buffers_that_are_meant_to_be_infinite(tmp_path):
    """A mask, and the minimum that an observer has not seen yet; others are checked."""
    hook, model = CheckFiniteHook(), nn.Sequential(nn.BatchNorm1d(2))
    model.register_buffer('mask', torch.full((4, 4), -torch.inf).triu(1))
    runner = SimpleNamespace(cfg={}, model=model, iter=6, epoch=1, work_dir=str(tmp_path))
    hook.before_run(runner)
    hook.after_train_epoch(runner)
    hook.before_test(runner)
    model[0].running_var.fill_(torch.inf)
    with pytest.raises(NonFiniteError, match='1 of 4 weights are not finite: 0.running_var'):
        hook.after_train_epoch(runner)


def test_the_weights_are_checked_before_checkpoints_by_iterations():
    """With save_begin, CheckpointHook counts from there."""
    hook, model = CheckFiniteHook(), nn.Linear(1, 1)
    nn.init.constant_(model.weight, torch.nan)
    runner = SimpleNamespace(cfg={}, model=model, epoch=0, max_iters=99, work_dir='work',
                             hooks=[CheckpointHook(4, by_epoch=False, save_begin=2)],
                             message_hub=SimpleNamespace(log_scalars={}))
    stopped = []
    for runner.iter in range(12):
        try:
            hook.after_train_iter(runner, 0)
        except NonFiniteError:
            stopped.append(runner.iter + 1)
    assert stopped == [2, 6, 10]


def test_the_place_of_logits_that_are_not_finite():
    logits = torch.zeros(3, 4)
    logits[1, 2], logits[1, 3] = float('inf'), float('nan')
    batch = dict(data_samples=[SimpleNamespace(img_path=f'{i}.jpg') for i in range(3)])
    assert describe_logits([logits], batch) == (
        '2 of 12 logits are not finite, in 1 of 3 images (1.jpg), of 2 of 4 classes (numbers 2, 3).')
    assert describe_logits([logits, logits[:2]], batch) == (
        '4 of 20 logits are not finite, of 2 of 4 classes (numbers 2, 3).')
    assert describe_logits([torch.zeros(3, 4)], batch).startswith('All 12 logits are finite: a target or a weight')
    assert describe_logits([], batch) == describe_logits([logits[:0]], batch) == ''


def test_class_counts_look_at_heads_and_their_losses():
    model = nn.Module()
    model.rpn_head, model.backbone, model.head = nn.Module(), nn.Module(), nn.Module()
    for name, count in (('rpn_head', 1), ('backbone', 1000), ('head', 3)):
        getattr(model, name).num_classes = count
    model.rpn_head.loss_cls, model.head.loss_cls = AsymmetricLoss(), AsymmetricLoss(clip=[0, 0.05, 0.1])
    check_class_counts(model, NAMES, 'data')
    with pytest.raises(ConfigError, match='model.head has num_classes=3, and data has 2 classes, cat, dog: set'):
        check_class_counts(model, NAMES[:2], 'data')
    model.head.loss_cls = AsymmetricLoss(clip=[0, 0.05])
    with pytest.raises(ConfigError, match='clip of model.head.loss_cls has 2 values, and data has 3 classes'):
        check_class_counts(model, NAMES, 'data')


def test_text_slots_are_no_classes():
    model = nn.Module()
    model.bbox_head = nn.Linear(2, 2)
    model.bbox_head.num_classes = 256
    with pytest.raises(ConfigError, match='model.bbox_head has num_classes=256'):
        check_class_counts(model, NAMES, 'data')
    model.language_model = nn.Identity()
    check_class_counts(model, NAMES, 'data')


def test_same_classes():
    check_same_classes({})
    check_same_classes(dict(train=NAMES, val=tuple(NAMES)))
    with pytest.raises(DataError, match="(?i)class 2 is 'elk' in train and 'no class' in val"):
        check_same_classes(dict(train=NAMES, val=NAMES[:2]))


class Remote(BaseDataset):

    def load_data_list(self) -> list[dict]:
        return [dict(img_path='s3://a.jpg', instances=[])]


@pytest.mark.parametrize('names, words', [
    (NAMES, None), (['cat', 'elk', 'dog'], "Class 1 is 'dog' in train_dataloader.dataset.datasets.0 and 'elk' in tra")
], ids=['palette', 'order'])
def test_sets_whose_metainfo_differs(names, words):
    """MMDetection's ConcatDataset then has a list in place of a dict."""
    metas = dict(classes=NAMES, palette=[1, 2, 3]), dict(classes=names)
    data = ConcatDataset([Remote(metainfo=meta) for meta in metas])
    assert isinstance(data.metainfo, list)
    loop = SimpleNamespace(dataloader=torch.utils.data.DataLoader(data))
    with pytest.raises(DataError, match=words) if words else nullcontext():
        CheckDataHook()._check(nn.Identity(), dict(train=loop), ())


def test_wrapped_data_sets_are_found():
    data = BaseDataset(lazy_init=True)
    other = BaseDataset(lazy_init=True)
    wrapped = SimpleNamespace(dataset=SimpleNamespace(datasets=[data, SimpleNamespace(dataset=other)]))
    assert [id(x) for x in iter_datasets(wrapped)] == [id(data), id(other)]
    unknown = SimpleNamespace(parts=[data, other], seed=3, rest=torch.utils.data.Subset(data, [0]))
    assert [id(x) for x in iter_datasets(unknown)] == [id(data), id(other), id(data)]
    assert list(iter_datasets(alone := object())) == [alone]


def test_hooks_are_added_once():
    cfg = Config(dict(custom_hooks=[dict(type='EMAHook'), dict(type='mmasl.CheckDataHook', skip_unreadable=3)]))
    for _ in range(2):
        add_hooks(cfg, *TEST_HOOKS)
    assert [hook.type for hook in cfg.custom_hooks] == [
        'EMAHook', 'mmasl.CheckDataHook', 'mmasl.CheckFiniteHook', 'mmasl.CheckStateDictHook']
    assert cfg.custom_hooks[1].skip_unreadable == 3
    with pytest.raises(ConfigError, match='skip_unreadable=-1 must be a number of images'):
        CheckDataHook(skip_unreadable=-1)


@pytest.mark.slow
def test_flags_turn_the_checks_off():
    edit('coco/val.json', lambda x: x['categories'].reverse())
    run('coco', '', '--no-check-data')
    run('coco', DIVERGE + 'val_cfg = val_dataloader = val_evaluator = None', '--no-check-data', '--no-check-finite')
    assert 'loss: nan' in log()


def test_logits_are_kept_within_a_training_iteration_only():
    hook, loss = CheckFiniteHook(), AsymmetricLoss()
    runner = SimpleNamespace(cfg={}, model=nn.ModuleList([loss]), iter=0, max_iters=9, train_dataloader=range(9),
                             hooks=[], message_hub=SimpleNamespace(log_scalars={}))
    hook.before_run(runner)

    def call():
        loss(torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3))

    call()
    assert hook.logits is None
    hook.before_train_iter(runner, 0)
    call()
    assert len(hook.logits) == 1
    hook.after_train_iter(runner, 0)
    call()
    assert hook.logits is None
    for end in (hook.before_val, hook.before_train_iter):  # after an iteration that an exception left
        hook.before_train_iter(runner, 0)
        call()
        end(*[runner, 0][:1 if end == hook.before_val else 2])
        assert not hook.logits


def test_only_errors_of_users_lose_their_traceback():
    with pytest.raises(SystemExit, match='skip_unreadable=-1 must be'), exit_on_user_error():
        CheckDataHook(skip_unreadable=-1)
    with pytest.raises(SystemExit, match='^a.jpg cannot be read$'), exit_on_user_error():
        raise UnreadableImageError(  # as a worker's error reaches the main process
            'Caught UnreadableImageError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n'
            '  ...\nmmasl.errors.UnreadableImageError: a.jpg cannot be read\n')
    with pytest.raises(ValueError, match='mine'), exit_on_user_error():
        raise ValueError('mine')
    with pytest.raises(TypeError), exit_on_user_error():
        check_same_classes(dict(train=3, val=4))  # a defect of mmasl keeps its traceback
