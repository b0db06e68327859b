"""Swap mmasl.AsymmetricLoss into the stock configs of MMDetection and MMPretrain, and record whether they train.

Every config of the installed packages is read. Of each family (a folder of configs) and head, one config trains a step
on two drawn images and validates, by tools/train.py with --cfg-options alone. The rows go to
benchmarks/stock_configs.csv and into docs/stock_configs.md.
"""
import argparse
import importlib.util
import json
import math
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, Registry
from mmengine.utils import get_installed_path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from mmasl.reproduce.render import rows_table  # noqa: E402
from mmasl.reproduce.runs import Run, read_rows, write_rows  # noqa: E402
from mmasl.utils.markdown import fill_blocks, markdown_table  # noqa: E402

PACKAGES = ('mmdet', 'mmpretrain')
ROWS, DOC = ROOT / 'benchmarks' / 'stock_configs.csv', ROOT / 'docs' / 'stock_configs.md'
SIZE = 384  # DDOD's deformable convolutions refuse a last feature map of less than 3 pixels at stride 128
TIMEOUT = 1800  # s
WORKS, FAILS, NOT_RUN, LEFT_OUT = 'trains and validates', 'FAILS', 'not run', 'left out'
BERT = 'bert-base-uncased'
PARTS = ('model', 'train_dataloader', 'val_dataloader')  # of a config, where settings are made small

FOCAL = ('FocalLoss', 'FocalCustomLoss')  # both on sigmoids, always
CLASSIFICATION = ('loss_cls', 'initial_loss_cls', 'loss_heatmap', 'loss_center_heatmap')  # keys of losses
FIGURES = ('/bbox_mAP', '/segm_mAP', '/mAP', '/top1')  # of a validation, what is shown
REASONS = {  # classification loss of a family: why it is left out
    'softmax CrossEntropyLoss': 'a softmax, whose classes exclude each other',
    'sigmoid CrossEntropyLoss':
        'not a focal loss; tests/models/heads/test_mmdet_heads.py swaps it in RPN, YOLOv3 and YOLOX',
    'QualityFocalLoss': 'its targets are IoUs; tests/models/heads/test_mmdet_heads.py swaps it in GFL and RTMDet',
    'VarifocalLoss': 'its targets are IoUs; tests/models/heads/test_mmdet_heads.py swaps it in VFNet',
    'GaussianFocalLoss': 'its targets are heatmaps, whose Gaussians reduce the weight of negatives',
    'GHMC': 'weights by gradient density; the head is the one of retinanet',
    'SeesawLoss': 'a softmax, whose classes exclude each other',
    '': 'the configs name no classification loss; the head has a fixed one'}


@dataclass
class Family:
    """Configs of a folder with the same class of head. ``head`` is empty if there is no loss to replace."""
    package: str
    name: str
    head: str = ''
    configs: list[str] = field(default_factory=list)
    losses: set[str] = field(default_factory=set)  # the replaced losses, or all of a family that is left out
    runnable: list[str] = field(default_factory=list)
    obstacles: set[str] = field(default_factory=set)  # why the others cannot run

    @property
    def config(self) -> str:
        """Config to run: the alphabetically last of the shortest names, usually the plainest and smallest."""
        return min(sorted(self.runnable or self.configs, reverse=True), key=len)

    def row(self, **columns: object) -> dict:
        return dict(package=self.package, family=self.name, head=self.head, config=self.config if self.head else '',
                    configs=len(self.configs), stock_loss=', '.join(sorted(self.losses)), **columns)


def walk(node: Any, path: str = '') -> Iterator[tuple[str, Any]]:
    """Yield every dict in a config with its dotted path, as --cfg-options takes it."""
    if isinstance(node, dict):
        yield path, node
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, (dict, list, tuple)):
            yield from walk(value, f'{path}.{key}'.lstrip('.'))


def config_folder(package: str) -> Path:
    root = Path(get_installed_path(package))
    return next(path for path in (root / '.mim' / 'configs', root.parent / 'configs') if path.is_dir())


def load(path: Path) -> Config:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return Config.fromfile(path)


@cache
def registered(registry: Registry, package: str, name: str) -> Any:
    """Look up a class of a package by its name."""
    return registry.get(f'{package}.{name}')


def stock_losses(cfg: Config) -> dict[str, tuple[str, dict]]:
    """Find the losses to replace. Returns (class of the head, config of the loss) by path."""
    model = cfg.get('model') or {}
    if cfg.get('default_scope') == 'mmpretrain':
        from mmpretrain.models.heads import MultiLabelClsHead
        head = model.get('head') or {}
        cls = registered(MODELS, 'mmpretrain', head['type']) if isinstance(head, dict) and 'type' in head else object
        return {'model.head.loss': (head['type'], head.get('loss', {}))} if issubclass(cls, MultiLabelClsHead) else {}
    return {f'{path}.{key}': (part['type'], part[key]) for path, part in walk(model, 'model') for key in CLASSIFICATION
            if isinstance(part.get(key), dict) and part[key].type in FOCAL}


def loss_names(cfg: Config) -> set[str]:
    """Name the classification losses of a model."""
    names = set()
    for _, part in walk(cfg.get('model') or {}):
        for loss in (part[key] for key in CLASSIFICATION if isinstance(part.get(key), dict)):
            name = loss.type.rpartition('.')[2]
            name = 'CrossEntropyLoss' if name == 'CrossEntropyCustomLoss' else name
            form = 'sigmoid ' if loss.get('use_sigmoid') else 'softmax '
            names.add(form + name if name == 'CrossEntropyLoss' else name)
    return names


def unavailable_reason(cfg: Config) -> str:
    """Why the tool cannot run a config on two drawn images and a CPU, or ''."""
    if {'loss_scale', 'dtype'} & set(cfg.get('optim_wrapper') or {}):
        return 'mixed precision needs a GPU'
    for split in ('train', 'val'):
        datasets = [part for _, part in walk(cfg.get(f'{split}_dataloader') or {})
                    if {'ann_file', 'data_root'} & set(part)]
        if not datasets:
            return f'no {split}_dataloader'
        for name in (dataset.type for dataset in datasets):
            if name not in ('OpenImagesDataset', 'VOC', 'ImageNet') and as_coco(cfg.default_scope, name) is None:
                return f'no data made for {name}'
    if any(BERT in part.values() for _, part in walk(cfg.model)) and not importlib.util.find_spec('transformers'):
        return 'needs the package transformers'
    return ''


def as_coco(package: str, name: str) -> dict | None:
    """Options with which a data set reads COCO's format, or None if there are none."""
    if package != 'mmdet':
        return None
    from mmdet.datasets import CocoDataset, XMLDataset
    cls = registered(DATASETS, package, name)
    if issubclass(cls, XMLDataset):
        return dict(type='CocoDataset', **{'metainfo.classes': cls.METAINFO['classes']})
    return {} if issubclass(cls, CocoDataset) else None


def discover(package: str, names: Iterable[str] = (), folder: Path | None = None) -> list[Family]:
    """Group the readable configs of a package by family, or those of the families ``names``."""
    folder = folder or config_folder(package)
    found: dict[tuple[str, str, str], Family] = {}
    rest: dict[str, Family] = {}
    for path in sorted(folder.rglob('*.py')):
        name, config = path.relative_to(folder).parts[0], str(path.relative_to(folder))
        if name == '_base_' or (names and name not in names):
            continue
        try:
            cfg = load(path)
        except Exception as error:  # configs that are broken as shipped
            print(f'{package} {config} cannot be read: {type(error).__name__}: {str(error)[:90]}', file=sys.stderr)
            continue
        losses = stock_losses(cfg)
        for head, _ in losses.values():
            # MMPretrain has few enough to run each.
            key = name, head, config if package == 'mmpretrain' else ''
            family = found.setdefault(key, Family(package, name, head))
            if config not in family.configs:
                family.configs.append(config)
                family.losses |= {loss.get('type', '') for kind, loss in losses.values() if kind == head}
                why = unavailable_reason(cfg)
                family.obstacles |= {why} - {''}
                family.runnable += [] if why else [config]
        if not losses and package == 'mmdet' and 'model' in cfg:
            family = rest.setdefault(name, Family(package, name))
            family.configs.append(config)
            family.losses |= loss_names(cfg)
    heads = {name for name, *_ in found}
    return sorted([*found.values(), *(family for name, family in rest.items() if name not in heads)],
                  key=lambda family: (family.name, family.head, family.config))


def swap(cfg: Config) -> dict[str, object]:
    """Options that replace the losses and change nothing else of the model."""
    imports = [*(cfg.get('custom_imports') or {}).get('imports', []), 'mmasl']
    options = {'custom_imports.imports': imports, 'custom_imports.allow_failed_imports': False}
    for path, (_, stock) in stock_losses(cfg).items():
        if cfg.default_scope == 'mmpretrain':
            loss = dict(gamma_pos=0, gamma_neg=4, clip=0.05)
        else:
            loss = dict(use_sigmoid=True, gamma_pos=1, gamma_neg=2, clip=0, alpha=stock.get('alpha', 0.25))
            loss |= {key: stock[key] for key in ('loss_weight', 'reduction', 'activated') if key in stock}
        options |= {f'{path}.{key}': value
                    for key, value in dict(_delete_=True, type='mmasl.AsymmetricLoss', **loss).items()}
    return options


def small(cfg: Config, data: Path) -> dict[str, object]:
    """Options that make a run short: two drawn images, one iteration, no pretrained weights, no checkpoint."""
    options: dict[str, object] = {
        'default_hooks.logger.interval': 1, 'default_hooks.checkpoint': None, 'load_from': None, 'randomness.seed': 0}
    if cfg.optim_wrapper.get('type') == 'AmpOptimWrapper':
        options['optim_wrapper.type'] = 'OptimWrapper'
    iterations = cfg.train_cfg.get('type') == 'IterBasedTrainLoop' or 'max_iters' in cfg.train_cfg
    options |= {'train_cfg.max_iters' if iterations else 'train_cfg.max_epochs': 1, 'train_cfg.val_interval': 1}
    for split in ('train', 'val'):
        batch_size = min(cfg[f'{split}_dataloader'].batch_size, 2)  # some models predict one image at a time
        options |= {f'{split}_dataloader.{key}': value for key, value in
                    dict(batch_size=batch_size, num_workers=0, persistent_workers=False).items()}
    for path, part in walk(cfg.model, 'model'):
        if 'checkpoint' in (part.get('init_cfg') or ()):
            options[f'{path}.init_cfg'] = None
        if part.get('pretrained') is True:
            options[f'{path}.pretrained'] = False
        if isinstance(part.get('teacher_ckpt'), str):
            options[f'{path}.teacher_ckpt'] = None
        if part.get('type') in ('SyncBN', 'MMSyncBN'):  # one process, and on the CPU
            options[f'{path}.type'] = 'BN'
        if part.get('eps') == 0:  # NAS-FCOS; torch has refused it since
            options[f'{path}.eps'] = 1e-5
        if part.get('num_cp'):  # only saves memory, and needs fairscale
            options[f'{path}.num_cp'] = 0
        if 'score_thr' in part:
            options[f'{path}.score_thr'] = 0.
    for top in PARTS:
        for path, part in walk(cfg[top], top):
            options |= {f'{path}.{key}': str(data / 'bert') for key, value in part.items() if value == BERT}
    return options | (detection_options if cfg.default_scope == 'mmdet' else classification_options)(cfg, data)


def detection_options(cfg: Config, data: Path) -> dict[str, object]:
    data.mkdir(parents=True, exist_ok=True)
    options: dict[str, object] = {}
    num_classes = max(part.get('num_classes', 0) for _, part in walk(cfg.model))
    for split in ('train', 'val'):
        for path, part in walk(cfg[f'{split}_dataloader'], f'{split}_dataloader'):
            if 'ann_file' in part:
                options |= {f'{path}.data_prefix._delete_': True, f'{path}.data_prefix.img': str(data / 'images')}
                if part.type == 'OpenImagesDataset':
                    options[f'{path}.data_root'] = str(draw_open_images(data, part, num_classes))
                    continue
                classes = (part.get('metainfo') or registered(DATASETS, 'mmdet', part.type).METAINFO)['classes']
                if classes is None:  # V3Det reads them from a file
                    classes = [f'class {number}' for number in range(num_classes)]
                    (data / 'classes.txt').write_text('\n'.join(classes))
                    options[f'{path}.label_file'] = 'classes.txt'
                ann_file = draw_coco(data, tuple(classes))
                options |= {f'{path}.{key}': value for key, value in (as_coco('mmdet', part.type) or {}).items()}
                options |= {f'{path}.data_root': str(data), f'{path}.ann_file': ann_file.name}
            if part.get('times'):
                options[f'{path}.times'] = 1
    evaluator = cfg.val_evaluator if isinstance(cfg.val_evaluator, dict) else {}
    if evaluator.get('type') not in ('CocoMetric', 'OpenImagesMetric'):
        options |= {'val_evaluator._delete_': True, 'val_evaluator.type': 'CocoMetric', 'val_evaluator.metric': 'bbox'}
    if evaluator.get('type') != 'OpenImagesMetric':
        options['val_evaluator.ann_file'] = str(ann_file)
    for top in PARTS:
        for path, part in walk(cfg[top], top):
            for key in {'scale', 'scales', 'img_scale', 'crop_size', 'size', 'random_size_range'} & set(part):
                if 'type' in part and (top != 'model' or '.batch_augments.' in path):
                    options[f'{path}.{key}'] = shrunk(part[key])
    return options


def shrunk(size: Any) -> Any:
    """Replace every side of an image size, or of a list of sizes, by SIZE."""
    if isinstance(size, (list, tuple)):
        return type(size)(shrunk(side) for side in size)
    return SIZE if isinstance(size, int) and size > 2 else size


def classification_options(cfg: Config, data: Path) -> dict[str, object]:
    options: dict[str, object] = {}
    kind = cfg.train_dataloader.dataset.type
    root = dict(VOC=draw_voc, ImageNet=draw_imagenet)[kind](data)
    for split in ('train', 'val'):
        options[f'{split}_dataloader.dataset.data_root'] = str(root)
    return options


def draw(path: Path, seed: int) -> list[tuple[int, int, int, int]]:
    """Draw rectangles on noise. Returns the image and the boxes (x, y, width, height)."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 80, (SIZE, SIZE, 3), dtype=np.uint8)
    half = SIZE // 2
    boxes = [(x + int(rng.integers(8, 40)), y + int(rng.integers(8, 40)), int(rng.integers(60, 130)),
              int(rng.integers(60, 130))) for x in (0, half) for y in (0, half)]
    for x, y, width, height in boxes:
        cv2.rectangle(image, (x, y), (x + width, y + height), rng.integers(100, 256, 3).tolist(), -1)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)
    return boxes


def draw_images(data: Path) -> dict[str, list[tuple[int, int, int, int]]]:
    """Write two images to the folder ``images``. Returns their names and boxes."""
    return {f'{number}.jpg': draw(data / 'images' / f'{number}.jpg', number) for number in range(2)}


def draw_coco(data: Path, classes: tuple[str, ...]) -> Path:
    """Write two images in COCO's format. Returns the annotation file."""
    names, boxes = zip(*draw_images(data).items())
    corners = ((0, 0), (1, 0), (1, 1), (0, 1))
    annotations = [
        dict(id=4 * image + i + 1, image_id=image, category_id=(image + i) % len(classes) + 1, bbox=[x, y, w, h],
             area=w * h, iscrowd=0, segmentation=[[side for a, b in corners for side in (x + a * w, y + b * h)]])
        for image in range(2) for i, (x, y, w, h) in enumerate(boxes[image])]
    path = data / f'{len(classes)}_{classes[0]}.json'.replace(' ', '_')
    path.write_text(json.dumps(dict(
        images=[dict(id=i, file_name=name, width=SIZE, height=SIZE) for i, name in enumerate(names)],
        annotations=annotations, categories=[dict(id=i, name=name) for i, name in enumerate(classes, 1)])))
    return path


def draw_open_images(data: Path, dataset: dict, num_classes: int) -> Path:
    """Write two images in Open Images' format, with the file names of a config. Returns the root."""
    root = data / 'open_images'
    labels = [f'/m/{number}' for number in range(num_classes)]
    lines = ['ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,' + 'flag,' * 5]
    for name, boxes in draw_images(data).items():
        for label, (x, y, w, h) in zip(labels, boxes):
            sides = ','.join(str(side / SIZE) for side in (x, x + w, y, y + h))
            lines.append(f'{Path(name).stem},x,{label},1,{sides},0,0,0,0,0')
    texts = dict(label_file='\n'.join(f'{label},{label}' for label in labels), ann_file='\n'.join(lines),
                 hierarchy_file=json.dumps(dict(LabelName='root', Subcategory=[dict(LabelName=labels[0])])),
                 image_level_ann_file='ImageID,Source,LabelName,Confidence\n0,x,/m/0,1\n')
    for key, text in texts.items():
        if key in dataset:
            (root / dataset[key]).parent.mkdir(parents=True, exist_ok=True)
            (root / dataset[key]).write_text(text)
    sizes = [dict(filename=name, ori_shape=(SIZE, SIZE, 3)) for name in draw_images(data)]
    (root / dataset['meta_file']).write_bytes(pickle.dumps(sizes))
    return root


def draw_voc(data: Path) -> Path:
    """Write two images in VOC's folders. Returns the root."""
    root = data / 'VOC2007'
    for folder in ('Annotations', 'ImageSets/Main'):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number, labels in enumerate((('cat', 'dog'), ('person', ))):
        draw(root / 'JPEGImages' / f'{number}.jpg', number)
        objects = ''.join(f'<object><name>{label}</name><difficult>0</difficult></object>' for label in labels)
        (root / 'Annotations' / f'{number}.xml').write_text(f'<annotation>{objects}</annotation>')
    for split in ('trainval', 'test'):
        (root / 'ImageSets' / 'Main' / f'{split}.txt').write_text('0\n1\n')
    return root


def draw_imagenet(data: Path) -> Path:
    """Write two images with one label each in ImageNet's folders. Returns the root."""
    root = data / 'imagenet'
    (root / 'meta').mkdir(parents=True, exist_ok=True)
    for split in ('train', 'val'):
        for number in range(2):
            draw(root / split / f'{number}.jpg', number)
        (root / 'meta' / f'{split}.txt').write_text('0.jpg 3\n1.jpg 999\n')
    return root


def make_bert(folder: Path) -> None:
    """Write a BERT of two layers with random weights and the words of COCO's classes."""
    from mmdet.datasets import CocoDataset
    from transformers import BertConfig, BertModel, BertTokenizer
    folder.mkdir(parents=True, exist_ok=True)
    words = sorted({word for name in CocoDataset.METAINFO['classes'] for word in name.split()})
    tokens = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '.', '?', *words]
    (folder / 'vocab.txt').write_text('\n'.join(tokens) + '\n')
    BertModel(BertConfig(vocab_size=7 + len(words), num_hidden_layers=2)).save_pretrained(folder)
    BertTokenizer(folder / 'vocab.txt').save_pretrained(folder)


def execute(family: Family, data: Path, work_dir: Path) -> dict:
    """Train a step and validate with the swapped loss, in a process of its own. Returns the row of the family."""
    path = config_folder(family.package) / family.config
    cfg = load(path)
    replaced = swap(cfg)
    keys = sorted({re.sub(r'\.\d+\.', '.*.', key.removesuffix('.type')) for key in replaced if key.endswith('.type')})
    columns = dict(replaced=', '.join(keys), outcome=NOT_RUN, loss='', validation='',
                   reason='; '.join(family.obstacles))
    if family.runnable:
        name = f'{family.package}_{path.stem}'
        columns |= attempt(Run(str(path), str(work_dir / name), replaced | small(cfg, data)))
        if columns['outcome'] == FAILS:
            stock = attempt(Run(str(path), str(work_dir / f'{name}_stock'), small(cfg, data)))['reason']
            told = f'fails: {stock}' if stock else 'does not fail'
            columns['reason'] += '; the stock loss ' + ('fails in the same way' if stock == columns['reason'] else told)
    return family.row(**columns)


def attempt(run: Run) -> dict[str, str]:
    """Run once. Returns outcome, loss, validation and reason."""
    shutil.rmtree(run.work_dir, ignore_errors=True)
    process = run.start(threads=1)
    try:
        code: int | None = process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        process.kill()
        process.wait()
    losses, evaluations = [step['loss'] for step in run.training()], run.evaluations()
    result = dict(outcome=WORKS, loss=f'{losses[-1]:.4g}' if losses else '', validation='', reason='')
    if code == 0 and losses and math.isfinite(losses[-1]) and evaluations:
        figures = [f'{key} {value:.3g}' for key, value in evaluations[-1].items() if key.endswith(FIGURES)]
        return result | dict(validation=', '.join(figures) or 'no detection')
    if code == 1:
        lines = [line.strip() for line in run.tail(4000).splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r'[\w.]*(Error|Exception)\b', line)]
        reason = textwrap.shorten((errors or lines)[-1].replace('|', '/'), 140, placeholder=' ...')
    elif code == 0:
        reason = 'no finite loss, or no validation, in its log'
    else:
        reason = f'no end after {TIMEOUT} s' if code is None else f'exit {code}'
    return result | dict(outcome=FAILS, reason=reason)


def left_out(family: Family) -> dict:
    reasons = [f'{name}: {REASONS[name]}' if name else REASONS[name] for name in sorted(family.losses) or ['']]
    return family.row(replaced='', outcome=LEFT_OUT, loss='', validation='', reason='; '.join(reasons))


def render(doc: str, rows: list[dict[str, str]]) -> str:
    """Fill the tables between the markers of the document."""
    tried = [row for row in rows if row['outcome'] != LEFT_OUT]
    count = [sum(row['outcome'] == outcome for row in tried) for outcome in (WORKS, FAILS, NOT_RUN)]
    reasons = defaultdict(list)
    for row in rows:
        if row['outcome'] == LEFT_OUT:
            reasons[row['reason']].append(f"{row['family']} ({row['configs']})")
    families = {(row['package'], row['family']) for row in tried}
    configs = sum(int(row['configs']) for row in tried)
    blocks = {
        'summary': f'{len(tried)} runs stand for {configs} configs of {len(families)} families: {count[0]} train and '
                   f'validate, {count[1]} fail, {count[2]} cannot be run here.',
        'runs': rows_table(tried),
        'left out': markdown_table([(why, ', '.join(families)) for why, families in sorted(reasons.items())],
                                   ('why', 'families (configs)'))}
    return fill_blocks(doc, dict(stock=blocks.__getitem__))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--family', nargs='+', default=[], metavar='NAME',
                        help='only these families (folders of configs)')
    parser.add_argument('--list', action='store_true', help='only show what there is to run, and what is left out')
    parser.add_argument('--out', type=Path, default=ROWS,
                        help='CSV file; rows of other families stay (default: %(default)s)')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/stock_configs'),
                        help='folder of data and logs')
    parser.add_argument('--render', action='store_true', help='only put the rows there are into docs/stock_configs.md')
    args = parser.parse_args()
    if args.render:
        DOC.write_text(render(DOC.read_text(), read_rows(ROWS)))
        return

    families = [family for package in PACKAGES for family in discover(package, args.family)]
    if missing := sorted(set(args.family) - {family.name for family in families}):
        raise SystemExit(f'--family {" ".join(missing)}: no folder of configs with a model in {" or ".join(PACKAGES)}')
    if args.list:
        for family in families:
            print(f'{family.package} {family.name}', family.head or LEFT_OUT, f'{len(family.configs)} configs',
                  family.config if family.head else '', ', '.join(sorted(family.losses)), sep='  ')
        return

    data = args.work_dir.resolve() / 'data'
    if importlib.util.find_spec('transformers') and not (data / 'bert').exists():
        make_bert(data / 'bert')
    key = ('package', 'family', 'head', 'config')
    rows = {tuple(row[name] for name in key): row for row in read_rows(args.out)} if args.family else {}
    for family in families:
        row = execute(family, data, args.work_dir) if family.head else left_out(family)
        print(', '.join(f'{name} {value}' for name, value in row.items() if value), flush=True)
        rows[tuple(row[name] for name in key)] = row
        write_rows(args.out, [rows[name] for name in sorted(rows)])
    if args.out.resolve() == ROWS:
        DOC.write_text(render(DOC.read_text(), read_rows(ROWS)))


if __name__ == '__main__':
    main()
