"""Random damage to annotation files, class lists and configs: read, or refused with one MMASLError.

An input that is read must keep its labels: they are compared with labels taken from the content directly. An input
that the checks of MMDetection's data sets accept must be read by the stock class without an error, with the same
labels, and be evaluated by pycocotools. Each input follows from its number:

    python tests/datasets/fuzz_annotation_files.py --seconds 3600 [--first NUMBER]
"""
import argparse
import contextlib
import io
import json
import logging
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.datasets import CocoDataset, XMLDataset
from mmdet.evaluation import CocoMetric
from mmengine.config import Config
from mmengine.fileio import list_from_file
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, MODELS, DefaultScope
from PIL import Image

from mmasl.datasets.annotation_files import read_class_names
from mmasl.datasets.coco import CocoMultiLabel
from mmasl.datasets.validation import check_coco_file, check_evaluation_file, check_samples, check_voc_files
from mmasl.datasets.voc import VOCMultiLabel
from mmasl.errors import MMASLError
from mmasl.models.losses.asymmetric_loss import AsymmetricLoss
from mmasl.utils.tools import building_data, exit_on_user_error, merge_options

NAMES = ['cat', 'dog', '老虎']
VALUES = [None, True, False, 0, 1, -1, 1.0, 1.5, 10.0, 2**70, 1e308, float('nan'), float('inf'), '', ' ', 'cat', 'cat ',
          '1', '1.0', [], {}, [1], ['cat'], [[1.0, 2.0]], {'id': 1}, '0.jpg', 'images/0.jpg', '../x', '\ud83d', '\x00',
          '猫']
PIECES = ['0', '1', '32', 'cat', '<difficult>', '</object>', '<name>', '</name>', '<size>', '</size>', '<xmin>1']
OPTIONS = ['train_dataloader.dataset.data_root', 'train_dataloader.dataset.pipeline.0.type', 'train_dataloder.x',
           'train_dataloader.dataset.pipeline.7.type', 'custom_hooks.0.type', 'load_from', 'a', 'a.b.0']
COUNT = 4


def prepare() -> None:
    """Make the images in the current folder."""
    for folder in ('images', 'voc/JPEGImages', 'voc/Annotations'):
        Path(folder).mkdir(parents=True)
    for i in range(COUNT):
        Image.new('RGB', (32, 24)).save(f'images/{i}.jpg')
        Image.new('RGB', (32, 24)).save(f'voc/JPEGImages/{i}.jpg')


def coco(rng: random.Random) -> dict:
    ids = rng.choice([[10, 11, 12], [1, 2, 3], ['a', 'b', 'c'], [2.5, 1.5, 7]])
    return dict(
        images=[dict(id=i, file_name=f'{i}.jpg', width=32, height=24) for i in range(COUNT)],
        categories=[dict(id=number, name=name) for number, name in zip(ids, NAMES)],
        annotations=[dict(id=i, image_id=rng.randrange(COUNT), category_id=rng.choice(ids),
                          bbox=[rng.randrange(12), rng.randrange(8), rng.randrange(2, 12), rng.randrange(2, 12)],
                          area=9, iscrowd=0) for i in range(rng.randrange(1, 8))])


def damage(rng: random.Random, content: Any) -> None:
    """Change one thing in a container: set, delete, repeat or convert a value somewhere in it."""
    node, parents = content, []
    while True:
        values = node.values() if isinstance(node, dict) else node
        inner = [value for value in values if isinstance(value, (dict, list)) and value]
        if not inner or (parents and rng.random() < 0.25):
            break
        parents.append(node)
        node = rng.choice(inner)
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    if not keys:
        return
    key, action = rng.choice(keys), rng.random()
    if action < 0.5:
        node[key] = deepcopy(rng.choice(VALUES))
    elif action < 0.65:
        del node[key]
    elif action < 0.8 and isinstance(node, list):
        node.insert(rng.randrange(len(node) + 1), json.loads(json.dumps(rng.choice(node))))
    elif isinstance(node[key], (int, float)) and not isinstance(node[key], bool):
        node[key] = rng.choice([float, str, lambda x: -x, lambda x: x + 1, lambda x: [x]])(node[key])
    elif isinstance(node, dict):
        node[rng.choice(['ignore', 'area', 'id', 'name', 'segmentation', 'iscrowd'])] = deepcopy(rng.choice(VALUES))


def encode(rng: random.Random, text: str) -> bytes:
    """Text in a random encoding, mostly UTF-8, sometimes cut off or with other bytes."""
    encoding = rng.choice(['utf-8'] * 12 + ['utf-8-sig', 'utf-16', 'gbk', 'latin-1'])
    raw = text.encode(encoding, errors='replace' if encoding in ('gbk', 'latin-1') else 'surrogatepass')
    action = rng.random()
    if action < 0.04:
        raw = raw[:rng.randrange(len(raw) + 1)]
    elif action < 0.08 and raw:
        place = rng.randrange(len(raw))
        raw = raw[:place] + bytes([rng.randrange(256)]) + raw[place + 1:]
    return raw


def choose_classes(rng: random.Random) -> Any:
    """A setting of classes, mostly a list."""
    action = rng.random()
    if action < 0.5:
        return rng.sample(NAMES, rng.randrange(1, 4))
    if action < 0.6:
        return tuple(NAMES)
    if action < 0.8:
        Path('classes.txt').write_bytes(encode(rng, rng.choice(['\n', '\r\n']).join(
            rng.choice([*NAMES, '', ' cat', 'cow']) if rng.random() < 0.2 else name for name in NAMES)))
        return 'classes.txt'
    return deepcopy(rng.choice(VALUES))


# --------------------------------------------------------------------------------------------------------- the checks

class Changed(AssertionError):
    """A label is not that of the file."""


def expect_labels(content: dict, names: list) -> dict:
    """Class names of each image id, without any reader."""
    wanted = set(names)
    name_of = {category['id']: str(category['name']) for category in content['categories']}
    found: dict = {image['id']: set() for image in content['images']}
    for ann in content['annotations']:
        name = name_of[ann['category_id']]
        if name in wanted:
            found[ann['image_id']].add(name)
    return found


def fuzz_coco(rng: random.Random) -> str:
    content = coco(rng)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        damage(rng, content)
    try:
        Path('a.json').write_bytes(encode(rng, json.dumps(content, ensure_ascii=rng.random() < 0.3)))
    except UnicodeEncodeError:
        return 'no text'
    classes = None if rng.random() < 0.4 else choose_classes(rng)
    said = [read_labels(classes, rng.random() < 0.5, rng.random() < 0.3), read_boxes(classes)]
    return ', '.join(said)


def read_labels(classes: Any, metainfo: bool, test_mode: bool) -> str:
    how: dict = dict(metainfo=dict(classes=classes)) if metainfo else dict(classes=classes)
    try:
        data = CocoMultiLabel('a.json', data_prefix=dict(img_path='images'), keep_empty=True, test_mode=test_mode,
                              **({} if classes is None else how))
        check_samples(data, len(data.CLASSES), 'data')
    except MMASLError:
        return 'labels refused'
    raw = Path('a.json').read_bytes()
    content = json.loads(raw.decode(json.detect_encoding(raw), errors='replace'))
    for info in map(data.get_data_info, range(len(data))):
        if 'gt_label' not in info:
            if 'annotations' in content:
                raise Changed('annotations were not read')
        elif {data.CLASSES[i] for i in info['gt_label']} != (
                wanted := expect_labels(content, data.CLASSES)[info['img_id']]):
            raise Changed(f'{info} is not {wanted}')
    return 'labels read'


def read_boxes(classes: Any) -> str:
    names = NAMES if classes is None else classes
    try:
        names = read_class_names(names, 'classes')
        check_coco_file('a.json', names, 'data', {})
    except MMASLError:
        return 'boxes refused'
    data = CocoDataset(ann_file='a.json', data_prefix=dict(img='images'), metainfo=dict(classes=list(names)))
    content = json.loads(Path('a.json').read_text())
    name_of = {category['id']: category['name'] for category in content['categories']}
    for info in map(data.get_data_info, range(len(data))):
        boxes = Counter((name_of[ann['category_id']], *ann['bbox'][:2]) for ann in content['annotations']
                        if ann['image_id'] == info['img_id'] and 'bbox' in ann and isinstance(ann['bbox'], list))
        for instance in info['instances']:
            if not boxes[(names[instance['bbox_label']], *instance['bbox'][:2])]:
                raise Changed(f'{instance} is not in the file')
    try:
        check_evaluation_file('a.json', 'evaluator')
    except MMASLError:
        return 'boxes read'
    metric = CocoMetric(ann_file='a.json')
    metric.dataset_meta = dict(classes=list(names))
    for info in map(data.get_data_info, range(len(data))):
        boxes = torch.tensor([x['bbox'] for x in info['instances']], dtype=torch.float64).reshape(-1, 4)
        metric.process({}, [dict(img_id=info['img_id'], ori_shape=(24, 32), pred_instances=dict(
            bboxes=boxes, scores=torch.ones(len(boxes)), labels=torch.tensor(
                [x['bbox_label'] for x in info['instances']], dtype=torch.long)))])
    metric.evaluate(len(data))
    return 'boxes read and evaluated'


def fuzz_voc(rng: random.Random) -> str:
    for i in range(COUNT):
        objects = ''.join(
            f'<object><name>{rng.choice(NAMES)}</name><difficult>{rng.choice([0, 0, 1])}</difficult><bndbox>'
            '<xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>'
            for _ in range(rng.randrange(3)))
        text = f'<annotation><size><width>32</width><height>24</height></size>{objects}</annotation>'
        if rng.random() < 0.05:
            text = f'<?xml version="1.0" encoding="{rng.choice(["utf-8", "gbk", "gb2312", "no", "utf-16"])}"?>{text}'
        for _ in range(rng.choice([0] * 9 + [1, 1, 2])):
            text = text.replace(rng.choice(PIECES), rng.choice(
                [*PIECES, '', ' ', 'x', '1.5', '<difficult/>', ' cat ', '&amp;', '&x;']), rng.choice([1, -1]))
        Path(f'voc/Annotations/{i}.xml').write_bytes(encode(rng, text) if rng.random() < 0.1 else text.encode())
    lines = [str(i) for i in range(COUNT)]
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        lines.insert(rng.randrange(5), rng.choice(['', ' ', '0 1', '0', '9', '1.jpg', '\ufeff', 'a b', '\t']))
    text = rng.choice(['\n', '\r\n']).join(lines) + rng.choice(['', '\n', '\n\n'])
    Path('voc/list.txt').write_bytes(encode(rng, text))
    classes = choose_classes(rng)
    said = 'labels read'
    try:
        data = VOCMultiLabel('voc', difficult=rng.choice(['positive', 'negative', 'ignore']), split='',
                             image_set_path='list.txt', metainfo=dict(classes=classes))
        check_samples(data, len(data.CLASSES), 'data')
    except MMASLError:
        said = 'labels refused'
    try:
        names = read_class_names(classes, 'classes')
        check_voc_files('voc/list.txt', 'voc', names, 'data')
    except MMASLError:
        return f'{said}, boxes refused'
    data = XMLDataset(ann_file='voc/list.txt', data_prefix=dict(sub_data_root='voc'), metainfo=dict(classes=names))
    if not len(data):
        raise Changed('no image')
    return f'{said}, boxes read'


def fuzz_classes(rng: random.Random) -> str:
    classes = choose_classes(rng)
    try:
        names = read_class_names(classes, 'classes')
    except MMASLError:
        return 'refused'
    expected = list_from_file(classes) if isinstance(classes, str) else classes
    while isinstance(classes, str) and not expected[-1]:  # the only difference to MMEngine
        expected = expected[:-1]
    if list(names) != list(expected):
        raise Changed(f'{names} is not {expected}')
    return 'read'


def fuzz_labels(rng: random.Random) -> str:
    """Files of MMPretrain's MultiLabelDataset."""
    content = dict(metainfo=dict(classes=list(NAMES)), data_list=[
        dict(img_path=f'{i}.jpg', gt_label=rng.sample(range(3), rng.randrange(4))) for i in range(COUNT)])
    for _ in range(rng.choice([0, 1, 2])):
        damage(rng, content)
    try:
        Path('labels.json').write_text(json.dumps(content))
    except UnicodeEncodeError:
        return 'no text'
    cfg = Config(dict(type='mmpretrain.MultiLabelDataset', ann_file='labels.json', data_prefix='images', pipeline=[
        dict(type='mmpretrain.LoadImageFromFile'), dict(type='mmpretrain.PackInputs')]))
    try:
        with building_data(cfg):
            data = DATASETS.build(cfg._cfg_dict)
            names = data.metainfo.get('classes')
            names = names and read_class_names(names, 'classes')
        check_samples(data, names and len(names), 'data')
    except MMASLError:
        return 'refused'
    for i in range(len(data)) if names else ():
        found, info = data[i]['data_samples'], data.get_data_info(i)
        label = info.get('gt_label')
        if label is not None and not isinstance(label, dict) and sorted(
                found.gt_label.tolist()) != sorted(np.asarray(label).reshape(-1).tolist()):
            raise Changed(f'{found.gt_label} is not {label}')
    return 'read'


def fuzz_config(rng: random.Random) -> str:
    """Configs of data sets, and options that are merged into them."""
    Path('a.json').write_text(json.dumps(coco(rng)))
    config: dict = dict(type=rng.choice(['mmasl.CocoMultiLabel', 'mmdet.CocoDataset', 'mmpretrain.CustomDataset']),
                        ann_file='a.json', data_root='', data_prefix=dict(img='images', img_path='images'), indices=2,
                        metainfo=dict(classes=list(NAMES)), pipeline=[dict(type='LoadImageFromFile')], test_mode=False)
    for _ in range(rng.choice([0, 1, 2])):
        damage(rng, config)
    cfg = Config(dict(default_scope='mmpretrain', train_dataloader=dict(batch_size=1, dataset=config)))
    options = {rng.choice(OPTIONS): rng.choice(VALUES) for _ in range(rng.choice([0, 0, 1]))}
    try:
        merge_options(cfg, options, 'c.py')
        with building_data(cfg), DefaultScope.overwrite_default_scope('mmpretrain'):
            data = DATASETS.build(cfg.train_dataloader.dataset)
            len(data)
    except MMASLError:
        return 'refused'
    return 'built'


def fuzz_loss(rng: random.Random) -> str:
    """Settings of a loss in a config, and a batch of labels for it."""
    config: dict = dict(type='mmasl.AsymmetricLoss', gamma_pos=1, gamma_neg=[4., 2., 0.], clip=0.05, alpha=None,
                        class_weight=[1, 2, 3], ignore_index=-1, weight_unannotated=0., loss_weight=1.)
    for _ in range(rng.choice([0, 1, 1, 2])):
        damage(rng, config)
    target = torch.tensor([rng.choices([0., 1., 0.5, -1., 2., float('nan')], [9, 9, 1, 1, 1, 1], k=3)
                           for _ in range(rng.randrange(4))]).reshape(-1, 3)
    try:
        with exit_on_user_error():
            loss = MODELS.build(config)
            if not isinstance(loss, AsymmetricLoss):
                return 'another class'
            value = loss(torch.zeros(len(target), 3), target)
    except (MMASLError, SystemExit):
        return 'refused'
    if value.isfinite().all() or value.dtype != torch.float32:
        return 'computed'
    raise Changed(f'{loss} of {target} is {value}')


FUZZERS: dict[str, Callable[[random.Random], str]] = dict(
    coco=fuzz_coco, voc=fuzz_voc, classes=fuzz_classes, labels=fuzz_labels, config=fuzz_config,
    loss=fuzz_loss)


def run(number: int) -> tuple[str, str]:
    """Try one input. Returns its kind and what became of it; other errors than MMASLError pass."""
    rng = random.Random(number)
    kind = rng.choices(list(FUZZERS), [5, 3, 1, 2, 2, 1])[0]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return kind, FUZZERS[kind](rng)


def quiet() -> None:
    MMLogger.get_current_instance().setLevel(logging.CRITICAL)
    logging.getLogger('mmengine').setLevel(logging.CRITICAL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--seconds', type=float, default=60)
    parser.add_argument('--first', type=int, default=0, help='number of the first input')
    args = parser.parse_args()
    os.chdir(tempfile.mkdtemp(prefix='fuzz'))
    prepare()
    quiet()
    found: Counter = Counter()
    failures: Counter = Counter()
    end, number = time.monotonic() + args.seconds, args.first
    while time.monotonic() < end:
        try:
            found[run(number)] += 1
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            place = next((f'{Path(f.filename).name}:{f.lineno}' for f in reversed(frames)), '')
            failures[f'{type(error).__name__} at {place}'] += 1
            if failures[f'{type(error).__name__} at {place}'] <= 3:
                print(f'input {number}: {type(error).__name__} at {place}: {str(error)[:300]}', flush=True)
        number += 1
        if number % 2000 == 0:
            print(f'{number - args.first} inputs, {sum(failures.values())} failures', flush=True)
    for key, count in sorted(found.items()):
        print(*key, count, sep=': ')
    print(f'{number - args.first} inputs, {sum(failures.values())} failures: {dict(failures)}')
    sys.exit(bool(failures))


if __name__ == '__main__':
    main()
