"""Label counts of training sets of both families."""
import numpy as np
import pytest
from mmengine.dataset import BaseDataset, RepeatDataset

from mmasl.analysis.label_statistics import LabelStatistics, count_labels
from mmasl.errors import DataError


class Data(BaseDataset):
    """A data set without images."""

    def __init__(self, *infos: dict, classes=('a', 'b', 'c')) -> None:
        self.infos = infos
        super().__init__(metainfo=dict(classes=classes) if classes else None)

    def load_data_list(self) -> list[dict]:
        return list(self.infos)


def labelled(*labels: object) -> list[dict]:
    return [dict(gt_label=label) for label in labels]


def objects(*labels: int, ignored: tuple = ()) -> dict:
    return dict(instances=[dict(bbox_label=label, ignore_flag=int(i in ignored)) for i, label in enumerate(labels)])


@pytest.mark.parametrize('data, kind, counts, per_image, ignored', (
    (Data(*labelled([0, 1], [1], [])), 'multi-label', [1, 2, 0], [2, 1, 0], 0),
    (Data(dict(gt_score=np.array([1., -1, 0]), gt_label=[0]), dict(gt_score=np.array([0., 1, 0.5]))), 'multi-label',
     [1, 1, 1], [1, 2], 1),
    (Data(*labelled(2, np.int64(0), 2)), 'single-label', [1, 0, 2], [1, 1, 1], 0),
    (Data(objects(0, 0, 1, ignored=(1, )), objects()), 'detection', [1, 1, 0], [2, 0], 1)))
def test_counts(data, kind, counts, per_image, ignored):
    stats = count_labels(data)
    assert (stats.kind, stats.counts.tolist(), stats.per_image.tolist(), stats.ignored) == (
        kind, counts, per_image, ignored)
    assert stats.classes == ('a', 'b', 'c') and stats.images == len(data)


def test_repeated_images_count_once():
    stats = count_labels(RepeatDataset(Data(*labelled([0], [1])), times=3))
    assert stats.images == 2


def test_classes_without_names_are_numbered():
    assert count_labels(Data(*labelled([0, 2]), classes=None)).classes == ('0', '1', '2')


@pytest.mark.parametrize('data, message', (
    (Data(*labelled([], [])), 'none of the 2 training images has a label'),
    (Data(*labelled([0], [3])), 'labels range from 0 to 3, but metainfo.classes has 3 names'),
    (Data(dict(img_path='x.jpg')), 'x.jpg has no gt_label')))
def test_labels_that_cannot_be_counted(data, message):
    with pytest.raises(DataError, match=message):
        count_labels(data)


def test_imbalance():
    stats = LabelStatistics(tuple('abcd'), np.array([3, 0, 12, 5]), np.full(10, 2), 4, 'multi-label')
    assert stats.negatives_per_positive() == (10 * 4 - 4 - 20) / 20
    assert stats.negatives_per_positive(0.25) == (10 * 4 - 4 - 20 + 1) / 20
    assert stats.order.tolist() == [2, 3, 0] and stats.imbalance == 4 and stats.empty == ['b']
