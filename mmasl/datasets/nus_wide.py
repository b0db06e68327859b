"""NUS-WIDE in the variant that the authors of ASL published, from its CSV."""
import csv
import io
import logging
from typing import Any

from mmengine.fileio import exists, get_text, join_path
from mmengine.logging import print_log
from mmpretrain.datasets import MultiLabelDataset

from mmasl.datasets.validation import refuse_repeats
from mmasl.registry import DATASETS

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
CURE = ('Get nus_wid_data.csv and the images as MODEL_ZOO.md of https://github.com/Alibaba-MIIL/ASL says, or set '
        'data_root, ann_file and data_prefix to where they lie. No download is needed for configs/digits/*_digits.py, on the '
        'data that tools/make_digits.py writes')


@DATASETS.register_module()
class NUSWide(MultiLabelDataset):
    """Labels from the columns ``filepath``, ``label`` and ``split_name`` of ``nus_wid_data.csv``.

    A label is a list of names, as in ``"['clouds', 'sky']"``, with or without quotes. A sample has ``img_path`` and
    ``gt_label`` (sorted list of int). Images without a label are left out, as the authors did. Class i is the i-th of
    the 81 concepts in alphabetical order, as the authors' code has it. Classes without any image are
    named in a warning. The paper's 65.2 mAP was confirmed at 240 pixels (issue 44 of the official repository), not at
    the 448 of its other data sets.

    Args:
        ann_file: The CSV, absolute or in ``data_root``.
        split: The ``split_name`` of the wanted rows: 'train' or 'val'.
        keep_empty: Keep images without a label, with an empty ``gt_label``.
        **kwargs: As in :class:`mmpretrain.datasets.MultiLabelDataset`; ``data_prefix`` is the folder that file paths
            start from. ``metainfo=dict(classes=...)`` or ``classes`` replaces the 81 concepts; names that are not in it
            are then left out, with a warning.

    Raises:
        FileNotFoundError: The CSV or the first image does not exist.
        ValueError: The CSV lacks a column or the split, has a damaged row, an image twice or a name that is none of
            the 81 concepts, or no image has a label.
    """
    METAINFO = dict(classes=CONCEPTS)

    def __init__(self, ann_file: str, split: str, keep_empty: bool = False, **kwargs: Any) -> None:
        self.split = split
        self.keep_empty = keep_empty
        super().__init__(ann_file, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Read the CSV: one dict an image."""
        refuse_repeats(self.CLASSES, 'classes has')
        rows = self._load_rows()
        refuse_repeats([path for path, _, _ in rows], f'{self.ann_file} lists')
        splits = sorted({split for _, _, split in rows})
        if self.split not in splits:
            raise ValueError(f'split is {self.split!r}; {self.ann_file} has {splits}')
        if odd := sorted(set(splits) - {*SPLITS, self.split}):
            print_log(f'{self.ann_file} has rows of other splits than {SPLITS}, of {odd}: is it cut off?', 'current',
                      logging.WARNING)

        index, other_names, data_list, total = self.class_to_idx, set(), [], 0
        fixed = tuple(self.CLASSES) == CONCEPTS
        for path, label, split in rows:
            if split != self.split:
                continue
            total += 1
            names = {name.strip(' \'"') for name in label.strip('[] ').split(',')} - {''}
            if fixed and not names <= index.keys():
                raise ValueError(f'{self.ann_file} labels {path} with {sorted(names - index.keys())}, which are none '
                                 'of the 81 concepts: name the classes of this data with metainfo=dict(classes=[...])')
            other_names |= names - index.keys()
            gt_label = sorted(index[name] for name in names & index.keys())
            if gt_label or self.keep_empty:
                data_list.append(dict(img_path=join_path(self.img_prefix, path), gt_label=gt_label))
        self._report(data_list, other_names, total)
        return data_list

    def _load_rows(self) -> list[tuple[str, str, str]]:
        if not exists(self.ann_file):
            raise FileNotFoundError(f'There is no annotation file {self.ann_file}. {CURE}')
        try:
            reader = csv.DictReader(io.StringIO(get_text(self.ann_file), newline=''))
        except UnicodeDecodeError as error:
            raise ValueError(f'{self.ann_file} is no text ({error}): get it again') from error
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f'{self.ann_file} lacks the columns {missing} and has {reader.fieldnames}: name them in '
                             'its first line')
        rows: list[Any] = []
        for row in reader:
            rows.append(tuple(row[name] for name in COLUMNS))
            if None in rows[-1] or None in row:
                raise ValueError(f'{self.ann_file}, line {reader.line_num}: expected {len(reader.fieldnames or ())} '
                                 'columns, with the list of labels in double quotes')
        return rows

    def _report(self, data_list: list[dict], other_names: set[str], total: int) -> None:
        if not data_list:
            raise ValueError(f'no image of split {self.split!r} in {self.ann_file} has a label of the '
                             f'{len(self.CLASSES)} classes' + (f', but of {sorted(other_names)}: correct '
                                                               'metainfo=dict(classes=[...])' if other_names else ''))
        first = data_list[0]['img_path']
        if not exists(first):
            raise FileNotFoundError(f'There is no image {first}, the first of {self.ann_file}. {CURE}')
        if len(data_list) < total:
            print_log(f'{self.ann_file} ({self.split}): {total - len(data_list):,} of {total:,} images have no label '
                      'and are left out', 'current')
        seen = {label for data in data_list for label in data['gt_label']}
        empty = [name for i, name in enumerate(self.CLASSES) if i not in seen]
        for what, names in (('has no image of', empty), ('has labels left out, of', sorted(other_names))):
            if names:
                print_log(f'{self.ann_file} ({self.split}) {what} {len(names)} classes: {", ".join(names)}', 'current',
                          logging.WARNING)
