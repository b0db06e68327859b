"""benchmarks/learning_rates/search_lr.py: one row a run, beside the rows that are there."""
import json
from pathlib import Path

import pytest

from benchmarks.learning_rates import search_lr
from mmasl.reproduce.runs import read_rows

ROOT = Path(__file__).parents[2]
CONFIG = 'configs/digits/resnet_asl_digits_paper.py'



@pytest.fixture
def search(tmp_path, monkeypatch):
    """Calls the tool; a training's mAP is 1000 times its learning rate, 0.5 above the evaluation before."""
    monkeypatch.chdir(ROOT)
    started = []

    def train(runs, jobs):
        for run in runs:
            started.append(run)
            folder = Path(run.work_dir) / '20260101_000000' / 'vis_data'
            folder.mkdir(parents=True, exist_ok=True)
            score = 1000 * run.options['param_scheduler.eta_max']
            folder.joinpath('scalars.json').write_text('\n'.join(json.dumps(
                {'step': step, 'multi-label/mAP': score - 0.5 * (step == 7)}) for step in (7, 8)))
            run.finish()
            if score == 13:
                raise SystemExit('terminated')

    def call(*flags):
        search_lr.main([CONFIG, *flags, '--work-dir', str(tmp_path / 'work'), '--out', str(tmp_path / 'lr.csv')])
        return read_rows(tmp_path / 'lr.csv'), started

    monkeypatch.setattr(search_lr, 'train', train)
    return call


def test_a_row_a_run(search):
    rows, _ = search('--lr', '0.02', '0.005')
    names = ('config', 'options', 'lr', 'mAP', 'last_gain', 'epochs')
    assert [tuple(row[name] for name in names) for row in rows] == [
        ('resnet_asl_digits_paper', '', '0.005', '5', '0.5', '8'),
        ('resnet_asl_digits_paper', '', '0.02', '20', '0.5', '8')]


def test_overrides_have_rows_and_work_dirs_of_their_own(search):
    search('--lr', '0.02')
    rows, runs = search('--lr', '0.02', '--cfg-options', 'train_dataloader.dataset.data_root=data/digits')
    assert [row['options'] for row in rows] == ['', 'train_dataloader.dataset.data_root=data/digits']
    assert runs[1].options == {'train_dataloader.dataset.data_root': 'data/digits', 'param_scheduler.eta_max': 0.02}
    assert runs[0].work_dir != runs[1].work_dir


def test_rows_without_a_column_of_overrides_are_kept(search, tmp_path):
    (tmp_path / 'lr.csv').write_text('\n'.join([
        'config,lr,epochs,mAP,CF1,OF1,gap,bbox_mAP,last_gain,commit,date,torch,device',
        *(f'resnet_asl_digits_paper,{lr},8,{score},1,1,1,,1,abc,,,' for lr, score in ((0.01, 80), (0.02, 81)))]))
    rows, _ = search('--lr', '0.02')
    assert [(row['lr'], row['mAP'], row['options']) for row in rows] == [('0.01', '80', ''), ('0.02', '20', '')]
    assert rows[0]['commit'] == 'abc' and rows[1]['commit'] != 'abc'


def test_a_config_that_is_not_there(search):
    with pytest.raises(SystemExit, match='configs/nowhere.py'):
        search_lr.main(['configs/nowhere.py', '--lr', '0.01'])


def test_an_interrupted_search_leaves_its_rows(search, tmp_path):
    with pytest.raises(SystemExit, match='terminated'):
        search('--lr', '0.012', '0.013', '0.014')
    assert [row['lr'] for row in read_rows(tmp_path / 'lr.csv')] == ['0.012', '0.013']


@pytest.mark.parametrize('config, key', [
    ('resnet_asl_digits', 'param_scheduler.eta_max'), ('tresnet-l_paper_asl_coco', 'param_scheduler.0.eta_max'),
    ('tresnet-l_official_asl_coco', 'param_scheduler.0.eta_max')])
def test_the_rate_of_a_config(config, key):
    assert search_lr.one_cycle(str(next(ROOT.glob(f'configs/**/{config}.py')))) == key


def test_a_config_without_one_cycle():
    with pytest.raises(SystemExit, match='fcos_asl_coco.py has no OneCycleLR in param_scheduler'):
        search_lr.one_cycle(str(ROOT / 'configs' / 'fcos_asl_coco.py'))
