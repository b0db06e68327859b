"""Names of the metrics of an evaluator, found before an evaluation."""
import pytest
from mmpretrain.evaluation import AveragePrecision, SingleLabelMetric
from mmpretrain.evaluation import MultiLabelMetric as StockMultiLabelMetric

from mmasl.errors import ConfigError
from mmasl.evaluation.metrics import MacroF1, MultiLabelMetric
from mmasl.evaluation.name_checks import check_metric_names, metric_names


def named(metric):
    metric.dataset_meta = dict(classes=('cat', 'dog', 'elk'))
    return metric


@pytest.mark.parametrize('metric, some', [
    (MultiLabelMetric(calibrated=True), ['multi-label/mAP', 'multi-label/AUC', 'multi-label/OF1_top3']),
    (MultiLabelMetric('ml_gcn', per_class=True, prefix='x'), ['x/mAP', 'x/AP_elk', 'x/recall_cat']),
    (AveragePrecision(), ['multi-label/mAP']), (MacroF1(), ['single-label/f1-score', 'single-label/top1']),
    (StockMultiLabelMetric(topk=2, average='micro'), ['multi-label/recall_top2_micro']),
    (SingleLabelMetric(), ['single-label/f1-score'])])
def test_names(metric, some, capfd):
    assert set(some) <= set(metric_names(named(metric), 3))
    assert metric.results == []
    assert capfd.readouterr().err == ''


def test_names_of_other_kinds_are_unknown(tmp_path):
    from mmengine.evaluator import DumpResults
    assert metric_names(DumpResults(str(tmp_path / 'out.pkl')), 3) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('metrics, name', [
    ([AveragePrecision(), StockMultiLabelMetric(thr=0.5), MultiLabelMetric()], 'evaluator.0 .* evaluator.2 .*/mAP'),
    ([MultiLabelMetric(), MultiLabelMetric('official')], 'both report multi-label/mAP'),
    ([SingleLabelMetric(), MacroF1()], 'both report single-label/f1-score'),
    ([StockMultiLabelMetric(thr=0.5), StockMultiLabelMetric(thr=0.5)], 'multi-label/precision'),
])
def test_two_metrics_of_one_name(metrics, name):
    with pytest.raises(ConfigError, match=name):
        check_metric_names(list(map(named, metrics)), 3, 'evaluator')


def test_what_mmengine_accepts_is_accepted():
    check_metric_names([AveragePrecision(), StockMultiLabelMetric(thr=0.5), StockMultiLabelMetric(topk=3),
                        StockMultiLabelMetric(thr=0.5, average='micro'), MultiLabelMetric(prefix='paper'),
                        MultiLabelMetric('official', prefix='official')], 3, 'evaluator', ['auto', 'official/OF1'])


def test_save_best():
    with pytest.raises(ConfigError, match="save_best='mAP' is not reported by e: use one of multi-label/mAP, "):
        check_metric_names([MultiLabelMetric()], 3, 'e', ['mAP'])


def test_save_best_with_a_metric_of_unknown_names(tmp_path):
    from mmengine.evaluator import DumpResults
    check_metric_names([MultiLabelMetric(), DumpResults(str(tmp_path / 'out.pkl'))], 3, 'e', ['other'])
