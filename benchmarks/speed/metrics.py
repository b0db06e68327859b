"""Time, memory and accuracy of MultiLabelMetric.

Measures the metric at the size of Open Images, against MMPretrain and torchmetrics at the size of COCO, over growing
sizes, and with float16. Scores are sigmoids of normal logits with a higher mean for positive labels. Batches are
generated one at a time from a seed.
"""
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import barrier, collect_results

from mmasl.evaluation.functional import multilabel_metrics
from mmasl.evaluation.metrics import MultiLabelMetric

from .measure import in_process, in_turn, memory_of_process

OPEN_IMAGES, COCO = (114_648, 9_605), (40_137, 80)
BATCH = 64
SWEEP = [(samples, 1000) for samples in (5_000, 10_000, 20_000, 40_000)]
SWEEP += [(10_000, classes) for classes in (500, 2000, 4000)]
GIB = 2**30
COLUMNS = ('case', 'implementation', 'samples', 'classes', 'negatives', 'precision', 'processes', 'process_s',
           'gather_s', 'evaluate_s', 'total_s', 'peak_rss_gib', 'kept_bytes_per_label', 'mAP')


def measure(device: str) -> Iterator[dict]:
    """Yield the rows of all measurements. All run on the CPU, whatever the device."""
    yield from compare_at_coco_size()
    yield from compare_precisions()
    yield from sweep()
    # With verified labels only, the metric stores so little that float32 costs nothing.
    for negatives, precision in (('all', 'float16'), ('verified', 'float16'), ('verified', 'float32')):
        for processes, function in ((1, 'evaluate_metric'), (2, 'gather_metric')):
            yield row('Open Images', 'mmasl', *OPEN_IMAGES, negatives=negatives, precision=precision,
                      processes=processes, **run(f'{function}(*OPEN_IMAGES, {negatives!r}, {precision!r})'))


def targets(rows: list[dict]) -> list[tuple[str, str, bool]]:
    """Judge time and memory at the size of Open Images, speed against the peers, and linear cost."""
    results = []
    for x in select(rows, case='Open Images'):
        seconds, peak = float(x['total_s']), float(x['peak_rss_gib'])
        precision = '' if x['precision'] == 'float16' else f'{x["precision"]}, '
        count = '1 process' if str(x['processes']) == '1' else f'{x["processes"]} processes'
        what = f'Open Images, {x["negatives"]} negatives, {precision}{count}'
        results += [(f'{what}: total time under 180 s', f'{seconds:.0f} s', seconds < 180),
                    (f'{what}: peak RSS under 8 GB (7.45 GiB)', f'{peak:.2f} GiB', peak < 8e9 / GIB)]
        if precision and x['kept_bytes_per_label']:
            kept = float(x['kept_bytes_per_label'])
            results.append((f'{what}: stores at most 0.04 bytes a label, a hundredth of float32', f'{kept:.3f}',
                            kept <= 0.04))
    for case, peer in (('COCO, samples', 'mmpretrain'), ('COCO, arrays', 'torchmetrics')):
        times = {x['implementation']: float(x['total_s']) for x in select(rows, case=case)}
        if times:
            ratio = times[peer] / times['mmasl']
            results.append((f'{case}: at least 10 times faster than {peer}', f'{ratio:.1f} times', ratio >= 10))
    for fixed, growing in (('classes', 'samples'), ('samples', 'classes')):
        sizes: dict[int, list[tuple[int, float]]] = {}
        for x in select(rows, case='sweep'):
            sizes.setdefault(int(x[fixed]), []).append((int(x[growing]), float(x['evaluate_s'])))
        if sizes:
            points = max(sizes.values(), key=len)
            (small, fast), (large, slow) = min(points), max(points)
            growth = slow / fast / (large / small)
            results.append((f'{large // small} times the {growing}: at most {large // small * 1.25:g} times as long',
                            f'{slow / fast:.1f} times', growth <= 1.25))
    return results


def select(rows: list[dict], **values: str) -> list[dict]:
    return [x for x in rows if all(x[key] == value for key, value in values.items())]


def row(case: str, implementation: str, samples: int, classes: int, **values: Any) -> dict:
    known = dict(case=case, implementation=implementation, samples=samples, classes=classes, negatives='all',
                 precision='float16', processes=1) | values
    return dict.fromkeys(COLUMNS, '') | known


def run(call: str) -> dict[str, Any]:
    """Call a function of this file in a separate process."""
    result = in_process(f'import json\nfrom benchmarks.speed.metrics import *\nprint(json.dumps({call}))')
    return dict(peak_rss_gib=result.pop('peak_rss_bytes') / GIB) | result


def make_batches(samples: int, classes: int, negatives: str = 'all', first: int = 0) -> Iterator[list[dict]]:
    """Generate samples as predicted by a head, with about 4 positives each and a long tail of classes.

    Args:
        samples, classes: Their numbers.
        negatives: 'all': all other labels are negative, and samples have ``gt_label``; 'verified': about 7 labels are
            negative, the others are ignored, and samples have ``gt_score``, as in :class:`mmasl.OpenImages`.
        first: Number of the first batch, which is its seed.
    """
    frequency = torch.arange(1, classes + 1) ** -0.7
    frequency = (frequency * 4 / frequency.sum()).clamp(max=0.5)
    for number, start in enumerate(range(0, samples, BATCH), first):
        rng = torch.Generator().manual_seed(number)
        shape = min(BATCH, samples - start), classes
        chance = torch.rand(shape, generator=rng)
        positive = chance < frequency
        scores = torch.randn(shape, generator=rng).mul_(1.5).add_(frequency.logit() / 2 - 1)
        scores = scores.add_(positive, alpha=3.5).sigmoid_()
        if negatives == 'all':
            labels = [dict(gt_label=x.nonzero()[:, 0]) for x in positive]
        else:
            labels = [dict(gt_score=x) for x in (chance < frequency + 7 / classes).float() - 1 + positive.float()]
        yield [dict(pred_score=s, **y) for s, y in zip(scores, labels)]


def evaluate_metric(samples: int, classes: int, negatives: str = 'all', precision: str = 'float16') -> dict:
    """Measure the seconds to process samples, and to compute the metrics from them."""
    metric = MultiLabelMetric(score_dtype=precision)
    process = fill(metric, make_batches(samples, classes, negatives))
    kept = sum(x.nbytes for x in metric.results) / (samples * classes)
    begin = time.perf_counter()
    report = metric.evaluate(samples)
    seconds = time.perf_counter() - begin
    return dict(process_s=process, evaluate_s=seconds, total_s=process + seconds,
                kept_bytes_per_label=kept, mAP=report['multi-label/mAP'])


def fill(metric: MultiLabelMetric, batches: Iterator[list[dict]]) -> float:
    """Measure the seconds of ``process``, without the generation of the samples."""
    seconds = 0.
    for batch in batches:
        begin = time.perf_counter()
        metric.process(None, batch)
        seconds += time.perf_counter() - begin
    return seconds


def gather_metric(samples: int, classes: int, negatives: str, precision: str = 'float16') -> dict:
    """Measure two gloo processes with half of the samples each, including MMEngine's gather through files.

    The peak memory is that of rank 0, which gathers and evaluates.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(gather_on_rank, (folder, samples, classes, negatives, precision), nprocs=2)
        return json.loads(Path(folder, 'result').read_text())


def gather_on_rank(rank: int, folder: str, samples: int, classes: int, negatives: str, precision: str) -> None:
    torch.distributed.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=2)
    metric = MultiLabelMetric(score_dtype=precision)
    half = samples // 2
    process = fill(metric, make_batches(half, classes, negatives, first=rank * samples))
    barrier()
    begin = time.perf_counter()
    results = collect_results(metric.results, samples, 'cpu', f'{folder}/parts')
    gather = time.perf_counter() - begin
    if rank == 0:
        begin = time.perf_counter()
        report = metric.compute_metrics(results)
        evaluate = time.perf_counter() - begin
        peak = memory_of_process('VmHWM')
        Path(folder, 'result').write_text(json.dumps(dict(
            process_s=process, gather_s=gather, evaluate_s=evaluate, total_s=process + gather + evaluate,
            peak_rss_gib=peak / GIB, mAP=report['mAP'])))
    barrier()
    torch.distributed.destroy_process_group()


def compare_at_coco_size() -> Iterator[dict]:
    """Compare with the peers, with the metrics they share: from single samples, and from whole arrays."""
    batches = list(make_batches(*COCO))
    for batch in batches:
        for sample in batch:
            sample['gt_score'] = torch.zeros(COCO[1]).index_fill_(0, sample.pop('gt_label'), 1)
    peers = dict(mmasl=[MultiLabelMetric('mmpretrain')], mmpretrain=mmpretrain_metrics())
    kept: dict[str, list] = {name: [] for name in peers}
    calls: dict[tuple[str, str], Callable[[], object]] = {
        (name, 'process'): partial(process, metrics, batches, kept[name]) for name, metrics in peers.items()}
    calls |= {(name, 'evaluate'): partial(evaluate, metrics, kept[name]) for name, metrics in peers.items()}
    scores, labels = (torch.stack([x[key] for batch in batches for x in batch]) for key in ('pred_score', 'gt_score'))
    arrays, tensors = (scores.numpy(), labels.to(torch.int8).numpy()), (scores, labels.long())
    collection = torchmetrics_collection()
    calls['mmasl', 'arrays'] = partial(multilabel_metrics, *arrays)
    calls['torchmetrics', 'arrays'] = lambda: (collection.update(*tensors), collection.compute(), collection.reset())
    calls['torchmetrics', 'samples'] = partial(stream, collection, batches)
    times = in_turn(calls, least=3)
    for name in peers:
        first, second = times[name, 'process'], times[name, 'evaluate']
        yield row('COCO, samples', name, *COCO, precision='float32', process_s=first, evaluate_s=second,
                  total_s=first + second)
    yield row('COCO, samples', 'torchmetrics', *COCO, precision='float32', total_s=times['torchmetrics', 'samples'])
    for name in ('mmasl', 'torchmetrics'):
        yield row('COCO, arrays', name, *COCO, precision='float32', total_s=times[name, 'arrays'])


def mmpretrain_metrics() -> list:
    from mmpretrain.evaluation import AveragePrecision
    from mmpretrain.evaluation import MultiLabelMetric as StockMultiLabelMetric
    return [AveragePrecision(), *(StockMultiLabelMetric(average=average, **chosen) for average in ('macro', 'micro')
                                  for chosen in (dict(thr=0.5), dict(topk=3)))]


def torchmetrics_collection() -> Any:
    from torchmetrics import MetricCollection
    from torchmetrics.classification import (
        MultilabelAveragePrecision,
        MultilabelF1Score,
        MultilabelPrecision,
        MultilabelRecall,
    )
    counts = {f'{average} {metric.__name__}': metric(COCO[1], average=average) for average in ('macro', 'micro')
              for metric in (MultilabelPrecision, MultilabelRecall, MultilabelF1Score)}
    return MetricCollection(dict(mAP=MultilabelAveragePrecision(COCO[1]), **counts))


def process(metrics: list, batches: list[list[dict]], kept: list) -> None:
    for metric in metrics:
        metric.results = []
    for batch in batches:
        for metric in metrics:
            metric.process(None, batch)
    kept[:] = [metric.results for metric in metrics]


def evaluate(metrics: list, kept: list) -> list[dict]:
    for metric, results in zip(metrics, kept):
        metric.results = list(results)  # evaluate empties its list
    return [metric.evaluate(COCO[0]) for metric in metrics]


def stream(collection: Any, batches: list[list[dict]]) -> dict:
    collection.reset()
    for batch in batches:
        collection.update(*(torch.stack([x[key] for x in batch]).to(dtype)
                            for key, dtype in (('pred_score', torch.float32), ('gt_score', torch.int64))))
    return collection.compute()


def compare_precisions() -> Iterator[dict]:
    """Compute the mAP of the same scores in both precisions, also for a confident model with scores near 0 and 1."""
    batches = list(make_batches(*COCO))
    scores = torch.stack([x['pred_score'] for batch in batches for x in batch])
    labels = np.zeros(COCO, np.int8)
    for labelled, sample in zip(labels, (x for batch in batches for x in batch)):
        labelled[sample['gt_label']] = 1
    for case, factor in (('precision', 1), ('precision, 4 times the logits', 4)):
        rounded = (factor * scores.double().logit()).sigmoid().float().numpy()
        for precision in ('float32', 'float16'):
            report, _ = multilabel_metrics(rounded.astype(precision), labels)
            yield row(case, 'mmasl', *COCO, precision=precision, mAP=report['mAP'])


def sweep() -> Iterator[dict]:
    """Measure the computation of the metrics over growing numbers of samples and classes."""
    metrics = {size: MultiLabelMetric(score_dtype='float16') for size in SWEEP}
    processed = {size: fill(metric, make_batches(*size)) for size, metric in metrics.items()}
    times = in_turn({size: partial(metric.compute_metrics, metric.results) for size, metric in metrics.items()})
    for size in SWEEP:
        yield row('sweep', 'mmasl', *size, process_s=processed[size], evaluate_s=times[size],
                  total_s=processed[size] + times[size])
