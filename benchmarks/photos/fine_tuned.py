"""Fine-tune EfficientNet-Lite0 on VOC 2007 and Corel-5k: its last stage, or the whole network.

A check of how far the ranking on frozen features holds once layers are trained, and why. All losses share AdamW and the
length of the training. The learning rate of each is searched with seed 0, on the test images, until the next lower and
the next higher of RATES are worse; further seeds, and other recipes, have the best one. Repeat an interrupted call:
finished rows and epochs are kept.
"""
import argparse
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.model import ExponentialMovingAverage
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import set_random_seed
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.photos import frozen  # noqa: E402
from benchmarks.photos.frozen import ASL, CE, DATA, FOCAL, SOURCES, describe, load_config, remove_labels  # noqa: E402
from mmasl import AsymmetricLoss  # noqa: E402
from mmasl.analysis.gradient import Setting  # noqa: E402
from mmasl.analysis.probe import extract_features, score  # noqa: E402
from mmasl.reproduce.runs import read_rows, write_rows  # noqa: E402
from mmasl.utils.files import atomic_write  # noqa: E402
from mmasl.utils.tools import exit_on_user_error, progress  # noqa: E402

BATCH_SIZE = 64
RATES = (1e-4, 2e-4, 3e-4, 6e-4, 1e-3, 2e-3, 3e-3, 6e-3, 1e-2, 2e-2, 3e-2)  # learning rates
START = RATES.index(1e-3)  # of the search


class Inputs(NamedTuple):
    """Images of a recipe: their size in pixels, and whether every epoch draws the official augmentation of VOC."""
    size: int = frozen.SIZE
    drawn: bool = False


class Recipe(NamedTuple):
    """What the trainings share.

    Args:
        weight_decay: Of AdamW.
        scale: Factor of the loss, which is summed over the classes and averaged over the images.
        prior: Probability of every class that the head starts with.
        length: Factor of the number of epochs.
        momentum: Of the moving average of the weights that is evaluated; 0 for the weights themselves.
        inputs: Of the trained layers.
    """
    weight_decay: float = 0.01
    scale: float = 1.
    prior: float = 0.5
    length: int = 1
    momentum: float = 0.
    inputs: Inputs = Inputs()


# The average has a memory of 20 of the 312 steps on VOC.
RECIPES = {'': Recipe(), 'start at p = 0.05': Recipe(prior=0.05), 'loss x 64': Recipe(scale=64.),
           'no weight decay': Recipe(weight_decay=0.), '3 times the epochs': Recipe(length=3),
           'average of the weights': Recipe(momentum=0.05), 'RandAugment and Cutout': Recipe(inputs=Inputs(drawn=True)),
           'images of 224 px': Recipe(inputs=Inputs(224))}


class Training(NamedTuple):
    """A data set, a setting of the loss, and a name of RECIPES."""
    data: str
    setting: Setting
    recipe: str = ''


@dataclass(frozen=True)
class Layers:
    """Which layers are trained.

    Args:
        title: Name in the tables.
        first: First trained stage; the stem belongs to stage 0.
        epochs: Length of the training.
        flip: Whether half of the images are flipped.
        shares: Whether rows of data with missing labels have the figures of :func:`label_shares`.
        plan: Trainings, the most telling first.
    """
    title: str
    first: int
    epochs: int
    flip: bool
    shares: bool
    plan: tuple[Training, ...]

    @property
    def rows(self) -> Path:
        return Path(__file__).with_name(f'{self.title.replace(" ", "_")}.csv')


MILD, MARGIN, CONSTANT = Setting(0, 2, 0), Setting(0, 0, 0.05), replace(ASL, detach_focusing=True)
SETS = ('voc-60', 'corel5k', 'voc')
LAST = Layers('last stage', 6, 8, False, True, (
    *(Training(data, setting) for setting in (CE, ASL, MILD, MARGIN, CONSTANT, FOCAL) for data in SETS),
    # One change of the recipe at a time.
    *(Training('voc-60', setting, recipe) for recipe in list(RECIPES)[1:5] for setting in (CE, ASL)),
    *(Training('voc', setting, recipe) for recipe in list(RECIPES)[4:] for setting in (CE, ASL))))
ALL = Layers('whole network', 0, 6, True, False, (
    *(Training('voc', setting) for setting in (ASL, CE, MILD, FOCAL)),
    *(Training('voc-60', setting) for setting in (ASL, CE, MILD)),
    *(Training('corel5k', setting) for setting in (CE, ASL))))
OFFICIAL = ROOT / 'configs' / '_base_' / 'datasets' / 'voc2007_multilabel_official.py'
LAYERS = dict(last=LAST, all=ALL)
KINDS = ('annotated', 'removed', 'absent')  # of labels


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--layers', choices=LAYERS, default='last',
                        help='train the last stage, the last convolution and the head, from cached outputs of the '
                        'stages before, or all (default: %(default)s)')
    parser.add_argument('--voc', default='data/VOCdevkit/VOC2007', help='folder of VOC (default: %(default)s)')
    parser.add_argument('--corel5k', default='data/corel5k', help='folder of Corel-5k (default: %(default)s)')
    parser.add_argument('--cache', type=Path, default=Path('work_dirs/photos/maps'),
                        help='folder of the inputs of the trained layers (default: %(default)s)')
    parser.add_argument('--data', nargs='+', choices=SETS, default=SETS, help='data sets (default: all)')
    parser.add_argument('--lr', type=float, nargs='+', choices=RATES, help='maximal learning rates (default: searched)')
    parser.add_argument('--trainings', type=int, help='run the first N of the plan only')
    parser.add_argument('--seeds', type=int, default=1)
    return parser.parse_args(argv)


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    layers = LAYERS[args.layers]
    plan = [one for one in layers.plan[:args.trainings] if one.data in args.data]
    maps = {(name, inputs): load_maps(name, getattr(args, name), args.cache, layers, inputs)
            for name, inputs in dict.fromkeys((DATA[one.data].source, RECIPES[one.recipe].inputs) for one in plan)}
    rows = read_rows(layers.rows)
    for seed, one in progress(list(product(range(args.seeds), plan)), 'settings'):
        while (lr := next_rate(one, seed, rows, args.lr)) is not None:
            columns = describe(one.data, one.setting) | dict(recipe=one.recipe, lr=f'{lr:g}', seed=str(seed))
            rows.append(columns | measure(one, lr, seed, maps[DATA[one.data].source, RECIPES[one.recipe].inputs],
                                          layers, args.cache / 'unfinished.pth'))
            write_rows(layers.rows, rows)


def next_rate(one: Training, seed: int, rows: Sequence[dict[str, str]], asked: Sequence[float] | None = None
              ) -> float | None:
    """The learning rate to train next; None if the rows have all.

    Those that are asked for; otherwise those of the search, which has seed 0 and the usual recipe, and its best one
    with other seeds and recipes.
    """
    def scores(**columns: str) -> dict[float, float]:
        wanted = describe(one.data, one.setting) | columns
        return {float(row['lr']): float(row['mAP']) for row in rows if wanted.items() <= row.items()}

    searched, known = scores(recipe='', seed='0'), scores(recipe=one.recipe, seed=str(seed))
    if not asked and not seed and not one.recipe:
        return continue_search(searched)
    wanted = asked or [max(searched, key=searched.__getitem__) if searched else RATES[START]]
    return next((rate for rate in wanted if rate not in known), None)


def continue_search(scores: Mapping[float, float]) -> float | None:
    """The next of RATES in a search from mAP by learning rate; None if the rates beside the best one are known.

    It tries every second rate first.
    """
    for step in (2, 1):
        known = {place: scores[rate] for place, rate in enumerate(RATES)
                 if rate in scores and not (place - START) % step}
        if not known:
            return RATES[START]
        best = max(known, key=known.__getitem__)
        for place in (best - step, best + step):
            if 0 <= place < len(RATES) and place not in known:
                return RATES[place]
    return None


# --- inputs of the trained layers

def load_maps(name: str, folder: str, cache: Path, layers: Layers, inputs: Inputs
              ) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs of the trained layers and labels of 'train' and 'test' images; cached.

    The inputs of 'train' are float16 (E, N, D, H, W), where E is the number of epochs if they are drawn, else 1. Those
    of 'test' are (N, D, H, W), labels (N, C).
    """
    cfg, loaders = load_config(name, folder)
    cache.mkdir(parents=True, exist_ok=True)
    found = {}
    for split, loader in loaders.items():
        epochs = layers.epochs if inputs.drawn and split == 'train' else 1
        path = cache / '_'.join([name, split, *([] if layers.first else ['images']), *(
            [str(inputs.size)] if inputs.size != frozen.SIZE else []), *(['drawn'] if epochs > 1 else [])])
        path = path.with_suffix('.pt')
        if not path.exists():
            if epochs > 1:
                loader.dataset.pipeline = Config.fromfile(OFFICIAL).train_dataloader.dataset.pipeline
            loader.dataset.pipeline[1].scale = inputs.size
            set_random_seed(0)
            torch.save(compute_maps(*frozen.build(cfg, loader), path.stem, layers, epochs), path)
        maps, labels = torch.load(path)
        found[split] = maps.unflatten(0, (-1, len(labels))) if split == 'train' else maps, labels
    return found


def compute_maps(model: Any, loader: Any, name: str, layers: Layers, epochs: int = 1) -> tuple[Tensor, Tensor]:
    network = model.backbone.timm_model
    maps: list[Tensor] = []
    first = network.blocks[layers.first] if layers.first else network.conv_stem
    first.register_forward_pre_hook(lambda _, args: maps.append(args[0].half()))
    for _ in range(epochs):
        labels = [found for _, found in extract_features(model, progress(loader, name), model.head.num_classes)]
    return torch.cat(maps), torch.cat(labels)


# --- trainings

def build(name: str, layers: Layers, seed: int) -> nn.Sequential:
    """The trained layers of the classifier of a data set, with ImageNet's weights and a new head."""
    torch.manual_seed(seed)
    cfg = Config.fromfile(ROOT / 'configs' / SOURCES[name].config)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model: Any = MODELS.build(cfg.model)
        model.init_weights()
    network = model.backbone.timm_model
    stem = () if layers.first else (network.conv_stem, network.bn1)
    return nn.Sequential(*stem, *network.blocks[layers.first:], network.conv_head, network.bn2,
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.head.fc).to(memory_format=torch.channels_last)


def images_of(maps: Tensor, places: Tensor) -> Tensor:
    return maps[places].float().contiguous(memory_format=torch.channels_last)


def measure(one: Training, lr: float, seed: int, maps: dict[str, tuple[Tensor, Tensor]], layers: Layers,
            unfinished: Path) -> dict[str, str]:
    """Train, and evaluate on the test images. A file keeps the state of an interrupted training."""
    x, complete = maps['train']
    labels = remove_labels(complete, DATA[one.data].missing, seed)
    model = train(build(DATA[one.data].source, layers, seed), one.setting, lr, x, labels, layers, RECIPES[one.recipe],
                  unfinished, f'{layers.title}, {one}, lr {lr}, seed {seed}')
    figures = evaluate(predict(model, maps['test'][0]), maps['test'][1], one.setting)
    if layers.shares and DATA[one.data].missing:
        figures |= label_shares(predict(model, x[0]), complete, labels, one.setting)
    return figures


def train(model: nn.Sequential, setting: Setting, lr: float, x: Tensor, y: Tensor, layers: Layers, recipe: Recipe,
          unfinished: Path, name: str) -> nn.Sequential:
    """Train a model on maps, (E, N, D, H, W), and labels, (N, C). It is in evaluation mode afterwards.

    After each epoch ``unfinished`` has the state of the training with this name.
    """
    model[-1].bias.data.fill_(torch.tensor(recipe.prior).logit())
    loss = AsymmetricLoss(**asdict(setting), reduction='sum')
    steps, epochs = len(y) // BATCH_SIZE, recipe.length * layers.epochs
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * steps, cycle_momentum=False)
    parts: dict[str, Any] = dict(model=model, optimizer=optimizer, schedule=schedule)
    if recipe.momentum:
        parts['average'] = ExponentialMovingAverage(model, recipe.momentum, update_buffers=True)
    first, state = 0, torch.load(unfinished) if unfinished.exists() else {}
    if state.get('name') == name:
        first = state['epoch']
        for key, part in parts.items():
            part.load_state_dict(state[key])
        torch.set_rng_state(state['rng'])
    for epoch in range(first, epochs):
        for batch in torch.randperm(len(y))[:steps * BATCH_SIZE].split(BATCH_SIZE):
            images = images_of(x[epoch % len(x)], batch)
            if layers.flip:
                images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
            optimizer.zero_grad()
            (recipe.scale / BATCH_SIZE * loss(model(images), y[batch].float())).backward()
            optimizer.step()
            schedule.step()
            if 'average' in parts:
                parts['average'].update_parameters(model)
        buffer = io.BytesIO()
        torch.save(dict(name=name, epoch=epoch + 1, rng=torch.get_rng_state()) |
                   {key: part.state_dict() for key, part in parts.items()}, buffer)
        atomic_write(unfinished, buffer.getvalue())
    return (parts['average'].module if 'average' in parts else model).eval()


@torch.no_grad()
def predict(model: nn.Module, maps: Tensor) -> Tensor:
    """Logits, (N, C)."""
    return torch.cat([model(images_of(maps, batch)) for batch in torch.arange(len(maps)).split(BATCH_SIZE)])


def evaluate(logits: Tensor, labels: Tensor, setting: Setting) -> dict[str, str]:
    """Figures of a prediction, in percent."""
    scores = score(logits[None], labels, setting)
    return {figure: f'{values[0]:.4g}' for figure, values in dict(
        mAP=scores.map, CF1=scores.cf1, OF1=scores.of1, CF1_calibrated=scores.cf1_calibrated,
        OF1_calibrated=scores.of1_calibrated).items()}


def label_shares(logits: Tensor, complete: Tensor, labels: Tensor, setting: Setting) -> dict[str, str]:
    """Mean probability, and share of the summed |dL/dz| in percent, of annotated, removed and absent labels.

    Args:
        logits: (N, C).
        complete: All labels, (N, C): 1 or 0.
        labels: The labels of the training, (N, C).
        setting: Parameters of the loss.
    """
    z = logits.double().requires_grad_()
    size = torch.autograd.grad(AsymmetricLoss(**asdict(setting), reduction='sum')(z, labels.double()), z)[0].abs()
    masks = dict(zip(KINDS, (labels == 1, complete != labels, complete == 0), strict=True))
    return {f'{name}_{kind}': f'{value:.4g}' for kind, mask in masks.items() for name, value in dict(
        p=z[mask].sigmoid().mean().item(), gradient=100 * (size[mask].sum() / size.sum()).item()).items()}


if __name__ == '__main__':
    main()
