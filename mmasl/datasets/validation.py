"""TODO."""
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.dist import is_main_process
from mmengine.logging import print_log


def _cure(dataset: BaseDataset) -> str:
    cure = 'Get what is missing, or remove it from the annotation file'
    return cure if dataset.test_mode else (
        f"{cure}; to train without up to N images, custom_hooks=[dict(type='mmasl.CheckDataHook', skip_unreadable=N)]")


def leaves(dataset: Any) -> Iterator[BaseDataset]:
    """The data sets that wrappers such as RepeatDataset and ConcatDataset hold, or the data set itself."""
    if isinstance(dataset, BaseDataset):
        yield dataset
    elif isinstance(getattr(dataset, 'datasets', None), (list, tuple)):
        for inner in dataset.datasets:
            yield from leaves(inner)
    elif hasattr(dataset, 'dataset'):
        yield from leaves(dataset.dataset)


def check_same_classes(classes: dict[str, Sequence[str]]) -> None:
    """Raise ValueError where two data sets (config key: class names) do not have the same classes in one order."""
    (first, ours), *rest = classes.items() if classes else [(None, ())]
    for key, other in rest:
        for index, (a, b) in enumerate(zip_longest(ours, other, fillvalue='no class')):
            if a != b:
                raise ValueError(f'class {index} is {a!r} in {first} and {b!r} in {key}, so that one would be '
                                 'evaluated as the other: give both the same metainfo=dict(classes=[...])')


def check_samples(dataset: BaseDataset, num_classes: int | None, key: str, spare: int = 0) -> None:
    """Raise for the first label that is no class, and for image files that do not exist.

    The folders are listed once each; images of another file system than the local one, and those of
    :class:`mmasl.OpenImages`, of which there may be nine million, are left to the loaders.

    Args:
        dataset: The data set.
        num_classes: Of the data set; None: labels are not looked at.
        key: Of the data set in the config, for the message.
        spare: Number of images that may be missing.
    """
    if type(dataset).__module__ == 'mmasl.datasets.open_images':
        return  # which has checked its labels while reading
    listed, missing = {}, []
    for info in map(dataset.get_data_info, range(len(dataset))):
        path = info.get('img_path')
        labels = torch.as_tensor(info['gt_label'] if info.get('gt_label') is not None else []).reshape(-1)
        if num_classes and ((labels < 0) | (labels >= num_classes)).any():
            raise ValueError(f'{path} in {key} has gt_label={info["gt_label"]}, and there are {num_classes} classes: '
                             f'labels lie in 0 ... {num_classes - 1}')
        if not isinstance(path, str) or ':' in path.split('/')[0]:
            continue
        folder, name = os.path.split(path)
        if folder not in listed:
            listed[folder] = set(os.listdir(folder or '.')) if os.path.isdir(folder or '.') else ()
        if name not in listed[folder]:
            missing.append(path)
    if missing:
        message = f'{len(missing)} of {len(dataset)} images of {key} are missing, the first is {missing[0]}'
        if len(missing) > spare:
            raise FileNotFoundError(f'{message}. {_cure(dataset)}')
        print_log(f'{message}; others take their place', 'current', logging.WARNING)


def _few(values: Iterable, count: int = 5) -> str:
    values = list(values)
    return ', '.join(map(str, values[:count])) + (', ...' if len(values) > count else '')


# ------------------------------------------------------------------------------------- the files of MMDetection's COCO

def check_coco_files(cfg: Config, *splits: str) -> None:
    """Raise or warn where MMDetection's CocoDataset would leave out or mix up annotations without a word.

    Its labels are numbered by the classes that the file has, in the file's order, so that a class that is missing, or
    another order, shifts names. Each file is read once more than without this check.

    Args:
        cfg: Of a run; its ``CocoDataset`` entries are looked at, those in wrappers too.
        splits: Of 'train', 'val' and 'test'.

    Raises:
        ValueError: A file is damaged, of other classes, lists an id twice or annotates what it does not list.
    """
    for split in splits if is_main_process() else ():
        loader = cfg.get(f'{split}_dataloader')
        for key, dataset in _coco_entries(loader['dataset'], f'{split}_dataloader.dataset') if loader else ():
            classes = (dataset.get('metainfo') or {}).get('classes')
            path = os.path.join(dataset.get('data_root') or '', dataset.get('ann_file') or '')
            if not os.path.isfile(path):
                continue
            check_coco_file(path, classes, key, {} if dataset.get('test_mode') else dataset.get('filter_cfg') or {})
            evaluators = cfg.get(f'{split}_evaluator') or ()
            for evaluator in [evaluators] if isinstance(evaluators, dict) else evaluators:
                other = evaluator.get('ann_file') or ''
                if os.path.isfile(other) and not os.path.samefile(path, other):
                    _check_evaluator(path, other, f'{split}_evaluator.ann_file')


def _check_evaluator(path: str, other: str, key: str) -> None:
    (images, names), (known, found) = ((
        {image['id'] for image in content['images']}, [category['name'] for category in content['categories']])
        for content in (json.loads(Path(file).read_bytes()) for file in (path, other)))
    if images - known or names != found:
        raise ValueError(f'{key}={other} lacks {len(images - known)} of the {len(images)} images of {path}, whose '
                         'predictions it is to judge, or has other categories: give both the same file')


def _coco_entries(dataset: dict, key: str) -> Iterator[tuple[str, dict]]:
    for number, inner in enumerate(dataset.get('datasets') or ()):
        yield from _coco_entries(inner, f'{key}.datasets.{number}')
    if isinstance(dataset.get('dataset'), dict):
        yield from _coco_entries(dataset['dataset'], f'{key}.dataset')
    if dataset.get('type') in ('CocoDataset', 'mmdet.CocoDataset'):
        yield key, dataset


def check_coco_file(path: str, classes: Sequence[str] | None, key: str, filter_cfg: dict) -> None:
    """Check one file, see :func:`check_coco_files`; warns of boxes that CocoDataset leaves out, with their number.

    Args:
        path: The annotation file.
        classes: ``metainfo.classes`` of the data set; None for COCO's 80.
        key: Of the data set in the config, for the message.
        filter_cfg: Of the data set: ``min_size`` and ``filter_empty_gt``.
    """
    if classes is None:
        from mmdet.datasets import CocoDataset
        classes = CocoDataset.METAINFO['classes']
    try:
        content = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f'{path} is not a whole JSON file ({error}): get it again') from None
    lacks = {'images', 'annotations', 'categories'} - set(content if isinstance(content, dict) else ())
    if lacks:
        raise ValueError(f'{path} is no COCO instances file: it lacks {sorted(lacks)}. Give instances_*.json')
    check_entries(content, path, dict(images=('id', 'file_name', 'width', 'height'), categories=('id', 'name'),
                                      annotations=('id', 'image_id', 'category_id')))
    names = [category['name'] for category in content['categories']]
    if absent := [name for name in classes if name not in names]:
        raise ValueError(f'{len(absent)} of the {len(classes)} classes of {key} are not in {path}: {_few(absent)}. The '
                         f'labels of the others would be shifted. The file has {_few(names)}: set '
                         'metainfo=dict(classes=(...)) to names of the file, in its order')
    order = [name for name in names if name in set(classes)]
    if order != list(classes):
        index = next(i for i, (a, b) in enumerate(zip(order, classes)) if a != b)
        raise ValueError(f'class {index} of {key} is {classes[index]!r} and that of {path} is {order[index]!r}, and '
                         'CocoDataset numbers classes by the file: give metainfo=dict(classes=(...)) in its order')
    sizes = {image['id']: (image['width'], image['height']) for image in content['images']}
    known = {category['id']: category['name'] in classes for category in content['categories']}
    annotated: set[int] = set()
    left_out: dict[str, list] = {}
    for ann in content['annotations']:
        for name, ids in (('image_id', sizes), ('category_id', known)):
            if ann.get(name) not in ids:
                raise ValueError(f'annotation {ann["id"]} in {path} has the unknown {name} {ann.get(name)}, and '
                                 'CocoDataset would leave it out: correct it or remove it')
        if known[ann['category_id']]:
            annotated.add(ann['image_id'])
        box = ann.get('bbox')
        if not isinstance(box, list) or len(box) != 4:
            raise ValueError(f'annotation {ann["id"]} in {path} has bbox={box}: give [x, y, width, height] in pixels')
        (x, y, w, h), (width, height) = box, sizes[ann['image_id']]
        fault = ('not finite' if not all(map(math.isfinite, box)) else
                 'narrower than a pixel' if w < 1 or h < 1 else
                 'outside of their image' if min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0) else
                 'of area 0' if ann.get('area', 1) <= 0 else None)
        if fault:
            left_out.setdefault(fault, []).append(ann['id'])
    if not any(min(size) >= filter_cfg.get('min_size', 0)
               and (image in annotated or not filter_cfg.get('filter_empty_gt')) for image, size in sizes.items()):
        raise ValueError(f'none of the {len(sizes)} images in {path} is left for {key} by '
                         f'filter_cfg={dict(filter_cfg)}: correct filter_cfg, or metainfo.classes')
    for fault, numbers in left_out.items():
        print_log(f'{len(numbers)} of {len(content["annotations"])} boxes in {path} are {fault} and are left out '
                  f'(annotations {_few(numbers)})', 'current', logging.WARNING)


def check_entries(content: dict, path: str, keys: dict[str, Sequence[str]]) -> None:
    """Raise ValueError where an entry of a COCO file lacks a key, or an id or a file name stands there twice.

    Args:
        content: The file's.
        path: Of the file, for the message.
        keys: What every entry of a list must have, such as ``dict(images=('id', 'file_name'))``.
    """
    for group, wanted in keys.items():
        what = dict(images='image', categories='category', annotations='annotation')[group]
        for number, entry in enumerate(content[group]):
            for key in wanted:
                if key not in entry:
                    raise ValueError(f'{path}: entry {number} of {group}, {str(entry)[:80]}, has no {key}: get the '
                                     'file again')
        for key, words in (('id', 'id'), ('file_name', 'file')):
            if key in wanted:
                refuse_repeats([entry[key] for entry in content[group]], f'{path} lists {what} {words}')


def refuse_repeats(values: Iterable, where: str) -> None:
    """Raise ValueError for the value that stands there most often, if that is more than once."""
    value, times = max(Counter(values).items(), key=lambda item: item[1], default=(None, 0))
    if times > 1:
        raise ValueError(f'{where} {value!r} {times} times')
