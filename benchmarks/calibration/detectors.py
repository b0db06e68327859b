"""Measure the scores of detectors before and after calibration: on locations, and on detections.

Detectors of the digits are trained if their work dirs hold no finished training; their backbone needs
work_dirs/resnet_ce_glyphs, which `make demo` trains. The rows are of the validation set; those in the file are kept.

- location: each class of each location, against the label that the assigner of the head gives it in training. Ignored
  locations are left out. Candidates are those with p above score_thr of the config.
- detection: boxes after non-maximum suppression, against whether they match a box of their class by IoU 0.5. A box is
  matched once, by the highest score. F1 is over all boxes of all classes.
"""
import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import METRICS, MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import Tensor

from mmasl.apis.model_files import load_checkpoint, use_calibrated_head
from mmasl.evaluation.functional import expected_calibration_error
from mmasl.models.calibrated_dense_head import CalibratedDenseHead
from mmasl.reproduce.runs import Run, read_rows, train, write_rows
from mmasl.utils.checkpoint import load_weights, safe_checkpoint_loading
from mmasl.utils.markdown import fill_blocks, markdown_table
from mmasl.utils.tools import drop_pretrained, exit_on_user_error, progress

ROOT = Path(__file__).parents[2]
ROWS, PAGE = Path(__file__).with_suffix('.csv'), ROOT / 'docs' / 'analysis.md'
LOSS = 'model.bbox_head.loss_cls.'
SETTINGS = {  # the first one's best thresholds are carried to the others
    'FCOS, focal loss': Run('configs/digits/fcos_focal_digits.py', 'work_dirs/fcos_focal_digits'),
    'FCOS, ASL (1, 2)': Run('configs/digits/fcos_asl_digits.py', 'work_dirs/fcos_asl_digits'),
    'FCOS, ASL (0, 4)': Run('configs/digits/fcos_asl_digits.py', 'work_dirs/fcos_asl_digits_0_4',
                            {f'{LOSS}gamma_pos': 0., f'{LOSS}gamma_neg': 4.}),
}
SCORES = ('p', 'posterior')
KINDS = ('detection', 'without factor')  # with and without centerness
IOU = 0.5
FIXED = (0.3, 0.5)  # thresholds for F1


def measure(run: Run, carried: dict[tuple[str, str], float]) -> list[dict[str, Any]]:
    """Rows of a trained detector: of each score, its locations, and its detections of each kind.

    Args:
        run: The finished training.
        carried: Thresholds of another detector by score and kind; empty for its own best ones.
    """
    cfg = Config.fromfile(run.config)
    cfg.merge_from_dict(run.options)
    init_default_scope(cfg.default_scope)
    use_calibrated_head(cfg)
    drop_pretrained(cfg)
    model = MODELS.build(cfg.model).eval()
    load_weights(model, load_checkpoint(run.last_checkpoint()), run.last_checkpoint())
    head, test_cfg = model.bbox_head, cfg.model.test_cfg
    thresholds = {'p': test_cfg.score_thr}
    thresholds['posterior'] = head.calibrate(torch.tensor([test_cfg.score_thr]).logit()).sigmoid().item()

    def detect(score: str, outputs: tuple, infos: list[dict]) -> list[InstanceData]:
        predict = head.predict_by_feat if score == 'posterior' else super(CalibratedDenseHead, head).predict_by_feat
        return predict(*outputs, batch_img_metas=infos, rescale=True,
                       cfg=type(test_cfg)(test_cfg, score_thr=thresholds[score]))

    labelled: list[tuple[Tensor, ...]] = []
    head.loss_cls.register_forward_pre_hook(lambda loss, args: labelled.append(args))
    loader = Runner.build_dataloader(cfg.val_dataloader)
    variants = [(score, kind) for score in SCORES for kind in KINDS]
    metrics = {variant: METRICS.build(cfg.val_evaluator) for variant in variants}
    found: dict[tuple, list[tuple[Tensor, Tensor]]] = {variant: [] for variant in variants}
    positives = 0
    for batch in progress(loader, run.name):
        data = model.data_preprocessor(batch)
        samples = data['data_samples']
        with torch.no_grad():
            features = model.extract_feat(data['inputs'])
            head.loss(features, samples)
            outputs = head(features)
            for variant in variants:
                score, kind = variant
                detections = detect(score, outputs if kind == 'detection' else outputs[:2],
                                    [sample.metainfo for sample in samples])
                found[variant] += [(boxes.scores, match(boxes, sample.gt_instances))
                                   for boxes, sample in zip(detections, samples)]
                metrics[variant].process(None, [dict(sample.metainfo, pred_instances=boxes)
                                                for boxes, sample in zip(detections, samples)])
        positives += sum(len(sample.gt_instances) for sample in samples)

    locations = of_locations(labelled, head, test_cfg.score_thr)
    rows = [dict(score=score, kind='location', **locations[score]) for score in SCORES]
    for (score, kind), metric in metrics.items():
        scores, hits = (torch.cat(values).numpy() for values in zip(*found[score, kind]))
        metric.dataset_meta = loader.dataset.metainfo
        ap = metric.evaluate(len(loader.dataset))['coco/bbox_mAP']
        rows.append(dict(score=score, kind=kind, score_thr=thresholds[score], boxes=positives, AP=100 * ap,
                         **of_detections(scores, hits, positives, carried.get((score, kind)))))
    return rows


def of_locations(labelled: Sequence[tuple[Tensor, ...]], head: CalibratedDenseHead,
                 score_thr: float) -> dict[str, dict[str, float]]:
    """Calibration by score, from the arguments of each call of the loss: logits (N, C), labels (N,), weights (N,)."""
    kept = [(logits[weight[0] > 0], labels[weight[0] > 0]) if weight else (logits, labels)
            for logits, labels, *weight in labelled]
    logits, labels = (torch.cat(values) for values in zip(*kept))
    truth = torch.nn.functional.one_hot(labels, logits.shape[1] + 1)[:, :-1].to(torch.int8).numpy()
    p = logits.sigmoid().numpy()
    candidate = np.where(p > score_thr, truth, -1)
    rows = {}
    for name, scores in (('p', p), ('posterior', head.calibrate(logits).sigmoid().numpy())):
        rows[name] = dict(count=truth.size, positive=truth.mean(), ECE=expected_calibration_error(scores, truth),
                          Brier=np.square(scores - truth).mean(dtype=np.float64), candidates=(candidate >= 0).sum(),
                          candidate_ECE=expected_calibration_error(scores, candidate))
    return rows


def match(boxes: InstanceData, truth: InstanceData) -> Tensor:
    """Whether each predicted box has the highest score of those that match a box of its class."""
    from mmdet.structures.bbox import bbox_overlaps

    overlap = bbox_overlaps(boxes.bboxes, truth.bboxes) * (boxes.labels[:, None] == truth.labels)
    hits = torch.zeros(len(boxes), dtype=torch.bool)
    for place in boxes.scores.argsort(descending=True) if len(truth) else ():
        value, other = overlap[place].max(0)
        if value >= IOU:
            hits[place] = True
            overlap[:, other] = 0
    return hits


def of_detections(scores: np.ndarray, hits: np.ndarray, positives: int,
                  carried: float | None = None) -> dict[str, float]:
    """Calibration and F1 of detections.

    Args:
        scores: (N,).
        hits: Whether they are right, (N,).
        positives: Number of true boxes.
        carried: Threshold of another detector; None for the best one.
    """
    order = np.argsort(-scores, kind='stable')
    values, tp = scores[order], hits[order].cumsum()
    last = np.append(values[1:] != values[:-1], True)
    f1 = 2 * tp[last] / (np.arange(1, len(values) + 1)[last] + positives)
    best = f1.argmax()
    return dict(count=len(scores), positive=hits.mean(),
                ECE=expected_calibration_error(scores[:, None], hits[:, None].astype(np.int8)),
                **{f'F1_{threshold}': f1_at(threshold, values, tp, positives) for threshold in FIXED},
                F1_carried=f1_at(values[last][best] if carried is None else carried, values, tp, positives),
                F1=100 * f1[best], threshold=values[last][best])


def f1_at(threshold: float, values: np.ndarray, tp: np.ndarray, positives: int) -> float:
    """F1 in percent of the detections with at least a score, from descending scores and the sums of their hits."""
    chosen = (values >= threshold).sum()
    return 100 * 2 * (tp[chosen - 1] if chosen else 0) / (chosen + positives)


def fill_page(text: str) -> str:
    """The page with the tables of the rows."""
    rows = read_rows(ROWS)

    def table(kind: str) -> str:
        columns = dict(location=('ECE', 'candidate_ECE', 'Brier'))
        columns |= dict.fromkeys(KINDS, ('AP', 'ECE', *(f'F1_{threshold}' for threshold in FIXED), 'F1_carried', 'F1',
                                         'threshold'))
        names = dict(candidate_ECE='ECE of candidates', AP='AP [%]', F1_carried='F1 at the first best [%]',
                     F1='best F1 [%]', threshold='at',
                     **{f'F1_{threshold}': f'F1 at {threshold} [%]' for threshold in FIXED})
        digits = dict(AP=1, F1=1, F1_carried=1, Brier=5, threshold=2) | {f'F1_{threshold}': 1 for threshold in FIXED}
        return markdown_table(
            ([row['setting'], row['score'], *(f'{float(row[name]):.{digits.get(name, 4)}f}' for name in columns[kind])]
             for row in rows if row['kind'] == kind),
            ['', 'score', *(names.get(name, name) for name in columns[kind])])

    return fill_blocks(text, dict(detectors=table))


@exit_on_user_error()
@safe_checkpoint_loading()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--jobs', type=int, help='simultaneous trainings (default: one per core)')
    args = parser.parse_args(argv)
    train(list(SETTINGS.values()), args.jobs)
    rows: list[dict[str, Any]] = [row for row in read_rows(ROWS) if row['setting'] in SETTINGS]
    done = {row['setting'] for row in rows}
    for name, run in SETTINGS.items():
        if name in done:
            continue
        carried = {(row['score'], row['kind']): float(row['threshold']) for row in rows
                   if row['setting'] == next(iter(SETTINGS)) and row.get('threshold')}
        options = ' '.join(f'{key}={value}' for key, value in run.options.items())
        rows += [dict(setting=name, config=run.config, options=options) | {
            key: f'{value:.6g}' if isinstance(value, (float, np.floating)) else value for key, value in row.items()
        } for row in measure(run, carried)]
        write_rows(ROWS, rows)
    PAGE.write_text(fill_page(PAGE.read_text()))


if __name__ == '__main__':
    main()
