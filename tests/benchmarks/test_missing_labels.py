"""benchmarks/paper/missing_labels.py: probabilities and gradients of a model that predicts a constant."""
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmpretrain.apis import get_model

from benchmarks.paper import missing_labels
from mmasl.datasets.coco import CocoMultiLabel
from mmasl.reproduce.experiments import digits_of
from mmasl.reproduce.runs import Run

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / 'configs/digits/resnet_bce_digits_paper.py')


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A classifier that predicts p = 0.2 everywhere, on 40 images with two fifths of the labels missing."""
    monkeypatch.chdir(tmp_path)
    for root in ('data/digits_hard', missing_labels.COMPLETE):
        replace(digits_of(root), train=40, val=2, missing=0.4 if root == 'data/digits_hard' else 0.).write(root)
    cfg = Config.fromfile(CONFIG)
    cfg.model.backbone.pop('init_cfg')
    model = get_model(cfg)
    torch.nn.init.zeros_(model.head.fc.weight)
    torch.nn.init.constant_(model.head.fc.bias, math.log(0.2 / 0.8))
    run = Run(CONFIG, 'work', {'model.backbone.init_cfg': None})
    Path('work').mkdir()
    torch.save(dict(state_dict=model.state_dict(), meta=dict()), 'work/epoch_8.pth')
    Path('work/last_checkpoint').write_text('/moved/since/work/epoch_8.pth')
    return run


def count(root, **kwargs):
    data = CocoMultiLabel(data_root=root, ann_file='annotations/instances_train.json',
                          data_prefix=dict(img_path='train/'), **kwargs)
    return {data.get_data_info(i)['img_id']: len(data.get_data_info(i)['gt_label']) for i in range(len(data))}


def test_shares_of_a_constant_prediction(run):
    """The gradient of the focal loss is that of arXiv 1708.02002, the same for every label of a kind."""
    gamma = 2
    annotated, complete = count('data/digits_hard'), count(missing_labels.COMPLETE, keep_empty=True)
    numbers = [sum(annotated.values()), sum(complete[one] - annotated[one] for one in annotated),
               sum(40 - complete[one] for one in annotated)]
    assert min(numbers) > 10 and len(annotated) < 40  # an image without any label is not trained on
    run.options |= {'model.head.loss.gamma_pos': gamma, 'model.head.loss.gamma_neg': gamma}

    def focal(p_t):
        return (1 - p_t)**gamma * (1 - p_t - gamma * p_t * math.log(p_t))
    sizes = [number * size for number, size in zip(numbers, (focal(0.2), focal(0.8), focal(0.8)), strict=True)]
    row = missing_labels.measure(run)
    assert [float(row[f'p_{kind}']) for kind in missing_labels.KINDS] == pytest.approx([0.2] * 3)
    assert [float(row[f'gradient_{kind}']) for kind in missing_labels.KINDS] == pytest.approx(
        [100 * size / sum(sizes) for size in sizes], rel=1e-3)
