"""Fine-tune the last stage of EfficientNet-Lite0 on VOC 2007, from cached outputs of the stages before it.

A check of how far the ranking on frozen features holds once layers are trained. The last stage, the last convolution
and the head hold 30 % of the weights. Images have 128 px and are not augmented. All losses share AdamW, its learning
rates and the length of the training. Finished rows are kept.
"""
import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.photos import frozen  # noqa: E402
from benchmarks.photos.frozen import ASL, CE, DATA, FOCAL, describe, key, load_config, remove_labels  # noqa: E402
from mmasl import AsymmetricLoss  # noqa: E402
from mmasl.analysis.gradient import Setting  # noqa: E402
from mmasl.analysis.probe import extract_features, score  # noqa: E402
from mmasl.reproduce.runs import read_rows, write_rows  # noqa: E402
from mmasl.utils.tools import exit_on_user_error, progress  # noqa: E402

ROWS = Path(__file__).with_name('last_stage.csv')
SETTINGS = (CE, ASL, FOCAL, Setting(0, 2, 0), Setting(1, 4, 0), Setting(0, 0, 0.05), Setting(0, 4, 0),
            Setting(0, 4, 0.05, detach_focusing=True))
EPOCHS, BATCH_SIZE, WEIGHT_DECAY = 8, 64, 0.01


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--voc', default='data/VOCdevkit/VOC2007', help='folder of VOC (default: %(default)s)')
    parser.add_argument('--cache', type=Path, default=Path('work_dirs/photos/maps'), help='folder of the outputs')
    parser.add_argument('--data', nargs='+', choices=[name for name in DATA if name.startswith('voc')],
                        default=['voc-60', 'voc'])
    parser.add_argument('--lr', type=float, nargs='+', default=[3e-4, 1e-3, 3e-3], help='maximal learning rates')
    parser.add_argument('--settings', type=int, help='train the first N settings only')
    parser.add_argument('--seeds', type=int, default=1)
    return parser.parse_args(argv)


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    maps = load_maps(args.voc, args.cache)
    rows = read_rows(ROWS)
    done = {(*key(row), row['lr'], row['seed']) for row in rows}
    wanted = product(range(args.seeds), SETTINGS[:args.settings], args.data, args.lr)
    for seed, setting, name, lr in progress(list(wanted), 'trainings'):
        if (*key(describe(name, setting)), f'{lr:g}', str(seed)) not in done:
            row = describe(name, setting) | dict(lr=f'{lr:g}', seed=str(seed))
            rows.append(row | train(name, setting, lr, seed, maps))
            write_rows(ROWS, rows)


def load_maps(voc: str, cache: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Outputs of stage 5, float16 (N, 192, 4, 4), and labels, (N, 20), of the 'train' and 'test' images, cached."""
    cfg, loaders = load_config('voc', voc)
    cache.mkdir(parents=True, exist_ok=True)
    for split, loader_cfg in loaders.items():
        if not (path := cache / f'voc_{split}.pt').exists():
            torch.save(compute_maps(*frozen.build(cfg, loader_cfg), path.stem), path)
    return {split: torch.load(cache / f'voc_{split}.pt') for split in loaders}


def compute_maps(model: Any, loader: Any, name: str) -> tuple[Tensor, Tensor]:
    maps: list[Tensor] = []
    model.backbone.timm_model.blocks[5].register_forward_hook(lambda *call: maps.append(call[2].half()))
    labels = [found for _, found in extract_features(model, progress(loader, name), model.head.num_classes)]
    return torch.cat(maps), torch.cat(labels)


def build() -> nn.Module:
    """The layers of the classifier that follow stage 5, with ImageNet's weights and a new head."""
    cfg = Config.fromfile(ROOT / 'configs' / 'photos' / 'efficientnet-lite0_bce_voc.py')
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model: Any = MODELS.build(cfg.model)
        model.init_weights()
    network = model.backbone.timm_model
    return nn.Sequential(network.blocks[6], network.conv_head, network.bn2, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         model.head.fc).to(memory_format=torch.channels_last)


def batches(order: Tensor, maps: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in order.split(BATCH_SIZE):
        yield maps[batch].float().contiguous(memory_format=torch.channels_last), labels[batch].float()


def train(name: str, setting: Setting, lr: float, seed: int, maps: dict[str, tuple[Tensor, Tensor]]) -> dict[str, str]:
    """Train with a setting, and evaluate on the test images. The figures are in percent."""
    (x, y), (x_test, y_test) = maps['train'], maps['test']
    y = remove_labels(y, DATA[name].missing, seed)
    torch.manual_seed(seed)
    model = build()
    loss = AsymmetricLoss(**asdict(setting), reduction='sum')
    steps = len(x) // BATCH_SIZE
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, EPOCHS * steps, cycle_momentum=False)
    for _ in range(EPOCHS):
        for images, targets in batches(torch.randperm(len(x))[:steps * BATCH_SIZE], x, y):
            optimizer.zero_grad()
            (loss(model(images), targets) / BATCH_SIZE).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(images) for images, _ in batches(torch.arange(len(x_test)), x_test, y_test)])
    scores = score(logits[None], y_test, setting)
    return {figure: f'{values[0]:.4g}' for figure, values in dict(
        mAP=scores.map, CF1=scores.cf1, OF1=scores.of1, CF1_calibrated=scores.cf1_calibrated,
        OF1_calibrated=scores.of1_calibrated).items()}


if __name__ == '__main__':
    main()
