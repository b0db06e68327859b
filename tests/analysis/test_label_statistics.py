"""Label counts of training sets of both families."""
import numpy as np
import pytest
from mmengine.dataset import BaseDataset, ConcatDataset, RepeatDataset
from torch.utils.data import Subset

from mmasl.analysis.label_statistics import LabelStatistics, count_labels
from mmasl.errors import ConfigError, DataError


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


@pytest.mark.parametrize('data, kind, counts, negatives, per_image, ignored', (
    (Data(*labelled([0, 1], [1], [])), 'multi-label', [1, 2, 0], [2, 1, 3], [2, 1, 0], 0),
    (Data(dict(gt_score=np.array([1., -1, 0]), gt_label=[0]), dict(gt_score=np.array([0., 1, 0.5]))), 'multi-label',
     [1, 1, 1], [1, 0, 1], [1, 2], 1),
    (Data(*labelled(2, np.int64(0), 2)), 'single-label', [1, 0, 2], [2, 3, 1], [1, 1, 1], 0),
    (Data(objects(0, 0, 1, ignored=(1, )), objects()), 'detection', [1, 1, 0], [1, 1, 2], [2, 0], 1)))
def test_counts(data, kind, counts, negatives, per_image, ignored):
    stats = count_labels(data)
    assert (stats.kind, stats.counts.tolist(), stats.negatives.tolist(), stats.per_image.tolist(), stats.ignored) == (
        kind, counts, negatives, per_image, ignored)
    assert stats.classes == ('a', 'b', 'c') and stats.images == len(data)


def test_repeated_images_count_once():
    stats = count_labels(RepeatDataset(Data(*labelled([0], [1])), times=3))
    assert stats.images == 2


class Thrice(RepeatDataset):
    pass


def test_labels_inside_wrappers():
    whole = ConcatDataset([Data(*labelled([0], [1])), Data(*labelled([2]))])
    assert count_labels(Thrice(Data(*labelled([0], [1])), times=3)).images == 2
    assert count_labels(Subset(whole, range(3))).counts.tolist() == [1, 1, 1], 'as a wrapper that mixes images'
    with pytest.raises(DataError, match='Subset has no get_data_info'):
        count_labels(Subset(whole, [0]))


def test_classes_without_names_are_numbered():
    assert count_labels(Data(*labelled([0, 2]), classes=None)).classes == ('0', '1', '2')


@pytest.mark.parametrize('data, message', (
    (Data(*labelled([], [])), 'none of the 2 training images has a label'),
    (Data(*labelled([0], [3])), 'labels range from 0 to 3, but metainfo.classes has 3 names'),
    (Data(dict(gt_score=np.array([1., 0]))), 'gt_score has 2 values, but metainfo.classes has 3'),
    (Data(dict(img_path='x.jpg')), 'x.jpg has no gt_label'),
    (Data(dict(img_path='x.jpg', gt_label=dict(tags=[1], sky=0))), 'x.jpg has labels of the tasks .*tags.*sky')))
def test_labels_that_cannot_be_counted(data, message):
    with pytest.raises(DataError, match=message):
        count_labels(data)


def test_imbalance():
    stats = LabelStatistics(tuple('abcd'), np.array([3, 0, 12, 5]), np.array([7, 8, 0, 1]), np.full(10, 2), 4,
                            'multi-label')
    assert stats.negatives_per_positive() == (10 * 4 - 4 - 20) / 20
    assert stats.negatives_per_positive(0.25) == (10 * 4 - 4 - 20 + 1) / 20
    assert stats.order.tolist() == [2, 3, 0] and stats.imbalance == 4 and stats.empty == ['b']


def test_weights_of_the_losses():
    stats = count_labels(Data(dict(gt_score=np.array([1., -1, 0])), dict(gt_score=np.array([0., 1, 0])),
                              dict(gt_score=np.array([1., 0, 0]))))  # 2:1, 1:1 and 0:3
    assert stats.loss_weights('positive') == dict(pos_weight=[0.5, 1, 3])
    assert stats.loss_weights('positive', temperature=2, cap=1.5) == dict(pos_weight=[0.7071, 1, 1.5])
    assert stats.loss_weights('inverse_frequency') == dict(class_weight=[0.6, 1.2, 1.2])
    assert stats.loss_weights('effective_number', beta=0) == dict(class_weight=[1, 1, 1])


@pytest.mark.parametrize('kind, options, message', [
    ('inverse', {}, "'inverse' are unknown: use one of inverse_frequency, effective_number, positive"),
    ('positive', dict(beta=0.9), "'positive' have no option beta; known: temperature, cap"),
    ('positive', {}, 'negatives of a detector')])
def test_weights_that_there_are_not(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        count_labels(Data(objects(0, 1))).loss_weights(kind, **options)
