"""Compare cross-entropy, focal loss and ASL on handwritten digits.

Writes the data, trains three classifiers, and shows their table and a picture of predictions. Then prepares detection
(mmcv's ops are compiled once), trains two FCOS detectors, and adds them to the table, the curves and the picture.
Everything goes to data/ and work_dirs/. Finished trainings are not repeated; interrupted ones are resumed.
"""
import argparse
import datetime
import importlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

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
from PIL import Image
from torchvision.ops import box_iou

from mmasl.datasets.digits import GLYPHS, DigitScenes
from mmasl.errors import MMASLError
from mmasl.reproduce.runs import Run, duration, train
from mmasl.utils.checkpoint import read_checkpoint
from mmasl.utils.markdown import markdown_table
from mmasl.utils.tools import exit_on_user_error

EPOCHS = 4  # of the classifiers: half of their configs', for a first table within minutes
# Faster on CPUs. They change the rounding only, which a training amplifies.
FAST: dict[str, object] = {
    'default_hooks.channels_last.type': 'mmasl.ChannelsLastHook', 'optim_wrapper.optimizer.fused': True}
LOSSES = {'bce': 'cross-entropy', 'focal': 'focal loss', 'asl': 'ASL'}
IMAGES = 6  # in the picture of predictions
LABEL_SCORE, BOX_SCORE, IOU = 0.5, 0.3, 0.5  # thresholds of a shown label, of a shown box, and of a correct box


def digits_run(config: str) -> Run:
    """The run of ``tools/train.py configs/digits/CONFIG.py``."""
    return Run(f'configs/digits/{config}.py', f'work_dirs/{config}', placement=FAST)


def classifier_run(loss: str) -> Run:
    """A shorter run, in a folder of its own, of ``configs/digits/resnet_LOSS_digits.py``."""
    name = f'resnet_{loss}_digits'
    return Run(f'configs/digits/{name}.py', f'work_dirs/demo/{name}', {'train_cfg.max_epochs': EPOCHS}, FAST)


@exit_on_user_error()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Three trainings on a thread each end sooner than two and one on all threads: the models are small.
    parser.add_argument('--jobs', type=int, default=3, help='simultaneous trainings (default: %(default)s)')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/demo'),
                        help='folder of the table, the curves and the picture (default: %(default)s)')
    parser.add_argument('--picture', type=Path, metavar='FILE',
                        help='train only the two models with ASL, and write their picture of predictions to FILE')
    args = parser.parse_args()
    begin = time.monotonic()
    print('Cross-entropy, focal loss and ASL on handwritten digits: first three classifiers, then two detectors, after '
          'a\none-time preparation. On 2 idle cores the first table takes 5 to 8 minutes, all trainings 10 to 13. An '
          'interrupted\ndemo goes on where it stopped.', flush=True)

    print('== data and pre-training on single digits', flush=True)
    GLYPHS.write('data/glyphs')
    DigitScenes().write('data/digits')
    glyphs = digits_run('resnet_ce_glyphs')
    # A single training leaves a core to a process that loads its images. It keeps the default memory format, since the
    # one pre-training with the channels last led to lower mAP.
    glyphs.placement = {'train_dataloader.num_workers': 1, 'train_cfg.val_interval': 3}
    train([glyphs], args.jobs)
    classifiers = {loss: classifier_run(loss) for loss in LOSSES}
    detectors = {loss: digits_run(f'fcos_{loss}_digits') for loss in ('focal', 'asl')}
    shown = ['asl'] if args.picture else list(LOSSES)
    print('== classifiers', flush=True)
    train([classifiers[loss] for loss in shown], args.jobs)
    if not args.picture:
        write_results(classifiers, {}, args.out, begin)

    print('\n== detectors', flush=True)
    prepare_detection()
    train([run for loss, run in detectors.items() if loss in shown], args.jobs)
    if args.picture:
        plot_predictions(classifiers['asl'], detectors['asl'], args.picture)
    else:
        write_results(classifiers, detectors, args.out, begin)


def prepare_detection() -> None:
    """Install MMDetection and mmcv's compiled ops, unless they are there."""
    if subprocess.run([sys.executable, '-c', 'import mmcv.ops, mmdet'], capture_output=True).returncode:
        setup = Path(__file__).with_name('setup_env.sh')
        if subprocess.run([setup], env={**os.environ, 'PYTHON': sys.executable, 'VENV': sys.prefix}).returncode:
            raise MMASLError(f'{setup.name} failed: see the lines above. The results of the classifiers remain')
        importlib.invalidate_caches()  # the picture needs the new packages in this process


def write_results(classifiers: dict[str, Run], detectors: dict[str, Run], out: Path, begin: float) -> None:
    """Write and print the table, and draw the curves and predictions. ``detectors`` may be empty."""
    out.mkdir(parents=True, exist_ok=True)
    table = render_table(classifiers, detectors)
    (out / 'results.md').write_text(f'{table}\n\n{origin(time.monotonic() - begin)}\n')
    plot_curves(classifiers, detectors, out / 'curves.svg')
    plot_predictions(classifiers['asl'], detectors.get('asl'), out / 'predictions.png')
    print(f'\n{table}\n\nafter {duration(time.monotonic() - begin)}. Table, curves and predictions: {out}/results.md, '
          'curves.svg, predictions.png', flush=True)


def origin(seconds: float) -> str:
    """Commit, date, machine and duration of the demo."""
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True).stdout.strip()
    return (f'`make demo` at commit {commit}, {datetime.date.today()}: {os.cpu_count()} cores {platform.machine()}, '
            f'torch {torch.__version__}, {seconds / 60:.1f} minutes.')


def render_table(classifiers: dict[str, Run], detectors: dict[str, Run]) -> str:
    """The last evaluation of every run as Markdown. Both arguments are runs by loss."""
    rows = []
    for loss, name in LOSSES.items():
        last = classifiers[loss].evaluations()[-1]
        cells = [name, learning_rate(classifiers[loss])]
        cells += [f'{last[f"multi-label/{key}"]:.1f}' for key in ('mAP', 'CF1', 'OF1')]
        cells += [f'{last["multi-label/gap"]:+.2f}']
        if loss in detectors:
            cells += [learning_rate(detectors[loss]), f'{100 * detectors[loss].evaluations()[-1]["coco/bbox_mAP"]:.1f}']
        elif detectors:
            cells += ['', '']
        rows.append(cells)
    columns = ['loss', 'learning rate', 'mAP', 'CF1', 'OF1', 'probability gap', 'FCOS learning rate', 'FCOS AP']
    return markdown_table(rows, columns[:len(rows[0])])


def learning_rate(run: Run) -> str:
    """The maximal learning rate of a run."""
    return f'{Config.fromfile(run.config).param_scheduler.eta_max:g}'


def plot_curves(classifiers: dict[str, Run], detectors: dict[str, Run], path: Path) -> None:
    """Plot every evaluation of the runs, which are given by loss."""
    panels = [(classifiers, 'multi-label/mAP', 'mAP [%]'), (classifiers, 'multi-label/gap', 'probability gap (Eq. 10)'),
              (detectors, 'coco/bbox_mAP', 'FCOS box AP')][:3 if detectors else 2]
    figure, axes = plt.subplots(1, len(panels), figsize=(13 / 3 * len(panels), 4), layout='constrained')
    for axis, (runs, key, title) in zip(axes, panels):
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
    """Predict the first test images.

    Returns:
        Images, (H, W, 3) in RGB; data samples with predictions; class names.
    """
    cfg = Config.fromfile(run.config)
    init_default_scope(cfg.default_scope)
    if 'data_preprocessor' in cfg:  # as MMEngine's Runner does
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    dataset, model = DATASETS.build(cfg.test_dataloader.dataset), MODELS.build(cfg.model)
    model.load_state_dict(read_checkpoint(run.last_checkpoint())['state_dict'])
    batch = pseudo_collate([dataset[number] for number in range(IMAGES)])
    images = [image.flip(0).permute(1, 2, 0).numpy() for image in batch['inputs']]
    return images, model.eval().test_step(batch), dataset.metainfo['classes']


def plot_predictions(classifier: Run, detector: Run | None, path: Path) -> None:
    """Draw the predictions of a classifier, and of a detector if there is one, for the first test images."""
    rows = 1 if detector is None else 2
    figure, axes = plt.subplots(rows, IMAGES, figsize=(1.6 * IMAGES, 2.3 * rows), layout='constrained', squeeze=False,
                                gridspec_kw=dict(hspace=0.02))
    what = 'Labels' if detector is None else f'Bottom: boxes with a score > {BOX_SCORE}. Top: labels'
    figure.suptitle(f'{what} with p > {LABEL_SCORE}. Green: correct, red: wrong, grey: missed.', fontsize=9)
    images, samples, classes = predict(classifier)
    for axis, image, sample in zip(axes[0], images, samples):
        axis.imshow(image)
        truth = set(sample.gt_label.tolist())
        found = [(p, k) for k, p in enumerate(sample.pred_score.tolist()) if p > LABEL_SCORE]
        notes = [(f'{classes[k]} {p:.2f}', 'green' if k in truth else 'red') for p, k in sorted(found, reverse=True)]
        notes += [(classes[k], 'grey') for k in sorted(truth - {k for _, k in found})]
        for line, (text, color) in enumerate(notes):
            axis.text(0.5, -0.04 - 0.11 * line, text, color=color, fontsize=8, ha='center', va='top',
                      transform=axis.transAxes)
    if detector is not None:
        draw_boxes(axes[1], *predict(detector))
    for axis in axes.flat:
        axis.axis('off')
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches='tight', pad_inches=0.05)  # the lists of labels differ in length
    plt.close(figure)
    with Image.open(path) as picture:  # 256 colours take a third of the space
        picture.convert('RGB').quantize(256).save(path, optimize=True)


def draw_boxes(axes: Sequence[Axes], images: Sequence[np.ndarray], samples: Sequence, classes: Sequence[str]) -> None:
    """Draw images with their predicted and missed boxes."""
    for axis, image, sample in zip(axes, images, samples):
        axis.imshow(image)
        truth, kept = sample.gt_instances, sample.pred_instances[sample.pred_instances.scores > BOX_SCORE]
        hits = (box_iou(kept.bboxes, torch.as_tensor(truth.bboxes)) > IOU) & (kept.labels[:, None] == truth.labels)
        for box in torch.as_tensor(truth.bboxes)[~hits.any(0)].tolist():
            draw_box(axis, box, 'grey', 'missed')
        for box, label, score, hit in zip(*(values.tolist() for values in (
                kept.bboxes, kept.labels, kept.scores, hits.any(1)))):
            draw_box(axis, box, 'green' if hit else 'red', f'{classes[label]} {score:.2f}')


def draw_box(axis: Axes, box: list[float], color: str, text: str) -> None:
    """Draw a box, given as left, top, right and bottom in pixels, with a text above it."""
    left, top, right, bottom = box
    axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=color, linewidth=1.5))
    axis.text(left, top, text, color='white', fontsize=6, clip_on=True, va='bottom' if top > 6 else 'top',
              bbox=dict(facecolor=color, edgecolor='none', pad=0.8))


if __name__ == '__main__':
    main()
