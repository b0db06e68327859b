"""The evaluators: what they read, their presets, what they refuse, and several processes."""
import doctest
import tracemalloc

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from metric_definitions import COUNTS, evaluate, make_data, make_samples, metrics_by_definition, sklearn_counts
from mmengine.evaluator import Evaluator
from mmengine.registry import DefaultScope

import mmasl.evaluation.metrics
from mmasl.errors import ConfigError, DataError, NonFiniteError
from mmasl.evaluation.functional import Conventions, average_precision, multilabel_metrics
from mmasl.evaluation.metrics import MacroF1, MultiLabelMetric


def test_class_without_negatives(monkeypatch):
    scores, labels = make_data(25, 60, 5)
    labels[:, 1] = np.where(labels[:, 1] == 1, 1, -1)
    labels[:, 3] = 0
    messages = []
    monkeypatch.setattr(mmasl.evaluation.metrics, 'print_log', lambda message, *_: messages.append(message))
    count, skip = (evaluate(MultiLabelMetric(no_negative=x), scores, labels) for x in ('count', 'skip'))
    ap, n = 100 * average_precision(scores, labels), (labels == 1).sum(0)
    assert ap[1] == 100
    for report, kept in ((count, [0, 1, 2, 4]), (skip, [0, 2, 4])):
        assert report['mAP'] == pytest.approx(ap[kept].mean(), rel=1e-12)
        assert report['mAP_weighted'] == pytest.approx((ap * n)[kept].sum() / n[kept].sum(), rel=1e-12)
    assert {k: v for k, v in count.items() if 'mAP' not in k} == {k: v for k, v in skip.items() if 'mAP' not in k}
    empty = "No positive label in 1 of 5 classes ('3'): omitted from the class means."
    assert messages == [empty, empty, "No negative label in 1 of 5 classes ('1'): omitted from mAP."]
    for kept in ([1], [1, 3]):
        with pytest.raises(DataError, match="No class has both a positive and a negative label .* no_negative='count'"):
            multilabel_metrics(scores[:, kept], labels[:, kept], Conventions(no_negative='skip'))
    zero, _ = multilabel_metrics(scores, labels, Conventions(no_negative='skip', empty='zero'))
    assert zero['mAP'] == pytest.approx(skip['mAP'] * 3 / 4)


def test_decides_by_calibrated_scores():
    scores, labels = make_data(17, 100, 6, ignored=0.1)
    calibrated = np.where(scores < 0.3, 0, scores**2)
    samples = [dict(sample, calibrated_score=torch.tensor(c))
               for sample, c in zip(make_samples(scores, labels), calibrated)]
    plain, got = (MultiLabelMetric(calibrated=flag) for flag in (False, True))
    for metric in (plain, got):
        metric.process(None, samples)
    plain, got = ({k.split('/')[1]: v for k, v in metric.evaluate(100).items()} for metric in (plain, got))
    assert plain == multilabel_metrics(scores, labels)[0]
    by_square, _ = multilabel_metrics(calibrated, labels)
    ranked = ('mAP', 'mAP_weighted', 'AUC', 'p_t_pos', 'p_t_neg', 'gap')
    assert got == {**by_square, **{name: plain[name] for name in ranked}}
    assert got['OF1'] != plain['OF1'] and got['ECE'] != plain['ECE'] and by_square['mAP'] != plain['mAP']
    # The k best of a sample are told by the raw scores where the calibrated ones are all 0.
    none = multilabel_metrics(scores, labels, Conventions(topk_above_threshold=False), calibrated=0 * scores)[0]
    assert none['OF1'] == 0
    expected = multilabel_metrics(scores, labels, Conventions(topk_above_threshold=False))[0]
    assert none['OF1_top3'] == expected['OF1_top3'] > 0


@pytest.fixture
def preset_data():
    # scores on the thresholds, ties, ignored labels and a class without positives: all that the presets disagree on
    scores, labels = make_data(8, 200, 8, ignored=0.1, levels=20)
    labels[:, 7] = 0
    assert (scores == np.float32(0.5)).any() and (scores == np.float32(0.8)).any()
    return scores, labels


def test_preset_paper(preset_data):
    scores, labels = preset_data
    report = evaluate(dict(type='mmasl.MultiLabelMetric', preset='paper'), scores, labels)
    best = (scores[:, :, None] < scores[:, None]).sum(2) < 3
    for above, suffix in ((scores > 0.5, ''), ((scores > 0.5) & best, '_top3')):
        predicted = above & (labels >= 0)
        by_class = sklearn_counts(predicted[:, :7], labels[:, :7] == 1, 'harmonic')
        overall = sklearn_counts(predicted, labels == 1, 'harmonic', zero_division=0)
        assert [report[name + suffix] for name in COUNTS[:3]] == [by_class[name] for name in COUNTS[:3]]
        assert [report[name + suffix] for name in COUNTS[3:]] == [overall[name] for name in COUNTS[3:]]
    assert report['mAP'] == pytest.approx(100 * average_precision(scores[:, :7], labels[:, :7]).mean())


def test_preset_official(preset_data):
    scores, labels = preset_data
    report = evaluate(MultiLabelMetric('official'), scores, labels)
    predicted = (scores > np.float32(0.8)) & (labels >= 0)
    assert report == {**report, **sklearn_counts(predicted, labels == 1, 'mean', zero_division=0)}
    assert report['mAP'] == pytest.approx(100 * average_precision(scores[:, :7], labels[:, :7]).sum() / 8)


def test_preset_ml_gcn(preset_data):
    scores, labels = preset_data
    with pytest.raises(DataError, match='no positive label in 1 of 8 classes'):
        evaluate(MultiLabelMetric('ml_gcn'), scores, labels)
    scores, labels = scores[:, :7], labels[:, :7]
    report = evaluate(MultiLabelMetric('ml_gcn'), scores, labels)
    # its counts take difficult labels for negatives, its average precision leaves them out
    assert report == {**report, **sklearn_counts(scores >= 0.5, labels == 1, 'harmonic')}
    assert report['mAP'] == pytest.approx(100 * average_precision(scores, labels).mean())
    best = (scores >= 0.5) & ((scores[:, :, None] < scores[:, None]).sum(2) < 3)
    assert report['OP_top3'] == sklearn_counts(best, labels == 1, 'harmonic')['OP']


def test_preset_mmpretrain():
    from mmpretrain.evaluation import AveragePrecision
    from mmpretrain.evaluation import MultiLabelMetric as StockMultiLabelMetric
    scores, labels = make_data(9, 200, 8, ignored=0.1)
    np.fill_diagonal(scores, 0.5)
    labels[:, 2] = 0
    report = evaluate(MultiLabelMetric('mmpretrain'), scores, labels)
    chosen = [dict(thr=0.5), dict(thr=0.5, average='micro'), dict(topk=3), dict(topk=3, average='micro')]
    theirs = [*(StockMultiLabelMetric(**arguments) for arguments in chosen), AveragePrecision()]
    expected = [v for metric in theirs for v in evaluate(metric, scores, labels).values()]
    got = [report[name + k] for k in ('', '_top3') for name in COUNTS] + [report['mAP']]
    assert got == pytest.approx(expected, rel=1e-5)
    # given both, mmpretrain's metric takes the threshold and forgets k
    assert evaluate(StockMultiLabelMetric(thr=0.5, topk=3), scores, labels) == evaluate(theirs[0], scores, labels)


def test_explicit_arguments_override_the_preset():
    metric = MultiLabelMetric('official', threshold=0.3, topk=5)
    assert metric.conventions == Conventions(threshold=0.3, cf1='mean', empty='zero', topk=5)


def test_reads_what_the_stock_head_returns():
    from mmpretrain.models import MultiLabelClsHead
    from mmpretrain.structures import DataSample
    logits, labels = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), make_data(0, 20, 4)[1]
    expected = evaluate(MultiLabelMetric(), logits.sigmoid().numpy(), labels)
    for label in (lambda y: DataSample().set_gt_score(y), lambda y: DataSample().set_gt_label(y.nonzero()[0])):
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            evaluator, head = Evaluator(metrics=dict(type='mmasl.MultiLabelMetric')), MultiLabelClsHead()
        evaluator.dataset_meta = dict(classes=('a', 'b', 'c', 'd'))
        evaluator.process(head.predict((logits, ), [label(y) for y in labels]))
        assert {k.split('/')[1]: v for k, v in evaluator.evaluate(20).items()} == expected


def test_ignore_index_and_half_precision():
    scores, labels = make_data(10, 30, 4, ignored=0.2, levels=8)
    samples = [dict(pred_score=torch.tensor(s).bfloat16(), gt_score=np.where(y < 0, 3, y))
               for s, y in zip(scores, labels)]
    metric = MultiLabelMetric(ignore_index=3, prefix='x')
    metric.process(None, samples)
    expected, _ = multilabel_metrics(torch.tensor(scores).bfloat16().float().numpy(), labels)
    assert metric.evaluate(30) == {f'x/{name}': value for name, value in expected.items()}


def test_per_class_values_and_table(monkeypatch):
    from sklearn.metrics import precision_score, recall_score, roc_auc_score
    scores, labels = make_data(11, 40, 3)
    labels[:, 1] = 0
    names = ('cat', 'traffic light', 'dog')
    metric = MultiLabelMetric(per_class=True, threshold={'dog': 0.3})
    metric.dataset_meta = dict(classes=names)
    messages = []
    monkeypatch.setattr(mmasl.evaluation.metrics, 'print_log', lambda message, *_: messages.append(message))
    report = evaluate(metric, scores, labels)
    ap = 100 * average_precision(scores, labels)
    expected = {}
    for c, threshold in ((0, 0.5), (2, 0.3)):
        y, chosen = labels[:, c], scores[:, c] > np.float32(threshold)
        found = dict(AP=ap[c] / 100, AUC=roc_auc_score(y, scores[:, c]), precision=precision_score(y, chosen),
                     recall=recall_score(y, chosen))
        expected |= {f'{name}_{names[c]}': pytest.approx(100 * value, rel=1e-12) for name, value in found.items()}
    assert {k: v for k, v in report.items() if any(k.endswith(name) for name in names)} == expected
    assert report['AUC'] == pytest.approx((report['AUC_cat'] + report['AUC_dog']) / 2)
    assert messages[0] == "No positive label in 1 of 3 classes ('traffic light'): omitted from the class means."
    assert [line.split()[-5:-3] for line in messages[1].splitlines()[2:]] == [
        [str((labels[:, c] == 1).sum()), f'{ap[c]:.2f}'] for c in range(3)]


@pytest.mark.parametrize('threshold', [[0.5, 0.3, 0.7], dict(b=0.3, c=0.7), torch.tensor([0.5, 0.3, 0.7])],
                         ids=['list', 'dict', 'tensor'])
@pytest.mark.parametrize('arguments', [{}, dict(inclusive=True, topk_above_threshold=False)], ids=str)
def test_thresholds_per_class(threshold, arguments):
    """On scores at the thresholds, with all labels and with few; sklearn tells the predicted labels."""
    scores, labels = make_data(13, 120, 3, levels=10)
    metric = MultiLabelMetric(threshold=threshold, **arguments)
    metric.dataset_meta = dict(classes=('a', 'b', 'c'))
    report = evaluate(metric, scores, labels)
    above = np.greater_equal if arguments else np.greater
    predicted = above(scores, np.float32([0.5, 0.3, 0.7]))
    assert report == {**report, **sklearn_counts(predicted, labels, 'harmonic')}
    c = Conventions(threshold=[0.5, 0.3, 0.7], **arguments)
    assert report == multilabel_metrics(scores, labels, c)[0]
    assert report == pytest.approx(metrics_by_definition(scores, labels, scores, c))


def test_a_dict_of_thresholds_leaves_the_others_at_those_of_the_preset():
    metric = MultiLabelMetric('official', threshold=dict(b=0.25))
    metric.dataset_meta = dict(classes=('a', 'b'))
    scores, labels = make_data(14, 40, 2)
    assert evaluate(metric, scores, labels) == evaluate(MultiLabelMetric('official', threshold=[0.8, 0.25]), scores,
                                                        labels)


def test_bootstrap_intervals():
    """The same draws by hand; a class with one positive may have none in a draw."""
    scores, labels = make_data(15, 40, 4)
    labels[3:, 2] = 0
    for ignored in (False, True):  # stored as codes, and as records
        if ignored:
            scores, labels = (np.concatenate([x, y], 1) for x, y in zip(
                (scores, labels), (make_data(0, 40, 90)[0], -np.ones((40, 90), np.int8))))
        report = evaluate(MultiLabelMetric(bootstrap=30), scores, labels)
        rng = np.random.default_rng(0)
        draws = [rng.integers(40, size=40) for _ in range(30)]
        drawn = [multilabel_metrics(scores[rows], labels[rows])[0] for rows in draws]
        for name in ('mAP', 'OF1', 'gap', 'CF1_top3'):
            half = 1.959964 * np.std([metrics[name] for metrics in drawn], ddof=1)
            ends = [max(report[name] - half, -1 if name == 'gap' else 0), min(report[name] + half, 100)]
            assert [report[f'{name}_low'], report[f'{name}_high']] == pytest.approx(ends, rel=1e-6)
            assert report[f'{name}_low'] < report[name] < report[f'{name}_high']
    strict = evaluate(MultiLabelMetric('ml_gcn', bootstrap=30), scores[:, :4], labels[:, :4])
    assert strict['mAP_low'] < strict['mAP'] < strict['mAP_high']


def make_rare(seed, positives, images=400, classes=40):
    """Scores and labels with that many positives per class on average."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((images, classes)) < positives / images).astype(np.int8)
    return (rng.random((images, classes)) * 0.6 + 0.4 * labels).astype(np.float32), labels


def test_intervals_of_rare_classes_hold_the_metric():
    """Positives that a draw repeats tie, which raises their average precision. The groups of classes stay the same."""
    scores, labels = make_rare(0, positives=20)
    report, same = (evaluate(MultiLabelMetric(bootstrap=40, class_counts=counts), scores, labels)
                    for counts in ('evaluated', labels.sum(0)))
    assert same == pytest.approx(report, nan_ok=True)
    for name in ('mAP', 'mAP_few', 'mAP_medium', 'AUC', 'OF1'):
        assert report[f'{name}_low'] < report[name] < report[f'{name}_high']
    assert np.isnan([report['mAP_many'], report['mAP_many_low']]).all()


@pytest.mark.slow
def test_intervals_cover_the_expected_map_of_rare_classes():
    """Of 60 data sets, nominally 57 have the mean of all in their interval; 5 standard errors of slack."""
    truth = np.mean([evaluate(MultiLabelMetric(), *make_rare(seed, 5))['mAP'] for seed in range(300)])
    reports = [evaluate(MultiLabelMetric(bootstrap=100), *make_rare(seed, 5)) for seed in range(60)]
    assert sum(report['mAP_low'] <= truth <= report['mAP_high'] for report in reports) >= 49


@pytest.mark.slow
def test_intervals_cover_the_metrics_of_the_population():
    """Of 200 samples of 150 images, nominally 95 % hold the value of 200,000 images; 5 standard errors of slack."""
    truth, _ = multilabel_metrics(*make_data(99, 200_000, 4))
    covered = dict.fromkeys(('mAP', 'AUC', 'OF1', 'gap', 'CF1'), 0)
    for seed in range(200):
        report = evaluate(MultiLabelMetric(bootstrap=200), *make_data(seed, 150, 4))
        for name in covered:
            covered[name] += report[f'{name}_low'] <= truth[name] <= report[f'{name}_high']
    print(covered)
    assert all(0.87 * 200 <= count for count in covered.values()), covered


@pytest.mark.parametrize('counts', [
    [5, 19, 20, 100, 101, 7], dict(a=5, b=19, c=20, d=100, e=101, f=7), np.array([5, 19, 20, 100, 101, 7])],
    ids=['list', 'dict', 'array'])
def test_split_by_class_frequency(counts):
    scores, labels = make_data(16, 150, 6)
    labels[:, 5] = 0  # omitted from all means
    metric = MultiLabelMetric(class_counts=counts)
    metric.dataset_meta = dict(classes='abcdef')
    report, ap = evaluate(metric, scores, labels), 100 * average_precision(scores, labels)
    assert [report[f'mAP_{name}'] for name in ('few', 'medium', 'many')] == pytest.approx(
        [ap[:2].mean(), ap[2:4].mean(), ap[4]], rel=1e-12)
    report = evaluate(MultiLabelMetric(class_counts='evaluated'), scores[:, :2], labels[:, :2])
    assert np.isnan(report['mAP_few']) and (labels[:, :2].sum(0) < 101).all()
    assert report['mAP_medium'] == report['mAP']


@pytest.mark.parametrize('counts, message', [
    ([1, 2], 'class_counts has 2 values for 3 classes'), (dict(a=1, b=2), r"class_counts has no count of \['c'\]")])
def test_counts_that_do_not_fit_the_classes(counts, message):
    with pytest.raises(ConfigError, match=message):
        MultiLabelMetric(class_counts=counts).dataset_meta = dict(classes='abc')


@pytest.mark.parametrize('threshold, message', [
    (dict(eel=0.5), r"threshold has unknown classes \['eel'\]: the 2 classes are cat, dog"),
    ([0.1, 0.2, 0.3], 'threshold has 3 values for 2 classes'), (dict(cat=7), "threshold=7 of 'cat' must be in")])
def test_thresholds_that_do_not_fit_the_classes_are_refused_before_the_evaluation(threshold, message):
    with pytest.raises(ConfigError, match=message):
        MultiLabelMetric(threshold=threshold).dataset_meta = dict(classes=('cat', 'dog'))


GOOD = dict(pred_score=torch.tensor([0.1, 0.2]), gt_label=[0], img_path='a.jpg')


@pytest.mark.parametrize('change, message', [
    (dict(pred_score=torch.tensor([3., 0.])), r'class 0 \(cat\): pred_score=3 is not a probability. Apply a sigmoid'),
    (dict(pred_score=torch.rand(3)), r'sample a.jpg: pred_score has shape \(3,\), expected \(2,\). .*num_classes'),
    (dict(gt_score=torch.ones(3)), r'sample a.jpg: gt_score has shape \(3,\), expected \(2,\)'),
    (dict(gt_score=torch.tensor([0.3, 1])), r'class 0 \(cat\): gt_score=0.3\d* is not 0, 1 or ignore_index=-1'),
    (dict(gt_label=[0, 2]), r'sample a.jpg: gt_label \[0, 2\] is not within 0 ... 1'),
    (dict(gt_label=[-1]), r'gt_label \[-1\] is not within 0 ... 1'),
])
def test_refuses_bad_samples_at_once(change, message):
    metric = MultiLabelMetric()
    metric.dataset_meta = dict(classes=('cat', 'dog'))
    with pytest.raises(DataError, match=message):
        metric.process(None, [GOOD, {**GOOD, **change}])
    assert metric.results == []


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_refuses_scores_that_are_not_finite(value):
    metric = MultiLabelMetric()
    with pytest.raises(NonFiniteError, match=f'sample a.jpg, class 1: pred_score={value}. The model diverged'):
        metric.process(None, [GOOD, {**GOOD, 'pred_score': torch.tensor([0.1, value])}])


def test_refuses_missing_fields_and_other_lengths():
    metric = MultiLabelMetric()
    with pytest.raises(DataError, match='no samples'):
        metric.evaluate(0)
    with pytest.raises(DataError, match='sample 0 has no pred_score. Use a head'):
        metric.process(None, [dict(gt_label=[0])])
    with pytest.raises(DataError, match='sample a.jpg has neither gt_score nor gt_label'):
        metric.process(None, [dict(pred_score=torch.rand(2), img_path='a.jpg')])
    with pytest.raises(DataError, match='sample a.jpg has no calibrated_score. Use a head .* mmasl.MultiLabelClsHead'):
        MultiLabelMetric(calibrated=True).process(None, [GOOD])
    with pytest.raises(DataError, match='class 0: calibrated_score=2 is not a probability'):
        MultiLabelMetric(calibrated=True).process(None, [dict(GOOD, calibrated_score=torch.tensor([2., 0.]))])
    metric.process(None, [GOOD])
    with pytest.raises(DataError, match=r'sample 1: pred_score has shape \(3,\), expected \(2,\)'):
        metric.process(None, [dict(pred_score=torch.rand(3), gt_label=[])])


@pytest.mark.parametrize('arguments, message', [
    (dict(preset='coco'), "preset='coco' is unknown; valid: 'paper', 'ml_gcn', 'official', 'mmpretrain'"),
    (dict(cf1='macro'), "cf1='macro' is unknown; valid: 'harmonic', 'mean'"),
    (dict(thr=0.5), "argument='thr' is unknown; valid: 'ap_mode', 'threshold'"),
    (dict(threshold=50), 'threshold=50 is not a probability'),
    (dict(score_dtype='bfloat16'), "score_dtype='bfloat16' is unknown; valid: 'float32', 'float16'"),
    (dict(bootstrap=-1), 'bootstrap=-1 is not a number of resamples'),
    (dict(bootstrap=1), 'bootstrap=1 is not a number of resamples; set 0, or 2 or more'),
    (dict(class_counts='train'), "class_counts='train' is unknown; valid: 'evaluated'"),
    (dict(topk=0), 'topk=0 is not a positive integer'),
    (dict(ignore_index=0), 'ignore_index=0 is the value of a label'),
])
def test_refuses_unknown_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        MultiLabelMetric(**arguments)


def test_float16_rounds_the_threshold_too():
    # 0.8 rounds down: in float16 it must not fall below its own threshold
    args = np.full((4, 1), 0.8, np.float32), np.ones((4, 1), np.int8)
    for inclusive in (False, True):
        metric = MultiLabelMetric(threshold=0.8, inclusive=inclusive, score_dtype='float16')
        assert evaluate(metric, *args)['OR'] == (100 if inclusive else 0)


def test_samples_with_classes_and_with_scores_in_one_batch():
    scores, labels = make_data(21, 20, 6)
    expected = evaluate(MultiLabelMetric(), scores, labels)
    samples = make_samples(scores, labels)
    for sample in samples[1::3]:
        sample['gt_label'] = sample.pop('gt_score').nonzero()[:, 0]
    samples[2]['gt_label'] = samples[2].pop('gt_score').nonzero()[:, 0].tolist()
    metric = MultiLabelMetric()
    metric.process(None, samples)
    assert {k.split('/')[1]: v for k, v in metric.evaluate(20).items()} == expected


def samples_of_two_kinds():
    """Of which every other one has few labels."""
    scores, labels = make_data(12, 21, 60, levels=6)
    labels[::2, 4:] = -1
    return make_samples(scores, labels)


def samples_of_one_label():
    return single(np.arange(21) % 5, np.arange(21) % 4)


def evaluate_on_rank(rank, folder):
    torch.distributed.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=2)
    samples = samples_of_two_kinds()
    metric = MultiLabelMetric(collect_dir=f'{folder}/parts')
    # as DistributedSampler deals them: alternating, and the first sample once more to fill up
    metric.process(None, (samples + samples[:1])[rank::2])
    assert bool(metric.results[0].dtype.names) == (rank == 0)
    single_label = MacroF1(collect_dir=f'{folder}/single_label')
    samples = samples_of_one_label()
    single_label.process(None, (samples + samples[:1])[rank::2])
    torch.save([metric.evaluate(21), single_label.evaluate(21)], f'{folder}/{rank}.pt')
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    torch.multiprocessing.spawn(evaluate_on_rank, (str(tmp_path), ), nprocs=2)
    metric = MultiLabelMetric()
    metric.process(None, samples_of_two_kinds())
    expected = [metric.evaluate(21), macro_f1(samples_of_one_label())]
    assert torch.load(tmp_path / '0.pt') == torch.load(tmp_path / '1.pt') == expected


# --- one label a sample


def single(true, predicted):
    """Samples as a single-label head of mmpretrain returns them, without their scores."""
    return [dict(gt_label=torch.tensor([t]), pred_label=torch.tensor([p])) for t, p in zip(true, predicted)]


def macro_f1(samples):
    metric = MacroF1()
    metric.process(None, samples)
    return metric.evaluate(len(samples))


def test_macro_f1_is_sklearns():
    from sklearn.metrics import accuracy_score, f1_score
    rng = np.random.default_rng(0)
    true = rng.integers(30, size=200) ** 2  # classes with gaps between them
    predicted = np.where(rng.random(200) < 0.5, true, rng.integers(1000, size=200))
    assert macro_f1(single(true, predicted)) == pytest.approx({
        'single-label/f1-score': 100 * f1_score(true, predicted, average='macro'),
        'single-label/top1': 100 * accuracy_score(true, predicted)})


def test_a_species_without_an_image_counts_if_it_is_predicted():
    """Class 3 is neither seen nor predicted, and class 2 is predicted alone: mmpretrain counts both, with 0."""
    from mmpretrain.evaluation import SingleLabelMetric
    true, predicted = torch.tensor([0, 0, 1, 4]), torch.tensor([0, 2, 1, 4])
    found = macro_f1(single(true, predicted))['single-label/f1-score']
    assert found == pytest.approx(100 * (2 / 3 + 1 + 0 + 1) / 4)
    _, _, f1, _ = SingleLabelMetric.calculate(predicted, true, num_classes=5, average='macro')
    assert found * 4 / 5 == pytest.approx(f1.item())


@pytest.mark.parametrize('label', [[], [0]], ids=['scalar', 'one of a list'])
def test_macro_f1_of_scores(label):
    samples = [dict(gt_label=torch.tensor(1).reshape([1] * len(label)), pred_score=torch.tensor(scores))
               for scores in ([0.1, 0.7, 0.2], [0.6, 0.3, 0.1])]
    assert macro_f1(samples) == pytest.approx({'single-label/f1-score': 100 / 3, 'single-label/top1': 50})
    # What the head decided comes before what its scores say.
    assert macro_f1([dict(sample, pred_label=1) for sample in samples])['single-label/top1'] == 100


def test_macro_f1_keeps_no_scores():
    """Herbarium 2020 has 32,094 species."""
    count, classes, batch = 4_000, 32_094, 100
    scores = torch.rand(batch, classes)
    metric = MacroF1()
    tracemalloc.start()
    for start in range(0, count, batch):
        metric.process(None, [dict(gt_label=torch.tensor([i % classes]), pred_score=row)
                              for i, row in enumerate(scores, start)])
    report = metric.compute_metrics(metric.results)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0 <= report['f1-score'] <= report['top1'] < 1
    # A float32 of each score would be 0.5 GB. PyTorch's memory is not traced: the results are to be numbers.
    assert peak < 250 * count + 50 * classes
    assert {type(number) for pair in metric.results for number in pair} == {int}


@pytest.mark.parametrize('sample, message', [
    (dict(pred_label=1), 'sample 0 has no gt_label. Evaluate a single-label head, such as LinearClsHead'),
    (dict(gt_label=1, img_path='a.jpg'), 'sample a.jpg has no pred_label'),
    (dict(gt_label=torch.tensor([0, 2]), pred_label=1), r'gt_label \[0, 2\] is not one class. .*MultiLabelMetric')])
def test_samples_that_have_no_f1(sample, message):
    with pytest.raises(DataError, match=message):
        MacroF1().process(None, [sample])


def test_macro_f1_refuses_nan_and_nothing():
    with pytest.raises(NonFiniteError, match='sample 0: pred_score is nan'):
        MacroF1().process(None, [dict(gt_label=1, pred_label=1, pred_score=torch.tensor([0.1, float('nan')]))])
    with pytest.raises(DataError, match='MacroF1 got no samples'):
        MacroF1().evaluate(0)


def test_docstring_example():
    result = doctest.testmod(mmasl.evaluation.metrics)
    assert result.attempted > 2 and result.failed == 0
