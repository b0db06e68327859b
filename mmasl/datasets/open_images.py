"""Open Images from its own CSV files: labels verified as positive, verified as negative, or not annotated."""
import csv
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, TextIO

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmpretrain.datasets import MultiLabelDataset
from rich.console import Console
from rich.progress import Progress

from mmasl.errors import ConfigError, DataError
from mmasl.registry import DATASETS

from .annotation_files import require_file, require_unique

COLUMNS = ('ImageID', 'LabelName', 'Confidence')
LINES = 2**18  # of a CSV file at a time
HINT = ('Download it from https://storage.googleapis.com/openimages/web/download.html, or correct data_root and the '
        'file name; configs/digits/ needs no download.')


@DATASETS.register_module()
class OpenImages(MultiLabelDataset):
    """Image-level labels of Open Images (v4 to v7) in three states: positive, negative, not annotated.

    A sample has ``img_path``, ``img_id`` (16 hexadecimal digits), ``gt_label`` (sorted array of int, the positives) and
    ``gt_score``, float32 (C,): 1 for positive, 0 for negative, and -1 or 0 by ``unannotated`` for labels that nobody
    verified. The data set contains all images with a label, ordered by id.

    - Evaluate with ``unannotated='ignore'``: ``mmasl.MultiLabelMetric`` omits -1. Otherwise mAP is at most half of the
      published values.
    - Train with 'ignore' and ``ignore_index=-1`` in the loss, or with 'negative'. The paper weights unannotated labels
      (App. F, the value is not given). To do so, set 'ignore', and ``weight_unannotated`` or ``gamma_unannotated`` of
      :class:`mmasl.AsymmetricLoss`.

    The labels take 24 bytes an image and 2 bytes a label. Forked and spawned workers share them.

    Args:
        ann_file: CSV file of human-verified labels with the columns ``ImageID``, ``LabelName`` and ``Confidence``, 1
            for positive and 0 for negative. All files are absolute or in ``data_root``.
        class_file: File whose first column holds the ids of the classes in their order, such as
            ``oidv6-classes-trainable.txt`` (9,605) or ``class-descriptions-boxable.csv`` (601). Labels of other classes
            are skipped.
        unannotated: 'ignore' (-1) or 'negative' (0), the ``gt_score`` of labels that nobody verified.
        description_file: CSV file of class ids and names, for a ``class_file`` without names.
        machine_file: CSV file of machine-generated labels with the same columns. They are positives where no human
            verified the label.
        min_confidence: Machine-generated labels below this confidence, in (0, 1], are skipped.
        image_file: File whose first column holds the ids of the images to use, such as those that were downloaded: a
            list, or ``*-images-with-labels-with-rotation.csv``.
        img_name: Path in ``data_prefix`` of the image with the id ``{id}``. Use 'train_{id[0]}/{id}.jpg' for the
            unpacked archives of the CVDF mirror.
        **kwargs: As in :class:`mmpretrain.datasets.MultiLabelDataset`, except ``classes`` and ``serialize_data``.

    Raises:
        ConfigError: An argument is out of its range.
        DataError: A file or the first image does not exist; a file lacks a column, has a damaged row, repeats a class
            or image, or lists something that is not an id; a human label is neither 0 nor 1; a class has no
            description; or no image has a label.
    """
    samples_checked = True  # see check_samples: labels are checked here, and nine million images are too many to list

    def __init__(self,
                 ann_file: str,
                 class_file: str,
                 *,
                 unannotated: str,
                 description_file: str = '',
                 machine_file: str = '',
                 min_confidence: float = 0.5,
                 image_file: str = '',
                 img_name: str = '{id}.jpg',
                 data_root: str = '',
                 metainfo: dict | None = None,
                 **kwargs: Any) -> None:
        if unannotated not in ('ignore', 'negative'):
            raise ConfigError(f"unannotated={unannotated!r} is unknown; set 'ignore' or 'negative'.")
        if not 0 < min_confidence <= 1:
            raise ConfigError(f'min_confidence={min_confidence} is out of range; set a value in (0, 1].')
        if kwargs.get('classes') is not None or 'classes' in (metainfo or {}):
            raise ConfigError('classes cannot be set; OpenImages takes them from class_file. Give a shorter file.')
        self.unannotated = unannotated
        self.min_confidence = min_confidence
        self.img_name = img_name
        self.machine_file = os.path.join(data_root, machine_file) if machine_file else ''
        self.image_file = os.path.join(data_root, image_file) if image_file else ''
        self.class_file = os.path.join(data_root, class_file)
        self.class_ids, names = _read_classes(
            self.class_file, os.path.join(data_root, description_file) if description_file else '')
        # serialize_data would turn the labels into one pickled dict an image.
        super().__init__(ann_file, data_root=data_root, metainfo=dict(metainfo or {}, classes=names),
                         serialize_data=False, **kwargs)

    def load_data_list(self) -> 'LabelledImages':
        """Read the label files: a sequence of one dict an image, built on access."""
        parts = [self._read_labels(self.machine_file, human=False)] if self.machine_file else []
        # The last label of an image and a class counts, so human labels come last.
        parts.append(self._read_labels(self.ann_file, human=True))
        images = LabelledImages.from_runs(*map(np.concatenate, zip(*parts)))
        total = len(images)
        if self.image_file:
            ids = _read_column(self.image_file, 'image id')
            wanted = _parse_ids(np.array(ids, 'S17'), self.image_file)
            images = images.subset(np.isin(images.ids, wanted.view(np.int64)).nonzero()[0])
        if not len(images):
            where = f' and is in {self.image_file}' if total else ''
            raise DataError(f'No image of {self.ann_file} has a label of the {len(self.class_ids)} classes of '
                            f'{self.class_file}{where}.')
        print_log(f'{self.ann_file}: {len(images):,} images, {len(images.labels):,} labels read', 'current')
        require_file(self._img_path(images[0]['img_id']), 'image',
                     'Correct data_prefix and img_name, or set image_file to a list of the downloaded images; '
                     'configs/digits/ needs no download.')
        return images

    def get_data_info(self, idx: int) -> dict:
        """Ids of the sample and its labels of all classes."""
        info = super().get_data_info(idx)
        labels = info.pop('labels')
        score = np.full(len(self.class_ids), -1 if self.unannotated == 'ignore' else 0, np.float32)
        score[np.where(labels < 0, ~labels, labels)] = labels >= 0
        return dict(info, img_path=self._img_path(info['img_id']), gt_score=score, gt_label=(score == 1).nonzero()[0])

    def _img_path(self, img_id: str) -> str:
        return os.path.join(self.img_prefix, self.img_name.format(id=img_id))

    def _get_unserialized_subset(self, indices: Sequence[int] | int) -> 'LabelledImages':
        if isinstance(indices, int):
            indices = range(len(self.data_list))[:indices] if indices >= 0 else range(len(self.data_list))[indices:]
        return self.data_list.subset(np.asarray(indices, np.int64))

    def _read_labels(self, path: str, human: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Runs of equal image ids (R,) uint64, their lengths (R,), and all labels: c, or ~c for a negative."""
        order = np.argsort(self.class_ids)
        table = np.array(self.class_ids, 'S')[order]
        label_type = np.int16 if len(table) < 2**15 else np.int32
        parts = []
        for line, rows in _read_rows(path, table.itemsize + 1):
            confidence = rows['Confidence']
            if human and not ((confidence == 0) | (confidence == 1)).all():
                bad = ((confidence != 0) & (confidence != 1)).argmax()
                raise DataError(f'{path}, line {line + bad}: Confidence {confidence[bad]:g} is neither 1 (verified '
                                'positive) nor 0 (verified negative). Set machine_file for machine-generated labels.')
            place = table.searchsorted(rows['LabelName']).clip(max=len(table) - 1)
            keep = table[place] == rows['LabelName']
            if not human:
                keep &= confidence >= self.min_confidence
            labels, ids = order[place[keep]].astype(label_type), rows['ImageID'][keep]
            starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]][:len(ids)])
            parts.append((_parse_ids(ids[starts], f'{path}, from line {line}'), np.diff(starts, append=len(ids)),
                          np.where(confidence[keep] > 0, labels, ~labels)))
        if not parts:
            raise DataError(f'{path} has no label. {HINT}')
        ids, lengths, labels = map(np.concatenate, zip(*parts))
        return ids, lengths, labels


class LabelledImages(Sequence):
    """Images and their labels as compressed sparse rows. An item is a dict of ``img_id`` and ``labels``.

    The arrays are stored as tensors, which PyTorch passes to spawned workers in shared memory instead of copying them.

    Args:
        ids: Image ids (N,), uint64.
        starts, ends: First and last + 1 position in ``labels`` for each image, (N,).
        labels: Labels of all images, c for positive and ~c for negative, signed integers.
    """

    def __init__(self, ids: np.ndarray, starts: np.ndarray, ends: np.ndarray, labels: np.ndarray) -> None:
        ids = ids.view(np.int64)  # torch 2.11 does not unpickle uint64
        self.ids, self.starts, self.ends, self.labels = map(torch.as_tensor, (ids, starts, ends, labels))

    @classmethod
    def from_runs(cls, ids: np.ndarray, lengths: np.ndarray, labels: np.ndarray) -> 'LabelledImages':
        """Sort runs of labels by image. The runs of one image keep their order."""
        order = ids.argsort(kind='stable')
        if (order[1:] < order[:-1]).any():
            starts, ids, lengths = (lengths.cumsum() - lengths)[order], ids[order], lengths[order]
            source = np.repeat(starts - (lengths.cumsum() - lengths), lengths)
            source += np.arange(len(labels))
            labels = labels[source]
        ends = lengths.cumsum()
        last = np.flatnonzero(np.r_[ids[1:] != ids[:-1], True][:len(ids)])
        ids, ends = ids[last], ends[last]
        return cls(ids, np.r_[0, ends[:-1]][:len(ends)], ends, labels)

    def subset(self, indices: np.ndarray) -> 'LabelledImages':
        """Select the images at ``indices``. Both objects share the labels."""
        ids, starts, ends = (x.numpy()[indices] for x in (self.ids, self.starts, self.ends))
        return LabelledImages(ids, starts, ends, self.labels.numpy())

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, idx: int) -> dict:  # type: ignore[override]  # no slices
        labels = self.labels[self.starts[idx]:self.ends[idx]]
        return dict(img_id=f'{self.ids[idx].item() % 2**64:016x}', labels=labels.numpy())


def _open(path: str) -> TextIO:
    require_file(path, 'file', HINT)
    # Replaced bytes fail later as a row or an id, with a message that names the file.
    return open(path, newline='', encoding='utf-8', errors='replace')


def _read_rows(path: str, label_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield parts of a label file as records, each with the number of its first line."""
    with _open(path) as file:
        header = file.readline().strip().split(',')
        missing = [name for name in COLUMNS if name not in header]
        if missing:
            raise DataError(f'{path} lacks the columns {missing} and has {header}. Give a file of image-level labels: '
                            '*-annotations-human-imagelabels.csv or *-annotations-machine-imagelabels.csv.')
        # An id has 16 bytes; one more byte reveals longer ones.
        record = np.dtype(list(zip(COLUMNS, ('S17', f'S{label_size}', np.float64))))
        columns = [header.index(name) for name in COLUMNS]
        line = 2
        hidden = not (is_main_process() and sys.stderr.isatty())
        with Progress(console=Console(stderr=True), disable=hidden) as progress:
            task = progress.add_task(os.path.basename(path), total=os.path.getsize(path))
            while lines := list(islice(file, LINES)):
                try:
                    rows = np.loadtxt(lines, record, comments=None, delimiter=',', usecols=columns, ndmin=1)
                except ValueError as error:
                    raise DataError(f'{path} is damaged in the {len(lines)} lines from {line} on ({error}). {HINT}'
                                    ) from error
                yield line, rows
                line += len(lines)
                progress.advance(task, sum(map(len, lines)))


def _parse_ids(text: np.ndarray, where: str) -> np.ndarray:
    """Convert ids of 16 hexadecimal digits, S17 (N,), to uint64 (N,)."""
    if not len(text):
        return np.empty(0, np.uint64)
    last = text.view('S1').reshape(-1, 17)[:, 16]
    try:
        if last.any():
            raise ValueError
        ids = np.frombuffer(bytes.fromhex(text.astype('S16').tobytes().decode('ascii')), '>u8')
        if len(ids) != len(text):
            raise ValueError
    except ValueError:
        bad = next(x for x in text.tolist() if len(x) != 16 or x.strip(b'0123456789abcdefABCDEF'))
        raise DataError(f'{where}: image id {bad.decode("latin1")!r} is not 16 hexadecimal digits.') from None
    return ids.astype(np.uint64)


def _read_cells(path: str) -> list[list[str]]:
    """Rows of a small CSV file."""
    with _open(path) as file:
        try:
            return [row for row in csv.reader(file) if row]
        except csv.Error as error:
            raise DataError(f'{path} is not a CSV file ({error}). Download it again, and unpack it.') from error


def _read_column(path: str, what: str) -> list[str]:
    """First column of a file without the header, if there is one."""
    values = [row[0].strip() for row in _read_cells(path)]
    values = values[1:] if values[:1] in (['ImageID'], ['LabelName']) else values
    if odd := next((value for value in values if not value.isascii()), None):
        raise DataError(f'{path} lists {what} {odd[:50]!r}, which is not an id. Put the ids of the label files, not '
                        'names, in the first column, and unpack the file if it is compressed.')
    require_unique(values, f'{path} lists {what}')
    if not values:
        raise DataError(f'{path} lists no {what}.')
    return values


def _read_classes(class_file: str, description_file: str) -> tuple[list[str], tuple[str, ...]]:
    """Ids and names of the classes. The id follows a name that several classes have."""
    ids = _read_column(class_file, 'class')
    names = dict(zip(ids, ids))
    for path in filter(None, (class_file, description_file)):
        described = {row[0]: row[1] for row in _read_cells(path) if len(row) > 1}
        if path == description_file and (unknown := [x for x in ids if x not in described]):
            raise DataError(f'{len(unknown)} classes of {class_file} are not in {description_file}, the first is '
                            f'{unknown[0]!r}. Give the descriptions of the same version, such as '
                            'oidv6-class-descriptions.csv.')
        names |= {x: described[x] for x in ids if x in described}
    times = Counter(names.values())
    return ids, tuple(name if times[name] == 1 else f'{name} ({x})' for x, name in names.items())
