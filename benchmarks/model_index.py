"""Write metafile.yml and the tables of configs/**/README.md.

metafile.yml lists the classifiers, which MMPretrain's ModelHub builds by name. The README of each folder of configs
lists its configs, the paper's number, ours, and the command. The paper's numbers come from
mmasl/reproduce/tables.json, those of the released checkpoints from the configs, and ours from the rows below
benchmarks/. tests/test_packaging.py fails while a file is out of date.
"""
import argparse
import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from mmengine.fileio import dump

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from mmasl.reproduce.experiments import COLUMNS, Training, items, rows  # noqa: E402
from mmasl.reproduce.runs import read_rows  # noqa: E402
from mmasl.utils.markdown import fill_blocks, markdown_table  # noqa: E402
from mmasl.utils.statistics import interval  # noqa: E402

LOSSES = {
    'asl': 'ASL', 'asl-softmax': 'ASL, softmax form', 'adaptive': 'ASL with adaptive asymmetry', 'focal': 'focal loss',
    'focal-alpha': 'focal loss with alpha', 'focusing': 'asymmetric focusing', 'margin': 'probability margin',
    'bce': 'binary cross-entropy', 'ce': 'cross-entropy'}
DATA = {  # by the part of a config's name: data set and task
    'coco': ('MS-COCO 2014', 'Multi-Label Classification'), 'voc': ('Pascal VOC 2007', 'Multi-Label Classification'),
    'corel5k': ('Corel-5k', 'Multi-Label Classification'),
    'nus-wide': ('NUS-WIDE', 'Multi-Label Classification'),
    'open-images': ('Open Images V6', 'Multi-Label Classification'),
    'herbarium': ('Herbarium 2020', 'Image Classification'), 'glyphs': ('glyphs', 'Image Classification'),
    'digits_hard': ('digits, long tail and missing labels', 'Multi-Label Classification'),
    'digits_paper': ('digits, long tail and missing labels', 'Multi-Label Classification'),
    'digits': ('digits', 'Multi-Label Classification')}
DETECTORS = ('fcos', 'atss')
SEEDS = {'fixed 4': 'resnet_asl_digits_hard', 'adaptive, target 0.1 (default)': 'resnet_adaptive_digits_hard'}


def config_files() -> list[Path]:
    """All configs, without the parts in configs/_base_/."""
    return sorted(path for path in (ROOT / 'configs').rglob('*.py') if '_base_' not in path.parts)


def describe(name: str) -> dict[str, str]:
    """Loss, data and task that a config's name states.

    Raises:
        ValueError: The name has no known loss or data.
    """
    loss = next((part for part in name.split('_') if part in LOSSES), None)
    data = next((key for key in DATA if re.search(rf'_{key}(-[\w-]+?)?(_|$)', name)), None)
    if loss is None or data is None:
        raise ValueError(f'{name}.py: the name has no loss of {", ".join(LOSSES)} or no data of {", ".join(DATA)}. '
                         'Rename the config, or extend LOSSES or DATA in benchmarks/model_index.py')
    dataset, task = DATA[data]
    return dict(loss=LOSSES[loss], data=dataset, task=task)


def is_detector(path: Path) -> bool:
    return path.stem.split('_')[0] in DETECTORS


def released(path: Path) -> dict[str, object]:
    """What the config states of the checkpoint that the official repository released for it."""
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], 'id', '') == 'released':
            call = statement.value
            if isinstance(call, ast.Call):
                return {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
    return {}


def printed() -> dict[str, str]:
    """The paper's number for each config that has one without further options, and the place of the number."""
    found: dict[str, str] = {}
    for item in items('real'):
        for row in rows(item, 'real') if item.startswith('Table') or item == 'Fig. 8' else ():
            if len(row.trainings) != 1 or row.trainings[0] != Training(row.trainings[0].config):
                continue
            for entry in row.entries:
                if entry.unit == '%' and entry.value is not None:
                    figure = 'macro F1' if COLUMNS.get(entry.column) == 'f1-score' else 'mAP'
                    found.setdefault(row.trainings[0].config, f'{entry.value:.1f} {figure} ({item})')
    return found


def measured() -> dict[str, dict[str, list[float]]]:
    """Our scores in percent by config and metric, one for each seed.

    Raises:
        ValueError: There are scores of a config that does not exist.
    """
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read_rows(ROOT / 'benchmarks/adaptive/seeds.csv'):
        for key in ('mAP', 'CF1') if row['method'] in SEEDS else ():
            found[SEEDS[row['method']]][key].append(float(row[key]))
    for data in ('real', 'digits'):
        for row in read_rows(ROOT / f'benchmarks/paper/{data}.csv'):
            for key, name in {'mAP': 'mAP', 'CF1': 'CF1', 'bbox_mAP': 'box AP'}.items():
                if not row['options'] and row.get(key):
                    found[row['config']][name].append(float(row[key]))
    if lost := set(found) - {path.stem for path in config_files()}:
        raise ValueError(f'configs/ has no {", ".join(sorted(lost))}, of which there are scores: rename or delete them')
    return found


def metafile() -> str:
    """Content of metafile.yml."""
    scores = measured()
    models: list[dict[str, object]] = []
    for path in config_files():
        if is_detector(path):
            continue
        facts = describe(path.stem)
        model: dict[str, object] = {
            'Name': path.stem, 'In Collection': 'ASL', 'Config': path.relative_to(ROOT).as_posix(),
            'Metadata': {'Training Data': facts['data'], 'Loss': facts['loss']}}
        metrics = {name: round(float(interval(values)[0]), 1) for name, values in scores.get(path.stem, {}).items()}
        metrics |= {f'{name} (published)': value for name, value in released(path).items() if name != 'checkpoint'}
        if metrics:
            model['Results'] = [{'Task': facts['task'], 'Dataset': facts['data'], 'Metrics': metrics}]
        models.append(model)
    collection = {
        'Name': 'ASL', 'README': 'configs/README.md',
        'Paper': {'Title': 'Asymmetric Loss For Multi-Label Classification', 'URL': 'https://arxiv.org/abs/2009.14119'}}
    return '# Written by benchmarks/model_index.py.\n' + dump(
        {'Collections': [collection], 'Models': models}, file_format='yaml', sort_keys=False, width=120)


def table(folder: str) -> str:
    """Table of the configs in a folder: the paper's numbers, those of released checkpoints, ours, and the commands."""
    numbers, scores = printed(), measured()

    def cells(path: Path) -> Iterator[str]:
        name, file = path.stem, released(path)
        yield f'[{name}]({path.name})'
        yield numbers.get(name, '')
        yield f'[{file["mAP"]} mAP]({file["checkpoint"]})' if file else ''
        yield ', '.join(f'{_mean(values)} {metric}' for metric, values in scores.get(name, {}).items())
        yield f'`python tools/train.py {path.relative_to(ROOT)}`'

    found = list(map(list, map(cells, sorted((ROOT / folder).glob('*.py')))))
    heads = ('config', "paper's number", 'released checkpoint', 'ours', 'command')
    kept = [number for number in range(len(heads)) if any(row[number] for row in found)]
    return markdown_table([[row[number] for number in kept] for row in found], [heads[number] for number in kept])


def _mean(values: list[float]) -> str:
    mean, half = interval(values)
    return f'{mean:.1f}' + (f' ± {half:.1f}' if len(values) > 1 else '')


def files() -> dict[Path, str]:
    """Path and current content of everything that this script writes."""
    readmes = sorted({path.with_name('README.md') for path in config_files()})
    return {ROOT / 'metafile.yml': metafile()} | {
        path: fill_blocks(path.read_text(), dict(configs=table)) for path in readmes}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for path, content in files().items():
        path.write_text(content)


if __name__ == '__main__':
    main()
