"""Inferencer for multi-label classifiers of MMPretrain."""
import copy
import os.path as osp
import warnings
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import mmcv
import mmengine
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, default_collate
from mmengine.infer import BaseInferencer
from mmengine.registry import MODELS, TRANSFORMS, DefaultScope
from mmengine.structures import BaseDataElement
from mmengine.visualization import Visualizer
from torch import nn
from torch.utils.data import DataLoader

from mmasl.apis.drawing import as_rgb, choose_name, draw_labels, use_font
from mmasl.apis.images import (
    Image,
    check_out_dir,
    describe_read_error,
    list_images,
    match_channels,
    unreadable_images,
)
from mmasl.apis.label_rule import LabelRule
from mmasl.apis.model_files import config_classes, inference_dataset, load_checkpoint
from mmasl.datasets.validation import require_depth
from mmasl.engine.hooks.adaptive_asymmetry import restore_asymmetry
from mmasl.errors import CheckpointError, ConfigError, NonFiniteError
from mmasl.models.losses.asymmetric_loss import AsymmetricLoss
from mmasl.models.losses.utils import calibration_settings
from mmasl.ops import posterior_upper_bound
from mmasl.utils.checkpoint import checkpoint_classes, inner_model, load_weights
from mmasl.utils.config import is_kind
from mmasl.utils.thresholds import STORED, expand_thresholds
from mmasl.utils.tools import drop_pretrained

DEFAULT_THR = 0.5  # for classes without a threshold of the caller or of the head


class MultiLabelInferencer(BaseInferencer):
    """Predicts the labels of images with a multi-label classifier of MMPretrain.

    The head must be an :class:`mmpretrain.models.MultiLabelClsHead` or derive from it, as the heads of mmasl do.
    Checkpoints are read without executing anything in them. Asymmetry that was adapted during training is restored. The
    class names come from the checkpoint, or else from the config's test data, or else are numbers, with a warning.

    Args:
        model: Config: a file, :class:`mmengine.Config` or dict. Its ``test_dataloader`` has the pipeline.
        weights: Checkpoint of a training with this config: a file or an http(s) URL.
        device: Device, such as 'cuda:0'; None for the best available.
        show_progress: Whether to draw a progress bar.

    Raises:
        CheckpointError: The checkpoint is missing, unsafe or damaged, or does not fit the model.
        ConfigError: The config is missing or belongs to another kind of model, its test pipeline does not start with
            LoadImageFromFile, or class names, head and checkpoint disagree.

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
            if not osp.isfile(osp.expanduser(model)):
                raise ConfigError(f'no such config: {model}')
            model = Config.fromfile(model)
        self.classes: list[str] = []
        self.rule = LabelRule(None, None, False)
        self._unreadable: dict[str, str] = {}
        self._pictures: dict[str, str] = {}
        self._out_dir: str | PathLike = ''
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
        """Predict the labels of images.

        Args:
            inputs: File, folder (its images by name, without subfolders), URL, array (H, W, 3) of uint8 in BGR or
                (H, W) of grey, array (N, H, W, 3), or a list of these. Arrays get the channels that the loader
                gives files.
            return_datasamples: Whether to return data samples with the scores of all classes instead of dicts.
            batch_size: Images per batch. Images of different sizes after the pipeline are split further.
            thr: Thresholds in [0, 1]: a number, one per class, or a dict by class name. The head's ``thr`` is used for
                classes that the dict does not name.
            topk: Number of labels per image: the k highest scores. With ``thr``, only those that pass it. Without
                both, the thresholds in the checkpoint decide (tools/calibrate.py writes them), or else the head.
            calibrated: Whether ``thr`` applies to the calibrated score, the probability that a label is right, or to p.
                None: to the calibrated score if the head predicts it.
            show: Whether to show pictures in windows.
            wait_time: Seconds that each window is shown; 0 waits for a key.
            out_dir: Folder for pictures, .png. Images with the same name get different picture names.
            return_vis: Whether to return the pictures.
            out_file: JSON file for the predictions as dicts.

        Returns:
            ``predictions``: one item per image in the order of the inputs. A dict has ``img_path`` (None for an array)
            and, in descending order of the scores, ``pred_label``, ``pred_class``, ``pred_score`` and, if predicted,
            ``calibrated_score``. A data sample is on the CPU and has ``pred_label`` and the scores of all classes.
            ``visualization``: (H, W, 3) uint8 arrays in RGB, or None.

        Raises:
            DataError: A file does not exist, a folder has no image, or an array is not an image. Raised before
                anything is predicted.
            UnreadableImageError: Some images cannot be read. Raised after the others are predicted, drawn and written;
                its ``results`` has them.
            ConfigError: An argument is out of range, names an unknown class, or does not fit the number of classes or
                the head, or ``out_dir`` has one of the images.
            CheckpointError: The model predicts another number of classes than there are names.
            NonFiniteError: The model predicts NaN.
        """
        if out_file and not str(out_file).endswith('.json'):
            raise ConfigError(f'out_file={str(out_file)!r}: give a .json file')
        self._out_dir = out_dir
        self.rule = self.make_rule(thr, topk, calibrated)
        self._unreadable = {}
        results = super().__call__(
            inputs, return_datasamples, batch_size, show=show, wait_time=wait_time, out_dir=out_dir,
            return_vis=return_vis, out_file=out_file)
        if self._unreadable:
            raise unreadable_images(self._unreadable, results)
        return results

    def make_rule(self,
                  thr: float | Sequence[float] | Mapping[str, float] | None = None,
                  topk: int | None = None,
                  calibrated: bool | None = None) -> LabelRule:
        """Make the rule that decides on the labels, from arguments of :meth:`__call__` and the head.

        Raises:
            ConfigError: See :meth:`__call__`.
        """
        head, classes = self.model.head, self.classes
        if calibrated and not self.calibrates:
            raise ConfigError(f'calibrated=True: {type(head).__module__}.{type(head).__name__} with '
                              f'{type(head.loss_module).__name__} predicts no calibrated_score. Use a head of mmasl, '
                              "such as model.head.type='mmasl.MultiLabelLinearClsHead', with the loss "
                              'mmasl.AsymmetricLoss; existing checkpoints work')
        if self.thresholds is not None and thr is None and topk is None and not calibrated:
            return LabelRule(self.thresholds, None, False)
        calibrated = self.calibrates if calibrated is None else calibrated
        if topk is not None and not 1 <= topk <= len(classes):
            raise ConfigError(f'topk={topk} must be from 1 to the {len(classes)} classes')
        if thr is None and topk is None:
            thr, topk = head.thr, head.topk if head.thr is None else None
        values = None if thr is None else expand_thresholds(thr, classes, DEFAULT_THR if head.thr is None else head.thr)
        if values is not None and calibrated:
            bound = posterior_upper_bound(**calibration_settings(head.loss_module)).float().cpu().expand_as(values)
            unreachable = (values >= bound) & (values < 1)  # thr=1 turns a class off
            if unreachable.any():
                worst = int(unreachable.int().argmax())
                raise ConfigError(f'thr={values[worst]:g} of {classes[worst]!r} is never exceeded: with this clip, '
                                  f'calibrated scores stay below {bound[worst]:.3g}')
        return LabelRule(values, topk, calibrated)

    # --- initialisation

    def _init_model(self, cfg: Config, weights: str, device: str) -> nn.Module:
        # Imported here: detectors need no MMPretrain.
        from mmpretrain.models import MultiLabelClsHead

        from mmasl.models.heads.calibrated_predictions import CalibratedPredictions

        if 'data_preprocessor' in cfg:  # as MMEngine's Runner does
            cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
        drop_pretrained(cfg)
        checkpoint = load_checkpoint(weights)
        model = MODELS.build(cfg.model)
        whole, model = model, inner_model(model)
        head = getattr(model, 'head', None)
        if not isinstance(head, MultiLabelClsHead):
            raise ConfigError(f'model.head is {type(head).__name__}: use a multi-label head of MMPretrain or mmasl')
        # Applied here for every head; those of mmasl apply them in other tools, too.
        self.thresholds = checkpoint.get('state_dict', checkpoint).pop(STORED, None)
        self.guarantee = (checkpoint.get('meta') or {}).get('guarantee')
        load_weights(whole, checkpoint, weights)
        restore_asymmetry(model, checkpoint)
        # Heads on feature maps have this class with any loss.
        self.calibrates = isinstance(head, CalibratedPredictions) and isinstance(head.loss_module, AsymmetricLoss)
        self.classes = self._name_classes(cfg, checkpoint, getattr(head, 'num_classes', None))
        return model.to(device).eval()

    @staticmethod
    def _name_classes(cfg: Config, checkpoint: dict, number: int | None) -> list[str]:
        names, source = checkpoint_classes(checkpoint), 'the checkpoint'
        if names is None:
            names, source = config_classes(cfg), 'the config'
        if names is None:
            hint = 'Set test_dataloader.dataset.metainfo=dict(classes=[...])'
            if number is None:
                raise ConfigError('neither the checkpoint nor the config names the classes, and the head has no '
                                  f'num_classes. {hint}')
            warnings.warn(f'neither the checkpoint nor the config names the classes, so numbers are used. {hint}',
                          stacklevel=2)
            names = [str(place) for place in range(number)]
        if number is not None and len(names) != number:
            raise ConfigError(f'{source} names {len(names)} classes, but model.head.num_classes is {number}: use the '
                              'config and checkpoint of one training')
        return [str(name) for name in names]

    def _init_pipeline(self, cfg: Config) -> Compose:
        load, *rest = inference_dataset(cfg).pipeline
        if not is_kind(load['type'], mmcv.transforms.LoadImageFromFile, TRANSFORMS, 'mmpretrain'):
            raise ConfigError(f"the test pipeline starts with {load['type']}: it must start with LoadImageFromFile")
        self._loader = TRANSFORMS.build(load)
        return Compose(rest)

    def _init_collate(self, cfg: Config) -> Callable:
        return default_collate

    def _init_visualizer(self, cfg: Config) -> None:
        """Pictures do not use the config's visualizer."""

    # --- the steps of a call, in their order

    def _inputs_to_list(self, inputs: Image | Sequence[Image]) -> list[str | np.ndarray]:
        images = list_images(inputs)
        check_out_dir(images, self._out_dir)
        return images

    def preprocess(self, inputs: list[str | np.ndarray], batch_size: int = 1) -> DataLoader:
        """Load batches of images. Each item is a list with one batch for each image size."""
        images: Any = list(enumerate(inputs))  # a list is a valid data set
        return DataLoader(images, batch_size, collate_fn=self._collate)

    def _collate(self, items: list[tuple[int, str | np.ndarray]]) -> list[dict]:
        batches: dict[torch.Size, list[dict]] = {}
        for index, image in items:
            try:
                results = self._load(image)
            except Exception as error:  # each decoder has its own kinds
                self._unreadable[str(image)] = describe_read_error(error)
                continue
            packed = self.pipeline(results | dict(sample_idx=index))
            packed['data_samples'].set_metainfo(dict(sample_idx=index, img_path=results['img_path']))
            batches.setdefault(packed['inputs'].shape, []).append(packed)
        return [self.collate_fn(batch) for batch in batches.values()]

    def _load(self, image: str | np.ndarray) -> dict:
        if isinstance(image, str):
            require_depth(self._loader, image)
            return self._loader(dict(img_path=image))
        image = match_channels(image, self._loader.color_type)
        image = image.astype(np.float32) if self._loader.to_float32 else image
        return dict(img=image, img_path=None, img_shape=image.shape[:2], ori_shape=image.shape[:2])

    def forward(self, inputs: list[dict]) -> list[BaseDataElement]:
        """Predict batches. Returns the data samples on the CPU, with the labels that the rule of the call selects."""
        samples = [sample.cpu() for batch in inputs for sample in super(MultiLabelInferencer, self).forward(batch)]
        for sample in samples:
            image = sample.img_path or f'array {sample.sample_idx}'
            if len(sample.pred_score) != len(self.classes):
                raise CheckpointError(f'the model predicts {len(sample.pred_score)} classes, but {len(self.classes)} '
                                      'have names: use the config of the training of this checkpoint')
            if sample.pred_score.isnan().any():
                raise NonFiniteError(f'the model predicts NaN for {image}: check its weights and the image')
            sample.set_pred_label(self.rule.labels(sample))
        return samples

    def visualize(self,
                  inputs: list[str | np.ndarray],
                  preds: list[BaseDataElement],
                  show: bool = False,
                  wait_time: float = 0,
                  out_dir: str | PathLike = '',
                  return_vis: bool = False) -> list[np.ndarray] | None:
        """Draw, show, write and return the pictures; see :meth:`__call__` for the arguments."""
        preds.sort(key=lambda sample: sample.sample_idx)
        if not (show or out_dir or return_vis):
            return None
        if show and self.visualizer is None:
            self.visualizer = Visualizer()
        with use_font(self.classes):
            return self._draw(inputs, preds, show, wait_time, out_dir, return_vis)

    def _draw(self, inputs: list[str | np.ndarray], preds: list[BaseDataElement], show: bool, wait_time: float,
              out_dir: str | PathLike, return_vis: bool) -> list[np.ndarray] | None:
        pictures = []
        for sample in preds:
            source = inputs[sample.sample_idx]
            name = choose_name(source if isinstance(source, str) else None, self._pictures)
            image = as_rgb(self._load(source)['img'])
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
        """Assemble the results of :meth:`__call__`, and write them to ``out_file``."""
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
