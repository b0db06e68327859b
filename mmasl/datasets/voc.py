"""Pascal VOC with a choice for the objects that are marked difficult."""
import logging
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
from mmengine.logging import print_log
from mmpretrain.datasets import VOC

from mmasl.datasets.validation import refuse_repeats
from mmasl.registry import DATASETS

LAYOUT = ('data_root must hold JPEGImages/, Annotations/ and ImageSets/Main/, as VOC2007 from '
          'http://host.robots.ox.ac.uk/pascal/VOC does')


@DATASETS.register_module()
class VOCMultiLabel(VOC):
    """VOC whose classes that are present only as difficult objects are positive, negative or ignored.

    A sample has ``img_path``, ``gt_label`` (sorted list of int, the positive classes), ``gt_label_difficult`` (the
    classes present only as difficult) and, with ``difficult='ignore'``, ``gt_score``: float32 (C,) of 0, 1 and -1 for
    ignored. Heads and metrics of mmpretrain take it in place of ``gt_label``; give the loss and
    ``mmasl.MultiLabelMetric`` ``ignore_index=-1``, and do not mix such images (Mixup, CutMix).

    Args:
        data_root: The folder ``VOC2007`` or of the same layout.
        difficult: 'positive', 'negative' or 'ignore'. ML-GCN's published code trains with 'positive' and evaluates with
            'ignore'; mmpretrain trains with 'negative'.
        **kwargs: As in :class:`mmpretrain.datasets.VOC` (``split``, ``pipeline`` ...). Other data than VOC's 20 classes
            needs ``metainfo=dict(classes=...)``; objects of other classes are then left out, with a warning.

    Raises:
        FileNotFoundError: A part of the layout does not exist.
        ValueError: ``difficult`` is none of the three, an object is of an unknown class while ``classes`` was not set,
            an annotation file is damaged, an image is listed twice, or no image has a label.
    """

    def __init__(self, data_root: str, *, difficult: str, **kwargs: Any) -> None:
        if difficult not in ('positive', 'negative', 'ignore'):
            raise ValueError(f"difficult is {difficult!r}; it must be 'positive', 'negative' or 'ignore'")
        self.difficult = difficult
        super().__init__(data_root, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Read the image set and its annotations: one dict an image."""
        self._require(self.image_set_path, 'list of images')
        self._other_names: set[str] = set()
        data_list = super().load_data_list()
        if not data_list:
            raise ValueError(f'{self.image_set_path} lists no image')
        refuse_repeats([info['img_path'] for info in data_list], f'{self.image_set_path} lists')
        self._require(data_list[0]['img_path'], 'image')
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
        self._require(path, 'annotation')
        try:
            root = ET.fromstring(self.backend.get(path))
        except ET.ParseError as error:
            raise ValueError(f'{path} is not whole XML ({error}): get it again') from error
        index, plain, difficult = self.class_to_idx, set[int](), set[int]()
        for obj in root.findall('object'):
            name = obj.findtext('name', '')
            mark = obj.findtext('difficult', '0').strip()
            if mark not in ('0', '1'):
                raise ValueError(f'{path} has an object of class {name!r} with difficult={mark!r}, which is 0 or 1')
            if name in index:
                (difficult if mark == '1' else plain).add(index[name])
            elif tuple(self.CLASSES) == tuple(VOC.METAINFO['classes']):
                raise ValueError(f'{path} has an object of class {name!r}, which VOC does not have: name the classes '
                                 'of this data with metainfo=dict(classes=[...])')
            else:
                self._other_names.add(name)
        return sorted(plain), sorted(difficult - plain)

    def _require(self, path: str, what: str) -> None:
        if not self.backend.exists(path):
            raise FileNotFoundError(f'There is no {what} {path}. {LAYOUT}; no download is needed for '
                                    'configs/digits/*_digits.py')

    def _report(self, data_list: list[dict]) -> None:
        seen = {label for info in data_list for label in info['gt_label'] + info['gt_label_difficult']}
        if not seen:
            raise ValueError(f'no image of {self.image_set_path} has an object of the classes {list(self.CLASSES)}; '
                             f'its objects are {sorted(self._other_names)}: correct metainfo=dict(classes=[...])')
        if not any(info['gt_label'] for info in data_list):
            raise ValueError(f'{self.image_set_path} has difficult objects only, and difficult={self.difficult!r} '
                             "leaves no positive label: choose another list, or difficult='positive'")
        empty = [name for i, name in enumerate(self.CLASSES) if i not in seen]
        for what, names in (('has no object of', empty), ('has objects left out, of', sorted(self._other_names))):
            if names:
                print_log(f'{self.image_set_path} {what} {len(names)} classes: {", ".join(names)}', 'current',
                          logging.WARNING)
