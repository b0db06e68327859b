"""Herbarium 2020 (FGVC7): one plant species an image, 32,000 species with a long tail."""
from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine.fileio import join_path
from mmpretrain.datasets import BaseDataset

from mmasl.errors import ConfigError, DataError
from mmasl.registry import DATASETS

from .annotation_files import LABELS, read_coco_file, require_file

SPLITS = ('train', 'val', 'all')
HINT = ('Download nybg2020.zip from https://www.kaggle.com/c/herbarium-2020-fgvc7 and set data_root and ann_file to '
        'nybg2020/train and its metadata.json; the labels of the test set are private, and configs/digits/ needs no '
        'download.')


@DATASETS.register_module()
class Herbarium2020(BaseDataset):
    """Training images of the challenge, with a fixed part of each species held out for evaluation.

    The labels of the challenge's test set are private. Results on the held-out images therefore do not compare with
    Table 12 of the paper. The metric of the challenge is macro F1, :class:`mmasl.MacroF1`.

    A sample has ``img_path``, ``img_id`` and ``gt_label`` (int). Class i is the category with the i-th smallest id. The
    image ids alone determine which images are held out. A species with n images holds out ``val_fraction`` n of them,
    rounded, but at least 1 and at most n - 1.

    Args:
        ann_file: ``metadata.json`` of the training set, absolute or in ``data_root``.
        split: 'train', 'val' (the held-out images) or 'all'.
        val_fraction: Share of held-out images, in (0, 1).
        **kwargs: As in :class:`mmpretrain.datasets.BaseDataset`. ``data_prefix`` is the folder that the file names are
            relative to, by default ``data_root``. ``classes`` cannot be set.

    Raises:
        ConfigError: An argument is out of its range.
        DataError: The file or the first image does not exist; the file is damaged or of another kind, repeats an image
            or id, annotates unknown images or categories, or does not give each image one category.
    """

    def __init__(self, ann_file: str, split: str, val_fraction: float = 0.1, **kwargs: Any) -> None:
        if split not in SPLITS:
            raise ConfigError(f'split={split!r} is unknown; set one of {SPLITS}.')
        if not 0 < val_fraction < 1:
            raise ConfigError(f'val_fraction={val_fraction} is out of range; set a share in (0, 1).')
        if kwargs.get('classes') is not None or 'classes' in (kwargs.get('metainfo') or {}):
            raise ConfigError('classes cannot be set; Herbarium2020 takes them from the file, ordered by id.')
        self.split = split
        self.val_fraction = val_fraction
        super().__init__(ann_file, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Read the JSON file: one dict an image."""
        content = read_coco_file(self.ann_file, HINT, LABELS._replace(utf8=False))
        for entry in (*content['images'], *content['categories']):
            if isinstance(entry['id'], str) or entry['id'] < 0 or entry['id'] % 1:
                raise DataError(f'{self.ann_file} has the id {entry["id"]!r}; ids must be integers. {HINT}')
        categories = sorted(content['categories'], key=lambda category: category['id'])
        self._metainfo['classes'] = tuple(category['name'] for category in categories)
        index = {category['id']: i for i, category in enumerate(categories)}
        label_of = dict.fromkeys(image['id'] for image in content['images'])
        for ann in content['annotations']:
            if label_of[ann['image_id']] is not None:
                raise DataError(f'{self.ann_file} annotates image id {ann["image_id"]} twice, the second time as '
                                f'annotation {ann.get("id")}. Each image must have one category.')
            label_of[ann['image_id']] = index[ann['category_id']]
        if missing := [image_id for image_id, label in label_of.items() if label is None]:
            raise DataError(f'{self.ann_file} has no annotation of {len(missing)} images, the first has the id '
                            f'{missing[0]}. {HINT}')

        data_list = [dict(img_path=join_path(self.img_prefix, image['file_name']), img_id=image['id'],
                          gt_label=label_of[image['id']]) for image in content['images']]
        if self.split != 'all':
            chosen = held_out([data['img_id'] for data in data_list], [data['gt_label'] for data in data_list],
                              self.val_fraction) == (self.split == 'val')
            data_list = [data for data, wanted in zip(data_list, chosen) if wanted]
        if not data_list:
            raise DataError(f'{self.ann_file} has no image for split={self.split!r}.')
        require_file(data_list[0]['img_path'], 'image', HINT)
        return data_list


def held_out(ids: Sequence[int], labels: Sequence[int], fraction: float) -> np.ndarray:
    """Choose the images that :class:`Herbarium2020` holds out.

    Args:
        ids: Image ids, integers >= 0, all different.
        labels: Classes of the images, integers >= 0.
        fraction: Share of each class, in (0, 1).

    Returns:
        bool (N,).
    """
    # Multiplication by 2^64 / golden ratio scatters the ids evenly, and identically on every machine.
    scattered = np.asarray(ids, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    of = np.asarray(labels, np.int64)
    order = np.lexsort((scattered, of))
    count = np.bincount(of, minlength=1)
    wanted = np.minimum(np.maximum(np.rint(fraction * count), 1), count - 1)
    rank = np.empty(len(of), np.int64)
    rank[order] = np.arange(len(of)) - (count.cumsum() - count)[of[order]]
    return rank < wanted[of]
