"""Train configs at several learning rates, an equal budget each, and write one row a run.

Rows go to a CSV file (benchmarks/digits_lr.csv by default) that the digits' configs take their learning rates from.
"""
import argparse
import csv
from pathlib import Path

from mmasl.runs import Run, train, write_rows

FIGURES = ('multi-label/mAP', 'multi-label/CF1', 'multi-label/OF1', 'multi-label/gap', 'coco/bbox_mAP')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('configs', nargs='+', help='config files with a OneCycleLR')
    parser.add_argument('--lr', type=float, nargs='+', required=True, help='maximal learning rates')
    parser.add_argument('--work-dir', default='work_dirs/search_lr', help='folder of the runs; finished ones are kept')
    parser.add_argument('--out', default='benchmarks/digits_lr.csv', help='CSV file; rows of these runs are replaced')
    parser.add_argument('--jobs', type=int, help='runs side by side (default: one per core)')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    runs = {(Path(config).stem, lr): Run(config, f'{args.work_dir}/{Path(config).stem}_{lr:g}',
                                         {'param_scheduler.eta_max': lr})
            for config in args.configs for lr in args.lr}
    train(list(runs.values()), args.jobs)

    out = Path(args.out)
    rows = {}
    if out.exists():
        rows = {(row['config'], float(row['lr'])): row for row in csv.DictReader(out.open())}
    for (config, lr), run in runs.items():
        *_, before, last = [None, *run.evaluations()]
        rows[config, lr] = dict(
            config=config, lr=f'{lr:g}', epochs=last['step'],
            **{key.split('/')[1]: f'{last[key]:.4g}' if key in last else '' for key in FIGURES},
            # How much the last evaluation still gained: whether the run had converged.
            last_gain=f'{last[FIGURES[0]] - before[FIGURES[0]]:.2g}' if before and FIGURES[0] in last else '')
    write_rows(out, [rows[key] for key in sorted(rows)])
    print(out.read_text())


if __name__ == '__main__':
    main()
