"""Compare the losses on handwritten digits: make the data, train, and show a table, curves and predictions.

Classification with cross-entropy, focal loss and ASL, and FCOS with focal loss and ASL, on a backbone pre-trained on
single glyphs. Everything lands in work_dirs/; what is there already is not done again.
"""
import argparse
import datetime
import os
import platform
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import load_checkpoint

from mmasl.datasets.digits import DigitScenes
from mmasl.reproduce.runs import Run, train
from mmasl.utils.checkpoint import load_only_data

LOSSES = {'bce': 'cross-entropy', 'focal': 'focal loss', 'asl': 'ASL'}
PICTURES = 8


def run_of(config: str) -> Run:
    """The run that `tools/train.py CONFIG` would make, too."""
    return Run(f'configs/digits/{config}.py', f'work_dirs/{config}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--jobs', type=int, help='trainings side by side (default: one per core)')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/demo'),
                        help='folder of the table, the curves and the pictures (default: %(default)s)')
    args = parser.parse_args()
    begin = time.monotonic()

    print('== data')
    DigitScenes(size=32, single=True, labels_per_image=1).write('data/glyphs')
    scenes = threading.Thread(target=DigitScenes().write, args=['data/digits'])
    scenes.start()
    print('== pre-training on single glyphs, while the scenes are drawn')
    train([run_of('resnet_ce_glyphs')])
    scenes.join()
    print('== training')
    classifiers = {loss: run_of(f'resnet_{loss}_digits') for loss in LOSSES}
    detectors = {loss: run_of(f'fcos_{loss}_digits') for loss in ('focal', 'asl')}
    # Four end on two cores at about the same time; the fifth then has both.
    *side_by_side, last = [*classifiers.values(), *detectors.values()]
    train(side_by_side, args.jobs)
    train([last])

    args.out.mkdir(parents=True, exist_ok=True)
    table = render_table(classifiers, detectors)
    (args.out / 'results.md').write_text(f'{table}\n{origin(time.monotonic() - begin)}\n')
    plot_curves(classifiers, detectors, args.out / 'curves.svg')
    plot_predictions(classifiers['asl'], detectors['asl'], args.out / 'predictions.png')
    print(f'\n{table}\nTable, curves and pictures: {args.out}/results.md, curves.svg, predictions.png')


def origin(seconds: float) -> str:
    """Where and when the numbers were made."""
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True).stdout.strip()
    return (f'`make demo` at commit {commit}, {datetime.date.today()}: {os.cpu_count()} cores {platform.machine()}, '
            f'torch {torch.__version__}, {seconds / 60:.1f} minutes.')


def render_table(classifiers: dict[str, Run], detectors: dict[str, Run]) -> str:
    """Last evaluation of every run, as Markdown."""
    lines = ['| loss | learning rate | mAP | CF1 | OF1 | probability gap | FCOS learning rate | FCOS AP |',
             '|---|---|---|---|---|---|---|---|']
    for loss, name in LOSSES.items():
        last = classifiers[loss].evaluations()[-1]
        cells = [name, learning_rate(classifiers[loss])]
        cells += [f'{last[f"multi-label/{key}"]:.1f}' for key in ('mAP', 'CF1', 'OF1')]
        cells += [f'{last["multi-label/gap"]:+.2f}']
        if loss in detectors:
            cells += [learning_rate(detectors[loss]), f'{100 * detectors[loss].evaluations()[-1]["coco/bbox_mAP"]:.1f}']
        else:
            cells += ['', '']
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def learning_rate(run: Run) -> str:
    return f'{Config.fromfile(run.config).param_scheduler.eta_max:g}'


def plot_curves(classifiers: dict[str, Run], detectors: dict[str, Run], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout='constrained')
    panels = ((axes[0], classifiers, 'multi-label/mAP', 'mAP [%]'),
              (axes[1], classifiers, 'multi-label/gap', 'probability gap (Eq. 10)'),
              (axes[2], detectors, 'coco/bbox_mAP', 'FCOS box AP'))
    for axis, runs, key, title in panels:
        for loss, run in runs.items():
            rows = run.evaluations()
            axis.plot([row['step'] for row in rows], [row[key] for row in rows], marker='o',
                      color=f'C{list(LOSSES).index(loss)}', label=LOSSES[loss])
        axis.set(title=title, xlabel='epoch')
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)


@torch.no_grad()
def predict(run: Run) -> tuple[list[np.ndarray], list, tuple[str, ...]]:
    """Images and predictions for the first samples of the test set."""
    cfg = Config.fromfile(run.config)
    init_default_scope(cfg.default_scope)
    if 'data_preprocessor' in cfg:  # as MMEngine's Runner does
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    dataset, model = DATASETS.build(cfg.test_dataloader.dataset), MODELS.build(cfg.model)
    load_only_data()  # MMEngine's own loading would try, complain, and execute
    load_checkpoint(model, run.last_checkpoint(), map_location='cpu')
    batch = pseudo_collate([dataset[number] for number in range(PICTURES)])
    images = [image.flip(0).permute(1, 2, 0).numpy() for image in batch['inputs']]
    return images, model.eval().test_step(batch), dataset.metainfo['classes']


def plot_predictions(classifier: Run, detector: Run, path: Path) -> None:
    figure, axes = plt.subplots(2, PICTURES, figsize=(2.1 * PICTURES, 5.6), layout='constrained')
    figure.suptitle('ASL: labels with p > 0.5 (top), boxes with a score > 0.3 (bottom).  '
                    'Green: right, red: wrong, grey: missed')
    images, samples, classes = predict(classifier)
    for axis, image, sample in zip(axes[0], images, samples):
        axis.imshow(image)
        truth = set(sample.gt_label.tolist())
        found = [(p, k) for k, p in enumerate(sample.pred_score.tolist()) if p > 0.5]
        notes = [(f'{classes[k]} {p:.2f}', 'green' if k in truth else 'red') for p, k in sorted(found, reverse=True)]
        notes += [(classes[k], 'grey') for k in sorted(truth - {k for _, k in found})]
        for line, (text, color) in enumerate(notes):
            axis.text(0.5, -0.08 - 0.13 * line, text, color=color, ha='center', va='top', transform=axis.transAxes)
    images, samples, classes = predict(detector)
    for axis, image, sample in zip(axes[1], images, samples):
        axis.imshow(image)
        for box in sample.gt_instances.bboxes.tolist():
            draw_box(axis, box, 'grey', '', linestyle=':')
        kept = sample.pred_instances[sample.pred_instances.scores > 0.3]
        truth = set(sample.gt_instances.labels.tolist())
        for box, label, score in zip(kept.bboxes.tolist(), kept.labels.tolist(), kept.scores.tolist()):
            draw_box(axis, box, 'lime' if label in truth else 'red', f'{classes[label]} {score:.2f}')
    for axis in axes.flat:
        axis.axis('off')
    figure.savefig(path, dpi=110)


def draw_box(axis: Axes, box: list[float], color: str, text: str, **style: Any) -> None:
    left, top, right, bottom = box
    axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=color, **style))
    axis.text(left, top - 1, text, color=color, fontsize=7)


if __name__ == '__main__':
    main()
