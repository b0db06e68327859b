"""Pascal VOC with a choice for objects marked as difficult."""
from typing import Any

import numpy as np
from mmpretrain.datasets import VOC

from mmasl.errors import ConfigError, DataError
from mmasl.registry import DATASETS

from .annotation_files import (
    find_voc_images,
    read_image_set,
    read_voc_objects,
    require_file,
    require_unique,
    use_class_names,
)
from .validation import warn_classes

HINT = ('data_root must contain JPEGImages/, Annotations/ and ImageSets/Main/, as VOC2007 from '
        'http://host.robots.ox.ac.uk/pascal/VOC does; configs/digits/ needs no download.')


@DATASETS.register_module()
class VOCMultiLabel(VOC):
    """VOC with positive, negative or ignored labels for classes that are present only as difficult objects.

    A sample has ``img_path``, ``gt_label`` (sorted list of int, the positive classes), ``gt_label_difficult`` (classes
    present only as difficult objects) and, with ``difficult='ignore'``, ``gt_score``: float32 (C,) of 1, 0 and -1 for
    ignored. MMPretrain's heads and metrics prefer ``gt_score`` to ``gt_label``. Set ``ignore_index=-1`` in the loss and
    in ``mmasl.MultiLabelMetric``, and do not use Mixup or CutMix with ignored labels.

    Images may have other suffixes than .jpg. A missing or empty ``<difficult>`` counts as 0.

    Args:
        data_root: Folder ``VOC2007``, or one of the same layout.
        difficult: 'positive', 'negative' or 'ignore'. ML-GCN's published code trains with 'positive' and evaluates with
            'ignore'; MMPretrain trains with 'negative'.
        **kwargs: As in :class:`mmpretrain.datasets.VOC`. Data with other classes than VOC's 20 needs
            ``metainfo=dict(classes=...)``; objects of other classes are then skipped with a warning.

    Raises:
        ConfigError: ``difficult`` or ``split`` is unknown, or ``classes`` is not a list of names.
        DataError: A part of the layout does not exist, an object has an unknown class while ``classes`` was not set, an
            annotation file is damaged, an image is repeated, or no image has a label.
    """

    def __init__(self, data_root: str, *, difficult: str, **kwargs: Any) -> None:
        if difficult not in ('positive', 'negative', 'ignore'):
            raise ConfigError(f"difficult={difficult!r} is unknown; set 'positive', 'negative' or 'ignore'.")
        self.difficult = difficult
        try:
            super().__init__(data_root, **use_class_names(kwargs))
        except AssertionError as error:  # of an unknown split, or of a missing data_prefix
            raise ConfigError(f'{error}') from None

    def load_data_list(self) -> list[dict]:
        """Read the image set and its annotations: one dict an image."""
        require_file(self.image_set_path, 'list of images', HINT)
        self._other_names: set[str] = set()
        names = read_image_set(self.image_set_path)
        if not names:
            raise DataError(f'{self.image_set_path} lists no image.')
        data_list: list[dict] = []
        for name, file in zip(names, find_voc_images(self.img_prefix, names)):
            labels = (None, None) if self.ann_prefix is None else self._get_labels_from_xml(name)
            data_list.append(dict(img_path=self.backend.join_path(self.img_prefix, file), gt_label=labels[0],
                                  gt_label_difficult=labels[1]))
        require_unique([info['img_path'] for info in data_list], f'{self.image_set_path} lists')
        require_file(data_list[0]['img_path'], 'image', HINT)
        if self.ann_prefix is None:
            return data_list
        for info in data_list:
            if self.difficult == 'positive':
                info['gt_label'] = sorted(info['gt_label'] + info['gt_label_difficult'])
            elif self.difficult == 'ignore':
                score = np.zeros(len(self.CLASSES), np.float32)
                score[info['gt_label']] = 1
                score[info['gt_label_difficult']] = -1
                info['gt_score'] = score
        self._report(data_list)
        return data_list

    def _get_labels_from_xml(self, img_id: str) -> tuple[list[int], list[int]]:
        path = self.backend.join_path(self.ann_prefix, f'{img_id}.xml')
        index, plain, difficult = self.class_to_idx, set[int](), set[int]()
        for written, hard, _ in read_voc_objects(path, HINT):
            name = written if written in index else written.strip()
            if name in index:
                (difficult if hard else plain).add(index[name])
            elif tuple(self.CLASSES) == tuple(VOC.METAINFO['classes']):
                raise DataError(f'{path} has an object of class {name!r}, which is not a class of VOC. Set '
                                'metainfo=dict(classes=[...]) for other data.')
            else:
                self._other_names.add(name)
        return sorted(plain), sorted(difficult - plain)

    def _report(self, data_list: list[dict]) -> None:
        """Check the result before it is used: labels, skipped objects and classes without images."""
        seen = {label for info in data_list for label in info['gt_label'] + info['gt_label_difficult']}
        if not seen:
            raise DataError(f'No image of {self.image_set_path} has an object of the classes {list(self.CLASSES)}. '
                            f'Correct metainfo=dict(classes=[...]); the objects are of {sorted(self._other_names)}.')
        if not any(info['gt_label'] for info in data_list):
            raise DataError(f'{self.image_set_path} has difficult objects only, and difficult={self.difficult!r} '
                            "leaves no positive label. Set difficult='positive', or use another list.")
        warn_classes(self.image_set_path, 'has no object of',
                     [name for i, name in enumerate(self.CLASSES) if i not in seen])
        warn_classes(self.image_set_path, 'has objects that were skipped, of', sorted(self._other_names))
