"""Complete training steps of ResNet-50 and FCOS-R50, with ASL and with the stock loss."""
from collections.abc import Callable, Iterator

import torch
from mmengine.hub import get_config
from mmengine.registry import DefaultScope
from torch import nn

from benchmarks.speed.measure import in_turn
from mmasl.registry import MODELS

ASL = dict(type='mmasl.AsymmetricLoss', use_sigmoid=True)
CLASSES = 80


def classifier(loss: dict, images: int, size: tuple[int, int]) -> tuple[nn.Module, torch.Tensor, list]:
    """MMPretrain's ResNet-50 with a multi-label head for 80 classes."""
    model = MODELS.build(dict(
        type='mmpretrain.ImageClassifier', backbone=dict(type='mmpretrain.ResNet', depth=50),
        neck=dict(type='mmpretrain.GlobalAveragePooling'),
        head=dict(type='mmpretrain.MultiLabelLinearClsHead', num_classes=CLASSES, in_channels=2048, loss=loss)))
    return model, *classifier_inputs(images, size, CLASSES)


def classifier_inputs(images: int, size: tuple[int, int], classes: int) -> tuple[torch.Tensor, list]:
    """Random images, and samples in which a class is present with probability 0.04."""
    from mmpretrain.structures import DataSample
    samples = [DataSample().set_gt_score((torch.rand(classes) < 0.04).float()) for _ in range(images)]
    return torch.randn(images, 3, *size), samples


def detector(loss: dict, images: int, size: tuple[int, int]) -> tuple[nn.Module, torch.Tensor, list]:
    """MMDetection's stock FCOS-R50, with seven boxes per image."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData
    config = get_config('mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py').model
    config.backbone.init_cfg = None
    config.bbox_head.loss_cls = loss
    model = MODELS.build(dict(config, type='mmdet.FCOS'))
    samples = []
    for _ in range(images):
        corner = torch.rand(7, 2) * torch.tensor([size[1] * 0.7, size[0] * 0.7])
        sample = DetDataSample(metainfo=dict(img_shape=size, batch_input_shape=size))
        extent = (0.05 + torch.rand(7, 2) * 0.25) * size[0]
        sample.gt_instances = InstanceData(bboxes=torch.cat([corner, corner + extent], 1),
                                           labels=torch.randint(CLASSES, (7, )))
        samples.append(sample)
    return model, torch.randn(images, 3, *size), samples


CASES = {
    'ResNet-50, 224 px': ('mmpretrain', classifier, dict(cpu=64, cuda=256), (224, 224), dict(
        bce=dict(type='mmpretrain.CrossEntropyLoss', use_sigmoid=True),
        asl=dict(ASL, gamma_pos=0., gamma_neg=4., clip=0.05))),
    'FCOS-R50, 800 x 1344 px': ('mmdet', detector, dict(cpu=1, cuda=16), (800, 1344), dict(
        focal=dict(type='mmdet.FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25),
        asl=dict(ASL, gamma_pos=1., gamma_neg=2., clip=0., alpha=0.25))),
}


def train_step(loss: dict, build: Callable, images: int, size: tuple[int, int], device: str) -> Callable[[], None]:
    """A call that runs one training step with a loss, with mixed precision on a GPU."""
    torch.manual_seed(0)
    model, inputs, samples = build(loss, images, size)
    model, inputs, samples = model.to(device).train(), inputs.to(device), [sample.to(device) for sample in samples]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    scaler = torch.amp.GradScaler(device, enabled=device == 'cuda')

    def call() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16, enabled=device == 'cuda'):
            losses = model(inputs, samples, mode='loss')
        scaler.scale(model.parse_losses(losses)[0]).backward()
        scaler.step(optimizer)
        scaler.update()

    return call


def loss_only(loss: dict, images: int, device: str, is_detector: bool) -> Callable[[], None]:
    """A call that runs forward and backward of the classification loss alone, on logits of the step's size."""
    generator = torch.Generator().manual_seed(0)
    module = MODELS.build(loss).to(device)
    if is_detector:
        logits = torch.randn(images * 22400, CLASSES, generator=generator) - 4
        target = torch.where(torch.rand(len(logits), generator=generator) < 0.01, 3, CLASSES)
    else:
        logits = torch.randn(images, CLASSES, generator=generator)
        target = (torch.rand(images, CLASSES, generator=generator) < 0.04).float()
    logits, target = logits.to(device).requires_grad_(), target.to(device)

    def call() -> None:
        logits.grad = None
        module(logits, target, avg_factor=images).backward()

    return call


def measure(device: str, quick: bool = False) -> Iterator[dict]:
    """Time the steps and the losses alone.

    Args:
        device: 'cpu' or 'cuda'.
        quick: One small image and two rounds, to see that everything runs.
    """
    for case, (scope, build, images, size, losses) in CASES.items():
        stock = next(iter(losses))
        again = f'{stock} again'  # its difference from the first is noise of the machine
        seconds, least = (0, 1) if quick else (60, 4) if device == 'cpu' else (15, 4)
        with DefaultScope.overwrite_default_scope(scope):
            count, pixels = (1, (128, 160)) if quick else (images[device], size)
            variants = losses | {again: losses[stock]}
            steps = in_turn({name: train_step(loss, build, count, pixels, device) for name, loss in variants.items()},
                            seconds, least, min)
            alone = in_turn({name: loss_only(loss, count, device, scope == 'mmdet') for name, loss in losses.items()},
                            0.1 if quick else 3)
        for name in variants:
            row = dict(model=case, images=count, loss=name, step_ms=round(1e3 * steps[name], 2),
                       step_over_stock=round(steps[name] / steps[stock], 4))
            yield row if name == again else row | dict(
                loss_alone_ms=round(1e3 * alone[name], 4),
                difference_of_losses_over_step=round((alone[name] - alone[stock]) / steps[stock], 5))


def targets(rows: list[dict]) -> list[tuple[str, str, bool]]:
    """Targets: description, measured value, whether it is reached."""
    results, noise = [], {}
    for row in rows:
        if row['loss'].endswith('again'):
            noise[row['model']] = float(row['step_over_stock']) - 1
    for row in rows:
        if row['loss'] == 'asl':
            step, loss = float(row['step_over_stock']) - 1, float(row['difference_of_losses_over_step'])
            results.append((f"{row['model']}: a training step with ASL at most 1 % longer than with the stock loss",
                            (f"{step:+.1%}, the stock loss again {noise[row['model']]:+.1%}; "
                             f'the losses alone {loss:+.2%}'), step <= 0.01))
    return results
