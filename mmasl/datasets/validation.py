"""Checks of data sets and annotation files.

The data sets, :class:`mmasl.CheckDataHook` and the tools use them.
"""
import logging
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, zip_longest
from typing import Any

import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.dist import all_gather_object, get_rank, get_world_size, is_main_process
from mmengine.fileio import list_from_file
from mmengine.logging import print_log
from mmengine.registry import DATASETS, METRICS, TRANSFORMS
from PIL import Image
from torch.utils.data import Dataset

from mmasl.errors import ConfigError, DataError
from mmasl.utils.config import is_kind, iter_dataset_configs, iter_metric_configs, resolve_type

from .annotation_files import (
    BOXES,
    EVALUATION,
    read_class_names,
    read_coco_file,
    read_voc_objects,
    require_selected,
    require_value,
    similar_file,
)

SECONDS_PER_REPORT = 10


def warn_classes(where: str, what: str, names: Collection[str]) -> None:
    """Log a warning that names classes, if there are any."""
    if names:
        print_log(f'{where} {what} {len(names)} classes: {", ".join(names)}', 'current', logging.WARNING)


# ------------------------------------------------------------------------------------------------------ built data sets

def iter_datasets(dataset: Any) -> Iterator[Any]:
    """Yield the data sets inside wrappers, or the data set itself, which need not be a BaseDataset.

    A wrapper has data sets in any attribute, alone or in a list, as RepeatDataset, ConcatDataset, KFoldDataset and
    MultiImageMixDataset do.
    """
    inner: list[Any] = []
    for name, value in () if isinstance(dataset, BaseDataset) else getattr(dataset, '__dict__', {}).items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if name in ('dataset', 'datasets') or (values and _is_dataset(values[0])):
            inner += values
    if not inner:
        yield dataset
    for part in inner:
        yield from iter_datasets(part)


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
        message = (f'{len(missing)} of {len(dataset)} images of {key} are missing, the first is {missing[0][1]}'
                   f'{similar_file(missing[0][1])}')
        if len(missing) > max_missing:
            raise DataError(f'{message}. {missing_image_hint(dataset)}')
        print_log(f'{message}; other images replace them', 'current', logging.WARNING)


def _look_at_samples(dataset: BaseDataset, num_classes: int | None, key: str,
                     indices: range) -> tuple[list[tuple[int, str]], tuple[int, Exception] | None]:
    """Index and path of the missing images among some samples; and index and error of the first wrong sample."""
    listed: dict[str, Collection[str]] = {}
    missing: list[tuple[int, str]] = []
    pairs: set[tuple] = set()
    labelled: dict[bool, tuple[int, Any]] = {}  # whether a sample has labels: the first one
    packs = _packs_labels(dataset)
    last = time.monotonic()
    for index in indices:
        try:
            info = dataset.get_data_info(index)
            path = info.get('img_path')
            if num_classes and (fault := find_label_fault(info, num_classes, packs)):
                raise DataError(f'{path} in {key} has {fault}')
            labelled.setdefault(bool({'gt_label', 'gt_score'} & info.keys()), (index, path))
            if num_classes == 2 and 'gt_score' not in info:
                pairs.add(tuple(np.asarray(info.get('gt_label', ())).reshape(-1).tolist()))
        except Exception as error:  # the other ranks wait for the result of this one
            return missing, (index, error)
        if time.monotonic() - last > SECONDS_PER_REPORT:
            last = time.monotonic()
            print_log(f'Checking the samples of {key}: {index:,} of {len(dataset):,}. To check fewer, set '
                      "custom_hooks=[dict(type='mmasl.CheckDataHook', max_samples=N)]", 'current')
        if not isinstance(path, str) or ':' in path.split('/')[0]:
            continue
        folder, name = os.path.split(path)
        if folder not in listed:
            listed[folder] = set(os.listdir(folder or '.')) if os.path.isdir(folder or '.') else ()
        if name not in listed[folder]:
            missing.append((index, path))
    if packs and len(labelled) == 2:
        index, path = labelled[False]
        return missing, (index, DataError(f'{path} in {key} has no gt_label, and other samples have one. Add it; an '
                                          'image without label has gt_label=[]. Or remove the sample.'))
    if pairs == {(0, 1), (1, 0)}:
        return missing, (0, DataError(
            f'All labels of {key} are [0, 1] or [1, 0]: they are vectors of 0 and 1, one per class, which belong in '
            'gt_score. gt_label lists the numbers of the positive classes.'))
    return missing, None


def _packs_labels(dataset: BaseDataset) -> bool:
    """Whether MMPretrain's PackInputs packs the samples."""
    kind = getattr(sys.modules.get('mmpretrain.datasets'), 'PackInputs', None)
    return kind is not None and any(
        isinstance(x, kind) for x in getattr(getattr(dataset, 'pipeline', None), 'transforms', ()))


def find_label_fault(info: dict, num_classes: int, packs: bool = False) -> str:
    """What is wrong with the labels of a sample, with a hint; '' if nothing is.

    Args:
        info: The sample, with ``gt_label``, a number or a list of numbers, or ``gt_score``, one value per class.
        num_classes: Number of classes.
        packs: Whether PackInputs packs the sample, which fails for None and for labels of several tasks.
    """
    label, score = info.get('gt_label'), info.get('gt_score')
    if score is not None and len(score) != num_classes:
        return f'a gt_score of {len(score)} values. It must have one for each of the {num_classes} classes.'
    if label is None or isinstance(label, dict):  # a dict has labels of several tasks
        return f'gt_label={label}. It must be a list of numbers of classes.' if packs and 'gt_label' in info else ''
    text = f'gt_label={label!s:.200}.'
    try:
        values = np.asarray(label)
    except ValueError:  # lists of several lengths
        values = np.asarray([''])
    if values.dtype.kind not in 'biuf' or values.ndim > 1:
        return f'{text} It must be a list of numbers of classes.'
    flat: list[float] = values.reshape(-1).tolist()
    vector = (values.dtype == bool or set(flat) <= {0, 1}) and len(flat) == num_classes
    vector_hint = ' A vector of 0 and 1, one per class, belongs in gt_score.'
    if values.dtype == bool or (vector and num_classes > 1 and len(set(flat)) < len(flat)):
        return f'{text} It must list the numbers of the positive classes.{vector_hint}'
    if any(not 0 <= value < num_classes or value % 1 for value in flat):
        return (f'{text} Labels of {num_classes} classes must be within 0 ... {num_classes - 1}.'
                f'{vector_hint if vector else ""}')
    if len(set(flat)) < len(flat):
        return f'{text} It must list each class once.'
    return ''


def find_image_fault(loader: LoadImageFromFile, info: dict, loaded: dict) -> str:
    """Compare an image, as it was loaded, with what the annotation file states about it.

    Args:
        loader: The loader.
        info: The sample, with ``img_path`` and, in detection, ``width`` and ``height``.
        loaded: Result of the loader.

    Returns:
        A sentence if the sizes differ; '' otherwise.

    Raises:
        DataError: See :func:`require_depth`.
    """
    path, stated = info.get('img_path'), (info.get('height'), info.get('width'))
    require_depth(loader, path)
    shape = loaded.get('ori_shape')
    if None in stated or shape is None or tuple(shape) == stated:
        return ''
    turned = ''
    if tuple(shape) == stated[::-1]:
        turned = (". Its EXIF orientation turns it: if the boxes fit the unturned pixels, set color_type="
                  "'color_ignore_orientation' in LoadImageFromFile")
    return (f'{path} is {shape[1]} x {shape[0]} pixels (width x height), but its annotation file says {stated[1]} x '
            f'{stated[0]}, so its boxes may not fit{turned}')


def require_depth(loader: LoadImageFromFile, path: str | None) -> None:
    """Raise DataError if the loader clips an image of 16 bits per pixel to white, as it does with Pillow.

    Args:
        loader: The loader.
        path: File of the image; others than local files are not checked.
    """
    if (loader.imdecode_backend != 'pillow' or loader.color_type == 'unchanged' or not path
            or path.lower().endswith(('.jpg', '.jpeg', '.webp')) or not os.path.isfile(path)):
        return
    with Image.open(path) as image:
        extrema: Any = image.getextrema() if image.mode[0] in 'IF' else (0, 0)
        if extrema[1] > 255:
            raise DataError(f"{path} has more than 8 bits per pixel (mode {image.mode}), and imdecode_backend='pillow' "
                            "clips them to white. Set imdecode_backend='cv2' in LoadImageFromFile, or convert the "
                            'images to 8 bits.')


def missing_image_hint(dataset: Any) -> str:
    """What to do about images of a data set that are missing or unreadable."""
    hint = 'Restore them, or remove them from the annotation file'
    return f'{hint}.' if not isinstance(dataset, BaseDataset) or dataset.test_mode else (
        f"{hint}; to train without up to N images, set custom_hooks=[dict(type='mmasl.CheckDataHook', "
        'skip_unreadable=N)].')


def first_few(values: Iterable, count: int = 5) -> str:
    """The first values for a message, separated by commas."""
    values = list(values)
    return ', '.join(map(str, values[:count])) + (', ...' if len(values) > count else '')


# --------------------------------------------------------------------------------------- MMDetection's CocoDataset

def check_annotation_files(cfg: Config, *splits: str) -> None:
    """Check class names of all data sets, and files of MMDetection's CocoDataset, XMLDataset and CocoMetric.

    CocoDataset silently skips annotations that do not fit, and numbers its labels by the classes that it finds in the
    file. A missing class, or another order, therefore shifts the names. The check reads each file once more.

    Args:
        cfg: Config of a run. Data sets inside wrappers are checked too.
        splits: Of 'train', 'val' and 'test'.

    Raises:
        ConfigError: ``classes`` is not a list of names.
        DataError: See :func:`check_coco_file`, :func:`check_voc_files` and :func:`check_evaluation_file`; or the
            evaluator reads another file than the data set.
    """
    scope = cfg.get('default_scope')
    for split in splits if is_main_process() else ():
        loader = cfg.get(f'{split}_dataloader')
        entries = iter_dataset_configs(loader['dataset'], f'{split}_dataloader.dataset', scope) if loader else ()
        evaluator = cfg.get(f'{split}_evaluator')
        metrics = list(iter_metric_configs(evaluator, f'{split}_evaluator'))
        by_part = isinstance(evaluator, dict) and 'metrics' in evaluator  # MultiDatasetsEvaluator has one for each part
        for place, (key, dataset) in enumerate(entries):
            kind = resolve_type(dataset.get('type'), DATASETS, scope)
            classes = _read_configured_classes(dataset, key)
            path = _join(dataset, 'ann_file')
            training = not dataset.get('test_mode') and not _is_unlabelled(dataset, scope)
            if classes is None:
                classes = (getattr(kind, 'METAINFO', None) or {}).get('classes')
            if not os.path.isfile(path) or not classes:
                continue
            if _stock(kind, 'XMLDataset', 'load_data_list', 'parse_data_info', '_parse_instance_info'):
                folders = {name: dataset[name] for name in ('img_subdir', 'ann_subdir') if name in dataset}
                prefix = (dataset.get('data_prefix') or {}).get('sub_data_root', '')
                check_voc_files(path, os.path.join(dataset.get('data_root') or '', prefix), classes, key, training,
                                **folders)
            if not _stock(kind, 'CocoDataset', 'load_data_list', 'parse_data_info'):
                continue
            check_coco_file(path, classes, key, dataset.get('filter_cfg') or {}, training)
            for where, metric in metrics[place:place + 1] if by_part else metrics:
                other = metric.get('ann_file') or ''
                if not os.path.isfile(other):
                    continue
                if not os.path.samefile(path, other):
                    _check_evaluator(path, other, f'{where}.ann_file')
                kind = resolve_type(metric.get('type'), METRICS, scope)
                if not metric.get('format_only') and _stock(kind, 'CocoMetric', 'compute_metrics'):
                    check_evaluation_file(other, where)


def _is_unlabelled(dataset: dict, scope: str | None) -> bool:
    """Whether a data set gives images without labels to a training, as MMDetection's semi-supervised configs do."""
    kind = getattr(sys.modules.get('mmdet.datasets.transforms'), 'LoadEmptyAnnotations', None)
    return kind is not None and any(isinstance(step, dict) and is_kind(step.get('type'), kind, TRANSFORMS, scope)
                                    for step in dataset.get('pipeline') or ())


def _read_configured_classes(dataset: dict, key: str) -> Sequence[Any] | None:
    """The class names that a config of a data set gives."""
    metainfo = dataset.get('metainfo') or {}
    if not isinstance(metainfo, dict):
        raise ConfigError(f'{key}.metainfo={metainfo!r} is not a dict. Write metainfo=dict(classes=[...]).')
    for names, place, expand in ((metainfo.get('classes'), 'metainfo.classes', False),
                                 (dataset.get('classes'), 'classes', True)):
        if names is not None:
            return read_class_names(names, f'{key}.{place}', expand)
    return None


def _join(dataset: dict, name: str) -> str:
    parts = dataset.get('data_root') or '', dataset.get(name) or ''
    return os.path.join(*parts) if all(isinstance(part, str) for part in parts) else ''


def _stock(kind: Any, name: str, *methods: str) -> bool:
    """Whether a class is MMDetection's of this name, or derives from it and has the same methods."""
    module = sys.modules.get('mmdet.evaluation' if name.endswith('Metric') else 'mmdet.datasets')
    base = getattr(module, name, None)
    return isinstance(kind, type) and base is not None and issubclass(kind, base) and all(
        getattr(kind, method) is getattr(base, method) for method in methods)


def _check_evaluator(path: str, other: str, key: str) -> None:
    """Raise DataError if the file of an evaluator has other images or categories than that of the data set."""
    hint = f'Set {key} to the file of the data set, {path}.'
    rules = EVALUATION._replace(annotations=('id', ), optional=True)
    (images, names), (known, found) = ((
        {image['id'] for image in content['images']}, [category['name'] for category in content['categories']])
        for content in (read_coco_file(file, hint, rules) for file in (path, other)))
    if images - known or names != found:
        raise DataError(f'{key}={other} lacks {len(images - known)} of the {len(images)} images of {path}, or has '
                        f'other categories. {hint}')


def check_evaluation_file(path: str, key: str) -> None:
    """Check an annotation file of MMDetection's CocoMetric, which evaluates boxes with pycocotools.

    Args:
        path: The annotation file.
        key: Config key of the evaluator, for the messages.

    Raises:
        DataError: The file is damaged, has no annotations, or an annotation lacks ``area`` or ``iscrowd``.
    """
    hint = 'pycocotools would fail after the predictions: correct the file'
    content = read_coco_file(path, f'{hint}.', EVALUATION._replace(optional=True))
    for group in ('images', 'categories'):
        if len({isinstance(entry['id'], str) for entry in content[group]}) > 1:
            raise DataError(f'{path} has numbers and texts as ids of {group}, which pycocotools cannot sort. {hint}.')
    if not content.get('annotations'):
        raise DataError(f'{path} of {key} has no annotations, so nothing can be evaluated. To only write predictions, '
                        "set format_only=True and outfile_prefix='FILE'.")


def check_coco_file(path: str, classes: Sequence[str], key: str, filter_cfg: dict, training: bool = True) -> None:
    """Check one annotation file of CocoDataset, and warn of boxes that it will skip or that do not fit the image.

    Args:
        path: The annotation file.
        classes: Class names of the data set.
        key: Config key of the data set, for the messages.
        filter_cfg: ``filter_cfg`` of the data set.
        training: Whether the data set trains a model. Otherwise the file may have no annotations.

    Raises:
        DataError: The file is damaged, has other classes or another order, repeats an id, annotates images or
            categories that it does not list, has a box without ``area``, or has no image or no box to train with.
    """
    hint = 'Correct or remove it; CocoDataset would fail, or skip it silently.'
    content = read_coco_file(path, hint, BOXES._replace(optional=not training))
    require_selected(path, content['categories'], classes)
    names = [category['name'] for category in content['categories']]
    if absent := [name for name in classes if name not in names]:
        raise DataError(
            f'{len(absent)} of the {len(classes)} classes of {key} are not in {path}: {first_few(map(repr, absent))}. '
            f'Set metainfo=dict(classes=(...)) to names of the file, in its order: {first_few(map(repr, names))}.')
    order = [name for name in names if name in set(classes)]
    if order != list(classes):
        index = next(i for i, (a, b) in enumerate(zip(order, classes)) if a != b)
        raise DataError(f'Class {index} of {key} is {classes[index]!r}, but {order[index]!r} in {path}. Set '
                        'metainfo=dict(classes=(...)) in the order of the file; CocoDataset numbers classes by it.')
    sizes = {image['id']: (image['width'], image['height']) for image in content['images']}
    files = Counter(image['file_name'] for image in content['images'])
    if repeated := [file for file, times in files.items() if times > 1]:
        print_log(f'{path} lists {len(repeated)} image files under several ids ({first_few(repeated)}). The objects of '
                  'one entry are background in the others', 'current', logging.WARNING)
    known = {category['id']: category['name'] in classes for category in content['categories']}
    annotations = [ann for ann in content.get('annotations', ()) if not ann.get('ignore')]  # as CocoDataset
    used: set[Any] = set()
    faults: dict[str, list] = {}
    for ann in annotations:
        fault = find_box_fault(ann, sizes[ann['image_id']], path)
        if fault:
            faults.setdefault(fault, []).append(ann['id'])
        if known[ann['category_id']] and not (fault and fault in SKIPPED):
            used.add(ann['image_id'])
    for fault, numbers in faults.items():
        print_log(f'{len(numbers)} of {len(annotations)} boxes in {path} are {fault}'
                  f'{" and are skipped" if fault in SKIPPED else ""} (annotations {first_few(numbers)})'
                  f'{"" if fault in SKIPPED else ". Are they x, y, width and height, not corners or centers?"}',
                  'current', logging.WARNING)
    if not training:
        return
    annotated = {ann['image_id'] for ann in content['annotations'] if known[ann['category_id']]}
    if not sizes:
        raise DataError(f'{path} of {key} lists no images. Give the file of a data set.')
    if not any(min(size) >= filter_cfg.get('min_size', 0)
               and (image in annotated or not filter_cfg.get('filter_empty_gt')) for image, size in sizes.items()):
        raise DataError(f'filter_cfg={dict(filter_cfg)} of {key} removes all {len(sizes)} images of {path}. Correct '
                        'filter_cfg or metainfo.classes.')
    if not used:
        raise DataError(f'None of the {len(annotations)} boxes in {path} can train the {len(classes)} classes of {key}'
                        f'{f": they are {first_few(faults)}" if faults else ""}. Boxes are [x, y, width, height] in '
                        'pixels.')


BEYOND = 'reaching beyond their image'
SKIPPED = ('not finite', 'narrower than a pixel', 'outside of their image', 'of area 0')


def find_box_fault(ann: dict, size: tuple[float, float], path: str) -> str | None:
    """What is wrong with a box for CocoDataset; None if nothing is.

    Args:
        ann: The annotation.
        size: Width and height of its image.
        path: The annotation file, for the messages.

    Returns:
        An entry of ``SKIPPED`` if the data set skips the box, ``BEYOND`` if it reaches beyond the image by more than a
        pixel, or None.

    Raises:
        DataError: A value has the wrong type, or ``area`` is missing.
    """
    require_value(ann, 'bbox', path)
    box: list[float] = ann['bbox']
    (x, y, w, h), (width, height) = box, size
    if not all(map(math.isfinite, box)):
        return 'not finite'
    if w < 1 or h < 1:
        return 'narrower than a pixel'
    if min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0):
        return 'outside of their image'
    require_value(ann, 'area', path)
    if ann.get('iscrowd') is not None:
        require_value(ann, 'iscrowd', path)
    if ann['area'] <= 0:
        return 'of area 0'
    return BEYOND if min(x, y) < -1 or x + w > width + 1 or y + h > height + 1 else None


# ------------------------------------------------------------------------------------------ MMDetection's XMLDataset

def check_voc_files(ann_file: str, folder: str, classes: Sequence[str], key: str, training: bool = True,
                    img_subdir: str = 'JPEGImages', ann_subdir: str = 'Annotations') -> None:
    """Check list, annotations and images of MMDetection's XMLDataset, and warn of objects that it skips.

    Args:
        ann_file: The list of images.
        folder: ``sub_data_root``, with the folders of images and annotations.
        classes: Class names of the data set.
        key: Config key of the data set, for the messages.
        training: Whether the data set trains a model.
        img_subdir, ann_subdir: As in XMLDataset.

    Raises:
        DataError: A line of the list is empty or has blanks, a file is missing or damaged, an object has no name or no
            box, or no object has one of the classes.
    """
    used, skipped = 0, Counter[str]()
    try:
        lines = list_from_file(ann_file)
    except UnicodeDecodeError as error:
        raise DataError(f'{ann_file} is not UTF-8 ({error}). Save it as UTF-8.') from None
    for number, name in enumerate(lines, 1):
        if not name or name != name.strip('\ufeff \t'):
            raise DataError(f'{ann_file}, line {number} is {name!r}. XMLDataset reads one name per line, without '
                            'suffix and blanks.')
        path = os.path.join(folder, ann_subdir, f'{name}.xml')
        for found, difficult, box in read_voc_objects(path, f'{ann_file} lists {name}.', strict=True):
            if found not in classes:
                if found.strip() in classes:
                    raise DataError(f'{path} has the class {found!r}, with blanks. Remove them; XMLDataset would skip '
                                    'the object silently.')
                skipped[found] += 1
                continue
            try:
                corners = [float(text or '') for text in box]
                if not all(map(math.isfinite, corners)):
                    raise ValueError
            except ValueError:
                raise DataError(f'{path} has an object of class {found!r} with the bndbox {box}. Give xmin, ymin, xmax '
                                'and ymax in pixels.') from None
            used += not difficult
        image = os.path.join(folder, img_subdir, f'{name}.jpg')
        if not os.path.isfile(image):
            raise DataError(f'There is no image {image}{similar_file(image)}. XMLDataset reads .jpg only.')
    if training and not used:
        raise DataError(f'No object in {ann_file} can train the {len(classes)} classes of {key}. Set metainfo=dict('
                        f'classes=(...)); the objects are of {first_few(skipped)}.')
    warn_classes(ann_file, 'has objects that were skipped, of', sorted(skipped))
