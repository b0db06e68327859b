"""Measure the usual weights by class on data with a long tail: classifiers on frozen features, with one hidden layer.

Corel-5k has features of the pre-trained EfficientNet-Lite0, as in benchmarks/photos/frozen.py. The long-tailed digits
have those of the demo's classifier, which was trained on other, balanced digits by cross-entropy. The hidden layer is
shared by the classes: without one, AdamW divides `class_weight` out. Each loss and weight is searched by
cross-validation on the training images, with the same trials. Five classifiers are then trained on 80 % of the training
images each, and evaluated on all test images. Thresholds are tuned on the predictions for the 20 % that a classifier
has not seen. A repetition draws the same images and initial weights for every setting, so differences are paired.
Finished rows are kept.
"""
import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.guarantees.guarantees import tune_f1  # noqa: E402
from benchmarks.photos import frozen  # noqa: E402
from mmasl import ops  # noqa: E402
from mmasl.analysis.probe import BATCH_SIZE, TRIALS, Trial  # noqa: E402
from mmasl.evaluation.functional import average_precision, count_outcomes, precision_recall_f1  # noqa: E402
from mmasl.models.losses.asymmetric_loss import AsymmetricLoss  # noqa: E402
from mmasl.reproduce.runs import read_rows, write_rows  # noqa: E402
from mmasl.utils.markdown import fill_blocks, markdown_table  # noqa: E402
from mmasl.utils.statistics import interval  # noqa: E402
from mmasl.utils.tools import check_data, exit_on_user_error, progress, set_dataloader_defaults  # noqa: E402

ROWS, PAGE = Path(__file__).with_suffix('.csv'), ROOT / 'docs' / 'loss.md'
DIGITS = ROOT / 'configs' / 'digits' / 'resnet_bce_digits.py'
HIDDEN, EPOCHS, FOLDS, SEARCH_FOLDS = 128, 10, 5, 2
LOSSES = {'cross-entropy': dict(gamma_neg=0., clip=0.), 'ASL': dict(gamma_neg=4., clip=0.05)}
# Arguments of the loss, from the positives and negatives of each class.
WEIGHTS: dict[str, Callable[[Tensor, Tensor], dict[str, Tensor]]] = {
    'none': lambda pos, neg: {},
    'inverse frequency': lambda pos, neg: dict(class_weight=ops.inverse_frequency_weights(pos)),
    'effective number, beta 0.999': lambda pos, neg: dict(class_weight=ops.effective_number_weights(pos)),
    'negatives / positives': lambda pos, neg: dict(pos_weight=ops.positive_weights(pos, neg)),
    'its square root, at most 10': lambda pos, neg: dict(
        pos_weight=ops.positive_weights(pos, neg, temperature=2, cap=10))}
FIGURES = ('mAP', *frozen.GROUPS, 'CF1', 'CF1_calibrated', 'CF1_tuned')
COMPARED = ('mAP', 'rare', 'CF1_tuned')  # with their differences to the loss without weights
Features = dict[str, tuple[Tensor, Tensor]]


def fit(x: Tensor, y: Tensor, settings: dict[str, Any], trial: Trial, *, seed: int, epochs: int = EPOCHS) -> nn.Module:
    """Train a classifier with one hidden layer by AdamW and the one-cycle policy."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(x.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, y.shape[1]))
    nn.init.normal_(model[2].weight, std=0.01)
    nn.init.zeros_(model[2].bias)
    optimizer = torch.optim.AdamW(model.parameters(), trial.lr, weight_decay=trial.weight_decay, fused=True)
    size = min(BATCH_SIZE, len(x))
    steps = len(x) // size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, trial.lr, epochs * steps, cycle_momentum=False)
    loss = AsymmetricLoss(**settings, reduction='sum')
    with ops.use_implementation('eager'):
        for _ in range(epochs):
            for batch in torch.randperm(len(x))[:steps * size].split(size):
                optimizer.zero_grad()
                (loss(model(x[batch]), y[batch].float()) / size).backward()
                optimizer.step()
                schedule.step()
    return model.requires_grad_(False)


def search(x: Tensor, y: Tensor, settings: dict[str, Any], epochs: int = EPOCHS) -> tuple[Trial, float]:
    """The trial with the best mean mAP of the folds, and that mAP."""
    folds = torch.randperm(len(x), generator=torch.Generator().manual_seed(100)) % SEARCH_FOLDS
    found = {}
    for trial in TRIALS:
        models = [(fit(x[folds != fold], y[folds != fold], settings, trial, seed=fold, epochs=epochs), folds == fold)
                  for fold in range(SEARCH_FOLDS)]
        found[trial] = np.mean([100 * np.nanmean(average_precision(model(x[rows]).numpy(), y[rows].numpy()))
                                for model, rows in models])
    best = max(found, key=lambda trial: found[trial])
    return best, float(found[best])


def measure(data: str, loss: str, weights: str, features: Features, epochs: int = EPOCHS) -> Iterator[dict[str, Any]]:
    """The rows of a loss with weights: its search, then one row for each classifier."""
    (x, y), (x_test, y_test) = features['train'], features['test']
    positives = y.sum(0, dtype=torch.int64)
    settings = LOSSES[loss] | WEIGHTS[weights](positives, len(y) - positives)
    trial, searched = search(x, y, settings, epochs)
    folds = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)) % FOLDS
    unseen, test = torch.empty(y.shape), []  # logits
    for fold in range(FOLDS):
        model = fit(x[folds != fold], y[folds != fold], settings, trial, seed=fold, epochs=epochs)
        unseen[folds == fold] = model(x[folds == fold])
        test.append(model(x_test).numpy())
    settings.pop('class_weight', None)  # no part of the posterior
    calibrated = ops.posterior_threshold(0.5, **settings)
    thresholds = dict(CF1=0., CF1_calibrated=calibrated.numpy(), CF1_tuned=tune_f1(unseen.numpy(), y.numpy()))
    groups = dict(zip(frozen.GROUPS, (part.numpy() for part in positives.argsort(
        descending=True, stable=True).tensor_split(3))))  # a third of the classes each
    for repetition, logits in enumerate(test):
        ap = 100 * average_precision(logits, y_test.numpy())
        figures = dict(mAP=np.nanmean(ap), **{group: np.nanmean(ap[classes]) for group, classes in groups.items()}, **{
            name: precision_recall_f1(*count_outcomes(logits >= threshold, y_test.numpy()))['CF1']
            for name, threshold in thresholds.items()})
        yield dict(data=data, loss=loss, weights=weights, repetition=repetition, lr=f'{trial.lr:g}',
                   weight_decay=f'{trial.weight_decay:g}', search_mAP=f'{searched:.4g}',
                   **{name: f'{value:.4g}' for name, value in figures.items()})


# --- data

def load_features(args: argparse.Namespace, name: str) -> Features:
    """Features and labels of the 'train' and 'test' images; computed at the first call."""
    if name == 'corel5k':
        return frozen.load_features(args, name)
    cfg = Config.fromfile(DIGITS)
    cfg.model.backbone.init_cfg.checkpoint = args.checkpoint
    loaders = dict(train=cfg.train_dataloader, test=cfg.val_dataloader)
    for loader in loaders.values():
        loader.dataset.data_root = args.digits
        loader.dataset.pipeline = cfg.val_dataloader.dataset.pipeline  # no augmentation
        loader.sampler.shuffle = False
    check_data(cfg, 'train', 'val')
    set_dataloader_defaults(cfg, 'train', 'val')
    return {split: frozen.compute(cfg, loader, args.cache / f'digits_{split}.pt') for split, loader in loaders.items()}


# --- tables

def read_columns(data: str) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """Values of each figure, one for each repetition, by loss and weights."""
    found: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in read_rows(ROWS):
        if row['data'] == data:
            found.setdefault((row['loss'], row['weights']), []).append(row)
    return {key: {figure: np.array([float(row[figure]) for row in rows]) for figure in FIGURES}
            for key, rows in found.items()}


def table(data: str) -> str:
    """The figures of each loss with each kind of weights, and their differences to the same loss without weights."""
    columns = read_columns(data)
    lines = []
    for (loss, weights), column in columns.items():
        cells = [loss, weights]
        for figure in FIGURES:
            cells.append(f'{column[figure].mean():.1f}')
            if figure in COMPARED:
                cells.append('' if weights == 'none' else '{:+.1f} ± {:.1f}'.format(
                    *interval(column[figure] - columns[loss, 'none'][figure])))
        lines.append(cells)
    heads = ['loss', 'weights']
    for figure in FIGURES:
        heads += [figure.replace('_', ', '), *['difference'] * (figure in COMPARED)]
    return markdown_table(lines, heads)


def fill_page(text: str) -> str:
    """The page with the tables of the rows."""
    return fill_blocks(text, dict(weights=table))


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', nargs='+', choices=('corel5k', 'digits'), default=['corel5k', 'digits'],
                        help='data sets (default: all)')
    parser.add_argument('--corel5k', default='data/corel5k', help='folder of Corel-5k (default: %(default)s)')
    parser.add_argument('--digits', default='data/digits_tail', help='folder of the digits (default: %(default)s)')
    parser.add_argument('--checkpoint', default='work_dirs/demo/resnet_bce_digits/epoch_4.pth',
                        help='classifier whose features of the digits are used (default: %(default)s)')
    parser.add_argument('--cache', type=Path, default=Path('work_dirs/photos'), help='folder of the features')
    args = parser.parse_args(argv)
    rows = read_rows(ROWS)
    done = {(row['data'], row['loss'], row['weights']) for row in rows}
    for data in args.data:
        features = load_features(args, data)
        left = [(loss, weights) for loss in LOSSES for weights in WEIGHTS if (data, loss, weights) not in done]
        for loss, weights in progress(left, data):
            rows += measure(data, loss, weights, features)
            write_rows(ROWS, rows)
    PAGE.write_text(fill_page(PAGE.read_text()))


if __name__ == '__main__':
    main()
