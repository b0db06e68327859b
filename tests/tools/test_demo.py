"""The demo's table, curves and picture, from files as its runs write them."""
import json
import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from mmasl.datasets.digits import DigitScenes
from mmasl.reproduce.runs import Run
from tools import demo

ROOT = Path(__file__).parents[2]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two evaluations of every run."""
    monkeypatch.chdir(ROOT)

    def write(config, **figures):
        folder = tmp_path / config / '20260101_000000' / 'vis_data'
        folder.mkdir(parents=True)
        rows = [dict({key: value * epoch / 2 for key, value in figures.items()}, step=epoch) for epoch in (1, 2)]
        (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, rows)))
        return Run(f'configs/digits/{config}.py', str(tmp_path / config))

    keys = ('multi-label/mAP', 'multi-label/CF1', 'multi-label/OF1', 'multi-label/gap')
    return ({loss: write(f'resnet_{loss}_digits', **dict(zip(keys, (90.06, 80., 81., -0.2))))
             for loss in ('bce', 'focal', 'asl')},
            {loss: write(f'fcos_{loss}_digits', **{'coco/bbox_mAP': 0.613}) for loss in ('focal', 'asl')})


def test_table_and_curves(runs, tmp_path):
    lines = demo.render_table(*runs).splitlines()
    lr, det_lr = demo.learning_rate(runs[0]['asl']), demo.learning_rate(runs[1]['asl'])
    assert lines[-1] == f'| ASL | {lr} | 90.1 | 80.0 | 81.0 | -0.20 | {det_lr} | 61.3 |'
    assert re.match(r'\| cross-entropy \| .* \|  \|  \|$', lines[2]) and len(lines) == 5
    demo.plot_curves(*runs, tmp_path / 'curves.svg')
    assert (tmp_path / 'curves.svg').read_text().count('<g id="axes_') == 3


def test_predictions(tmp_path, monkeypatch):
    """Untrained models on real digits, built as Runner builds them."""
    monkeypatch.chdir(ROOT)
    DigitScenes(train=1, val=demo.IMAGES).write(tmp_path / 'digits')
    runs = []
    for name in ('resnet_asl_digits', 'fcos_asl_digits'):
        cfg = Config.fromfile(f'configs/digits/{name}.py')
        cfg.model.backbone.init_cfg = None
        cfg.test_dataloader.dataset.data_root = str(tmp_path / 'digits')
        cfg.dump(tmp_path / f'{name}.py')
        init_default_scope(cfg.default_scope)
        (tmp_path / name).mkdir()
        torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), tmp_path / name / 'epoch_1.pth')
        (tmp_path / name / 'last_checkpoint').write_text(str(tmp_path / name / 'epoch_1.pth'))
        runs.append(Run(str(tmp_path / f'{name}.py'), str(tmp_path / name)))
    built, build = [], MODELS.build
    monkeypatch.setattr(MODELS, 'build', lambda cfg: built.append(deepcopy(cfg)) or build(cfg))
    demo.plot_predictions(*runs, tmp_path / 'predictions.png')
    assert (tmp_path / 'predictions.png').stat().st_size > 10000
    # Runner passes the data_preprocessor that stands beside the model in the config.
    assert built[0].data_preprocessor == Config.fromfile(runs[0].config).data_preprocessor
    assert built[0].data_preprocessor.std == [255.] * 3
    # Without a detector, a long list of labels makes the picture taller: the last ones are the doubtful ones.
    heights = []
    for score in (1., 0.):
        monkeypatch.setattr(demo, 'LABEL_SCORE', score)
        demo.plot_predictions(runs[0], None, tmp_path / 'labels.png')
        heights.append(Image.open(tmp_path / 'labels.png').height)
    assert heights[1] > 2 * heights[0]


def test_readme_shows_the_committed_results():
    readme = (ROOT / 'README.md').read_text()
    for line in (ROOT / 'benchmarks' / 'demo' / 'results.md').read_text().splitlines():
        assert line in readme
