"""Write metafile.yml, by which OpenMMLab's tools find configs and results: all configs of configs/, by their names.

`make test` says when it is out of date. Results are of two kinds, under names of their own: those of this repository's
result files, and '(published)' ones, which stand in a config for the checkpoint that the official repository released.
"""
import argparse
import ast
import csv
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from mmengine.fileio import dump

ROOT = Path(__file__).parents[1]
LOSSES = {
    'asl': 'ASL', 'asl-softmax': 'ASL, softmax form', 'adaptive': 'ASL with adaptive asymmetry', 'focal': 'focal loss',
    'focal-alpha': 'focal loss with alpha', 'focusing': 'asymmetric focusing', 'margin': 'probability margin',
    'bce': 'binary cross-entropy', 'ce': 'cross-entropy'}
DATA = {  # in a config's name: the data, and the task unless a detector is trained on them
    'coco': ('MS-COCO 2014', 'Multi-Label Classification'), 'voc': ('Pascal VOC 2007', 'Multi-Label Classification'),
    'nus-wide': ('NUS-WIDE', 'Multi-Label Classification'),
    'open-images': ('Open Images V6', 'Multi-Label Classification'),
    'herbarium': ('Herbarium 2020', 'Image Classification'), 'glyphs': ('glyphs', 'Image Classification'),
    'digits_hard': ('digits, long tail and missing labels', 'Multi-Label Classification'),
    'digits': ('digits', 'Multi-Label Classification')}
DETECTORS = ('fcos', 'atss')
DEMO = {'cross-entropy': 'bce', 'focal loss': 'focal', 'ASL': 'asl'}  # rows of benchmarks/demo/results.md
SEEDS = {'fixed 4': 'resnet_asl_digits_hard', 'adaptive, target 0.1 (default)': 'resnet_adaptive_digits_hard'}


def describe(name: str) -> dict[str, str]:
    """Loss, data and task of a config, which its name tells.

    Raises:
        ValueError: It does not.
    """
    parts = name.split('_')
    loss = next((part for part in parts if part in LOSSES), None)
    data = next((key for key in DATA if re.search(rf'_{key}(-[\w-]+?)?(_|$)', name)), None)
    if loss is None or data is None:
        raise ValueError(f'configs/{name}.py: its name must have a loss of {", ".join(LOSSES)}, and data '
                         f'of {", ".join(DATA)}: or extend LOSSES and DATA of benchmarks/model_index.py')
    dataset, task = DATA[data]
    if parts[0] in DETECTORS:
        dataset, task = dataset.replace('MS-COCO 2014', 'COCO 2017'), 'Object Detection'
    return dict(loss=LOSSES[loss], data=dataset, task=task)


def published(path: Path) -> dict[str, float]:
    """What the config states for the checkpoint that was released for it."""
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], 'id', '') == 'released':
            call = statement.value
            if isinstance(call, ast.Call):
                return {f'{word.arg} (published)': ast.literal_eval(word.value) for word in call.keywords
                        if word.arg != 'checkpoint'}
    return {}


def measured() -> dict[str, dict[str, float]]:
    """What this repository's result files have, in percent, by config."""
    found = {}
    rows = [[cell.strip() for cell in line.strip('|').split('|')]
            for line in (ROOT / 'benchmarks/demo/results.md').read_text().splitlines() if line.startswith('|')]
    for cells in rows[2:]:
        row = dict(zip(rows[0], cells))
        found[f'resnet_{DEMO[row["loss"]]}_digits'] = {key: float(row[key]) for key in ('mAP', 'CF1', 'OF1')}
        if row['FCOS AP']:
            found[f'fcos_{DEMO[row["loss"]]}_digits'] = {'box AP': float(row['FCOS AP'])}
    with open(ROOT / 'benchmarks/adaptive/seeds.csv', newline='') as file:
        seeds = list(csv.DictReader(file))
    for method, name in SEEDS.items():
        found[name] = {key: round(float(np.mean([float(row[key]) for row in seeds if row['method'] == method])), 1)
                       for key in ('mAP', 'CF1')}
    return found


def models() -> Iterator[dict[str, object]]:
    """What metafile.yml says of every config.

    Raises:
        ValueError: There are results of a config that does not exist.
    """
    results = measured()
    for path in sorted((ROOT / 'configs').glob('*.py')):
        facts = describe(path.stem)
        model: dict[str, object] = {'Name': path.stem, 'In Collection': 'ASL', 'Config': f'configs/{path.name}',
                 'Metadata': {'Training Data': facts['data'], 'Loss': facts['loss']}}
        metrics = results.pop(path.stem, {}) | published(path)
        if metrics:
            model['Results'] = [{'Task': facts['task'], 'Dataset': facts['data'], 'Metrics': metrics}]
        yield model
    if results:
        raise ValueError(f'there are results of {", ".join(results)}, and no such config')


def render() -> str:
    collection = {
        'Name': 'ASL', 'README': 'README.md',
        'Paper': {'Title': 'Asymmetric Loss For Multi-Label Classification', 'URL': 'https://arxiv.org/abs/2009.14119'}}
    return '# Made by benchmarks/model_index.py.\n' + dump(
        {'Collections': [collection], 'Models': list(models())}, file_format='yaml', sort_keys=False, width=120)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    (ROOT / 'metafile.yml').write_text(render())


if __name__ == '__main__':
    main()
