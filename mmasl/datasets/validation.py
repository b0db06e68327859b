"""Checks of data sets and annotation files.

The data sets, :class:`mmasl.CheckDataHook` and the tools use them.
"""
import json
import logging
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain, zip_longest
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.dist import all_gather_object, get_rank, get_world_size, is_main_process
from mmengine.fileio import exists, get
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from torch.utils.data import Dataset

from mmasl.errors import DataError
from mmasl.utils.config import iter_dataset_configs, resolve_type

SECONDS_PER_REPORT = 10
COCO_LISTS = dict(images='image', categories='category', annotations='annotation')


# ------------------------------------------------------------------------------------------------ files of data sets

def require_file(path: str, what: str, hint: str) -> None:
    """Raise DataError with the hint unless the file exists."""
    if not exists(path):
        raise DataError(f'There is no {what} {path}. {hint}')


def require_unique(values: Iterable, where: str) -> None:
    """Raise DataError for the most frequent value if it occurs more than once."""
    value, times = max(Counter(values).items(), key=lambda item: item[1], default=(None, 0))
    if times > 1:
        raise DataError(f'{where} {value!r} {times} times; each must be unique.')


def read_coco_file(path: str, keys: dict[str, Sequence[str]], hint: str,
                   parse_float: Callable[[str], Any] | None = None) -> dict:
    """Read a JSON file in COCO's layout.

    Args:
        path: The file.
        keys: Keys that every entry of a list must have, such as ``dict(images=('id', 'file_name'))``. Ids and file
            names must be unique.
        hint: What to do, for the error messages.
        parse_float: As in :func:`json.loads`.

    Returns:
        The content. It has the lists ``images``, ``annotations`` and ``categories``.

    Raises:
        DataError: The file does not exist, is damaged or of another kind, or an entry lacks a key or is repeated.
    """
    require_file(path, 'annotation file', hint)
    try:
        # The names of authors in the file of Herbarium 2020 are not all UTF-8.
        content = json.loads(get(path).decode('utf-8', errors='replace'), parse_float=parse_float)
    except ValueError as error:
        raise DataError(f'{path} is not valid JSON ({error}). {hint}') from error
    found = set(content) if isinstance(content, dict) else set()
    if lacking := sorted(set(COCO_LISTS) - found):
        raise DataError(f'{path} is not a file of annotated instances: it lacks {lacking} and has {sorted(found)}. '
                        f'{hint}')
    for group, wanted in keys.items():
        for number, entry in enumerate(content[group]):
            if absent := [key for key in wanted if key not in entry]:
                raise DataError(f'{path}: entry {number} of {group}, {str(entry)[:80]}, has no {absent[0]}. {hint}')
        for key, word in (('id', 'id'), ('file_name', 'file')):
            if key in wanted:
                require_unique([entry[key] for entry in content[group]], f'{path} lists {COCO_LISTS[group]} {word}')
    return content


def warn_classes(where: str, what: str, names: Collection[str]) -> None:
    """Log a warning that names classes, if there are any."""
    if names:
        print_log(f'{where} {what} {len(names)} classes: {", ".join(names)}', 'current', logging.WARNING)


# ------------------------------------------------------------------------------------------------------ built data sets

def iter_base_datasets(dataset: Any) -> Iterator[BaseDataset]:
    """Yield the data sets inside wrappers, or the data set itself.

    A wrapper has data sets in any attribute, alone or in a list, as RepeatDataset, ConcatDataset, KFoldDataset and
    MultiImageMixDataset do.
    """
    if isinstance(dataset, BaseDataset):
        yield dataset
        return
    for name, value in getattr(dataset, '__dict__', {}).items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if name in ('dataset', 'datasets') or (values and _is_dataset(values[0])):
            for inner in values:
                yield from iter_base_datasets(inner)


def _is_dataset(value: Any) -> bool:
    return isinstance(value, (BaseDataset, Dataset)) or (hasattr(value, 'metainfo') and hasattr(value, '__getitem__'))


def check_same_classes(classes: dict[str, Sequence[str]]) -> None:
    """Raise DataError if two data sets have different classes or another order.

    Args:
        classes: Class names by the config key of the data set.
    """
    (first, ours), *rest = classes.items() if classes else [(None, ())]
    for key, other in rest:
        for index, (a, b) in enumerate(zip_longest(ours, other, fillvalue='no class')):
            if a != b:
                raise DataError(f'Class {index} is {a!r} in {first} and {b!r} in {key}. Set the same '
                                'metainfo=dict(classes=[...]) in both.')


def check_samples(dataset: BaseDataset, num_classes: int | None, key: str, max_missing: int = 0,
                  max_samples: int | None = None) -> None:
    """Raise for the first label that is out of range, and for image files that do not exist.

    Every rank must call this: each looks at a share of the samples, and all raise the same error. Progress is logged
    every ten seconds. Lists each folder once. Skips images on remote file systems. Skips a data set whose attribute
    ``samples_checked`` is true: it checks labels while it reads them, and has too many images to list.

    Args:
        dataset: The data set.
        num_classes: Number of its classes; None: labels are not checked.
        key: Config key of the data set, for the message.
        max_missing: Number of missing images that give a warning instead of an error.
        max_samples: Number of samples to look at, evenly spaced; None for all.

    Raises:
        DataError: A label is out of range, or more images are missing.
    """
    if getattr(dataset, 'samples_checked', False):
        return
    step = max(1, math.ceil(len(dataset) / max_samples)) if max_samples else 1
    indices = range(get_rank() * step, len(dataset), get_world_size() * step)
    found = all_gather_object(_look_at_samples(dataset, num_classes, key, indices))
    if errors := [error for _, error in found if error]:
        raise min(errors, key=lambda error: error[0])[1]
    if missing := sorted(chain.from_iterable(missing for missing, _ in found)):
        message = f'{len(missing)} of {len(dataset)} images of {key} are missing, the first is {missing[0][1]}'
        if len(missing) > max_missing:
            raise DataError(f'{message}. {missing_image_hint(dataset)}')
        print_log(f'{message}; other images replace them', 'current', logging.WARNING)


def _look_at_samples(dataset: BaseDataset, num_classes: int | None, key: str,
                     indices: range) -> tuple[list[tuple[int, str]], tuple[int, Exception] | None]:
    """Index and path of the missing images among some samples; and index and error of the first wrong sample."""
    listed: dict[str, Collection[str]] = {}
    missing: list[tuple[int, str]] = []
    last = time.monotonic()
    for index in indices:
        try:
            info = dataset.get_data_info(index)
            path = info.get('img_path')
            labels = torch.as_tensor(info['gt_label'] if info.get('gt_label') is not None else []).reshape(-1)
            if num_classes and ((labels < 0) | (labels >= num_classes)).any():
                raise DataError(f'{path} in {key} has gt_label={info["gt_label"]}. Labels of {num_classes} classes '
                                f'must be within 0 ... {num_classes - 1}.')
        except Exception as error:  # the other ranks wait for the result of this one
            return missing, (index, error)
        if not isinstance(path, str) or ':' in path.split('/')[0]:
            continue
        folder, name = os.path.split(path)
        if folder not in listed:
            listed[folder] = set(os.listdir(folder or '.')) if os.path.isdir(folder or '.') else ()
        if name not in listed[folder]:
            missing.append((index, path))
        if time.monotonic() - last > SECONDS_PER_REPORT:
            last = time.monotonic()
            print_log(f'Checking the samples of {key}: {index:,} of {len(dataset):,}. To check fewer, set '
                      "custom_hooks=[dict(type='mmasl.CheckDataHook', max_samples=N)]", 'current')
    return missing, None


def missing_image_hint(dataset: BaseDataset) -> str:
    """What to do about images of a data set that are missing or unreadable."""
    hint = 'Restore them, or remove them from the annotation file'
    return f'{hint}.' if dataset.test_mode else (
        f"{hint}; to train without up to N images, set custom_hooks=[dict(type='mmasl.CheckDataHook', "
        'skip_unreadable=N)].')


def first_few(values: Iterable, count: int = 5) -> str:
    """The first values for a message, separated by commas."""
    values = list(values)
    return ', '.join(map(str, values[:count])) + (', ...' if len(values) > count else '')


# --------------------------------------------------------------------------------------- MMDetection's CocoDataset

def check_coco_files(cfg: Config, *splits: str) -> None:
    """Check the annotation files of MMDetection's CocoDataset in a config.

    CocoDataset silently skips annotations that do not fit, and numbers its labels by the classes that it finds in the
    file. A missing class, or another order, therefore shifts the names. The check reads each file once more.

    Args:
        cfg: Config of a run. Its ``CocoDataset`` entries are checked, also inside wrappers.
        splits: Of 'train', 'val' and 'test'.

    Raises:
        DataError: See :func:`check_coco_file`; or the evaluator reads a file that does not fit.
    """
    for split in splits if is_main_process() else ():
        loader = cfg.get(f'{split}_dataloader')
        scope = cfg.get('default_scope')
        entries = iter_dataset_configs(loader['dataset'], f'{split}_dataloader.dataset', scope) if loader else ()
        for key, dataset in entries:
            kind = resolve_type(dataset.get('type'), DATASETS, scope)
            if not _reads_coco(kind):
                continue
            classes = (dataset.get('metainfo') or {}).get('classes') or kind.METAINFO.get('classes')
            path = os.path.join(dataset.get('data_root') or '', dataset.get('ann_file') or '')
            if not os.path.isfile(path):
                continue
            check_coco_file(path, classes, key, {} if dataset.get('test_mode') else dataset.get('filter_cfg') or {})
            evaluators = cfg.get(f'{split}_evaluator') or ()
            for evaluator in [evaluators] if isinstance(evaluators, dict) else evaluators:
                other = evaluator.get('ann_file') or ''
                if os.path.isfile(other) and not os.path.samefile(path, other):
                    _check_evaluator(path, other, f'{split}_evaluator.ann_file')


def _reads_coco(kind: Any) -> bool:
    """Whether a data set is MMDetection's CocoDataset, or derives from it and reads files in the same way."""
    module = sys.modules.get('mmdet.datasets')
    return isinstance(kind, type) and module is not None and issubclass(kind, module.CocoDataset) and (
        getattr(kind, 'load_data_list') is module.CocoDataset.load_data_list)  # noqa: B009


def _check_evaluator(path: str, other: str, key: str) -> None:
    hint = f'Set {key} to the file of the data set, {path}.'
    (images, names), (known, found) = ((
        {image['id'] for image in content['images']}, [category['name'] for category in content['categories']])
        for content in (read_coco_file(file, {}, hint) for file in (path, other)))
    if images - known or names != found:
        raise DataError(f'{key}={other} lacks {len(images - known)} of the {len(images)} images of {path}, or has '
                        f'other categories. {hint}')


def check_coco_file(path: str, classes: Sequence[str] | None, key: str, filter_cfg: dict) -> None:
    """Check one annotation file of CocoDataset, and warn of boxes that it will skip.

    Args:
        path: The annotation file.
        classes: ``metainfo.classes`` of the data set; None: the 80 classes of COCO.
        key: Config key of the data set, for the messages.
        filter_cfg: ``filter_cfg`` of the data set.

    Raises:
        DataError: The file is damaged, has other classes or another order, repeats an id, annotates images or
            categories that it does not list, or ``filter_cfg`` removes all images.
    """
    if classes is None:
        from mmdet.datasets import CocoDataset
        classes = CocoDataset.METAINFO['classes']
    content = read_coco_file(path, dict(images=('id', 'file_name', 'width', 'height'), categories=('id', 'name'),
                                        annotations=('id', 'image_id', 'category_id')), 'Get instances_*.json again.')
    names = [category['name'] for category in content['categories']]
    if absent := [name for name in classes if name not in names]:
        raise DataError(f'{len(absent)} of the {len(classes)} classes of {key} are not in {path}: {first_few(absent)}. '
                        f'Set metainfo=dict(classes=(...)) to names of the file, in its order: {first_few(names)}.')
    order = [name for name in names if name in set(classes)]
    if order != list(classes):
        index = next(i for i, (a, b) in enumerate(zip(order, classes)) if a != b)
        raise DataError(f'Class {index} of {key} is {classes[index]!r}, but {order[index]!r} in {path}. Set '
                        'metainfo=dict(classes=(...)) in the order of the file; CocoDataset numbers classes by it.')
    sizes = {image['id']: (image['width'], image['height']) for image in content['images']}
    known = {category['id']: category['name'] in classes for category in content['categories']}
    annotated: set[int] = set()
    skipped: dict[str, list] = {}
    for ann in content['annotations']:
        for name, ids in (('image_id', sizes), ('category_id', known)):
            if ann[name] not in ids:
                raise DataError(f'Annotation {ann["id"]} in {path} has the unknown {name} {ann[name]}. Correct or '
                                'remove it; CocoDataset would skip it silently.')
        if known[ann['category_id']]:
            annotated.add(ann['image_id'])
        box = ann.get('bbox')
        if not isinstance(box, list) or len(box) != 4:
            raise DataError(f'Annotation {ann["id"]} in {path} has bbox={box}; give [x, y, width, height] in pixels.')
        if fault := _find_box_fault(box, sizes[ann['image_id']], ann.get('area', 1)):
            skipped.setdefault(fault, []).append(ann['id'])
    if not any(min(size) >= filter_cfg.get('min_size', 0)
               and (image in annotated or not filter_cfg.get('filter_empty_gt')) for image, size in sizes.items()):
        raise DataError(f'filter_cfg={dict(filter_cfg)} of {key} removes all {len(sizes)} images of {path}. Correct '
                        'filter_cfg or metainfo.classes.')
    for fault, numbers in skipped.items():
        print_log(f'{len(numbers)} of {len(content["annotations"])} boxes in {path} are {fault} and are skipped '
                  f'(annotations {first_few(numbers)})', 'current', logging.WARNING)


def _find_box_fault(box: list[float], size: tuple[float, float], area: float) -> str | None:
    (x, y, w, h), (width, height) = box, size
    return ('not finite' if not all(map(math.isfinite, box)) else
            'narrower than a pixel' if w < 1 or h < 1 else
            'outside of their image' if min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0) else
            'of area 0' if area <= 0 else None)
