"""Compare settings of the loss on photographs: linear heads on frozen features of EfficientNet-Lite0.

Features of images of 128 px are computed once and cached. The harder digits of docs/reproduce.md are there to compare
with their trainings; their features are those of the backbone that these start from. Each setting is searched by
cross-validation on the training images alone, by the same rule. Ten heads are then trained on 80 % of the training
images each, and evaluated on all test images. A repetition draws the same images, removed labels and initial weights
for every setting, so differences are paired. Finished rows are kept. render.py writes the tables of docs/choosing.md
and the picture.
"""
import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from mmasl.analysis.gradient import Setting  # noqa: E402
from mmasl.analysis.probe import extract_features, fit_heads, score, search  # noqa: E402
from mmasl.reproduce.experiments import ALPHAS, GAMMAS, MARGINS  # noqa: E402
from mmasl.reproduce.runs import read_rows, write_rows  # noqa: E402
from mmasl.utils.tools import check_data, exit_on_user_error, progress, set_dataloader_defaults  # noqa: E402

ROWS, PICTURE, DOC = Path(__file__).with_name('frozen.csv'), Path(__file__).with_name('frozen.png'), (
    ROOT / 'docs' / 'choosing.md')
SIZE = 128  # pixels
REPETITIONS = 10
SHARE = 0.8  # of the training images in a repetition
GROUPS = ('frequent', 'middle', 'rare')


class Source(NamedTuple):
    """Images and labels: a config of this repository, and folds and epochs of the search."""
    config: str
    folds: int = 3
    epochs: int = 20


SOURCES = {'voc': Source('photos/efficientnet-lite0_bce_voc.py'),
           'corel5k': Source('photos/efficientnet-lite0_bce_corel5k.py', 2, 10),  # 19 times as many classes
           'digits_hard': Source('digits/resnet_bce_digits_paper.py')}


class Data(NamedTuple):
    """A data set of the study: name in SOURCES, title, and share of the training labels to remove."""
    source: str
    title: str
    missing: float = 0.


DATA = {
    'voc': Data('voc', 'VOC 2007'),
    'voc-30': Data('voc', 'VOC 2007, 30 % of labels removed', 0.3),
    'voc-60': Data('voc', 'VOC 2007, 60 % of labels removed', 0.6), 'corel5k': Data('corel5k', 'Corel-5k'),
    'digits_hard': Data('digits_hard', 'harder digits')}
CE, FOCAL, ASL = Setting(0, 0, 0), Setting(2, 2, 0), Setting(0, 4, 0.05)
# The most telling first: CE, focal loss, ASL and its parts; more of the author's ladder; then Table 2 and Fig. 5 to 7.
SETTINGS = tuple(dict.fromkeys((
    CE, FOCAL, ASL, Setting(0, 0, 0.05), Setting(0, 2, 0), Setting(1, 4, 0),
    Setting(1, 2, 0), Setting(0, 4, 0), Setting(0, 1, 0), Setting(0, 3, 0), Setting(1, 4, 0.05), Setting(0, 2, 0.05),
    Setting(0, 7, 0.05), Setting(2, 2, 0.3), Setting(2, 2, 0, alpha=0.75),
    *(Setting(gamma, gamma, 0) for gamma in GAMMAS), *(Setting(gamma, 4, 0) for gamma in range(5)),
    *(Setting(gamma, gamma, margin) for gamma in (0, 2, 4) for margin in MARGINS),
    *(Setting(2, 2, 0, alpha=alpha) for alpha in ALPHAS))))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', nargs='+', choices=DATA, default=list(DATA), help='data sets (default: all)')
    parser.add_argument('--voc', default='data/VOCdevkit/VOC2007', help='folder of VOC (default: %(default)s)')
    parser.add_argument('--corel5k', default='data/corel5k', help='folder of Corel-5k (default: %(default)s)')
    parser.add_argument('--digits-hard', default='data/digits_hard',
                        help='folder of the harder digits, see configs/digits/resnet_bce_digits_hard.py (default: '
                        '%(default)s)')
    parser.add_argument('--detach', choices=('no', 'yes', 'both'), default='both',
                        help='constant focusing weights, or the gradient of Eq. 8, or both (default: %(default)s)')
    parser.add_argument('--settings', type=int, help='run the first N settings only')
    parser.add_argument('--cache', type=Path, default=Path('work_dirs/photos'), help='folder of the features')
    return parser.parse_args(argv)


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    forms = {'no': (False, ), 'yes': (True, ), 'both': (False, True)}[args.detach]
    for name in args.data:
        settings = [replace(one, detach_focusing=detach) for detach in forms for one in SETTINGS[:args.settings]
                    if not detach or one.gamma_pos or one.gamma_neg]
        run(name, settings, load_features(args, DATA[name].source))


# --- features

def load_features(args: argparse.Namespace, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Features and labels of the 'train' and 'test' images of a data set; computed at the first call."""
    cfg, loaders = load_config(name, getattr(args, name))
    return {split: compute(cfg, loader, args.cache / f'{name}_{split}.pt') for split, loader in loaders.items()}


def load_config(name: str, data_root: str) -> tuple[Config, dict[str, dict]]:
    """The config of a data set, and its loaders of the 'train' and 'test' images, without augmentation.

    VOC's test images are those of val, because the copies of the official test set are incomplete.
    """
    cfg = Config.fromfile(ROOT / 'configs' / SOURCES[name].config)
    loaders = dict(train=cfg.train_dataloader, test=cfg.val_dataloader)
    for loader, split in zip(loaders.values(), ('train', 'val')):
        loader.dataset.data_root = data_root
        loader.dataset.pipeline = cfg.val_dataloader.dataset.pipeline  # no augmentation
        if name != 'digits_hard':
            loader.dataset.pipeline[1].scale = SIZE
        loader.update(num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False))
        if name == 'voc':
            loader.dataset.split = split
    check_data(cfg, 'train', 'val')
    set_dataloader_defaults(cfg, 'train', 'val')
    return cfg, loaders


def build(cfg: Config, loader_cfg: dict) -> tuple[Any, Any]:
    """The pre-trained classifier and the loader."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(dict(cfg.model, data_preprocessor=dict(
            type='ClsDataPreprocessor', **cfg.data_preprocessor)))
        model.init_weights()
        return model.to(memory_format=torch.channels_last), Runner.build_dataloader(loader_cfg)


def compute(cfg: Config, loader_cfg: dict, path: Path) -> tuple[Tensor, Tensor]:
    """Features (N, D) and labels (N, C) of the images of a loader, cached in a file."""
    if not path.exists():
        model, loader = build(cfg, loader_cfg)
        found = zip(*extract_features(model, progress(loader, path.stem), cfg.model.head.num_classes))
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(tuple(map(torch.cat, found)), path)
    return torch.load(path)


# --- trainings

def run(name: str, settings: Sequence[Setting], features: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Train the settings that have no rows yet, and write their rows."""
    rows = read_rows(ROWS)
    done = {key(row) for row in rows}
    for setting in progress([one for one in settings if key(describe(name, one)) not in done], DATA[name].title):
        rows += measure(name, setting, features)
        write_rows(ROWS, rows)


def describe(name: str, setting: Setting) -> dict[str, str]:
    """The columns that identify a setting on a data set."""
    return dict(data=name, gamma_pos=f'{setting.gamma_pos:g}', gamma_neg=f'{setting.gamma_neg:g}',
                clip=f'{setting.clip:g}', alpha='' if setting.alpha is None else f'{setting.alpha:g}',
                gradient='constant weight' if setting.detach_focusing else 'Eq. 8')


def key(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in ('data', 'gamma_pos', 'gamma_neg', 'clip', 'alpha', 'gradient'))


def remove_labels(labels: Tensor, share: float, seed: int) -> Tensor:
    """Set a random share of the positive labels to 0."""
    removed = torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed)) < share
    return labels.masked_fill(removed & (labels == 1), 0)


def measure(name: str, setting: Setting, features: dict[str, tuple[Tensor, Tensor]]) -> Iterator[dict[str, Any]]:
    """The rows of a setting: its search, then one row for each repetition."""
    (x, y), (x_test, y_test) = features['train'], features['test']
    share = DATA[name].missing
    # The search sees the labels that training sees, as a user has them.
    _, folds, epochs = SOURCES[DATA[name].source]
    trial, found = search(x, remove_labels(y, share, seed=100), setting, folds=folds, epochs=epochs, seed=100)
    count = int(SHARE * len(x))
    rows = torch.stack([torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count]
                        for seed in range(REPETITIONS)])
    labels = torch.stack([remove_labels(y, share, seed) for seed in range(REPETITIONS)])
    weights, biases = fit_heads(x, labels, rows, setting, [trial], epochs=epochs)
    scores = score(torch.baddbmm(biases[0], x_test.expand(REPETITIONS, *x_test.shape), weights[0]), y_test, setting)
    # A third of the classes each, by their training images.
    order = (y == 1).sum(0).argsort(descending=True, stable=True)
    groups = dict(zip(GROUPS, (part.numpy() for part in order.tensor_split(3))))
    for place in range(REPETITIONS):
        figures = dict(
            mAP=scores.map[place],
            **{group: np.nanmean(scores.ap[place, classes]) for group, classes in groups.items()},
            CF1=scores.cf1[place], OF1=scores.of1[place], CF1_calibrated=scores.cf1_calibrated[place],
            OF1_calibrated=scores.of1_calibrated[place])
        yield describe(name, setting) | dict(
            repetition=place, lr=f'{trial.lr:g}', weight_decay=f'{trial.weight_decay:g}',
            search_mAP=f'{found.map.mean():.4g}', **{column: f'{value:.4g}' for column, value in figures.items()})


if __name__ == '__main__':
    main()
