"""The training behind each of the paper's numbers: a config and its overrides for every row of a table or figure.

The comparisons exist on the paper's data sets ('real') and on handwritten digits ('digits'), and a few of them on
photographs for small machines ('photos'). The digits train on 2 CPU cores.
"""
import shlex
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import MappingProxyType

from mmengine.config import Config

from mmasl.datasets.digits import GLYPHS, DigitScenes
from mmasl.errors import ConfigError
from mmasl.reproduce.numbers import Entry, load
from mmasl.reproduce.runs import Run, fingerprint

ROOT = Path(__file__).parents[2]

# Configs of the authors' released checkpoints, by table with the same data set. Their models or recipes differ from the
# table's (docs/recipes.md), so no number of the paper stands beside them.
RELEASED = {
    'Table 4': ('tresnet-l_official_asl_coco', ), 'Table 8': ('tresnet-l_official_asl_coco', ),
    'Table 5': ('tresnet-m-21k_official_asl_coco-224', 'tresnet-xl_official_asl_coco-640'),
    'Table 6': ('tresnet-xl_official_asl_voc', ), 'Table 9': ('tresnet-xl_official_asl_voc', ),
    'Table 7': ('tresnet-l_paper_asl_open-images-448', ),
    'Table 10': ('tresnet-l_paper_asl_nus-wide-240', ), 'Table 11': ('tresnet-l_paper_asl_nus-wide-240', )}

# Values of the paper's plots. The paper prints numbers for the best ones only.
GAMMAS = (0., 1., 2., 3., 4., 6.)
MARGINS = (0., 0.05, 0.1, 0.2, 0.3, 0.4)
ALPHAS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))  # Sec. 3: 0.5 to 0.95 in steps of 0.05
TARGETS = (0., 0.1, 0.2, 0.3)
MISSING = (0., 0.15, 0.3, 0.45, 0.6)
LABELS = (1.25, 2.5, 5.)
EPOCHS = (4, 8, 16)
GLYPH_EPOCHS = (0, 6, 24)

# Our own comparisons, on digits only. The first two test arguments of Sec. 1 and 2.5 for which the paper shows no
# numbers. The others test whether the trainings are long enough and the pre-training good enough.
MISSING_LABELS, IMBALANCE, CONVERGENCE, PRETRAINING = OWN = (
    'Missing labels', 'Imbalance', 'Convergence', 'Pre-training')


@dataclass(frozen=True)
class Loss:
    """The loss of a row.

    Args:
        gamma_pos, gamma_neg, clip, alpha: As in :class:`mmasl.AsymmetricLoss`.
        target: Probability gap of :class:`mmasl.AdaptiveAsymmetryHook`; None keeps the parameters fixed.
    """
    gamma_pos: float = 0.
    gamma_neg: float = 0.
    clip: float = 0.
    alpha: float | None = None
    target: float | None = None

    @property
    def name(self) -> str:
        """The loss in words."""
        if self.target is not None:
            return f'adaptive, target {self.target:g}'
        name = {'bce': 'CE', 'focal': f'focal, gamma {self.gamma_neg:g}'}.get(
            self.kind, f'gamma_pos {self.gamma_pos:g}, gamma_neg {self.gamma_neg:g}')
        name += f', margin {self.clip:g}' if self.clip else ''
        return name + (f', alpha {self.alpha:g}' if self.alpha else '')

    @property
    def kind(self) -> str:
        """Key in :data:`KINDS` of the nearest config: 'bce', 'focal', 'asl' or 'adaptive'."""
        if self.target is not None:
            return 'adaptive'
        if self.gamma_pos != self.gamma_neg:
            return 'asl'
        return 'focal' if self.gamma_neg else 'bce'


CE, FOCAL, ASL = Loss(), Loss(2., 2.), Loss(0., 4., 0.05)
LOSSES = {'CE': CE, 'focal': FOCAL, 'ASL': ASL}
# The loss of a config, by the part of the config's name.
KINDS = {'bce': CE, 'focal': FOCAL, 'focal-alpha': Loss(2., 2., alpha=0.75), 'focusing': Loss(0., 3.),
         'margin': Loss(2., 2., 0.3), 'asl': ASL, 'adaptive': Loss(0., 4., 0.05, target=0.1)}


@cache
def _config_paths() -> dict[str, str]:
    return {path.stem: path.relative_to(ROOT).as_posix() for path in (ROOT / 'configs').rglob('*.py')
            if '_base_' not in path.parts}


def config_path(name: str) -> str:
    """Path of a config relative to the repository, from its file name without '.py'.

    Raises:
        ConfigError: No config has this name.
    """
    if name not in _config_paths():
        raise ConfigError(f'No config named {name} in configs/')
    return _config_paths()[name]


_NAME = str.maketrans({'/': '-', ',': 'x', '(': None, ')': None})  # in the name of a folder


@dataclass(frozen=True)
class Training:
    """A config of this repository and its overrides.

    Args:
        config: File name of the config without '.py'.
        options: Overrides as (key, value), as in ``--cfg-options``.
        released: Evaluate the released checkpoint that the config names, instead of training.
    """
    config: str
    options: tuple[tuple[str, object], ...] = ()
    released: bool = False

    @property
    def path(self) -> str:
        """Path of the config, relative to the repository."""
        return config_path(self.config)

    @property
    def overrides(self) -> str:
        """The overrides as text, which identifies the training among those of its config."""
        return 'released' if self.released else ' '.join(f'{key}={_text(value)}' for key, value in self.options)

    @property
    def name(self) -> str:
        """Name of the work dir, without the seed."""
        parts = (f'{key.split(".")[-1]}{_text(value)}'.translate(_NAME) for key, value in self.options)
        return '_'.join(dict.fromkeys([self.config, *parts, *['released'] * self.released]))

    @property
    def checkpoint(self) -> str:
        """URL of the released checkpoint; '' for a training."""
        return _load(self.path).released.checkpoint if self.released else ''

    @property
    def command(self) -> str:
        """The shell command of this training or evaluation."""
        if self.released:
            return f'python tools/test.py {self.path} {self.checkpoint}'
        options = map(shlex.quote, self.overrides.split())
        return ' '.join([f'python tools/train.py {self.path}', *['--cfg-options'] * bool(self.options), *options])

    @property
    def cfg(self) -> Config:
        """The config with its overrides. It is cached: do not modify it."""
        return _merge(self)

    @property
    def settings(self) -> str:
        """First 12 digits of the config's SHA-256. Rows with other settings are outdated."""
        return fingerprint(self.cfg)[:12]

    @property
    def data_roots(self) -> set[str]:
        """Folders of the training and validation data."""
        return {self.cfg[f'{split}_dataloader'].dataset.data_root for split in ('train', 'val')}

    @property
    def initial_checkpoints(self) -> list[str]:
        """Checkpoints that the training starts from and that another config of this repository produces."""
        initial = self.cfg.model.get('backbone', {}).get('init_cfg') or {}
        return [path for path in (self.cfg.get('load_from'), initial.get('checkpoint'))
                if path and Path(path).parent.name in _config_paths()]

    def placement(self, data: str, gpus: int) -> dict[str, object]:
        """The override that keeps the config's total batch size, and so its learning rate, on any number of GPUs.

        Raises:
            ConfigError: The GPUs cannot share the batch equally.
        """
        if data != 'real':  # for one process
            return {}
        total = self.cfg.auto_scale_lr.base_batch_size
        if total % gpus:
            raise ConfigError(f'{self.path} trains on batches of {total} images, which {gpus} GPUs cannot share '
                              f'equally. Pass --gpus {", ".join(str(n) for n in range(1, 65) if total % n == 0)}')
        return {'train_dataloader.batch_size': total // gpus}

    def run(self, data: str, seed: int, work_dir: str, gpus: int = 1) -> Run:
        """The run of one seed.

        Args:
            data: 'real', 'photos' or 'digits'.
            seed: Random seed.
            work_dir: Folder of all runs.
            gpus: GPUs of the run.

        Raises:
            ConfigError: The GPUs cannot share the batch equally.
        """
        if self.released:
            return Run(self.path, f'{work_dir}/{data}/{self.name}', checkpoint=self.checkpoint)
        options = dict(self.options) | {'randomness.seed': seed}
        if data != 'real':  # evaluate at the end only, and log often enough for the curves
            options |= {'train_cfg.val_interval': self.cfg.train_cfg.max_epochs, 'default_hooks.logger.interval': 5}
        return Run(self.path, f'{work_dir}/{data}/{self.name}_seed{seed}', options, self.placement(data, gpus))


@cache
def _load(path: str) -> Config:
    return Config.fromfile(ROOT / path)


@cache
def _merge(training: Training) -> Config:
    cfg = deepcopy(_load(training.path))
    cfg.merge_from_dict(dict(training.options))
    return cfg


@dataclass(frozen=True)
class Row:
    """A row of a table, or a point of a figure.

    Args:
        item: 'Table 2', 'Fig. 5', ... or one of :data:`OWN`.
        label: As printed in the paper, if the paper has the row.
        trainings: Empty for a cited number or one computed from the equations. The best of several counts.
        entries: The paper's numbers.
        series: In a figure, the name of the curve.
        x: In a figure, the position of the point on the axis; None without an axis.
        command: Shell command of a row without a training.
        against: Label of the row to compare with; '' is the first row of the item.
    """
    item: str
    label: str
    trainings: tuple[Training, ...] = ()
    entries: tuple[Entry, ...] = ()
    series: str = ''
    x: float | None = None
    command: str = ''
    against: str = ''

    @property
    def cited(self) -> bool:
        """Whether the paper took all numbers of this row from other papers."""
        return bool(self.entries) and all(entry.source == 'cited' for entry in self.entries)


# Scalar of a run by the paper's column. 'train_' marks means over the end of the training.
COLUMNS = {
    'mAP': 'mAP', 'CF1': 'CF1', 'OF1': 'OF1', 'mAP Score': 'mAP', 'gamma_neg Final': 'gamma_neg',
    'mAP (ImageNet Only Pretrain)': 'mAP', 'mAP (Extra Pretrain Data)': 'mAP', 'micro mAP': 'mAP',
    'macro mAP': 'mAP_weighted', 'macro F1': 'f1-score', 'p_t+ at the end': 'train_p_t_pos',
    'p_t- at the end': 'train_p_t_neg', 'gap at the end': 'train_gap', 'gamma_neg final': 'gamma_neg',
    **{f'All {name}': name for name in ('mAP', 'CP', 'CR', 'CF1', 'OP', 'OR', 'OF1')},
    **{f'Top 3 {name}': f'{name}_top3' for name in ('CP', 'CR', 'CF1', 'OP', 'OR', 'OF1')}}


def rows(item: str, data: str) -> list[Row]:
    """The rows of a table or figure.

    Args:
        item: 'Table 1' to 'Table 13', 'Fig. 2' to 'Fig. 9', or one of :data:`OWN`.
        data: 'real', 'photos' or 'digits'.

    Returns:
        The rows; an empty list if the item does not exist on these data.
    """
    entries = [entry for entry in load() if entry.item == item]
    if item in ('Table 1', 'Fig. 2', 'Fig. 3'):
        return list(_drawn(item, entries)) if data != 'photos' else []
    if data == 'photos':
        return list(_PHOTOS[item](entries)) if item in _PHOTOS else []
    if item in _COMPARISONS:
        return list(_COMPARISONS[item](data, entries))
    return list(_of_entries(item, entries)) if data == 'real' else []


def items(data: str) -> list[str]:
    """All tables and figures that have rows on 'real' data, on 'photos' or on 'digits'."""
    names = [*dict.fromkeys(entry.item for entry in load()), *OWN]
    return [name for name in names if rows(name, data)]


def digits_of(root: str) -> DigitScenes | None:
    """The digits that ``tools/reproduce.py`` writes to a data root; None for a root of other data."""
    scenes = {'data/glyphs': GLYPHS, 'data/digits': DigitScenes()}
    scenes |= {_missing_root(share): DigitScenes(train=6000, long_tail=0.7, missing=share) for share in MISSING}
    scenes |= {_labels_root(mean): DigitScenes(train=6000, long_tail=0.7, missing=0.3, labels_per_image=mean)
               for mean in LABELS}
    return scenes.get(root.rstrip('/'))


def _missing_root(share: float) -> str:
    return 'data/digits_hard' if share == 0.3 else f'data/digits_hard_missing{share:g}'


def _labels_root(mean: float) -> str:
    return 'data/digits_hard' if mean == 2.5 else f'data/digits_hard_labels{mean:g}'


def _text(value: object) -> str:
    return f'{value:g}' if isinstance(value, float) else str(value).replace(' ', '')


def _training(pattern: str, kind: str, loss: Loss, options: Mapping[str, object] = MappingProxyType({})) -> Training:
    """The config of a kind with options, and with overrides where the loss differs from the config's."""
    options = dict(options)
    for field in fields(Loss):
        value = getattr(loss, field.name)
        if value is not None and value != getattr(KINDS[kind], field.name):
            options['custom_hooks.0.target' if field.name == 'target' else f'model.head.loss.{field.name}'] = value
    return Training(pattern.format(kind), tuple(options.items()))


def _classifier(data: str, loss: Loss) -> Training:
    """TResNet-L on MS-COCO, or a ResNet-18 on the digits."""
    if data == 'digits':
        return _training('resnet_{}_digits_paper', loss.kind, loss)
    kind = loss.kind
    if loss.alpha is not None:
        kind = 'focal-alpha'
    elif kind == 'asl' and not loss.clip:
        kind = 'focusing'
    elif kind == 'focal' and loss.clip:
        kind = 'margin'
    return _training('tresnet-l_paper_{}_coco', kind, loss)


def _named(entries: list[Entry], *names: str) -> tuple[Entry, ...]:
    return tuple(entry for entry in entries if entry.row in names and entry.value is not None)


def _fig4(data: str, entries: list[Entry]) -> Iterator[Row]:
    for name, loss in {'Cross-entropy': CE, 'Focal loss': FOCAL, 'ASL': Loss(0., 2., 0.2)}.items():
        yield Row('Fig. 4', name, (_classifier(data, loss), ), tuple(e for e in entries if e.row == name))


def _fig5(data: str, entries: list[Entry]) -> Iterator[Row]:
    for gamma in GAMMAS:
        known = _named(entries, 'gamma 0') if gamma == 0 else ()
        yield Row('Fig. 5', f'gamma {gamma:g}', (_classifier(data, Loss(gamma, gamma)), ), known, 'focal loss', gamma)
    # 85.1 is the best of these. The paper does not say which one.
    yield Row('Fig. 5', 'best, gamma 2 to 4', tuple(_classifier(data, Loss(g, g)) for g in (2., 3., 4.)),
              _named(entries, 'best, gamma 2 to 4'))


def _fig6(data: str, entries: list[Entry]) -> Iterator[Row]:
    curves = {2.: (0., 1., 2.), 4.: (0., 1., 2., 3., 4.)}
    for gamma_neg, values in curves.items():
        for gamma_pos in values:
            yield Row('Fig. 6', f'gamma_neg {gamma_neg:g}, gamma_pos {gamma_pos:g}',
                      (_classifier(data, Loss(gamma_pos, gamma_neg)), ), (), f'gamma_neg {gamma_neg:g}', gamma_pos)
    for gamma_neg, values in curves.items():
        name = f'gamma_neg {gamma_neg:g}'
        yield Row('Fig. 6', f'best, {name}', tuple(_classifier(data, Loss(value, gamma_neg)) for value in values),
                  _named(entries, name))


def _fig7(data: str, entries: list[Entry]) -> Iterator[Row]:
    for gamma in (0., 2., 4.):
        for margin in MARGINS:
            label = f'gamma {gamma:g}, margin {margin:g}'
            yield Row('Fig. 7', label, (_classifier(data, Loss(gamma, gamma, margin)), ), _named(entries, label),
                      f'gamma {gamma:g}', margin)
    for gamma in (0., 2., 4.):
        yield Row('Fig. 7', f'best, gamma {gamma:g}', tuple(_classifier(data, Loss(gamma, gamma, m)) for m in MARGINS),
                  _named(entries, f'gamma {gamma:g}'))


def _table2(data: str, entries: list[Entry]) -> Iterator[Row]:
    losses = {'FL': (FOCAL, ), 'FL + linear weighting': tuple(Loss(2., 2., alpha=alpha) for alpha in ALPHAS),
              'Focusing (ASL)': (Loss(0., 3.), ), 'Probability margin (ASL)': (Loss(2., 2., 0.3), ),
              'Focusing + Probability margin (ASL)': (ASL, )}
    for name, several in losses.items():
        yield Row('Table 2', name, tuple(_classifier(data, loss) for loss in several), _named(entries, name))


def _table3(data: str, entries: list[Entry]) -> Iterator[Row]:
    for target in TARGETS:
        yield Row('Table 3', f'{target:g}', (_classifier(data, Loss(0., 4., 0.05, target=target)), ),
                  _named(entries, f'{target:g}'), 'adaptive', target)


def _fig9(data: str, entries: list[Entry]) -> Iterator[Row]:
    yield Row('Fig. 9', 'target 0.1', (_classifier(data, KINDS['adaptive']), ), tuple(entries))


def _fig8(data: str, entries: list[Entry]) -> Iterator[Row]:
    backbones = {'ResNet-18': 'resnet', 'TResNet': 'tresnet', 'MobileNetV3': 'mobilenet-v3'}
    if data == 'real':
        backbones = {'OFA-595': 'ofa595_paper', 'ResNet101': 'resnet101', 'TResNet-L': 'tresnet-l_paper'}
    for name, stem in backbones.items():
        for printed, loss in {'Cross-entropy': CE, 'Focal loss': FOCAL, 'ASL': ASL}.items():
            pattern = stem + ('_{}_coco' if data == 'real' else '_{}_digits_paper')
            label = f'{name}, {printed}'
            known = tuple(e for e in entries if (e.row, e.column) == (printed, name) and e.value is not None)
            yield Row('Fig. 8', label, (_training(pattern, loss.kind, loss), ), known, printed,
                      against=label.replace(printed, 'Cross-entropy'))


def _table13(data: str, entries: list[Entry]) -> Iterator[Row]:
    for model in ('fcos', 'atss'):
        for printed, kind in {'Focal Loss': 'focal', 'ASL': 'asl'}.items():
            config = f'{model}_tresnet-m_{kind}_coco' if data == 'real' else f'{model}_{kind}_digits'
            known = _named(entries, printed) if model == 'fcos' else ()
            yield Row('Table 13', f'{model.upper()}, {printed}', (Training(config), ), known, printed,
                      against=f'{model.upper()}, Focal Loss')


def _missing(data: str, entries: list[Entry]) -> Iterator[Row]:
    yield from _own(MISSING_LABELS, data, {
        share: (f'{share:.0%} missing', _data(_missing_root(share))) for share in MISSING})


def _imbalance(data: str, entries: list[Entry]) -> Iterator[Row]:
    yield from _own(IMBALANCE, data, {
        mean: (f'{mean:g} labels an image', _data(_labels_root(mean))) for mean in LABELS})


def _convergence(data: str, entries: list[Entry]) -> Iterator[Row]:
    yield from _own(CONVERGENCE, data, {
        epochs: (f'{epochs} epochs', {} if epochs == 8 else {'train_cfg.max_epochs': epochs}) for epochs in EPOCHS})


def _pretraining(data: str, entries: list[Entry]) -> Iterator[Row]:
    key, glyphs = 'model.backbone.init_cfg', 'work_dirs/resnet_ce_glyphs/epoch_6.pth'
    options: dict[int, dict[str, object]] = {0: {key: None}, 6: {f'{key}.checkpoint': glyphs}, 24: {}}
    yield from _own(PRETRAINING, data, {
        epochs: (f'{epochs} epochs of glyphs' if epochs else 'no pre-training', options[epochs])
        for epochs in GLYPH_EPOCHS})


def _own(item: str, data: str, points: Mapping[float, tuple[str, Mapping[str, object]]]) -> Iterator[Row]:
    """The three losses at every point of a figure. ``points`` has labels and overrides by position."""
    for name, loss in LOSSES.items() if data == 'digits' else ():
        for x, (label, options) in points.items():
            training = _training('resnet_{}_digits_paper', loss.kind, loss, options)
            yield Row(item, f'{name}, {label}', (training, ), (), name, x, against=f'CE, {label}')


def _data(root: str) -> dict[str, object]:
    """The overrides for a data root other than the configs'."""
    return {} if root == 'data/digits_hard' else {
        f'{split}_dataloader.dataset.data_root': root for split in ('train', 'val', 'test')}


# Photographs: Pascal VOC 2007, train to val, and Corel-5k, both at 128 px for a CPU.
_SMALL = {f'{split}_dataloader.dataset.pipeline.1.scale': 128 for split in ('train', 'val')}
_VOC = {f'{split}_dataloader.dataset.split': split for split in ('train', 'val')} | _SMALL
_VOC_BOXES = {f'{split}_dataloader.dataset.ann_file': f'ImageSets/Main/{split}.txt' for split in ('train', 'val')} | {
    f'{split}_dataloader.dataset.pipeline.{place}.scale': (208, 128) for split, place in (('train', 2), ('val', 1))}


def _photo_losses(entries: list[Entry]) -> Iterator[Row]:
    """Table 9 without its other pre-training."""
    for printed, loss in {'CE': CE, 'Focal Loss': FOCAL, 'ASL': ASL}.items():
        known = tuple(entry for entry in _named(entries, printed) if 'ImageNet' in entry.column)
        yield Row('Table 9', printed, (_training('efficientnet-lite0_{}_voc', loss.kind, loss, _VOC), ), known)


def _photo_ablation(entries: list[Entry]) -> Iterator[Row]:
    """Table 2 on Corel-5k. The paper's numbers are of MS-COCO and stay with it."""
    for printed, kind in {'Cross-entropy': 'bce', 'FL': 'focal', 'Focusing (ASL)': 'focusing',
                          'Probability margin (ASL)': 'margin', 'Focusing + Probability margin (ASL)': 'asl'}.items():
        yield Row('Table 2', f'Corel-5k, {printed}', (_training('efficientnet-lite0_{}_corel5k', kind, KINDS[kind],
                                                                _SMALL), ))


def _photo_backbones(entries: list[Entry]) -> Iterator[Row]:
    for size in range(3):
        for printed, loss in {'Cross-entropy': CE, 'Focal loss': FOCAL, 'ASL': ASL}.items():
            label = f'EfficientNet-Lite{size}, {printed}'
            training = _training(f'efficientnet-lite{size}_{{}}_voc', loss.kind, loss, _VOC)
            yield Row('Fig. 8', label, (training, ), (), printed, against=label.replace(printed, 'Cross-entropy'))


def _photo_detection(entries: list[Entry]) -> Iterator[Row]:
    """Table 13 with FCOS on VOC. The paper's numbers are of MS-COCO and stay with it."""
    for printed, kind in {'Focal Loss': 'focal', 'ASL': 'asl'}.items():
        yield Row('Table 13', f'FCOS, {printed}', (Training(f'fcos_efficientnet-lite0_{kind}_voc', tuple(
            _VOC_BOXES.items())), ), (), printed, against='FCOS, Focal Loss')


def _photo_missing(entries: list[Entry]) -> Iterator[Row]:
    key = 'train_dataloader.dataset.pipeline.3.share'
    for name, loss in LOSSES.items():
        for share in (0., 0.3, 0.6):
            label = f'{share:.0%} missing'
            training = _training('efficientnet-lite0_{}_voc', loss.kind, loss, _VOC | ({key: share} if share else {}))
            yield Row(MISSING_LABELS, f'{name}, {label}', (training, ), (), name, share, against=f'CE, {label}')


_PHOTOS = {'Table 2': _photo_ablation, 'Table 9': _photo_losses, 'Table 13': _photo_detection,
           'Fig. 8': _photo_backbones, MISSING_LABELS: _photo_missing}


def _drawn(item: str, entries: list[Entry]) -> Iterator[Row]:
    for name in dict.fromkeys(entry.row for entry in entries):
        yield Row(item, name, (), tuple(e for e in entries if e.row == name), command='python tools/plot_loss.py')


def _of_entries(item: str, entries: list[Entry]) -> Iterator[Row]:
    """Rows of the cited methods and of the losses on a data set; columns with another pre-training get their own."""
    found: dict[tuple, list[Entry]] = {}
    for entry in entries:
        found.setdefault((entry.row, _config(entry) if entry.source == 'ours' else None), []).append(entry)
    for (name, config), known in found.items():
        pretrained = {entry.column for entry in known if '(' in entry.column} if config else ()
        label = ', '.join([name, *(column.partition('(')[2].rstrip(')') for column in pretrained)])
        command = '' if config else f'python tools/reproduce.py --table {item.split()[1]} --data real'
        yield Row(item, label, (Training(config), ) if config else (), tuple(known), command=command)
    for config in RELEASED.get(item, ()):
        yield Row(item, f'released checkpoint of {config}', (Training(config, released=True), ))


def _config(entry: Entry) -> str:
    """Name of the config for a number that the paper's authors measured."""
    backbone = {'ResNet101': 'resnet101', 'TResNet-L': 'tresnet-l_paper', None: 'tresnet-l_paper'}[entry.backbone]
    data = {'MS-COCO': 'coco', 'Pascal-VOC 2007': 'voc', 'NUS-WIDE': 'nus-wide', 'Open Images v6': 'open-images-448',
            'Herbarium 2020': 'herbarium'}[str(entry.dataset)]
    if entry.pretrain == 'MS-COCO':
        data += '-from-coco'
    elif entry.pretrain == 'ImageNet-21K':
        backbone = 'tresnet-l-v2-21k_paper'
        data += '-640' if entry.input_size == 640 else ''
    return f'{backbone}_{dict(CE="bce", focal="focal", ASL="asl")[str(entry.loss)]}_{data}'


_COMPARISONS = {'Fig. 4': _fig4, 'Fig. 5': _fig5, 'Fig. 6': _fig6, 'Fig. 7': _fig7, 'Fig. 8': _fig8, 'Fig. 9': _fig9,
                'Table 2': _table2, 'Table 3': _table3, 'Table 13': _table13,
                MISSING_LABELS: _missing, IMBALANCE: _imbalance, CONVERGENCE: _convergence,
                PRETRAINING: _pretraining}
