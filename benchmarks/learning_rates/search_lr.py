"""Train configs at several learning rates, and write one row per run.

The learning rates of the digits' configs are the best of these rows.
"""
import argparse
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config, DictAction

from mmasl.errors import ConfigError
from mmasl.reproduce.experiments import Training
from mmasl.reproduce.runs import Run, read_rows, train, write_rows
from mmasl.utils.tools import exit_on_user_error, require_file

FIGURES = ('multi-label/mAP', 'multi-label/CF1', 'multi-label/OF1', 'multi-label/gap', 'coco/bbox_mAP')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('configs', nargs='+', help='config files with a OneCycleLR')
    parser.add_argument('--lr', type=float, nargs='+', required=True, help='maximal learning rates')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', default={},
                        help='override settings of all configs; rows with other overrides are kept')
    parser.add_argument('--work-dir', default='work_dirs/search_lr',
                        help='folder of the runs; finished runs are not repeated')
    parser.add_argument('--out', type=Path, default=Path('benchmarks/learning_rates/digits.csv'),
                        help='CSV file; rows of these runs are replaced')
    parser.add_argument('--jobs', type=int,
                        help='simultaneous runs (default: as many as the GPUs allow; without a GPU, one per core)')
    return parser.parse_args(argv)


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    runs = {}
    for config in args.configs:
        require_file(config, 'config')
        training = Training(Path(config).stem, tuple(args.cfg_options.items()))
        for lr in args.lr:
            runs[training.config, training.overrides, lr] = Run(
                config, f'{args.work_dir}/{training.name}_{lr:g}', {**args.cfg_options, one_cycle(config): lr})
    try:
        train(list(runs.values()), args.jobs)
    finally:  # an interrupted search keeps the rows of finished runs
        update_rows({key: run for key, run in runs.items() if run.state == 'finished'}, args.out)
    print(args.out.read_text())


def one_cycle(config: str) -> str:
    """The key of a config's maximal learning rate.

    Raises:
        ConfigError: The config has no OneCycleLR.
    """
    schedulers = Config.fromfile(config).get('param_scheduler')
    several = isinstance(schedulers, list)
    for place, scheduler in enumerate(schedulers if several else [schedulers or {}]):
        if scheduler.get('type') == 'OneCycleLR':
            return f'param_scheduler.{place}.eta_max' if several else 'param_scheduler.eta_max'
    raise ConfigError(f'{config} has no OneCycleLR in param_scheduler. Only its eta_max can be searched')


def update_rows(runs: dict[tuple[str, str, float], Run], out: Path) -> None:
    """Write the last evaluation of finished runs. They replace the rows with the same key in the file.

    Args:
        runs: Finished runs by config, overrides and learning rate.
        out: CSV file.
    """
    if not runs:
        return
    rows: dict[tuple[str, str, float], dict] = {
        (row['config'], row.get('options', ''), float(row['lr'])): row for row in read_rows(out)}
    for (config, options, lr), run in runs.items():
        *_, before, last = [None, *run.evaluations()]
        assert last
        rows[config, options, lr] = dict(
            config=config, options=options, lr=f'{lr:g}', epochs=last['step'],
            **{key.split('/')[1]: f'{last[key]:.4g}' if key in last else '' for key in FIGURES},
            # The gain of the last evaluation tells whether the run had converged.
            last_gain=f'{last[FIGURES[0]] - before[FIGURES[0]]:.2g}' if before and FIGURES[0] in last else '')
    first = ('config', 'options', 'lr')
    write_rows(out, [{**dict.fromkeys(first, ''), **rows[key]} for key in sorted(rows)])


if __name__ == '__main__':
    main()
