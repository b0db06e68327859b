"""Count co-occurring labels in the training annotations of a config, for mmasl.LabelGraphHead. No image is loaded."""
import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import DictAction
from mmengine.registry import DATASETS, DefaultScope

from mmasl.analysis.label_statistics import LabelStatistics, count_labels, read_labels
from mmasl.errors import ConfigError, DataError
from mmasl.utils.tools import (
    building_data,
    check_data,
    exit_on_user_error,
    load_config,
    parse_args,
    progress,
    require_file,
)

EDGES = 10  # strongest edges to print
MISSING = 10  # words without a vector to list


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file with a multi-label training set')
    parser.add_argument('--out', type=Path, metavar='FILE.npz',
                        help='output file (default: model.head.graph of the config)')
    parser.add_argument('--glove', metavar='FILE.txt',
                        help='word vectors in the text format of GloVe; the mean vector of the words of each class '
                        'name is written too')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', default={},
                        help='override settings of the config, as in train_dataloader.dataset.data_root=PATH')
    parser.set_defaults(work_dir=None, amp=False, launcher='none', local_rank=0)
    return parser


def count_pairs(dataset: Any, stats: LabelStatistics) -> np.ndarray:
    """Count the images with each pair of labels, int64 (C, C). The diagonal counts the images with one label."""
    pairs = np.zeros((len(stats.classes), len(stats.classes)), np.int64)
    for index in progress(range(len(dataset)), 'pairs'):
        labels = sorted(set(read_labels(dataset.get_data_info(index))[1]))
        pairs[np.ix_(labels, labels)] += 1
    return pairs


def embed_classes(path: str, classes: tuple[str, ...]) -> np.ndarray:
    """Average the vectors of the words of each class name, in lower case, float32 (C, d)."""
    words = [re.findall('[a-z0-9]+', name.lower()) for name in classes]
    wanted, found = {word for name in words for word in name}, {}
    with open(path, encoding='utf-8') as file:
        for number, line in enumerate(progress(file, 'words'), 1):
            word, _, numbers = line.partition(' ')
            if word in wanted:
                try:
                    found[word] = np.array(numbers.split(), np.float32)
                except ValueError as error:
                    raise DataError(f'--glove {path}, line {number}: {error}. Each line must hold a word and its '
                                    'numbers.') from None
    missing = sorted(wanted - set(found))
    if missing or not all(words):
        unnamed = [name for name, parts in zip(classes, words) if not parts]
        what = f'{len(missing)} words of class names: {", ".join(missing[:MISSING])}' if missing else \
            f'classes without a word: {unnamed}'
        raise DataError(f'--glove {path} has no vector for {what}. Add lines for them, or set label_embeddings of '
                        'LabelGraphHead to another file.')
    sizes = {len(vector) for vector in found.values()}
    if len(sizes) > 1:
        raise DataError(f'--glove {path} has vectors of {sorted(sizes)} numbers; all must have the same length.')
    return np.stack([np.mean([found[word] for word in name], 0) for name in words])


def describe(pairs: np.ndarray, stats: LabelStatistics) -> str:
    """Describe the graph by its strongest conditional probabilities."""
    shared = pairs - np.diag(pairs.diagonal())
    probability = shared / pairs.diagonal().clip(1)[:, None]
    order = np.argsort(-probability, axis=None, kind='stable')[:EDGES]
    lines = [(f'{stats.images:,} images, {len(stats.classes)} classes, {(shared > 0).sum() // 2:,} co-occurring '
              'pairs; the strongest:')]
    for i, j in zip(*np.unravel_index(order, pairs.shape)):
        if shared[i, j]:
            lines.append(f'  P({stats.classes[j]} | {stats.classes[i]}) = {probability[i, j]:.2f}   '
                         f'{shared[i, j]:,} of {pairs[i, i]:,} images')
    return '\n'.join(lines)


@exit_on_user_error()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(build_parser(), argv)
    cfg = load_config(args)
    named = (cfg.get('model', {}).get('head') or {}).get('graph')
    out = args.out or (Path(named) if named else None)
    if out is None:
        raise ConfigError(f'{args.config} has no model.head.graph; name the output with --out FILE.npz.')
    if out.suffix != '.npz':
        raise ConfigError(f'{out} does not end in .npz; name an .npz file.')
    if not cfg.get('train_dataloader'):
        raise ConfigError(f'{args.config} has no train_dataloader.')
    if args.glove:
        require_file(args.glove, 'file of word vectors', '; GloVe is at https://nlp.stanford.edu/projects/glove')
    check_data(cfg, 'train')
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmpretrain')), building_data(cfg):
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
    stats = count_labels(dataset, progress)
    pairs = count_pairs(dataset, stats)
    if pairs.sum() == pairs.trace():
        raise DataError(f'None of the {stats.images:,} training images of {args.config} has two labels. Give a config '
                        'of a multi-label classifier.')
    arrays: dict[str, Any] = dict(classes=np.array(stats.classes), cooccurrence=pairs)
    if args.glove:
        arrays['embeddings'] = embed_classes(args.glove, stats.classes)
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out, **arrays)
    print(f'{describe(pairs, stats)}\n{out}: {", ".join(arrays)}')


if __name__ == '__main__':
    main()
