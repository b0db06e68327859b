"""Labels, files and pictures from a multi-label classifier of MMPretrain, on MMEngine's inferencer interface."""
import copy
import os.path as osp
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, count
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import cv2
import mmcv
import mmengine
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.dataset import Compose, default_collate
from mmengine.fileio import get_file_backend, join_path
from mmengine.infer import BaseInferencer
from mmengine.registry import DATASETS, MODELS, TRANSFORMS, DefaultScope
from mmengine.structures import BaseDataElement
from mmengine.visualization import Visualizer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmasl.engine.hooks.adaptive_asymmetry import restore_asymmetry
from mmasl.errors import UnreadableImageError
from mmasl.models.losses.asymmetric_loss import AsymmetricLoss
from mmasl.ops import posterior_cap
from mmasl.utils.checkpoint import convert_official, is_official, read_checkpoint

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.ppm', '.pgm')
BARS, FEWEST_BARS = 20, 5  # labels in a picture; labels that are not predicted fill it up to the second
THR = 0.5  # of classes for which neither the caller nor the head has another
MOST_NAMES = 10  # of an error message

Image = str | PathLike | np.ndarray


def unreadable_images(reasons: dict[str, str], results: Any = None) -> UnreadableImageError:
    """The error for images that could not be read, when the others are done.

    Args:
        reasons: The reason for each image.
        results: What the call would have returned for the others.
    """
    lines = [f'  {image}: {reason}' for image, reason in reasons.items()]
    done = ' (the others are done: see the results attribute of this error)' if results is not None else ''
    text = '\n'.join([f'{len(reasons)} images cannot be read{done}:', *lines])
    return UnreadableImageError(text, reasons, results)


class Rule(NamedTuple):
    """Which labels an image has: of the ``topk`` best, those whose score passes ``thr``.

    Attributes:
        thr: Thresholds of the classes, float32 (C,), or None. As in the heads, p passes where it is not below, a
            calibrated score where it is above.
        topk: Number of labels, or None for all.
        calibrated: Whether the score is ``calibrated_score``, and not ``pred_score``.
    """
    thr: Tensor | None
    topk: int | None
    calibrated: bool

    def score(self, sample: BaseDataElement) -> Tensor:
        return sample.calibrated_score if self.calibrated else sample.pred_score

    def rank(self, sample: BaseDataElement) -> Tensor:
        """All labels, the best first. Below the margin all calibrated scores are 0, and p tells them apart."""
        order = sample.pred_score.argsort(descending=True, stable=True)
        return order[self.score(sample)[order].argsort(descending=True, stable=True)]

    def labels(self, sample: BaseDataElement) -> Tensor:
        """The labels that the image has, int64, the best first."""
        best, score = self.rank(sample)[:self.topk], self.score(sample)
        if self.thr is None:
            return best
        return best[(score > self.thr if self.calibrated else score >= self.thr)[best]]


class MultiLabelInferencer(BaseInferencer):
    """Predicts the labels of images with a multi-label classifier of MMPretrain.

    Its heads are :class:`mmpretrain.models.MultiLabelClsHead` and what derives from it, in MMPretrain and mmasl.
    The checkpoint is loaded with ``weights_only``: nothing in it is executed. Asymmetry that was adapted while training
    is restored from it. The names of the classes are those of the checkpoint, else those of the config's test data,
    else numbers, with a warning.

    Args:
        model: Config: a file, :class:`mmengine.Config` or dict. Its ``test_dataloader`` holds the pipeline.
        weights: Checkpoint of a training with this config: a file or an http(s) URL.
        device: Device, as in 'cuda:0'; None for the best there is.
        show_progress: Whether a progress bar is drawn.

    Raises:
        FileNotFoundError: There is no such config or checkpoint.
        ValueError: The checkpoint is none, or holds more than weights and plain data; it, the head and the names of the
            classes do not fit one another; the config is of another kind of model, or its test pipeline does not start
            with LoadImageFromFile.

    Example:
        >>> inferencer = MultiLabelInferencer('config.py', 'epoch_8.pth')  # doctest: +SKIP
        >>> inferencer('image.jpg', thr=0.7)['predictions'][0]['pred_class']  # doctest: +SKIP
        ['person', 'dog']
    """
    visualizer: Any
    visualize_kwargs = {'show', 'wait_time', 'out_dir', 'return_vis'}
    postprocess_kwargs = {'out_file'}

    def __init__(self,
                 model: str | PathLike | Config | dict,
                 weights: str | PathLike,
                 device: str | None = None,
                 show_progress: bool = True) -> None:
        if isinstance(model, (str, PathLike)):
            _require_file(model, 'config')
            model = Config.fromfile(model)
        self.classes: list[str] = []
        self.rule = Rule(None, None, False)
        self._unreadable: dict[str, str] = {}
        self._pictures: dict[str, str] = {}
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            super().__init__(copy.deepcopy(model), str(weights), device, 'mmpretrain', show_progress)

    def __call__(self,
                 inputs: Image | Sequence[Image],
                 return_datasamples: bool = False,
                 batch_size: int = 1,
                 thr: float | Sequence[float] | Mapping[str, float] | None = None,
                 topk: int | None = None,
                 calibrated: bool | None = None,
                 show: bool = False,
                 wait_time: float = 0,
                 out_dir: str | PathLike = '',
                 return_vis: bool = False,
                 out_file: str | PathLike = '') -> dict:
        """Predict the labels of images, which come from here and there in any mixture.

        Args:
            inputs: File, folder (its images, by name, without subfolders), URL, array (H, W, 3) of uint8 in BGR, array
                (N, H, W, 3), or a list of these.
            return_datasamples: Whether to return samples with all scores, and not dicts with those of the labels.
            batch_size: Images that go through the model together, if they have one size after the pipeline.
            thr: Thresholds in [0, 1]: a number, one per class, or a dict by name; classes that it does not name keep
                the head's. No calibrated score exceeds 1.
            topk: The k best labels; with ``thr`` those of them that pass it. Without both the head decides.
            calibrated: Whether ``thr`` is of the calibrated score, the probability that a label is right, and not of p.
                None: where the head predicts it.
            show: Whether to show the pictures in windows, for ``wait_time`` seconds (0: until a key).
            out_dir: Folder for pictures, .png. Images of equal names get pictures of different names.
            return_vis: Whether to return the pictures.
            out_file: JSON file for the predictions as dicts.

        Returns:
            ``predictions``, one per image in the order of the inputs. Of the labels that an image has, the best first:
            ``pred_label``, ``pred_class``, ``pred_score`` and, if predicted, ``calibrated_score``; and ``img_path``,
            None for an array. Or samples on the CPU with ``pred_label`` and the scores of all classes.
            ``visualization``: (H, W, 3) uint8 arrays in RGB, or None.

        Raises:
            FileNotFoundError: There is no such file, or a folder has no image. Found before anything is predicted.
            UnreadableImageError: Some images cannot be read: raised when the others are predicted, drawn and written,
                with their results.
            ValueError: An argument is out of its range, names an unknown class, or does not fit the number of classes;
                ``calibrated`` with a head that does not calibrate; an array of another shape or dtype; or the model
                predicts NaN.
        """
        if out_file and not str(out_file).endswith('.json'):
            raise ValueError(f'out_file={str(out_file)!r}: predictions are written to .json')
        self.rule = self.make_rule(thr, topk, calibrated)
        self._unreadable = {}
        results = super().__call__(
            inputs, return_datasamples, batch_size, show=show, wait_time=wait_time, out_dir=out_dir,
            return_vis=return_vis, out_file=out_file)
        if self._unreadable:
            raise unreadable_images(self._unreadable, results)
        return results

    # --- set-up

    def _init_model(self, cfg: Config, weights: str, device: str) -> nn.Module:
        # Here, because a detector does without MMPretrain.
        from mmpretrain.models import MultiLabelClsHead

        from mmasl.models.heads.calibrated_predictions import CalibratedPredictions

        if 'data_preprocessor' in cfg:  # as MMEngine's Runner does
            cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
        if cfg.model.get('backbone', {}).get('pretrained') is True:
            cfg.model.backbone.pretrained = False  # timm would download what the checkpoint replaces
        checkpoint = load_checkpoint(weights)
        model = MODELS.build(cfg.model)
        head = getattr(model, 'head', None)
        if not isinstance(head, MultiLabelClsHead):
            raise ValueError(f'model.head is {type(head).__name__}, no multi-label head of MMPretrain or mmasl')
        load_weights(model, checkpoint, weights)
        restore_asymmetry(model, checkpoint)
        # Heads on feature maps are of the class whatever their loss.
        self.calibrates = isinstance(head, CalibratedPredictions) and isinstance(head.loss_module, AsymmetricLoss)
        self.classes = self._name_classes(cfg, checkpoint, getattr(head, 'num_classes', None))
        return model.to(device).eval()

    @staticmethod
    def _name_classes(cfg: Config, checkpoint: dict, number: int | None) -> list[str]:
        names, source = class_names(checkpoint), 'the checkpoint'
        if names is None:
            names, source = _config_classes(inference_data(cfg)), 'the config'
        if names is None:
            if number is None:
                raise ValueError('neither the checkpoint nor the config names the classes, and the head does not tell '
                                 'their number: set test_dataloader.dataset.metainfo=dict(classes=[...])')
            warnings.warn('neither the checkpoint nor the config names the classes: they are numbers. Set '
                          'test_dataloader.dataset.metainfo=dict(classes=[...])', stacklevel=2)
            names = [str(place) for place in range(number)]
        if number is not None and len(names) != number:
            raise ValueError(f'{source} names {len(names)} classes and model.head.num_classes is {number}: they must '
                             'be those of one training')
        return [str(name) for name in names]

    def _init_pipeline(self, cfg: Config) -> Compose:
        load, *rest = inference_data(cfg).pipeline
        if load['type'] not in ('LoadImageFromFile', 'mmpretrain.LoadImageFromFile', mmcv.transforms.LoadImageFromFile):
            raise ValueError(f"the test pipeline starts with {load['type']}, and must with LoadImageFromFile")
        self._loader = TRANSFORMS.build(load)
        return Compose(rest)

    def _init_collate(self, cfg: Config) -> Callable:
        return default_collate

    def _init_visualizer(self, cfg: Config) -> None:
        """None: pictures do not depend on the config's visualizer."""

    def make_rule(self,
                  thr: float | Sequence[float] | Mapping[str, float] | None = None,
                  topk: int | None = None,
                  calibrated: bool | None = None) -> Rule:
        """What decides on the labels, from the arguments of :meth:`__call__` and the head."""
        from mmasl.models.heads.calibrated_predictions import calibration_settings

        head, classes = self.model.head, self.classes
        if calibrated and not self.calibrates:
            raise ValueError(f'calibrated=True: {type(head).__module__}.{type(head).__name__} with '
                             f'{type(head.loss_module).__name__} predicts no calibrated_score. Put mmasl. before the '
                             "head's type, as in model.head.type='mmasl.MultiLabelLinearClsHead'; the loss must be "
                             'mmasl.AsymmetricLoss, and the checkpoint may stay')
        calibrated = self.calibrates if calibrated is None else calibrated
        if topk is not None and not 1 <= topk <= len(classes):
            raise ValueError(f'topk={topk} must be from 1 to the {len(classes)} classes')
        if thr is None and topk is None:
            thr, topk = head.thr, head.topk if head.thr is None else None
        values = None if thr is None else thresholds(thr, classes, THR if head.thr is None else head.thr)
        if values is not None and calibrated:
            cap = posterior_cap(**calibration_settings(head.loss_module)).float().cpu().expand_as(values)
            out_of_reach = (values >= cap) & (values < 1)  # 1 says that none is wanted
            if out_of_reach.any():
                worst = int(out_of_reach.int().argmax())
                raise ValueError(f'thr={values[worst]:g} of {classes[worst]!r} is never exceeded: calibrated scores '
                                 f'stay below {cap[worst]:.3g} with this clip')
        return Rule(values, topk, calibrated)

    # --- what a call does, in this order

    def _inputs_to_list(self, inputs: Image | Sequence[Image]) -> list[str | np.ndarray]:
        return list_images(inputs)

    def preprocess(self, inputs: list[str | np.ndarray], batch_size: int = 1) -> DataLoader:
        """Batches of images, each a list of one batch for each size that they have."""
        images: Any = list(enumerate(inputs))  # which is all that a data set has to be
        return DataLoader(images, batch_size, collate_fn=self._collate)

    def _collate(self, items: list[tuple[int, str | np.ndarray]]) -> list[dict]:
        batches: dict[torch.Size, list[dict]] = {}
        for index, image in items:
            try:
                results = self._load(image)
            except Exception as error:  # every decoder has its own kinds
                self._unreadable[str(image)] = why_unreadable(error)
                continue
            packed = self.pipeline(results | dict(sample_idx=index))
            packed['data_samples'].set_metainfo(dict(sample_idx=index, img_path=results['img_path']))
            batches.setdefault(packed['inputs'].shape, []).append(packed)
        return [self.collate_fn(batch) for batch in batches.values()]

    def _load(self, image: str | np.ndarray) -> dict:
        if isinstance(image, str):
            return self._loader(dict(img_path=image))
        image = image.astype(np.float32) if self._loader.to_float32 else image
        return dict(img=image, img_path=None, img_shape=image.shape[:2], ori_shape=image.shape[:2])

    def forward(self, inputs: list[dict]) -> list[BaseDataElement]:
        """Samples of the batches, on the CPU, with the labels of the call's rule."""
        samples = [sample.cpu() for batch in inputs for sample in super(MultiLabelInferencer, self).forward(batch)]
        for sample in samples:
            image = sample.img_path or f'array {sample.sample_idx}'
            if len(sample.pred_score) != len(self.classes):
                raise ValueError(f'the model predicts {len(sample.pred_score)} classes and {len(self.classes)} have a '
                                 'name: the checkpoint is of other classes than the head')
            if sample.pred_score.isnan().any():
                raise ValueError(f'the model predicts NaN for {image}: its weights are broken, or the image is')
            sample.set_pred_label(self.rule.labels(sample))
        return samples

    def visualize(self,
                  inputs: list[str | np.ndarray],
                  preds: list[BaseDataElement],
                  show: bool = False,
                  wait_time: float = 0,
                  out_dir: str | PathLike = '',
                  return_vis: bool = False) -> list[np.ndarray] | None:
        """Show, write and return the pictures, as :meth:`__call__` has it."""
        preds.sort(key=lambda sample: sample.sample_idx)
        if not (show or out_dir or return_vis):
            return None
        if show and self.visualizer is None:
            self.visualizer = Visualizer()
        pictures = []
        for sample in preds:
            source = inputs[sample.sample_idx]
            name = name_picture(source if isinstance(source, str) else None, self._pictures)
            image = self._load(source)['img'][..., ::-1].astype(np.uint8)
            picture = draw_labels(image, sample, self.classes, self.rule)
            if out_dir:
                mmcv.imwrite(picture[..., ::-1], osp.join(out_dir, f'{name}.png'))
            if show:
                self.visualizer.show(picture, win_name=name, wait_time=wait_time)
            if return_vis:
                pictures.append(picture)
        return pictures if return_vis else None

    def postprocess(self,
                    preds: list[BaseDataElement],
                    visualization: list[np.ndarray] | None,
                    return_datasamples: bool = False,
                    out_file: str | PathLike = '') -> dict:
        """Results as :meth:`__call__` returns them."""
        records = [self._as_dict(sample) for sample in preds] if out_file or not return_datasamples else []
        if out_file:
            mmengine.dump(records, str(out_file), indent=1)
        return dict(predictions=preds if return_datasamples else records, visualization=visualization)

    def _as_dict(self, sample: BaseDataElement) -> dict[str, object]:
        labels = sample.pred_label
        scores = {name: sample.get(name)[labels].tolist() for name in ('pred_score', 'calibrated_score')
                  if name in sample}
        return dict(img_path=sample.img_path, pred_label=labels.tolist(),
                    pred_class=[self.classes[i] for i in labels], **scores)


# --- inputs

def list_images(inputs: Image | Sequence[Image]) -> list[str | np.ndarray]:
    """The images of files, folders, URLs and arrays, as :class:`MultiLabelInferencer` takes them.

    Raises:
        FileNotFoundError: There is no such file, or a folder has no image.
        ValueError: There is no image at all, or an array is no image.
        TypeError: Something is none of these.
    """
    images = list(chain.from_iterable(map(_expand, inputs if isinstance(inputs, (list, tuple)) else [inputs])))
    if not images:
        raise ValueError('there are no images: the list is empty')
    return images


def _expand(item: Image) -> Iterator[str | np.ndarray]:
    if isinstance(item, np.ndarray):
        images = item if item.ndim == 4 else [item]
        for image in images:
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
                raise ValueError(f'an array of shape {item.shape} and {item.dtype} is no image: it must be '
                                 '(H, W, 3) or (N, H, W, 3), uint8, in BGR')
            yield image
    elif not isinstance(item, (str, PathLike)):
        raise TypeError(f'{type(item).__name__} is no image: give a path, a URL, an array, or a list of these')
    elif '://' in (path := str(item)) and not hasattr(get_file_backend(path), 'isdir'):
        yield path  # http has neither folders nor a cheap look at whether it is there
    else:
        path = osp.expanduser(path)
        backend = get_file_backend(path)
        if not backend.exists(path):
            raise FileNotFoundError(f'no such image or folder: {path}')
        if not backend.isdir(path):
            yield path
            return
        names = sorted(name for name in backend.list_dir_or_file(path, list_dir=False)
                       if name.lower().endswith(SUFFIXES))
        if not names:
            raise FileNotFoundError(f'no image in the folder {path}: it has no file that ends in {", ".join(SUFFIXES)} '
                                    '(subfolders are not searched)')
        for name in names:
            yield join_path(path, name)


def thresholds(thr: float | Sequence[float] | Mapping[str, float], classes: Sequence[str], default: float) -> Tensor:
    """One threshold per class, float32 (C,).

    Args:
        thr: A number, one per class, or numbers by name.
        classes: Names of the C classes.
        default: Of classes that a dict does not name.

    Raises:
        ValueError: A threshold is outside [0, 1], a name is no class, or there are not C thresholds.
    """
    if isinstance(thr, Mapping):
        if unknown := [name for name in thr if name not in classes]:
            raise ValueError(f'thr names {unknown}, which are none of the {len(classes)} classes '
                             f'{_shorten(classes)}')
        thr = [thr.get(name, default) for name in classes]
    values = torch.as_tensor(thr, dtype=torch.float32)
    if values.dim() > 1 or (values.dim() == 1 and len(values) != len(classes)):
        raise ValueError(f'thr has {values.numel()} values for {len(classes)} classes: give a number, one per class, '
                         'or a dict by name')
    values = values.expand(len(classes))
    wrong = ~((values >= 0) & (values <= 1))
    if wrong.any():
        place = int(wrong.int().argmax())
        raise ValueError(f'thr={values[place]:g} of {classes[place]!r} must be in [0, 1]')
    return values


def parse_thr(values: Sequence[str]) -> float | dict[str, float] | None:
    """Thresholds as the tools take them: 'NUMBER', or 'CLASS=NUMBER' for each class, or nothing.

    Raises:
        ValueError: A value is neither, or there are several for all classes.
    """
    parts = [value.rpartition('=') for value in values]
    try:
        named = {name: float(number) for name, equals, number in parts if equals}
        numbers = [float(number) for _, equals, number in parts if not equals]
    except ValueError:
        raise ValueError(f'--thr {values}: give NUMBER or CLASS=NUMBER') from None
    if len(numbers) > 1 or (numbers and named):
        raise ValueError(f'--thr {values}: give one NUMBER, or CLASS=NUMBER for each class')
    return numbers[0] if numbers else named or None


def why_unreadable(error: Exception) -> str:
    """The reason in an error of mmcv's LoadImageFromFile, whose own words for a broken image are an assertion's."""
    if isinstance(error, (AssertionError, cv2.error)):
        return 'no image, or a damaged one'
    return f'{type(error).__name__}: {error}'


def _shorten(names: Sequence[str]) -> str:
    return ', '.join(map(str, names[:MOST_NAMES])) + (', ...' if len(names) > MOST_NAMES else '')


def _require_file(path: str | PathLike, what: str) -> None:
    if not osp.isfile(osp.expanduser(path)):
        raise FileNotFoundError(f'no such {what}: {path}')


# --- checkpoints

def load_checkpoint(path: str | PathLike) -> dict:
    """A checkpoint on the CPU, without executing anything in it; MMEngine's own loader falls back to executing.

    Files of the official repository come in MMEngine's layout.

    Args:
        path: File, or http(s) URL, which is kept in torch.hub's folder.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is no checkpoint, or holds other objects than MMEngine's checkpoints do.
    """
    checkpoint = read_checkpoint(path)
    return convert_official(checkpoint) if is_official(checkpoint) else checkpoint


def load_weights(model: nn.Module, checkpoint: dict, name: str) -> None:
    """Load all weights of a model; MMEngine's own loader leaves those that do not fit as they are, which is noise.

    Raises:
        ValueError: The checkpoint lacks weights, or has them in other shapes.
    """
    try:
        missing, unexpected = model.load_state_dict(checkpoint.get('state_dict', checkpoint), strict=False)
    except RuntimeError as error:
        raise ValueError(f'{name} does not fit the model of the config, which must be that of its training: '
                         f'{" ".join(str(error).split())}') from None
    if missing:
        raise ValueError(f'{name} does not fit the model of the config, which must be that of its training: it lacks '
                         f'{len(missing)} weights: {_shorten(missing)}')
    if unexpected:
        warnings.warn(f'{name} has {len(unexpected)} weights that the model of the config does not: '
                      f'{_shorten(unexpected)}', stacklevel=2)


def class_names(checkpoint: dict) -> Sequence[str] | None:
    """The names of the classes in a checkpoint, where MMEngine and older versions keep them."""
    meta = checkpoint.get('meta') or {}
    return {key.lower(): value for key, value in (meta.get('dataset_meta') or meta).items()}.get('classes') or None


def inference_data(cfg: Config) -> Config:
    """The data set of a config's test data, inside those that wrap it."""
    if not cfg.get('test_dataloader'):
        raise ValueError('the config has no test_dataloader, whose pipeline prepares the images')
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    return dataset


def _config_classes(dataset: Config) -> Sequence[str] | None:
    names = (dataset.get('metainfo') or {}).get('classes') or dataset.get('classes')
    if isinstance(names, str):
        return mmengine.list_from_file(names)
    return names or (getattr(DATASETS.get(dataset.type), 'METAINFO', None) or {}).get('classes')


# --- pictures

def name_picture(image: str | None, taken: dict[str, str]) -> str:
    """A file name without suffix for the picture of an image, which no other image has.

    Args:
        image: Path or URL, None for an array.
        taken: The image of each name so far; the new name is put in.
    """
    path = urlparse(image).path if image and '://' in image else image
    stem = Path(path).stem or 'image' if path is not None else f'array_{len(taken)}'
    image = image or stem
    name = next(name for name in chain([stem], (f'{stem}_{i}' for i in count(1))) if taken.get(name, image) == image)
    taken[name] = image
    return name


def draw_labels(image: np.ndarray, sample: BaseDataElement, classes: Sequence[str], rule: Rule) -> np.ndarray:
    """An image beside bars for its labels, each with its score and a tick at its threshold.

    Args:
        image: (H, W, 3) uint8, RGB.
        sample: With ``pred_score``, ``pred_label`` and, by the rule, ``calibrated_score``.
        classes: Names of the classes.
        rule: What the labels were decided by.

    Returns:
        The picture, (H', W', 3) uint8, RGB. Labels that are not predicted are grey.
    """
    predicted = set(sample.pred_label.tolist())
    shown = rule.rank(sample).tolist()
    # Predicted labels first: with thresholds by class a better score can fall short of its own.
    shown = sorted(shown, key=lambda label: label not in predicted)
    shown = shown[:min(max(len(predicted), FEWEST_BARS), BARS)]
    scores = rule.score(sample)[shown].tolist()
    height = max(3.2, 0.3 * len(shown) + 1)
    figure = Figure(figsize=(9, height), dpi=100, layout='constrained')
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.imshow(image)
    left.axis('off')
    places = range(len(shown))
    right.barh(places, scores, color=['C0' if label in predicted else 'lightgrey' for label in shown])
    for place, label, score in zip(places, shown, scores):
        right.text(1.02, place, f'{score:.2f}', va='center', weight='bold' if label in predicted else 'normal')
    if rule.thr is not None:
        right.scatter(rule.thr[shown], places, marker='|', s=200, color='C3')
    names = (classes[label] for label in shown)
    right.set_yticks(places, [name if len(name) <= 28 else f'{name[:27]}…' for name in names], parse_math=False)
    hidden = max(len(predicted) - len(shown), 0)
    axis = ['calibrated score' if rule.calibrated else 'p']
    axis += ['threshold in red'] if rule.thr is not None else []
    axis += [f'{hidden} labels more'] if hidden else []
    right.set(xlim=(0, 1), ylim=(max(len(shown), FEWEST_BARS) - 0.4, -0.6), xlabel=', '.join(axis))
    right.spines[['top', 'right']].set_visible(False)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
