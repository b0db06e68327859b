"""EfficientNet-Lite0 on photographs: binary cross-entropy, focal loss and ASL on VOC 2007 and Corel-5k, three seeds.

Images are decoded once and stay on the device, which a machine lent for minutes needs. The configs of configs/ train
through MMEngine's Runner; model, normalisation and metric are theirs.
"""
import os
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import set_random_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmasl.evaluation.functional import multilabel_metrics
from mmasl.registry import DATASETS, MODELS

ROOT = Path(__file__).parents[1]
BASES = ROOT / 'configs' / '_base_'
BATCH, LEARNING_RATE, SIZE = 64, 3e-4, 224
LOSSES = dict(bce=dict(gamma_pos=0., gamma_neg=0., clip=0.), focal=dict(gamma_pos=2., gamma_neg=2., clip=0.),
              asl=dict(gamma_pos=0., gamma_neg=4., clip=0.05))
SEEDS, EPOCHS = (0, 1, 2), 10


@dataclass(frozen=True)
class Photos:
    """Images of a split as uint8 (N, 3, SIZE, SIZE) in RGB, and labels (N, C) of 1, 0 and -1 for ignored."""
    images: Tensor
    labels: Tensor


def datasets(data: Path) -> dict[str, tuple[dict, dict]]:
    """Configs of the train and test split of each data set that lies below a folder, in the layout of ``--data``."""
    found = {}
    for root in sorted([*data.glob('VOCdevkit/VOC2007'), *data.glob('*/VOCdevkit/VOC2007')])[:1]:
        found['VOC 2007, train and val'] = tuple(
            dict(type='mmasl.VOCMultiLabel', data_root=str(root), split=split, difficult=difficult)
            for split, difficult in (('train', 'positive'), ('val', 'ignore')))
    for root in [root for root in (data / 'corel5k', data) if (root / 'annotations' / 'test.json').is_file()][:1]:
        found['Corel-5k'] = tuple(
            dict(type='mmpretrain.MultiLabelDataset', data_root=str(root), ann_file=f'annotations/{split}.json',
                 data_prefix='images') for split in ('train', 'test'))
    return found


def read_base() -> Config:
    """The shipped model and the normalisation and pipeline of its data."""
    base = Config.fromfile(str(BASES / 'models' / 'efficientnet-lite0_multilabel.py'))
    base.merge_from_dict(Config.fromfile(str(BASES / 'datasets' / 'multilabel_224.py')).to_dict())
    return base


def read(dataset: dict, base: Config, size: int, device: str, limit: int | None) -> Photos:
    """Decode the images of a data set as the base config for 224 px does, without its random flip."""
    pipeline = [dict(step, scale=size) if step['type'] == 'Resize' else dict(step) for step in base.test_pipeline]
    built = DATASETS.build(dict(dataset, pipeline=pipeline, test_mode=True))
    count = min(len(built), limit or len(built))

    def batch(indices: list[int]) -> tuple[Tensor, Tensor]:
        samples = [built[i] for i in indices]
        labels = torch.zeros(len(samples), len(built.CLASSES))
        for label, sample in zip(labels, (sample['data_samples'] for sample in samples)):
            if 'gt_score' in sample:
                label.copy_(sample.gt_score)
            else:
                label[sample.gt_label] = 1
        return torch.stack([sample['inputs'] for sample in samples]).flip(1), labels  # BGR to RGB

    loader = DataLoader(range(count), BATCH, collate_fn=batch,
                        num_workers=len(os.sched_getaffinity(0)) if device == 'cuda' else 0)
    images, labels = zip(*loader)
    return Photos(torch.cat(images).to(device), torch.cat(labels).to(device))


def train(train_set: Photos, val_set: Photos, base: Config, loss: dict, seed: int, device: str,
          epochs: int) -> tuple[nn.Module, dict[str, float]]:
    """One training with Adam, OneCycleLR, random flips and mixed precision, and its evaluation."""
    set_random_seed(seed)
    center, std = (torch.tensor(base.data_preprocessor[name], device=device).view(3, 1, 1) for name in ('mean', 'std'))
    classes = train_set.labels.shape[1]
    model = deepcopy(base.model)
    model.head.update(num_classes=classes, loss=dict(type='mmasl.AsymmetricLoss', use_sigmoid=True, ignore_index=-1,
                                                     **loss))
    net = MODELS.build(model)
    net.init_weights()
    net = net.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(net.parameters(), LEARNING_RATE, fused=device == 'cuda')
    steps = -(-len(train_set.images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * steps)
    scaler = torch.amp.GradScaler(device, enabled=device == 'cuda')

    def logits(images: Tensor) -> Tensor:
        x = ((images - center) / std).contiguous(memory_format=torch.channels_last)
        return net.head(net.extract_feat(x))

    for _ in range(epochs):
        for picked in torch.randperm(len(train_set.images), device=device).split(BATCH):
            images = train_set.images[picked]
            images = torch.where(torch.rand(len(picked), 1, 1, 1, device=device) < 0.5, images.flip(-1), images)
            optimizer.zero_grad()
            with torch.autocast(device, torch.float16, enabled=device == 'cuda'):
                value = net.head.loss_module(logits(images), train_set.labels[picked], avg_factor=len(picked))
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
    net.eval()
    with torch.no_grad(), torch.autocast(device, torch.float16, enabled=device == 'cuda'):
        scores = torch.cat([logits(images).float().sigmoid() for images in val_set.images.split(4 * BATCH)])
    metrics, _ = multilabel_metrics(scores.cpu().numpy(), val_set.labels.cpu().numpy())
    return net, metrics


def measure(device: str, seconds: float, data: Path | None = None, quick: bool = False,
            done: list[dict[str, str]] | None = None) -> Iterator[dict]:
    """One row per training; all losses and data sets of a seed before the next seed.

    Args:
        device: 'cpu' or 'cuda'.
        seconds: A training that would end later, if it took as long as the longest one before, raises TimeoutError.
        data: Folder of the photographs.
        quick: A few small images, one epoch, one seed, no pretrained weights: to see that everything runs.
        done: Rows of an earlier call, whose trainings are not repeated.
    """
    end = time.monotonic() + seconds
    found = datasets(data) if data else {}
    if not found:
        raise FileNotFoundError(f'--data {data}: no photographs. Give a folder with VOCdevkit/VOC2007 or corel5k')
    yield from done or ()
    have = {(row['data'], row['loss'], str(row['seed'])) for row in done or ()}
    base = read_base()
    size, limit, epochs = (64, 32, 1) if quick else (SIZE, None, EPOCHS)
    if quick:
        base.model.backbone.pop('init_cfg')
    longest = 0.
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        splits = {name: [read(dataset, base, size, device, limit) for dataset in pair] for name, pair in found.items()}
        for seed in SEEDS[:1] if quick else SEEDS:
            for name, (train_set, val_set) in splits.items():
                for loss, setting in LOSSES.items():
                    if (name, loss, str(seed)) in have:
                        continue
                    start = time.monotonic()
                    if start + longest > end:
                        raise TimeoutError(f'no time is left for seed {seed} of {loss} on {name}')
                    _, metrics = train(train_set, val_set, base, setting, seed, device, epochs)
                    longest = max(longest, time.monotonic() - start)
                    yield dict(data=name, loss=loss, seed=seed, epochs=epochs, size=size, images=len(train_set.images),
                               **{key: round(metrics[key], 3) for key in ('mAP', 'CF1', 'OF1')},
                               seconds=round(time.monotonic() - start, 1))


def targets(rows: list[dict]) -> list[tuple[str, str, bool]]:
    """Targets: description, measured value, whether it is reached."""
    results = []
    for name in dict.fromkeys(row['data'] for row in rows):
        means: dict[str, Any] = {}
        for loss in LOSSES:
            values = [float(row['mAP']) for row in rows if (row['data'], row['loss']) == (name, loss)]
            means[loss] = mean(values) if values else None
        if None not in means.values():
            other = max(means['bce'], means['focal'])
            results.append((f'{name}: mAP of ASL at least that of cross-entropy and focal loss',
                            ', '.join(f'{loss} {value:.2f}' for loss, value in means.items()), means['asl'] >= other))
        seeds = {row['seed'] for row in rows if row['data'] == name}
        results.append((f'{name}: {len(SEEDS)} seeds of each loss', f'{len(seeds)}', len(seeds) == len(SEEDS)))
    return results
