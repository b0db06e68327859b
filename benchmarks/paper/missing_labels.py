"""Measure how the digits' trainings treat missing labels: their probabilities and their share of the gradient.

Evaluates the finished trainings of tools/reproduce.py --table 2 --missing-labels on their own training images. The
complete annotations tell which negatives are unannotated positives.
"""
import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from mmasl.apis.inferencer import MultiLabelInferencer
from mmasl.datasets.coco import CocoMultiLabel
from mmasl.errors import ConfigError
from mmasl.reproduce.experiments import MISSING_LABELS, digits_of, rows
from mmasl.reproduce.render import best
from mmasl.reproduce.results import Results
from mmasl.reproduce.runs import Run, read_rows, write_rows
from mmasl.utils.tools import exit_on_user_error, progress

COMPLETE = 'data/digits_hard_missing0'
KINDS = ('annotated', 'missing', 'absent')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work-dir', default='work_dirs/paper',
                        help='work dir of tools/reproduce.py (default: %(default)s)')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/paper/results'),
                        help='folder of digits.csv and digits_missing.csv; rows with the present settings are kept '
                        '(default: %(default)s)')
    return parser.parse_args(argv)


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    results = Results(args.out, 'digits')
    path = results.missing_path
    trainings = dict.fromkeys(
        best(row, results) for item in ('Table 2', 'Fig. 4', MISSING_LABELS) for row in rows(item, 'digits'))
    table = {(row['config'], row['options'], row['seed']): row for row in read_rows(path)}
    runs = {(one.config, one.overrides, str(seed)): (one.run('digits', seed, args.work_dir), one.settings)
            for one in trainings for seed in results.seeds(one)}
    wanted = [key for key, (run, now) in runs.items()
              if table.get(key, {}).get('settings') != now and run.state == 'finished']
    if wanted and (scenes := digits_of(COMPLETE)):
        scenes.write(COMPLETE)
    for key in progress(wanted, 'trainings'):
        run, now = runs[key]
        table[key] = dict(zip(('config', 'options', 'seed'), key, strict=True)) | dict(settings=now) | measure(run)
        write_rows(path, [table[one] for one in sorted(table)])
    if not table:
        raise ConfigError(f'No finished trainings in {args.out}. Run tools/reproduce.py --missing-labels first')
    print(path.read_text())


def measure(run: Run) -> dict[str, str]:
    """Mean probability and share of the summed |dL/dz| of annotated, missing and absent labels.

    Args:
        run: A finished run. Its training images are evaluated.

    Returns:
        ``p_<kind>`` and, in percent, ``gradient_<kind>``; '' if there is no label of the kind.
    """
    cfg = Config.fromfile(run.config)
    cfg.merge_from_dict(run.options)
    init_default_scope(cfg.default_scope)
    model = MultiLabelInferencer(cfg, run.last_checkpoint()).model
    train: dict[str, Any] = dict(ann_file='annotations/instances_train.json', data_prefix=dict(img_path='train/'))
    cfg.test_dataloader.dataset.update(train)
    complete = CocoMultiLabel(data_root=COMPLETE, **train)
    truth = {Path(one['img_path']).name: one['gt_label'] for one in map(complete.get_data_info, range(len(complete)))}

    p_sum, gradient, count = torch.zeros(3, 3, dtype=torch.float64)
    for batch in Runner.build_dataloader(cfg.test_dataloader):
        data = model.data_preprocessor(batch)
        with torch.no_grad():
            z = model(**data, mode='tensor')
        z.requires_grad_()
        annotated, true = (torch.zeros(z.shape, dtype=torch.bool) for _ in range(2))
        for i, sample in enumerate(data['data_samples']):
            annotated[i, sample.gt_label] = True
            true[i, truth[Path(sample.img_path).name]] = True
        loss = model.head.loss_module(z, annotated.to(z), reduction_override='none').sum()
        size = torch.autograd.grad(loss, z)[0].abs()
        for kind, where in enumerate((annotated, true & ~annotated, ~true)):
            p_sum[kind] += z[where].sigmoid().sum().item()
            gradient[kind] += size[where].sum().item()
            count[kind] += where.sum().item()
    means, shares = p_sum / count, 100 * gradient / gradient.sum()
    return {f'{name}_{kind}': f'{value:.4g}' if count[place] else ''
            for name, values in (('p', means), ('gradient', shares))
            for place, (kind, value) in enumerate(zip(KINDS, values.tolist(), strict=True))}


if __name__ == '__main__':
    main()
