"""Herbarium 2020 (FGVC7): one plant species an image, 32,000 species with a long tail."""
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine.fileio import exists, get, join_path
from mmpretrain.datasets import BaseDataset

from mmasl.datasets.validation import check_entries
from mmasl.registry import DATASETS

SPLITS = ('train', 'val', 'all')
CURE = ('Get nybg2020.zip from https://www.kaggle.com/c/herbarium-2020-fgvc7, or set data_root and ann_file to '
        'nybg2020/train and its metadata.json. No download is needed for configs/digits/*_digits.py')


@DATASETS.register_module()
class Herbarium2020(BaseDataset):
    """The training images of the challenge, of which a fixed part of each species is held out for evaluation.

    The labels of the challenge's test set are private, so no result here compares with Table 12 of the paper, which is
    on that set. Its metric is macro F1: :class:`mmasl.evaluation.metrics.MacroF1`.

    A sample has ``img_path``, ``img_id`` and ``gt_label`` (int). Class i is that of the i-th smallest category id. The
    held-out images are chosen by their ids alone, whatever the order of the file: of a species with n images,
    ``val_fraction`` n rounded, but at least 1 and at most n - 1.

    Args:
        ann_file: ``metadata.json`` of the training set, absolute or in ``data_root``.
        split: 'train', 'val' (the held-out images) or 'all'.
        val_fraction: Share of held-out images, in (0, 1).
        **kwargs: As in :class:`mmpretrain.datasets.BaseDataset`. ``data_prefix`` is the folder that file names of the
            JSON start from, by default ``data_root``. ``classes`` cannot be chosen.

    Raises:
        FileNotFoundError: The file or the first image does not exist.
        ValueError: The file is damaged or of another kind, lists an image or id twice, annotates unknown images or
            categories, or does not give each image one category; or an argument is out of its range.
    """

    def __init__(self, ann_file: str, split: str, val_fraction: float = 0.1, **kwargs: Any) -> None:
        if split not in SPLITS:
            raise ValueError(f'split is {split!r}; it must be one of {SPLITS}')
        if not 0 < val_fraction < 1:
            raise ValueError(f'val_fraction is {val_fraction}; it must be above 0 and below 1')
        if kwargs.get('classes') is not None or 'classes' in (kwargs.get('metainfo') or {}):
            raise ValueError('classes are those of the file, in the order of their ids: they cannot be chosen')
        self.split = split
        self.val_fraction = val_fraction
        super().__init__(ann_file, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Read the JSON: one dict an image."""
        content = self._load_file()
        check_entries(content, self.ann_file, dict(images=('id', 'file_name'), categories=('id', 'name')))
        categories = sorted(content['categories'], key=lambda category: category['id'])
        self._metainfo['classes'] = tuple(category['name'] for category in categories)
        index = {category['id']: i for i, category in enumerate(categories)}
        label_of = dict.fromkeys(image['id'] for image in content['images'])
        for ann in content['annotations']:
            self._check(ann, label_of, index)
            label_of[ann['image_id']] = index[ann['category_id']]
        missing = [image_id for image_id, label in label_of.items() if label is None]
        if missing:
            raise ValueError(f'{self.ann_file} has no annotation of {len(missing)} images, the first has the id '
                             f'{missing[0]}: give the metadata.json of the training set')

        data_list = [dict(img_path=join_path(self.img_prefix, image['file_name']), img_id=image['id'],
                          gt_label=label_of[image['id']]) for image in content['images']]
        if self.split != 'all':
            chosen = held_out([data['img_id'] for data in data_list], [data['gt_label'] for data in data_list],
                              self.val_fraction) == (self.split == 'val')
            data_list = [data for data, wanted in zip(data_list, chosen) if wanted]
        if not data_list:
            raise ValueError(f'{self.ann_file} has no image for split {self.split!r}')
        first = data_list[0]['img_path']
        if not exists(first):
            raise FileNotFoundError(f'There is no image {first}, the first of {self.ann_file}. {CURE}')
        return data_list

    def _load_file(self) -> dict:
        if not exists(self.ann_file):
            raise FileNotFoundError(f'There is no annotation file {self.ann_file}. {CURE}')
        try:
            # Authors' names in the released file are not all UTF-8.
            content = json.loads(get(self.ann_file).decode('utf-8', errors='replace'))
        except ValueError as error:
            raise ValueError(f'{self.ann_file} is not a whole JSON file ({error}): download it again') from error
        wanted = {'images', 'annotations', 'categories'}
        found = set(content) if isinstance(content, dict) else set()
        if not found >= wanted:
            raise ValueError(f'{self.ann_file} lacks {sorted(wanted - found)} and has {sorted(found)}: give the '
                             "metadata.json of the training set; the test set's labels are private")
        return content

    def _check(self, ann: dict, label_of: dict, categories: dict) -> None:
        for key, known in (('image_id', label_of), ('category_id', categories)):
            if ann.get(key) not in known:
                raise ValueError(f'annotation {ann.get("id")} in {self.ann_file} has the unknown {key} {ann.get(key)}')
        if label_of[ann['image_id']] is not None:
            raise ValueError(f'{self.ann_file} annotates image id {ann["image_id"]} 2 times or more, the last time as '
                             f'annotation {ann.get("id")}: each image must have one category')


def held_out(ids: Sequence[int], labels: Sequence[int], fraction: float) -> np.ndarray:
    """Which images to hold out, bool (N,), by the rule of :class:`Herbarium2020`.

    Args:
        ids: Image ids, integers >= 0, all different.
        labels: Classes of the images, integers >= 0.
        fraction: Share of each class, in (0, 1).
    """
    # Multiplication by 2^64 / golden ratio scatters the ids, evenly, and the same on every machine.
    scattered = np.asarray(ids, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    of = np.asarray(labels, np.int64)
    order = np.lexsort((scattered, of))
    count = np.bincount(of, minlength=1)
    wanted = np.minimum(np.maximum(np.rint(fraction * count), 1), count - 1)
    rank = np.empty(len(of), np.int64)
    rank[order] = np.arange(len(of)) - (count.cumsum() - count)[of[order]]
    return rank < wanted[of]
