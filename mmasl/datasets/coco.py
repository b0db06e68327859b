"""COCO as a multi-label data set: the categories of an image's instances are its labels."""
import json
import logging
from typing import Any

from mmengine.fileio import exists, get, join_path
from mmengine.logging import print_log
from mmpretrain.datasets import MultiLabelDataset

from mmasl.datasets.validation import check_entries, refuse_repeats
from mmasl.registry import DATASETS

CURE = ('Get the images and instances_*.json from https://cocodataset.org/#download, or set data_root, ann_file and '
        'data_prefix to where they lie. No download is needed for configs/digits/*_digits.py, on the data that '
        'tools/make_digits.py writes')


@DATASETS.register_module()
class CocoMultiLabel(MultiLabelDataset):
    """Image-level labels from COCO's ``instances_*.json``; a crowd counts as any other instance.

    A sample has ``img_path``, ``img_id`` and ``gt_label`` (sorted list of int). Images without annotation are left
    out, as the multi-label literature does: 82,081 and 40,137 images remain of the 2014 split. Class i is the i-th of
    the file's ``categories`` (80 on COCO, whatever their ids). Classes without any image are named in a warning.

    Args:
        ann_file: The annotation file, absolute or in ``data_root``.
        keep_empty: Keep images without a label, with an empty ``gt_label``.
        **kwargs: As in :class:`mmpretrain.datasets.MultiLabelDataset`. ``data_prefix=dict(img_path=...)`` is the image
            folder. ``metainfo=dict(classes=...)`` or ``classes`` selects and orders classes by name; an image that has
            none of them counts as one without annotation.

    Raises:
        FileNotFoundError: The annotation file or the first image does not exist.
        ValueError: The file is damaged or of another kind, annotates unknown images or categories, lists an image or
            category twice, lacks a selected class, or leaves no image.
    """

    def __init__(self, ann_file: str, keep_empty: bool = False, **kwargs: Any) -> None:
        self.keep_empty = keep_empty
        prefix = kwargs.get('data_prefix', '')
        if isinstance(prefix, dict) and 'img_path' not in prefix:
            raise ValueError(f'data_prefix is {prefix}; name the image folder with dict(img_path=...)')
        super().__init__(ann_file, **kwargs)

    @property
    def metainfo(self) -> dict:
        """Copy of the meta information; reads the file if ``classes`` can only come from there."""
        self._require_classes()
        return super().metainfo

    @property
    def CLASSES(self) -> tuple[str, ...]:
        """Names of the classes; reads the file if they can only come from there."""
        self._require_classes()
        return self._metainfo['classes']

    def _require_classes(self) -> None:
        if 'classes' not in self._metainfo:
            self.full_init()

    def load_data_list(self) -> list[dict]:
        """Read the annotation file: one dict an image."""
        content = self._load_file()
        check_entries(content, self.ann_file, dict(images=('id', 'file_name'), categories=('id', 'name')))
        names = {category['id']: category['name'] for category in content['categories']}
        refuse_repeats(names.values(), f'{self.ann_file} lists category')
        classes = self._metainfo['classes'] = tuple(self._metainfo.get('classes', names.values()))
        refuse_repeats(classes, 'classes has')
        unknown = sorted(set(classes) - set(names.values()))
        if unknown:
            raise ValueError(f'classes {unknown} are not in {self.ann_file}, which has {list(names.values())}')

        index = {name: i for i, name in enumerate(classes)}
        # None: a category of the file that is not selected.
        label_of = {category_id: index.get(name) for category_id, name in names.items()}
        labels: dict[Any, set[Any]] = {image['id']: set() for image in content['images']}
        for ann in content['annotations']:
            try:
                labels[ann['image_id']].add(label_of[ann['category_id']])
            except KeyError:
                raise ValueError(self._explain(ann, labels)) from None
        data_list = []
        for image in content['images']:
            gt_label = sorted(labels[image['id']] - {None})
            if gt_label or self.keep_empty:
                data_list.append(dict(img_path=join_path(self.img_prefix, image['file_name']), img_id=image['id'],
                                      gt_label=gt_label))
        self._report(data_list, len(content['images']))
        return data_list

    def _load_file(self) -> dict:
        if not exists(self.ann_file):
            raise FileNotFoundError(f'There is no annotation file {self.ann_file}. {CURE}')
        try:
            # Labels need no decimal number, and polygons are millions: `{}.get` drops them, in a third of the time.
            content = json.loads(get(self.ann_file), parse_float=dict[str, None]().get)
        except ValueError as error:
            raise ValueError(f'{self.ann_file} is not a whole JSON file ({error}): download it again') from error
        wanted = {'images', 'annotations', 'categories'}
        found = set(content) if isinstance(content, dict) else set()
        if not found >= wanted:
            raise ValueError(f'{self.ann_file} is no COCO instances file: it lacks {sorted(wanted - found)} and has '
                             f'{sorted(found)}. Give instances_*.json, not captions_* or image_info_*')
        return content

    def _explain(self, ann: dict, images: dict) -> str:
        key = 'category_id' if ann.get('image_id') in images else 'image_id'
        if key not in ann:
            return (f'{self.ann_file} is no COCO instances file: annotation {ann.get("id")} has no {key}. Give '
                    'instances_*.json')
        return f'annotation {ann.get("id")} in {self.ann_file} has the unknown {key} {ann[key]}'

    def _report(self, data_list: list[dict], total: int) -> None:
        """Tell before any work is lost what is missing from the file, its classes and the image folder."""
        if not data_list:
            raise ValueError(f'none of the {total} images in {self.ann_file} has a label of the '
                             f'{len(self._metainfo["classes"])} classes; keep_empty=True keeps them all the same')
        first = data_list[0]['img_path']
        if not exists(first):
            raise FileNotFoundError(f'There is no image {first}, the first of {self.ann_file}. {CURE}')
        if len(data_list) < total:
            print_log(f'{self.ann_file}: {total - len(data_list):,} of {total:,} images have no label and are left out',
                      'current')
        seen = {label for data in data_list for label in data['gt_label']}
        empty = [name for i, name in enumerate(self._metainfo['classes']) if i not in seen]
        if empty:
            print_log(f'{self.ann_file} has no image of {len(empty)} classes: {", ".join(empty)}', 'current',
                      logging.WARNING)
