"""Metrics for evaluators: :class:`MultiLabelMetric` for several labels a sample, :class:`MacroF1` for one of many."""
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NoReturn

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log

from mmasl.errors import ConfigError, DataError, NonFiniteError
from mmasl.registry import METRICS
from mmasl.utils.thresholds import expand_thresholds

from .functional import (
    PRESETS,
    ClassMetrics,
    Conventions,
    bootstrap_intervals,
    check_choice,
    list_classes,
    metrics_from_blocks,
)
from .score_storage import append_rows, make_blocks, make_records, pack, to_codes, unpack

NON_FINITE = 'The model diverged or overflowed; lower the learning rate, or evaluate in float32.'


@METRICS.register_module()
class MultiLabelMetric(BaseMetric):
    """mAP, precision, recall and F1, the same for the top k, probability gap and calibration error.

    Input: the samples of MMPretrain's multi-label heads. ``pred_score`` holds probabilities (C,). ``gt_score`` (C,)
    holds 0, 1 and ``ignore_index``; without it, ``gt_label`` holds the indices of the positive classes.

    Output, in percent:

    - ``mAP``, the mean average precision of the classes, and ``mAP_weighted``, weighted by the positives of each class
      ('micro' and 'macro' in Table 7 of the ASL paper, arXiv 2009.14119);
    - ``AUC``, the mean area under the ROC curve of the classes with positives and negatives, by which ChestX-ray14 and
      CheXpert are judged, see :func:`mmasl.evaluation.functional.roc_auc`;
    - ``CP, CR, CF1, OP, OR, OF1``, and the same with the suffix ``_top3`` (Tables 4 and 8).

    Output, as fractions: ``p_t_pos, p_t_neg, gap`` (Eq. 9-10) and ``ECE`` with 15 bins over all labels, see
    :func:`mmasl.evaluation.functional.expected_calibration_error`. The order of samples and classes and the number of
    processes do not change the metrics.

    Memory: 2 or 4 bytes a label, by ``score_dtype``. If most labels are ignored and ``ignored='skip'``, only the labels
    that can change a metric are stored, a hundredth of all for Open Images' 9,605 classes, and the metrics are the same
    bit for bit. The computation adds blocks of 2^24 labels.

    All presets use non-interpolated average precision, and precision 0 for a class without predictions:

    - 'paper': The harmonic CF1, and the top 3 above the threshold, follow from the numbers of Table 8; p > threshold
      follows Sec. 2.6. The paper does not state the threshold; 0.5 is that of ML-GCN. Non-interpolated average
      precision follows the authors' code. Skipping empty classes is our choice; MS-COCO has none.
    - 'ml_gcn' (Chen et al., CVPR 2019, ``util.py``): as 'paper', but p >= 0.5, empty classes raise (they divide by zero
      there), and ignored labels count as negatives in precision and recall. Its OP also adds one wrong prediction for
      each class without predictions; we do not.
    - 'official' (Alibaba-MIIL/ASL, ``validate.py``): p > 0.8, mean of the classes' F1, empty classes count 0. It has no
      top-k metrics and no ignored labels; both follow 'paper'.
    - 'mmpretrain' (``AveragePrecision`` and ``MultiLabelMetric``, 1.2): p >= 0.5, mean of the classes' F1, top k
      without threshold, empty classes count 0.

    The last three implementations break ties by the order of samples or classes. Here tied labels are treated alike.

    Args:
        preset: 'paper', 'ml_gcn', 'official' or 'mmpretrain'.
        ignore_index: Value of ``gt_score`` for ignored labels, such as the difficult ones of VOC; None: no value.
        per_class: Also return ``AP_<class>``, ``AUC_<class>``, ``precision_<class>`` and ``recall_<class>``, in
            percent, and log a table. Values that are skipped or undefined appear in the table only, as nan.
        calibrated: Apply the threshold to ``calibrated_score`` of the heads in :mod:`mmasl.models.heads`, and report
            its ECE. Average precision, the top k and the probability gap still use ``pred_score``.
        bootstrap: Number of resamples of the images, 0 or >= 2. Above 0, each metric also gets the ends of its 95 %
            interval, as ``mAP_low`` and ``mAP_high``. Each resample takes as long as the metrics themselves.
        class_counts: Number of positives of each class in the training set, one per class or a dict by class name.
            With it, ``mAP_few``, ``mAP_medium`` and ``mAP_many`` are the means over the classes with fewer than 20, 20
            to 100 and more than 100 positives, as in Liu et al. (CVPR 2019, arXiv 1904.05160). 'evaluated' counts the
            positives of the evaluated set.
        collect_device, prefix, collect_dir: See :class:`mmengine.evaluator.BaseMetric`.
        score_dtype: Type in which scores are stored, 'float32' or 'float16'. With 'float16', memory halves, the
            threshold is rounded too, and all probabilities above 1 - 2^-12 tie. Ties mostly lower mAP: by 0.02 points
            in the case 'precision' of benchmarks/speed/metrics.py, by 1.3 points with 4 times its logits.
        conventions: Fields of :class:`mmasl.evaluation.functional.Conventions` that override the preset. ``threshold``
            may also be a dict by class name, as in the inferencer; other classes have the preset's.

    Raises:
        ConfigError: An argument is unknown or out of range, or the thresholds do not fit the classes; the latter is
            raised as soon as the data set is known, before a training.
        DataError: Scores are not probabilities, labels are out of range or class counts differ, at the first such
            sample; there are no samples; or as :func:`mmasl.evaluation.functional.multilabel_metrics`.
        NonFiniteError: A score is NaN or infinite.

    Example:
        >>> metric = MultiLabelMetric(topk=1, empty='zero')
        >>> metric.process(None, [
        ...     dict(pred_score=torch.tensor([0.9, 0.6, 0.2]), gt_label=torch.tensor([0])),
        ...     dict(pred_score=torch.tensor([0.7, 0.8, 0.1]), gt_score=torch.tensor([1., 1., -1.]))])
        >>> metrics = metric.evaluate(size=2)
        >>> {name.split('/')[1]: round(value, 2) for name, value in metrics.items()}  # doctest: +NORMALIZE_WHITESPACE
        {'mAP': 66.67, 'mAP_weighted': 100.0, 'AUC': 100.0,
         'CP': 50.0, 'CR': 66.67, 'CF1': 57.14, 'OP': 75.0, 'OR': 100.0, 'OF1': 85.71,
         'CP_top1': 66.67, 'CR_top1': 50.0, 'CF1_top1': 57.14, 'OP_top1': 100.0, 'OR_top1': 66.67, 'OF1_top1': 80.0,
         'p_t_pos': 0.8, 'p_t_neg': 0.6, 'gap': 0.2, 'ECE': 0.28}
    """
    default_prefix = 'multi-label'

    def __init__(self,
                 preset: str = 'paper',
                 ignore_index: int | None = -1,
                 per_class: bool = False,
                 calibrated: bool = False,
                 collect_device: str = 'cpu',
                 prefix: str | None = None,
                 collect_dir: str | None = None,
                 score_dtype: str = 'float32',
                 bootstrap: int = 0,
                 class_counts: Sequence[int] | Mapping[str, int] | str | None = None,
                 **conventions: Any) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix, collect_dir=collect_dir)
        check_choice('preset', preset, PRESETS)
        check_choice('score_dtype', score_dtype, ('float32', 'float16'))
        for name in conventions:
            check_choice('argument', name, [field.name for field in fields(Conventions)])
        if ignore_index in (0, 1):
            raise ConfigError(f'ignore_index={ignore_index} is the value of a label; set another value, such as -1.')
        self.thresholds_by_name = None
        if isinstance(conventions.get('threshold'), Mapping):
            self.thresholds_by_name = conventions.pop('threshold')
        self.conventions = replace(PRESETS[preset], **conventions)
        self.ignore_index = ignore_index
        if not isinstance(bootstrap, int) or bootstrap < 0 or bootstrap == 1:
            raise ConfigError(f'bootstrap={bootstrap!r} is not a number of resamples; set 0, or 2 or more, such as '
                              '1000.')
        if isinstance(class_counts, str):
            check_choice('class_counts', class_counts, ('evaluated', ))
        elif class_counts is not None and not isinstance(class_counts, Mapping):
            class_counts = [int(count) for count in class_counts]
        self.bootstrap = bootstrap
        self.class_counts = class_counts
        self.per_class = per_class
        self.score_dtype = score_dtype
        self.score_keys = ['pred_score', 'calibrated_score'] if calibrated else ['pred_score']
        self.num_classes = 0  # of the samples so far

    @property
    def dataset_meta(self) -> dict | None:
        """Meta information of the evaluated data set. MMEngine sets it when it builds a loop."""
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, dataset_meta: dict | None) -> None:
        self._dataset_meta = dataset_meta
        if self._classes:
            self._expand_thresholds(self._classes)
            if self.class_counts not in (None, 'evaluated'):
                self._training_counts(self._classes)

    def _expand_thresholds(self, classes: Sequence[str]) -> Conventions:
        """The conventions with a threshold for each class, if they differ.

        Raises:
            ConfigError: The thresholds do not fit the classes.
        """
        if self.thresholds_by_name is None:
            self.conventions.thresholds(len(classes))
            return self.conventions
        default: Any = self.conventions.threshold  # of the preset: one number
        values = expand_thresholds(self.thresholds_by_name, classes, default, 'threshold')
        return replace(self.conventions, threshold=values.tolist())

    def process(self, data_batch: object, data_samples: Sequence[dict]) -> None:
        """Check a batch of samples and store its scores and labels."""
        scores = [self._read(data_samples, key) for key in self.score_keys]
        labels = self._read_labels(data_samples)
        for key, values in zip(self.score_keys, scores):
            if not (values.min() >= 0 and values.max() <= 1):  # also true for NaN
                self._check_finite(key, values, data_samples)
                where = self._locate((values < 0) | (values > 1), data_samples, key, values)
                raise DataError(f'{where} is not a probability. Apply a sigmoid to logits.')
        ignored = labels == self.ignore_index
        if (bad := (labels != 0) & (labels != 1) & ~ignored).any():
            where = self._locate(bad, data_samples, 'gt_score', labels)
            raise DataError(f'{where} is not 0, 1 or ignore_index={self.ignore_index}. Evaluate on hard labels, or set '
                            'ignore_index.')
        labels = np.where(ignored, -1, labels).astype(np.int8)
        scores = [values.astype(self.score_dtype) for values in scores]
        self.num_classes, c = labels.shape[1], self.conventions
        if c.ignored == 'skip' and (records := make_records(scores, labels, c.topk)):
            self.results.extend(records)
        else:
            append_rows(self.results, np.stack([pack(values, labels) for values in scores], axis=1))

    def compute_metrics(self, results: list[np.ndarray]) -> dict[str, float]:
        """Compute the metrics by name from the samples of all processes."""
        if not results:
            raise DataError('MultiLabelMetric got no samples; check that the evaluated data set is not empty.')
        num_classes = len(self._classes or ()) or self.num_classes
        classes = self._classes or [str(c) for c in range(num_classes)]
        metrics, by_class = self._compute(results, self._expand_thresholds(classes), classes)
        positives, undefined = by_class.positives, np.isnan(by_class.ap)
        for kind, mean, chosen in (('positive', 'the class means', positives == 0), ('negative', 'mAP', positives > 0)):
            if (skipped := chosen & undefined).any():
                print_log(f'No {kind} label in {list_classes(skipped, classes)}: omitted from {mean}.', 'current',
                          logging.WARNING)
        if self.bootstrap:
            metrics |= self._intervals(results, classes, metrics, by_class.positives)
        if self.per_class:
            metrics |= self._report_classes(classes, by_class)
        return metrics

    def _compute(self, results: Sequence[np.ndarray], conventions: Conventions, classes: Sequence[str],
                 evaluated: np.ndarray | None = None) -> tuple[dict[str, float], ClassMetrics]:
        """The metrics of samples. ``evaluated`` are the positives of the evaluated set; by default, of the samples."""
        blocks = make_blocks(results, len(classes), len(self.score_keys))
        metrics, by_class = metrics_from_blocks(blocks, conventions, classes)
        if self.class_counts is not None:
            if self.class_counts != 'evaluated':
                counts = self._training_counts(classes)
            else:
                counts = by_class.positives if evaluated is None else evaluated
            for name, chosen in (('few', counts < 20), ('medium', (counts >= 20) & (counts <= 100)),
                                 ('many', counts > 100)):
                ap = by_class.ap[chosen & ~np.isnan(by_class.ap)]
                metrics[f'mAP_{name}'] = float(ap.mean()) if ap.size else float('nan')
        return metrics, by_class

    def _intervals(self, results: Sequence[np.ndarray], classes: Sequence[str], metrics: Mapping[str, float],
                   positives: np.ndarray) -> dict[str, float]:
        conventions = self._expand_thresholds(classes)
        if conventions.empty == 'error':  # a draw may miss the positives of a rare class
            conventions = replace(conventions, empty='skip')
        ends = bootstrap_intervals(
            metrics, lambda rows: self._compute([results[row] for row in rows], conventions, classes, positives)[0],
            len(results), self.bootstrap)
        return {f'{name}_{end}': value for name, pair in ends.items() for end, value in zip(('low', 'high'), pair)}

    def _training_counts(self, classes: Sequence[str]) -> np.ndarray:
        """``class_counts`` in the order of the classes.

        Raises:
            ConfigError: A class has no count, or there is another number of counts.
        """
        counts: Any = self.class_counts
        if isinstance(counts, Mapping):
            if missing := [name for name in classes if name not in counts]:
                raise ConfigError(f'class_counts has no count of {missing[:10]}; give one for each class.')
            counts = [counts[name] for name in classes]
        if len(counts) != len(classes):
            raise ConfigError(f'class_counts has {len(counts)} values for {len(classes)} classes; give one per class.')
        return np.asarray(counts)

    @staticmethod
    def _report_classes(classes: Sequence[str], by_class: ClassMetrics) -> dict[str, float]:
        """Log a table of the classes, and return its values by name."""
        names = dict(ap='AP', auc='AUC', precision='precision', recall='recall')
        width = max(map(len, [*classes, 'class']))
        table = [f'{"class":<{width}} positives' + ''.join(f'{name:>10}' for name in names.values())]
        table += [f'{c:<{width}} {n:>9}' + ''.join(f'{value:>10.2f}' for value in row)
                  for c, n, *row in zip(classes, by_class.positives, *(getattr(by_class, key) for key in names))]
        print_log('\n'.join(['Metrics of each class, in percent:', *table]), 'current')
        return {f'{name}_{c}': float(value) for key, name in names.items()
                for c, value in zip(classes, getattr(by_class, key)) if not np.isnan(value)}

    def labels(self) -> np.ndarray:
        """Labels of the samples so far, int8 (N, C): 1, 0 and -1."""
        return np.stack([unpack(to_codes(sample, self.num_classes)[0])[1] for sample in self.results])

    @property
    def _classes(self) -> Sequence[str] | None:
        return (self.dataset_meta or {}).get('classes')

    def _read(self, samples: Sequence[dict], key: str) -> np.ndarray:
        """Field ``key`` of the samples, float32 (B, C); C is the data set's number of classes, else the first
        sample's."""
        expected = torch.Size([self._num_classes(samples)])
        try:
            values = torch.stack([torch.as_tensor(sample[key]) for sample in samples])
        except (KeyError, RuntimeError):
            values = None
        if values is None or values.shape[1:] != expected:
            self._raise_for_field(samples, key, expected)
        return values.detach().float().cpu().numpy()

    def _raise_for_field(self, samples: Sequence[dict], key: str, expected: torch.Size) -> NoReturn:
        """Raise for the first sample whose field is missing or has another shape."""
        for index, sample in enumerate(samples):
            if key not in sample:
                head = 'MultiLabelClsHead' if key == 'pred_score' else 'mmasl.MultiLabelClsHead'
                raise DataError(f'{self._name(samples, index)} has no {key}. Use a head that predicts it, such as '
                                f'{head}.')
            if (shape := torch.as_tensor(sample[key]).shape) != expected:
                raise DataError(f"{self._name(samples, index)}: {key} has shape {tuple(shape)}, expected "
                                f"{tuple(expected)}. Give the head's num_classes, metainfo.classes of the data set and "
                                'the labels the same number of classes.')
        raise DataError(f'The {key} of samples from {self._name(samples, 0)} on is spread over several devices. Move '
                        'it to one device.')

    def _read_labels(self, samples: Sequence[dict]) -> np.ndarray:
        """``gt_score`` of the samples, float32 (B, C), made from ``gt_label`` where a sample has none."""
        num_classes = self._num_classes(samples)
        samples = list(samples)
        for index, sample in enumerate(samples):
            if 'gt_score' in sample:
                continue
            if 'gt_label' not in sample:
                raise DataError(f'{self._name(samples, index)} has neither gt_score nor gt_label. Evaluate on an '
                                'annotated data set whose pipeline ends in PackInputs.')
            labels = torch.as_tensor(sample['gt_label']).long().reshape(-1).tolist()
            if labels and not 0 <= min(labels) <= max(labels) < num_classes:
                raise DataError(f'{self._name(samples, index)}: gt_label {labels} is not within 0 ... '
                                f'{num_classes - 1}. Give the head and the data set the same classes.')
            score = np.zeros(num_classes, np.float32)
            score[labels] = 1
            samples[index] = dict(sample, gt_score=score)
        return self._read(samples, 'gt_score')

    def _num_classes(self, samples: Sequence[dict]) -> int:
        if self.results and not self._classes:
            return self.num_classes
        return len(self._classes or samples[0].get('pred_score', ()))

    def _check_finite(self, key: str, values: np.ndarray, samples: Sequence[dict]) -> None:
        if (bad := ~np.isfinite(values)).any():
            raise NonFiniteError(f'{self._locate(bad, samples, key, values)}. {NON_FINITE}')

    def _name(self, samples: Sequence[dict], index: int) -> str:
        return f'sample {samples[index].get("img_path", len(self.results) + index)}'

    def _locate(self, bad: np.ndarray, samples: Sequence[dict], key: str, values: np.ndarray) -> str:
        """The first bad entry: its sample, class, field and value."""
        row, index = np.argwhere(bad)[0]
        label = f'class {index}' + (f' ({self._classes[index]})' if self._classes else '')
        return f'{self._name(samples, row)}, {label}: {key}={values[row, index]:g}'


@METRICS.register_module()
class MacroF1(BaseMetric):
    """Macro F1 and accuracy for samples with one class of many. It stores two integers a sample and no scores.

    Input: the samples of MMPretrain's single-label heads. ``gt_label`` and ``pred_label`` hold one class; without
    ``pred_label``, the class with the highest ``pred_score`` (C,) is predicted. Output, in percent: ``f1-score``, the
    mean F1 of the classes, and ``top1``, the accuracy.

    The mean is over the classes that occur as a label or as a prediction, as in scikit-learn's ``f1_score``.
    MMPretrain's ``SingleLabelMetric``, whose name ``f1-score`` is used here, takes the mean over all C classes, and
    classes that do not occur count 0. It also stores the scores (N, C), and torchmetrics a table (C, C).

    Args:
        collect_device, prefix, collect_dir: See :class:`mmengine.evaluator.BaseMetric`.

    Raises:
        DataError: A sample has no label or no prediction, or several labels; or there are no samples.
        NonFiniteError: A score is NaN.

    Example:
        >>> metric = MacroF1()
        >>> metric.process(None, [dict(gt_label=torch.tensor([true]), pred_label=torch.tensor([predicted]))
        ...                       for true, predicted in ((0, 0), (0, 0), (7, 7), (7, 9))])
        >>> {name: round(value, 2) for name, value in metric.evaluate(size=4).items()}
        {'single-label/f1-score': 55.56, 'single-label/top1': 75.0}
    """
    default_prefix = 'single-label'

    def process(self, data_batch: object, data_samples: Sequence[dict]) -> None:
        """Store the label and the prediction of each sample."""
        self.results.extend([(self._read(sample, index, 'gt_label'), self._predicted(sample, index))
                             for index, sample in enumerate(data_samples, len(self.results))])

    def compute_metrics(self, results: list[tuple[int, int]]) -> dict[str, float]:
        """Compute the metrics by name from the samples of all processes."""
        if not results:
            raise DataError('MacroF1 got no samples; check that the evaluated data set is not empty.')
        true, predicted = np.array(results).T
        hits, positives, predictions = (np.bincount(classes, minlength=np.max(results) + 1)
                                        for classes in (true[true == predicted], true, predicted))
        seen = positives + predictions
        return {'f1-score': float(100 * (2 * hits[seen > 0] / seen[seen > 0]).mean()),
                'top1': float(100 * hits.sum() / len(results))}

    def _predicted(self, sample: dict, index: int) -> int:
        scores = sample.get('pred_score')
        if scores is None:
            return self._read(sample, index, 'pred_label')
        scores = torch.as_tensor(scores)
        if scores.isnan().any():
            raise NonFiniteError(f'{self._name(sample, index)}: pred_score is nan. {NON_FINITE}')
        return self._read(sample, index, 'pred_label') if 'pred_label' in sample else int(scores.argmax())

    def _read(self, sample: dict, index: int, key: str) -> int:
        """The one class of a field."""
        if key not in sample:
            raise DataError(f'{self._name(sample, index)} has no {key}. Evaluate a single-label head, such as '
                            'LinearClsHead, on an annotated data set.')
        value = torch.as_tensor(sample[key]).reshape(-1)
        if len(value) != 1:
            raise DataError(f'{self._name(sample, index)}: {key} {value.tolist()} is not one class. Use '
                            'mmasl.MultiLabelMetric for samples with several labels.')
        return int(value)

    @staticmethod
    def _name(sample: dict, index: int) -> str:
        return f'sample {sample.get("img_path", index)}'
