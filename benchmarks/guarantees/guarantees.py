"""Check promised recall and precision over random splits of predictions, against tuned thresholds.

Each split calibrates thresholds on one half of the images and measures them on the other half. Predictions are those of
a config and a checkpoint on the validation set, of an .npz file with logits (N, C) and labels (N, C), or of linear
heads with ASL on the frozen features of benchmarks/photos/frozen.py.
"""
import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.photos import frozen  # noqa: E402
from mmasl.analysis.guarantees import guarantee_precision, guarantee_recall  # noqa: E402
from mmasl.analysis.probe import fit_heads, search  # noqa: E402
from mmasl.errors import ConfigError  # noqa: E402
from mmasl.reproduce.runs import read_rows, write_rows  # noqa: E402
from mmasl.utils.checkpoint import safe_checkpoint_loading  # noqa: E402
from mmasl.utils.markdown import fill_blocks, markdown_table  # noqa: E402
from mmasl.utils.tools import exit_on_user_error, progress  # noqa: E402

ROWS, PAGE = Path(__file__).with_suffix('.csv'), ROOT / 'docs' / 'evaluation.md'
PROMISES = [('recall', 0.9), ('recall', 0.95), ('precision', 0.8), ('precision', 0.9)]
FROZEN = [name for name, data in frozen.DATA.items() if not data.missing]
Data = tuple[np.ndarray, np.ndarray]


def tune(kind: str, level: float, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Threshold of each class that reaches ``level`` on the calibration half: the highest for recall, the lowest for
    precision, NaN if none does."""
    found = np.full(labels.shape[1], np.nan)
    for c, (s, y) in enumerate(zip(scores.T, labels.T)):
        candidates = np.sort(s[y == 1])
        tp = candidates.size - np.arange(candidates.size)
        if kind == 'recall':
            safe = candidates[tp >= level * candidates.size]
            found[c] = safe.max() if safe.size else np.nan
        else:
            known = np.sort(s[y >= 0])
            safe = candidates[tp >= level * (known.size - known.searchsorted(candidates))]
            found[c] = safe.min() if safe.size else np.nan
    return found


def tune_f1(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Threshold of each class with the highest F1 on the calibration half."""
    found = np.full(labels.shape[1], np.nan)
    for c, (s, y) in enumerate(zip(scores.T, labels.T)):
        candidates, known = np.sort(s[y == 1]), np.sort(s[y >= 0])
        if candidates.size:
            tp = candidates.size - np.arange(candidates.size)
            f1 = 2 * tp / (known.size - known.searchsorted(candidates) + candidates.size)
            found[c] = candidates[f1.argmax()]
    return found


def methods(kind: str, level: float) -> dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]:
    """Functions from scores and labels of the calibration half to thresholds, by name."""
    promise = guarantee_recall if kind == 'recall' else guarantee_precision

    def promised(scores: np.ndarray, labels: np.ndarray, by_class: bool) -> np.ndarray:
        return promise(scores, labels, level, by_class=by_class).thresholds

    return {'promised by class': partial(promised, by_class=True), 'tuned by class': partial(tune, kind, level),
            'best F1 by class': tune_f1, 'promised by image': partial(promised, by_class=False)}


def measure(data: Data, kind: str, level: float, splits: int) -> list[dict]:
    """Rows of all methods, as means over the splits."""
    scores, labels = data
    rows = []
    for name, calibrate in methods(kind, level).items():
        rng = np.random.default_rng(0)
        figures = []
        for _ in progress(range(splits), f'{kind} {level}, {name}'):
            first, second = np.array_split(rng.permutation(len(labels)), 2)
            thresholds = calibrate(scores[first], labels[first])
            figures.append((by_image if 'image' in name else by_class)(thresholds, scores[second], labels[second]))
        rows.append(dict(kind=kind, level=level, method=name) | summarize(np.array(figures), kind, level))
    return rows


def by_class(thresholds: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Recall and precision of each class, (2, C), on the other half; NaN without a threshold, or where undefined."""
    chosen = (scores >= thresholds) & (labels >= 0)  # none where the threshold is NaN
    tp = (chosen & (labels == 1)).sum(0)
    with np.errstate(invalid='ignore'):
        return np.where(np.isnan(thresholds), np.nan, [tp / (labels == 1).sum(0), tp / chosen.sum(0)])


def by_image(thresholds: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean recall of the images with positives, and mean precision of those with predictions, (2, 1)."""
    chosen, positive = (scores >= thresholds) & (labels >= 0), labels == 1
    tp = (chosen & positive).sum(1)
    with np.errstate(invalid='ignore'):
        figures = np.array([[np.nanmean(tp / positive.sum(1))], [np.nanmean(tp / chosen.sum(1))]])
    return np.where(np.isnan(thresholds).any(), np.nan, figures)


def summarize(figures: np.ndarray, kind: str, level: float) -> dict[str, str]:
    """Means over splits and classes.

    Args:
        figures: Recall and precision (splits, 2, classes), NaN without a threshold.
        kind, level: The promise.

    Returns:
        ``share``: thresholds that were found; ``recall`` and ``precision``: means of those; ``lowest``: the mean over
        splits of the promised figure in the worst class that has one in every split; ``below``: share of splits and
        classes whose figure on the other half is below ``level``. All in percent.
    """
    promised = figures[:, 0 if kind == 'recall' else 1]
    known = ~np.isnan(promised)
    always = known.all(0)
    values = dict(share=(~np.isnan(figures).all(1)).mean(), recall=_mean(figures[:, 0]), precision=_mean(figures[:, 1]),
                  lowest=promised[:, always].mean(0).min() if always.any() else np.nan,
                  below=(promised[known] < level).mean() if known.any() else np.nan)
    return {name: '' if np.isnan(value) else f'{100 * value:.2f}' for name, value in values.items()}


def _mean(values: np.ndarray) -> float:
    return np.nanmean(values) if not np.isnan(values).all() else np.nan


def render(rows: Sequence[dict]) -> str:
    """The table of one data set."""
    return markdown_table(
        ([f"{row['kind']} {float(row['level']):.0%}", row['method'],
          *(row[name] or '-' for name in ('share', 'recall', 'precision', 'lowest', 'below'))] for row in rows),
        ['asked', 'thresholds', 'found [%]', 'recall [%]', 'precision [%]', 'worst class [%]', 'below it [%]'])


def fill_page(text: str) -> str:
    """The page with the tables of the rows."""
    rows = read_rows(ROWS)
    return fill_blocks(text, {'guarantees': lambda data: render([row for row in rows if row['data'] == data])})


def predict_frozen(name: str, features: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Data:
    """Logits and labels of the test images, by a linear head with ASL and searched learning rate on frozen features."""
    (x, y), (x_test, y_test) = features['train'], features['test']
    _, folds, epochs = frozen.SOURCES[name]
    trial, _ = search(x, y, frozen.ASL, folds=folds, epochs=epochs)
    weights, biases = fit_heads(x, y, torch.arange(len(x))[None], frozen.ASL, [trial], epochs=epochs)
    return torch.addmm(biases[0, 0], x_test, weights[0, 0]).numpy(), y_test.numpy()


def load(args: argparse.Namespace) -> Data:
    if args.config.endswith('.npz'):
        content = np.load(args.config)
        logits, labels = content['logits'], content['labels']
    elif args.config in FROZEN:
        logits, labels = predict_frozen(args.config, frozen.load_features(frozen.parse_args([]), args.config))
    else:
        from tools import calibrate
        flags = calibrate.parse_args(calibrate.build_parser(), [args.config, args.checkpoint or '', '--work-dir',
                                                               'work_dirs/guarantees'])
        found = calibrate.predict(calibrate.configure(flags), flags)
        logits, labels = found.logits.numpy(), found.labels.numpy()
    return 1 / (1 + np.exp(-logits.astype(np.float64))), labels


@exit_on_user_error()
@safe_checkpoint_loading()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help=f'config, .npz file, or frozen features: {", ".join(FROZEN)}')
    parser.add_argument('checkpoint', nargs='?', help='checkpoint of a config')
    parser.add_argument('--name', required=True, help='name of the data in the rows')
    parser.add_argument('--splits', type=int, default=1000, help='number of random splits (default: 1000)')
    args = parser.parse_args(argv)
    if args.splits < 1:
        raise ConfigError(f'--splits {args.splits}: give 1 or more')
    data = load(args)
    common = dict(data=args.name, splits=args.splits, images=len(data[1]), classes=data[1].shape[1])
    rows = [common | row for kind, level in PROMISES for row in measure(data, kind, level, args.splits)]
    write_rows(ROWS, [*(row for row in read_rows(ROWS) if row['data'] != args.name), *rows])
    PAGE.write_text(fill_page(PAGE.read_text()))
    print(render(rows))


if __name__ == '__main__':
    main()
