"""benchmarks/speed/metrics.py at a small size: that it measures the same thing for all, and judges rows rightly."""

import numpy as np
import pytest

from benchmarks.speed import metrics


@pytest.mark.parametrize('negatives', ['all', 'verified'])
def test_samples(negatives):
    batches = list(metrics.make_batches(130, 300, negatives))
    assert [len(batch) for batch in batches] == [64, 64, 2]
    again = [sample for batch in metrics.make_batches(66, 300, negatives, first=1) for sample in batch]
    key = 'gt_label' if negatives == 'all' else 'gt_score'
    for one, other in zip([sample for batch in batches[1:] for sample in batch], again):
        assert (one['pred_score'] == other['pred_score']).all() and (one[key] == other[key]).all()
    values = [x[key].numpy() for batch in batches for x in batch]
    if negatives == 'all':
        assert 3 < np.mean([len(x) for x in values]) < 5
    else:
        shares = [300 * np.mean(np.stack(values) == y) for y in (1, 0, -1)]
        assert shares == pytest.approx([4, 7, 289], abs=1)


def test_peers_agree_on_the_same_samples(monkeypatch):
    monkeypatch.setattr(metrics, 'COCO', (150, 6))
    seen = {}

    def in_turn(calls, least):
        seen.update({name: call() for name, call in calls.items()})
        return dict.fromkeys(calls, 1)

    monkeypatch.setattr(metrics, 'in_turn', in_turn)
    rows = list(metrics.compare_at_coco_size())
    assert [(x['case'], x['implementation'], x['total_s']) for x in rows] == [
        ('COCO, samples', 'mmasl', 2), ('COCO, samples', 'mmpretrain', 2), ('COCO, samples', 'torchmetrics', 1),
        ('COCO, arrays', 'mmasl', 1), ('COCO, arrays', 'torchmetrics', 1)]
    (ours, ), theirs = seen['mmasl', 'evaluate'], seen['mmpretrain', 'evaluate']
    mean_ap, by_class, best, overall, best_overall = (list(x.values()) for x in theirs)
    got = {name.split('/')[1]: value for name, value in ours.items()}
    assert got['mAP'] == pytest.approx(mean_ap[0], rel=1e-5)
    for suffix, macro, micro in (('', by_class, overall), ('_top3', best, best_overall)):
        assert [got[f'{name}{suffix}'] for name in ('CP', 'CR', 'CF1')] == pytest.approx(macro, rel=1e-5)
        assert [got[f'{name}{suffix}'] for name in ('OP', 'OR', 'OF1')] == pytest.approx(micro, rel=1e-5)
    (arrays, _), tensors = seen['mmasl', 'arrays'], seen['torchmetrics', 'samples']
    assert arrays['OF1'] == pytest.approx(100 * tensors['micro MultilabelF1Score'].item(), rel=1e-5)
    assert arrays['CP'] == pytest.approx(100 * tensors['macro MultilabelPrecision'].item(), rel=1e-5)
    assert arrays['mAP'] == pytest.approx(100 * tensors['mAP'].item(), rel=1e-5)


def test_targets():
    def rows(total, peak, ours, growth):
        sweep = [metrics.row('sweep', 'mmasl', n, c, evaluate_s=str(s)) for n, c, s in (
            (10, 5, 1), (80, 5, 8), (20, 5, 2), (20, 10, 4), (20, 40, 16 * growth))]
        return [metrics.row('Open Images', 'mmasl', 9, 9, total_s=total, peak_rss_gib=peak),
                metrics.row('COCO, arrays', 'mmasl', 9, 9, total_s=ours),
                metrics.row('COCO, arrays', 'torchmetrics', 9, 9, total_s='1'), *sweep]

    assert [reached for *_, reached in metrics.targets(rows('179', '7', '0.1', 1))] == [True] * 5
    assert [reached for *_, reached in metrics.targets(rows('181', '7.5', '0.11', 2))] == [False] * 3 + [True, False]


def test_evaluate_metric():
    figures = metrics.evaluate_metric(200, 30)
    assert figures['kept_bytes_per_label'] == 2 and 0 < figures['mAP'] < 100
    assert figures['total_s'] == figures['process_s'] + figures['evaluate_s'] > 0
    assert figures.keys() <= set(metrics.COLUMNS)
