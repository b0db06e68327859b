"""Compact storage of the scores and labels that an evaluation collects.

:func:`pack` puts a probability and its label into one integer. Sorting the integers of a class therefore separates its
ignored, negative and positive labels and orders each kind by probability. :class:`ScoreMatrix` stores all labels,
:class:`ScoreRecords` only those that can change a metric. Both hand them out in blocks of bounded size.
"""
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

BLOCK = 2**24  # labels in one block
SLAB = 2**26  # bytes of samples that are copied into one array


def pack(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Encode labels and probabilities as unsigned integers, ordered by label and then by probability.

    The floats from 0 to 1 do not use their upper two bits at 16, 32 or 64 bits. These bits hold the label plus 1.

    Args:
        scores: float16, float32 or float64 in [0, 1], any shape.
        labels: 1, 0 or -1, same shape.

    Returns:
        Unsigned integers of the width and shape of ``scores``.
    """
    codes = np.abs(scores).view(f'u{scores.itemsize}')  # -0.0 has its sign bit set
    codes |= (labels + 1).astype(codes.dtype) << _label_shift(codes)
    return codes


def unpack(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Decode what :func:`pack` returned: scores (float) and labels (int8)."""
    shift = _label_shift(codes)
    return (codes & (2**shift - 1)).view(f'f{codes.itemsize}'), (codes >> shift).astype(np.int8) - 1


def _label_shift(codes: np.ndarray) -> int:
    return 8 * codes.itemsize - 2


class ScoreMatrix:
    """Codes of all labels, read in blocks.

    Args:
        read: Returns the codes of some rows and columns, one array (rows, columns) for each kind of score: the scores
            to rank by and, if there are any, the calibrated scores to decide by.
        num_samples: Number of rows N.
        num_classes: Number of columns C.
    """

    def __init__(self, read: Callable[[slice, slice], list[np.ndarray]], num_samples: int, num_classes: int) -> None:
        self.read = read
        if num_samples * num_classes <= BLOCK:
            whole = read(slice(None), slice(None))
            self.read = lambda rows, columns: [x[rows, columns] for x in whole]
        self.num_samples = num_samples
        self.num_classes = num_classes

    def class_blocks(self) -> Iterator[list[np.ndarray]]:
        """Yield the codes (M, B) of B classes for each kind of score; M >= N, padded with codes of ignored labels."""
        return (self.of_classes(columns) for columns in self._columns())

    def split_by_class(self, values: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the parts of ``values`` (C,) that belong to the items of :meth:`class_blocks`."""
        return (values[columns] for columns in self._columns())

    def _columns(self) -> list[slice]:
        return _slices(self.num_classes, BLOCK // self.num_samples)

    def sample_blocks(self) -> Iterator[list[np.ndarray]]:
        """Yield the codes (R, M) of R samples for each kind of score, and then the classes (R, M) of the codes."""
        return (self.of_samples(rows) for rows in _slices(self.num_samples, BLOCK // self.num_classes))

    def of_classes(self, columns: slice) -> list[np.ndarray]:
        """Read one item of :meth:`class_blocks`."""
        return self.read(slice(None), columns)

    def of_samples(self, rows: slice) -> list[np.ndarray]:
        """Read one item of :meth:`sample_blocks`."""
        codes = self.read(rows, slice(None))
        return [*codes, np.broadcast_to(np.arange(self.num_classes), codes[0].shape)]


class ScoreRecords(ScoreMatrix):
    """Codes of the labels that are not ignored, and of the k ignored labels of each sample with the highest scores.

    These labels determine all metrics. Other ignored labels cannot decide whether a label is among the k highest of its
    sample, and the metrics of a class do not depend on the order of its labels.

    Args:
        samples: Records of one sample each, from :func:`make_records`.
        num_classes: Number of classes C.
    """

    def __init__(self, samples: Sequence[np.ndarray], num_classes: int) -> None:
        self.num_samples, self.num_classes = len(samples), num_classes
        self.by_sample, self.sample_sizes = np.concatenate(samples), np.array([len(x) for x in samples])
        self.by_class = self.by_sample[self.by_sample['class'].argsort(kind='stable')]
        self.class_sizes = np.bincount(self.by_sample['class'], minlength=num_classes)

    def of_classes(self, columns: slice) -> list[np.ndarray]:
        sizes, first = self.class_sizes[columns], self.class_sizes[:columns.start].sum()
        codes = _pad(self.by_class[first:first + sizes.sum()], sizes)['codes']
        return [codes[..., kind].T for kind in range(codes.shape[2])]

    def of_samples(self, rows: slice) -> list[np.ndarray]:
        sizes, first = self.sample_sizes[rows], self.sample_sizes[:rows.start].sum()
        records = _pad(self.by_sample[first:first + sizes.sum()], sizes)
        return [*np.moveaxis(records['codes'], 2, 0), records['class']]


def make_records(scores: Sequence[np.ndarray], labels: np.ndarray, topk: int | None) -> list[np.ndarray] | None:
    """Select the labels of a batch that :class:`ScoreRecords` needs.

    Args:
        scores: Probabilities (B, C) of each kind of score. The first kind ranks the labels of a sample.
        labels: (B, C) of 1, 0 and -1.
        topk: Number of ignored labels to keep for each sample; None for 0.

    Returns:
        One structured array with the fields ``class`` and ``codes`` for each sample; None if the records would take
        more than half the memory of all codes.
    """
    record = np.dtype([('class', np.uint32), ('codes', f'u{scores[0].itemsize}', len(scores))])
    kept, topk = labels >= 0, min(topk or 0, labels.shape[1])
    if 2 * record.itemsize * (kept.sum() + topk * len(labels)) > sum(x.nbytes for x in scores):
        return None
    ignored = torch.from_numpy(np.where(kept, -1, scores[0]).astype(np.float32))
    np.put_along_axis(kept, ignored.topk(topk)[1].numpy(), True, axis=1)
    records = np.empty(kept.sum(), record)
    records['class'] = kept.nonzero()[1]
    for kind, values in enumerate(scores):
        records['codes'][:, kind] = pack(values[kept], labels[kept])
    return np.split(records, kept.sum(1).cumsum()[:-1])


def append_rows(samples: list[np.ndarray], rows: np.ndarray) -> None:
    """Append the codes (B, K, C) of a batch to ``samples``, one array (K, C) a sample.

    Every ``SLAB`` bytes of samples are copied into one array. Otherwise they would be scattered over the heap between
    the activations of the model, and the gaps would take as much memory again.
    """
    slab = max(1, SLAB // rows[0].nbytes)
    start, end = (count // slab * slab for count in (len(samples), len(samples) + len(rows)))
    samples.extend(rows)
    if start < end and not any(map(_is_records, samples[start:end])):
        samples[start:end] = np.stack(samples[start:end])


def to_codes(sample: np.ndarray, num_classes: int) -> np.ndarray:
    """Codes of all labels (K, C) of one stored sample; labels without a record get the code of an ignored label."""
    if not _is_records(sample):
        return sample
    codes = np.zeros((sample['codes'].shape[1], num_classes), sample['codes'].dtype)
    codes[:, sample['class']] = sample['codes'].T
    return codes


def make_blocks(samples: Sequence[np.ndarray], num_classes: int, kinds: int) -> ScoreMatrix:
    """Hand out stored samples in blocks.

    Args:
        samples: Codes (K, C) or records of one sample each, in any mixture.
        num_classes: Number of classes C.
        kinds: Number of kinds of scores K.
    """
    as_records = [_is_records(sample) for sample in samples]
    if all(as_records):
        return ScoreRecords(samples, num_classes)

    def read(rows: slice, columns: slice) -> list[np.ndarray]:
        block = samples[rows]
        if any(as_records):
            block = [to_codes(sample, num_classes) for sample in block]
        codes = np.concatenate([sample[:, columns] for sample in block])
        return [codes[kind::kinds] for kind in range(kinds)]

    return ScoreMatrix(read, len(samples), num_classes)


def _is_records(sample: np.ndarray) -> bool:
    return bool(sample.dtype.names)


def _pad(records: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Consecutive groups of records as rows (G, M), padded with 0, the code of an ignored label."""
    rows = np.zeros((sizes.size, sizes.max(initial=0)), records.dtype)
    rows[np.arange(rows.shape[1]) < sizes[:, None]] = records
    return rows


def _slices(length: int, step: int) -> list[slice]:
    step = max(step, 1)
    return [slice(start, start + step) for start in range(0, length, step)]
