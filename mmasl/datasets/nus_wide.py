"""NUS-WIDE in the variant that the authors of ASL published, from its CSV file."""
import csv
import io
import logging
from typing import Any

from mmengine.fileio import get_text, join_path
from mmengine.logging import print_log
from mmpretrain.datasets import MultiLabelDataset

from mmasl.errors import ConfigError, DataError
from mmasl.registry import DATASETS

from .annotation_files import require_file, require_unique, use_class_names
from .validation import warn_classes

CONCEPTS = (
    'airport', 'animal', 'beach', 'bear', 'birds', 'boats', 'book', 'bridge', 'buildings', 'cars', 'castle', 'cat',
    'cityscape', 'clouds', 'computer', 'coral', 'cow', 'dancing', 'dog', 'earthquake', 'elk', 'fire', 'fish', 'flags',
    'flowers', 'food', 'fox', 'frost', 'garden', 'glacier', 'grass', 'harbor', 'horses', 'house', 'lake', 'leaf', 'map',
    'military', 'moon', 'mountain', 'nighttime', 'ocean', 'person', 'plane', 'plants', 'police', 'protest', 'railroad',
    'rainbow', 'reflection', 'road', 'rocks', 'running', 'sand', 'sign', 'sky', 'snow', 'soccer', 'sports', 'statue',
    'street', 'sun', 'sunset', 'surf', 'swimmers', 'tattoo', 'temple', 'tiger', 'tower', 'town', 'toy', 'train', 'tree',
    'valley', 'vehicle', 'water', 'waterfall', 'wedding', 'whales', 'window', 'zebra')
SPLITS = ('train', 'val', 'test')
COLUMNS = ('filepath', 'label', 'split_name')
HINT = ('Download nus_wid_data.csv and the images as described in MODEL_ZOO.md of https://github.com/Alibaba-MIIL/ASL, '
        'or correct data_root, ann_file and data_prefix; configs/digits/ needs no download.')


@DATASETS.register_module()
class NUSWide(MultiLabelDataset):
    """Labels from the columns ``filepath``, ``label`` and ``split_name`` of ``nus_wid_data.csv``.

    A label is a list of names, such as ``"['clouds', 'sky']"``, with or without quotes. A sample has ``img_path`` and
    ``gt_label`` (sorted list of int). Images without labels are omitted, as the authors did. Class i is the i-th of the
    81 concepts in alphabetical order, as in the authors' code. A warning names classes without images. The paper's 65.2
    mAP was confirmed at 240 pixels (issue 44 of the official repository); its other data sets use 448.

    Args:
        ann_file: The CSV file, absolute or in ``data_root``.
        split: ``split_name`` of the rows to read, 'train' or 'val'.
        keep_empty: Keep images without labels, with an empty ``gt_label``.
        **kwargs: As in :class:`mmpretrain.datasets.MultiLabelDataset`. ``data_prefix`` is the folder that file paths
            are relative to. ``metainfo=dict(classes=...)`` or ``classes`` replaces the 81 concepts; other names
            are then skipped with a warning.

    Raises:
        ConfigError: The file does not have the split.
        DataError: The file or the first image does not exist; the file lacks a column, has a damaged row, repeats an
            image or has a name that is not one of the 81 concepts; or no image has a label.
    """
    METAINFO = dict(classes=CONCEPTS)

    def __init__(self, ann_file: str, split: str, keep_empty: bool = False, **kwargs: Any) -> None:
        self.split = split
        self.keep_empty = keep_empty
        super().__init__(ann_file, **use_class_names(kwargs))

    def load_data_list(self) -> list[dict]:
        """Read the CSV file: one dict an image."""
        rows = self._load_rows()
        require_unique([path for path, _, _ in rows], f'{self.ann_file} lists')
        splits = sorted({split for _, _, split in rows})
        if self.split not in splits:
            raise ConfigError(f'split={self.split!r} is not in {self.ann_file}; set one of {splits}.')
        if odd := sorted(set(splits) - {*SPLITS, self.split}):
            print_log(f'{self.ann_file} has rows of the unknown splits {odd}; check that it is not cut off', 'current',
                      logging.WARNING)

        index, other_names, data_list, total = self.class_to_idx, set(), [], 0
        fixed = tuple(self.CLASSES) == CONCEPTS
        for path, label, split in rows:
            if split != self.split:
                continue
            total += 1
            names = {name.strip(' \'"') for name in label.strip('[] ').split(',')} - {''}
            if fixed and not names <= index.keys():
                raise DataError(f'{self.ann_file} labels {path} with {sorted(names - index.keys())}, which are not '
                                'among the 81 concepts. Set metainfo=dict(classes=[...]) for other data.')
            other_names |= names - index.keys()
            gt_label = sorted(index[name] for name in names & index.keys())
            if gt_label or self.keep_empty:
                data_list.append(dict(img_path=join_path(self.img_prefix, path), gt_label=gt_label))
        self._report(data_list, other_names, total)
        return data_list

    def _load_rows(self) -> list[tuple[str, str, str]]:
        require_file(self.ann_file, 'annotation file', HINT)
        try:
            reader = csv.DictReader(io.StringIO(get_text(self.ann_file), newline=''))
        except UnicodeDecodeError as error:
            raise DataError(f'{self.ann_file} is not a text file ({error}). {HINT}') from error
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise DataError(f'{self.ann_file} lacks the columns {missing} and has {reader.fieldnames}. Name them in '
                            'its first line.')
        rows: list[Any] = []
        for row in reader:
            rows.append(tuple(row[name] for name in COLUMNS))
            if None in rows[-1] or None in row:
                raise DataError(f'{self.ann_file}, line {reader.line_num}: expected {len(reader.fieldnames or ())} '
                                'columns. Put the list of labels in double quotes.')
        return rows

    def _report(self, data_list: list[dict], other_names: set[str], total: int) -> None:
        """Check the result before it is used: images, omitted images and classes without images."""
        if not data_list:
            found = f'; the labels are {sorted(other_names)}' if other_names else ''
            raise DataError(f'No image of split {self.split!r} in {self.ann_file} has a label of the '
                            f'{len(self.CLASSES)} classes{found}. Correct metainfo=dict(classes=[...]).')
        require_file(data_list[0]['img_path'], 'image', HINT)
        where = f'{self.ann_file} ({self.split})'
        if len(data_list) < total:
            print_log(f'{where}: {total - len(data_list):,} of {total:,} images have no label and are omitted',
                      'current')
        seen = {label for data in data_list for label in data['gt_label']}
        warn_classes(where, 'has no image of', [name for i, name in enumerate(self.CLASSES) if i not in seen])
        warn_classes(where, 'has labels that were skipped, of', sorted(other_names))
