"""Storage of scores: the encoding, which labels are kept, memory, and the metrics from every form of it."""
import tracemalloc

import numpy as np
import pytest
import torch
from metric_definitions import make_data, make_samples, metrics_by_definition

from mmasl.evaluation import metrics, score_storage
from mmasl.evaluation.functional import multilabel_metrics
from mmasl.evaluation.metrics import MultiLabelMetric
from mmasl.evaluation.score_storage import pack, unpack


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
def test_pack_keeps_and_orders(dtype):
    bits = np.arange(0x3C01, dtype=np.uint16).view(np.float16)  # all probabilities of float16
    tiny = np.finfo(dtype).smallest_subnormal
    scores = np.unique(np.concatenate([bits.astype(dtype), np.array([tiny, 1 - np.finfo(dtype).epsneg], dtype)]))
    codes = np.concatenate([pack(scores, np.full(scores.shape, y, np.int8)) for y in (-1, 0, 1)])
    assert codes.itemsize == scores.itemsize and (codes[1:] > codes[:-1]).all()
    got, labels = unpack(codes)
    assert got.dtype == dtype and labels.dtype == np.int8
    np.testing.assert_array_equal(got, np.tile(scores, 3))
    np.testing.assert_array_equal(labels, np.repeat([-1, 0, 1], scores.size))
    assert pack(np.array([-0.], dtype), np.array([1])) == pack(np.array([0.], dtype), np.array([1]))


@pytest.fixture(params=[('float32', 1, 2**24), ('float16', 3, 100)], ids=['one_block', 'blocks_and_threads'])
def score_dtype(request, monkeypatch):
    score_dtype, threads, block = request.param
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    monkeypatch.setattr(score_storage, 'BLOCK', block)
    yield score_dtype
    torch.set_num_threads(before)


CASES = [
    ((40, 9), dict()), ((40, 9), dict(ap_mode='voc2010', empty='skip')),
    ((40, 9), dict(inclusive=True, cf1='mean', topk_above_threshold=False)), ((40, 9), dict(ignored='negative')),
    ((40, 9), dict(ignored='negative', topk=1, threshold=0.2, inclusive=True)), ((1, 9), dict(topk=2)),
    ((40, 1), dict(ap_mode='voc2007')), ((1, 1), dict())]


@pytest.mark.parametrize('calibrated', [False, True], ids=['plain', 'calibrated'])
@pytest.mark.parametrize('shape, conventions', CASES, ids=range(len(CASES)))
def test_metrics_of_stored_samples(shape, conventions, calibrated, score_dtype):
    scores, labels = make_data(18, *(max(n, 2) for n in shape), ignored=0.2, levels=20)
    scores, labels = scores[:shape[0], :shape[1]], labels[:shape[0], :shape[1]]
    labels[1:, 4:5] = 0
    labels[:, 5:6], labels[:, 6:7] = 0, -1
    # a second score which is no function of the first, as that of per-class parameters
    other = np.clip(scores**2 + np.linspace(0, 0.3, shape[1], dtype=np.float32), 0, 1)
    samples = [dict(sample, calibrated_score=o) for sample, o in zip(make_samples(scores, labels), other)]
    metric = MultiLabelMetric(calibrated=calibrated, score_dtype=score_dtype, **dict(empty='zero') | conventions)
    for start in range(0, len(samples), 16):
        metric.process(None, samples[start:start + 16])
    assert {x.dtype.itemsize for x in metric.results} == {np.dtype(score_dtype).itemsize}
    got = {name.split('/')[1]: value for name, value in metric.evaluate(len(samples)).items()}
    scores, other = scores.astype(score_dtype), other.astype(score_dtype)
    expected = metrics_by_definition(scores, labels, other if calibrated else scores, metric.conventions)
    assert got.keys() == expected.keys()
    assert got == pytest.approx(expected, rel=1e-9, nan_ok=True)
    direct, _ = multilabel_metrics(scores, labels, metric.conventions, calibrated=other if calibrated else None)
    np.testing.assert_equal(direct, got)


@pytest.mark.parametrize('score_dtype', ['float32', 'float16'])
def test_order_and_parts_of_the_samples_do_not_matter(score_dtype, monkeypatch):
    samples = make_samples(*make_data(19, 90, 11, ignored=0.3, levels=30))
    reports = []
    orders = ([samples], 2**24), ([samples[1::2], samples[::2]], 2**24), ([samples[50:], samples[:50]], 200)
    for parts, block in orders:
        monkeypatch.setattr(score_storage, 'BLOCK', block)
        gathered = []
        for part in parts:
            metric = MultiLabelMetric(score_dtype=score_dtype)
            metric.process(None, part)
            gathered += metric.results
        reports.append(metric.compute_metrics(gathered))
    assert reports[0] == reports[1] == reports[2]


def test_memory_beside_the_samples_is_that_of_blocks(monkeypatch):
    monkeypatch.setattr(score_storage, 'BLOCK', 2**16)
    scores, labels = make_data(20, 2000, 700, ignored=0.5)
    metric = MultiLabelMetric(score_dtype='float16')
    for start in range(0, 2000, 100):
        metric.process(None, [dict(pred_score=s, gt_score=y) for s, y in zip(scores[start:start + 100],
                                                                             labels[start:start + 100])])
    kept = sum(x.nbytes for x in metric.results)
    assert kept == 2 * scores.size and len(metric.results) == 2000
    tracemalloc.start()
    metric.compute_metrics(metric.results)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < kept / 2


def keep_all_labels(monkeypatch):
    monkeypatch.setattr(metrics, 'make_records', lambda *_: None)


@pytest.mark.parametrize('calibrated', [False, True], ids=['plain', 'calibrated'])
@pytest.mark.parametrize('conventions', [
    dict(), dict(topk=None), dict(topk=1, topk_above_threshold=False), dict(topk=2, threshold=0.1, inclusive=True),
    dict(preset='official', ap_mode='voc2010'), dict(preset='mmpretrain'), dict(no_negative='skip')], ids=str)
def test_annotated_labels_are_all_that_is_kept_and_needed(conventions, calibrated, score_dtype, monkeypatch):
    scores, labels = make_data(26, 50, 90, ignored=0.9, levels=15)
    labels[:, 4], labels[:, 5], labels[3], labels[4:8, 6] = 0, -1, -1, 1
    labels[:, 4:40] = -1
    scores[5] = scores[6, :80] = 0  # many labels tied among the k best
    samples = [dict(sample, calibrated_score=torch.tensor(s**2))
               for sample, s in zip(make_samples(scores, labels), scores)]
    few = MultiLabelMetric(calibrated=calibrated, score_dtype=score_dtype, **conventions)
    with monkeypatch.context() as patch:
        keep_all_labels(patch)
        all_ = MultiLabelMetric(calibrated=calibrated, score_dtype=score_dtype, **conventions)
        all_.process(None, samples)
    few.process(None, samples[:20])
    few.process(None, samples[20:])
    assert sum(x.nbytes for x in few.results) < sum(x.nbytes for x in all_.results) / 2
    np.testing.assert_array_equal(few.labels(), labels)
    np.testing.assert_array_equal(all_.labels(), labels)
    expected = all_.compute_metrics(all_.results)
    assert few.compute_metrics(few.results) == expected
    # As of two processes, one of which has more labels.
    assert few.compute_metrics([*all_.results[:20], *few.results[20:]]) == expected


def test_all_labels_are_kept_where_ignored_ones_matter_or_few_are():
    for share, conventions, records in ((0.9, dict(), True), (0.9, dict(ignored='negative'), False),
                                        (0.6, dict(), False), (0.9, dict(topk=80), False), (1, dict(topk=None), True)):
        scores, labels = make_data(27, 20, 80, ignored=share)
        metric = MultiLabelMetric(empty='zero', **conventions)
        metric.process(None, make_samples(scores, labels))
        assert {bool(x.dtype.names) for x in metric.results} == {records}
        got = {k.split('/')[1]: v for k, v in metric.evaluate(20).items()}
        np.testing.assert_equal(got, multilabel_metrics(scores, labels, metric.conventions)[0])


def test_memory_is_that_of_annotated_labels(monkeypatch):
    scores, labels = make_data(28, 2000, 700, ignored=0.995)
    monkeypatch.setattr(score_storage, 'BLOCK', 2**16)

    def peak():
        metric = MultiLabelMetric()
        samples = [dict(pred_score=s, gt_score=y) for s, y in zip(scores, labels)]
        tracemalloc.start()
        for start in range(0, 2000, 50):
            metric.process(None, samples[start:start + 50])
        metric.compute_metrics(metric.results)
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    few = peak()
    keep_all_labels(monkeypatch)
    assert few < 2.5e6 and peak() > 4 * 2000 * 700


def test_samples_are_moved_into_slabs_in_their_order(monkeypatch):
    samples = make_samples(*make_data(23, 26, 4, ignored=0.2))
    loose, moved = MultiLabelMetric(score_dtype='float16'), MultiLabelMetric(score_dtype='float16')
    loose.process(None, samples)
    monkeypatch.setattr(score_storage, 'SLAB', 7 * 4 * 2 + 1)
    for size, start in ((5, 0), (5, 5), (16, 10)):
        moved.process(None, samples[start:start + size])
    np.testing.assert_array_equal(loose.results, moved.results)
    assert [moved.results[i].base.shape[0] for i in (0, 6, 7, 20, 21, 25)] == [7, 7, 14, 14, 16, 16]
    # Records stay where they are.
    few = [dict(sample, gt_score=torch.full((4, ), -1.)) for sample in samples[:3]]
    moved, loose = (MultiLabelMetric(topk=None) for _ in range(2))
    for batch in (samples[:3], few, samples[3:23]):
        moved.process(None, batch)
    assert [bool(x.dtype.names) for x in moved.results] == [False] * 3 + [True] * 3 + [False] * 20
    loose.process(None, samples[:3] + few + samples[3:23])
    assert moved.evaluate(26) == loose.evaluate(26)
