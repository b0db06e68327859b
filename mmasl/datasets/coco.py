"""COCO as a multi-label data set: the labels of an image are the categories of its instances."""
from typing import Any

from mmengine.fileio import join_path
from mmengine.logging import print_log
from mmpretrain.datasets import MultiLabelDataset

from mmasl.errors import ConfigError, DataError
from mmasl.registry import DATASETS

from .annotation_files import LABELS, read_coco_file, require_file, require_selected, use_class_names
from .validation import warn_classes

HINT = ('Download instances_*.json and the images from https://cocodataset.org/#download, or correct data_root, '
        'ann_file and data_prefix; configs/digits/ needs no download.')


@DATASETS.register_module()
class CocoMultiLabel(MultiLabelDataset):
    """Image-level labels from COCO's ``instances_*.json``. Crowds count like other instances.

    A sample has ``img_path``, ``img_id`` and ``gt_label`` (sorted list of int). Images without annotations are omitted,
    as in the multi-label literature: 82,081 and 40,137 images of the 2014 split remain. Class i is the i-th entry of
    ``categories`` (80 for COCO), as text. A warning names classes without images. With ``test_mode``, the file may have
    no ``annotations``, as ``image_info_test-dev2017.json``: its samples have no ``gt_label`` and can only be predicted.

    Args:
        ann_file: Annotation file, absolute or in ``data_root``.
        keep_empty: Keep images without labels, with an empty ``gt_label``.
        **kwargs: As in :class:`mmpretrain.datasets.MultiLabelDataset`. ``data_prefix=dict(img_path=...)`` is the image
            folder. ``metainfo=dict(classes=...)`` or ``classes`` selects and orders classes by name. Images that have
            none of them count as images without annotations.

    Raises:
        ConfigError: ``data_prefix`` names no image folder, or a selected class is unknown.
        DataError: The annotation file or the first image does not exist; the file is damaged or of another kind,
            annotates unknown images or categories, or repeats an image or category; or no image remains.
    """

    def __init__(self, ann_file: str, keep_empty: bool = False, **kwargs: Any) -> None:
        self.keep_empty = keep_empty
        prefix = kwargs.get('data_prefix', '')
        if isinstance(prefix, dict) and 'img_path' not in prefix:
            raise ConfigError(f'data_prefix={prefix} names no image folder; set data_prefix=dict(img_path=...).')
        super().__init__(ann_file, **use_class_names(kwargs))

    @property
    def metainfo(self) -> dict:
        """Copy of the meta information. Reads the annotation file if ``classes`` is not set."""
        self._require_classes()
        return super().metainfo

    @property
    def CLASSES(self) -> tuple[str, ...]:
        """Class names. Reads the annotation file if ``classes`` is not set."""
        self._require_classes()
        return self._metainfo['classes']

    def _require_classes(self) -> None:
        if 'classes' not in self._metainfo:
            self.full_init()

    def load_data_list(self) -> list[dict]:
        """Read the annotation file: one dict an image."""
        # Labels need no decimals, and polygons contain millions.
        content = read_coco_file(self.ann_file, HINT, LABELS._replace(optional=self.test_mode), decimals=False)
        classes = self._metainfo.get('classes')
        require_selected(self.ann_file, content['categories'], classes)
        names = {category['id']: category['name'] for category in content['categories']}
        classes = self._metainfo['classes'] = tuple(names.values()) if classes is None else classes
        if unknown := [name for name in classes if name not in set(names.values())]:
            raise ConfigError(f'classes {unknown} are not in {self.ann_file}; choose from {list(names.values())}.')
        if 'annotations' not in content:  # for predictions
            data_list = [dict(img_path=join_path(self.img_prefix, image['file_name']), img_id=image['id'])
                         for image in content['images']]
            if not data_list:
                raise DataError(f'{self.ann_file} lists no image.')
            require_file(data_list[0]['img_path'], 'image', HINT)
            return data_list

        index = {name: i for i, name in enumerate(classes)}
        label_of = {category_id: index.get(name) for category_id, name in names.items()}  # None: not selected
        labels: dict[Any, set[Any]] = {image['id']: set() for image in content['images']}
        for ann in content['annotations']:
            labels[ann['image_id']].add(label_of[ann['category_id']])
        data_list = []
        for image in content['images']:
            gt_label = sorted(labels[image['id']] - {None})
            if gt_label or self.keep_empty:
                data_list.append(dict(img_path=join_path(self.img_prefix, image['file_name']), img_id=image['id'],
                                      gt_label=gt_label))
        self._report(data_list, len(content['images']))
        return data_list

    def _report(self, data_list: list[dict], total: int) -> None:
        """Check the result before it is used: images, omitted images and classes without images."""
        classes = self._metainfo['classes']
        if not data_list:
            raise DataError(f'None of the {total} images in {self.ann_file} has a label of the {len(classes)} classes. '
                            'Correct classes, or set keep_empty=True.')
        require_file(data_list[0]['img_path'], 'image', HINT)
        if len(data_list) < total:
            print_log(f'{self.ann_file}: {total - len(data_list):,} of {total:,} images have no label and are omitted',
                      'current')
        seen = {label for data in data_list for label in data['gt_label']}
        warn_classes(self.ann_file, 'has no image of', [name for i, name in enumerate(classes) if i not in seen])
