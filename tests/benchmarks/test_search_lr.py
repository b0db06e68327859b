"""benchmarks/learning_rates/search_lr.py: one row per run, beside the rows of the file."""
import json
from pathlib import Path

import pytest

from benchmarks.learning_rates import search_lr
from mmasl.reproduce.runs import read_rows

ROOT = Path(__file__).parents[2]
CONFIG = 'configs/digits/resnet_asl_digits_paper.py'


def test_search(tmp_path, monkeypatch):
    """Two overrides, interrupted once. The mAP of a training is 1000 times its learning rate."""
    monkeypatch.chdir(ROOT)

    def train(runs, jobs):
        for run in runs:
            score = 1000 * run.options['param_scheduler.eta_max']
            folder = Path(run.work_dir) / '20260101_000000' / 'vis_data'
            folder.mkdir(parents=True)
            folder.joinpath('scalars.json').write_text('\n'.join(json.dumps(
                {'step': step, 'multi-label/mAP': score - 0.5 * (step == 7)}) for step in (7, 8)))
            run.finish()
            if score == 13:
                raise SystemExit('terminated')

    def search(*flags):
        search_lr.main([CONFIG, *flags, '--work-dir', str(tmp_path / 'work'), '--out', str(tmp_path / 'lr.csv')])

    monkeypatch.setattr(search_lr, 'train', train)
    search('--lr', '0.02', '0.005')
    with pytest.raises(SystemExit, match='terminated'):
        search('--lr', '0.012', '0.013', '0.014', '--cfg-options', 'train_dataloader.dataset.data_root=data/digits')
    rows = read_rows(tmp_path / 'lr.csv')
    assert [tuple(row[name] for name in ('options', 'lr', 'mAP', 'last_gain', 'epochs')) for row in rows] == [
        ('', '0.005', '5', '0.5', '8'), ('', '0.02', '20', '0.5', '8'),
        ('train_dataloader.dataset.data_root=data/digits', '0.012', '12', '0.5', '8'),
        ('train_dataloader.dataset.data_root=data/digits', '0.013', '13', '0.5', '8')]
    assert {row['config'] for row in rows} == {'resnet_asl_digits_paper'}
