"""Two gloo processes against one process with the joint batch: real runners, heads, hooks and metrics."""
import importlib.util
import multiprocessing
import os

import pytest
import torch
import torch.multiprocessing
from mmdet.registry import MODELS as DETECTION
from mmdet.structures import DetDataSample
from mmengine._strategy.utils import MetaTensorContext
from mmengine.dataset import BaseDataset
from mmengine.model import BaseModule
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.runner._flexible_runner import FlexibleRunner
from mmengine.structures import InstanceData
from mmpretrain.registry import MODELS as CLASSIFICATION
from mmpretrain.structures import DataSample
from torch import nn
from torch.testing import assert_close
from torch.utils.data import Dataset

from mmasl import AsymmetricLoss
from mmasl.engine.hooks.adaptive_asymmetry import restore_asymmetry
from mmasl.engine.hooks.checks import CheckDataHook
from mmasl.errors import DataError
from mmasl.models.losses.utils import find_losses
from mmasl.ops import linear_asymmetric_loss

# Processes are forked from one that has imported the slow packages.
multiprocessing.get_context('forkserver').set_forkserver_preload(
    ['tools.train', 'mmpretrain.models', 'mmpretrain.datasets', 'mmdet.models'])
CLASSES, PER_RANK = 5, 4
GAMMA = 2.


@CLASSIFICATION.register_module(name='ParallelTestBackbone')
@DETECTION.register_module(name='ParallelTestBackbone')
class Backbone(BaseModule):
    """Two maps of 8 channels, of strides 8 and 16, without statistics of the batch."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 8, stride=8), nn.Conv2d(8, 8, 3, stride=2, padding=1)

    def forward(self, x):
        x = self.first(x).relu()
        return x, self.second(x).relu()


class Pictures(Dataset):
    """Noise with a bright square for each label; odd samples of every second batch of 8 have no label.

    Two processes share the samples by turns: there process 1 has no positive.
    """
    metainfo = dict(classes=[f'class {i}' for i in range(CLASSES)])

    def __init__(self, size, boxes=False):
        generator = torch.Generator().manual_seed(0)
        self.images = 50 * torch.randn(size, 3, 32, 32, generator=generator)
        self.labels = torch.rand(size, CLASSES, generator=generator) < 0.4
        number = torch.arange(size)
        self.labels[(number % 2 == 1) & (number // 8 % 2 == 1)] = False
        self.labels[0, 0] = True
        for image, label in (self.labels.nonzero()).tolist():
            self.images[image, label % 3, 6 * label:6 * label + 6, 6 * label:6 * label + 6] += 100
        self.boxes = boxes

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        labels = self.labels[index].nonzero().flatten()
        if self.boxes:
            corners = 6. * labels[:, None].expand(-1, 2)
            sample = DetDataSample(metainfo=dict(img_shape=(32, 32), ori_shape=(32, 32), scale_factor=(1, 1)))
            sample.gt_instances = InstanceData(bboxes=torch.cat([corners, corners + 6], 1), labels=labels)
        else:
            sample = DataSample().set_gt_label(labels)
        return dict(inputs=self.images[index], data_samples=sample)


def asl(**kwargs):
    return dict(type='mmasl.AsymmetricLoss', use_sigmoid=True, gamma_neg=GAMMA, **kwargs)


CLASSIFIER = dict(
    type='mmpretrain.ImageClassifier', backbone=dict(type='ParallelTestBackbone'),
    neck=dict(type='GlobalAveragePooling'), data_preprocessor=dict(mean=[0.] * 3, std=[50.] * 3),
    head=dict(type='MultiLabelLinearClsHead', num_classes=CLASSES, in_channels=8, loss=asl()))
DETECTOR = dict(
    type='mmdet.FCOS', backbone=dict(type='ParallelTestBackbone'), neck=None,
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[0.] * 3, std=[50.] * 3),
    bbox_head=dict(type='FCOSHead', num_classes=CLASSES, in_channels=8, feat_channels=32, stacked_convs=1,
                   strides=[8, 16], regress_ranges=((-1, 4), (4, 1e8)),
                   loss_cls=asl(gamma_pos=1., clip=0., alpha=0.25)))


def make_runner(folder, model, data, batch_size, val=None, runner=Runner, epochs=2, optimizer='OptimWrapper',
                sampler=None, **kwargs):
    """A runner that controls gamma_neg, and evaluates ``val`` after each epoch."""
    def loader(dataset, **sampler):
        return dict(dataset=dataset, batch_size=batch_size, num_workers=0, collate_fn=dict(type='pseudo_collate'),
                    sampler=dict(type='DefaultSampler', **sampler))

    if val:
        kwargs |= dict(val_dataloader=loader(val, shuffle=False), val_cfg=dict(), val_evaluator=dict(
            type='mmasl.MultiLabelMetric', collect_dir=f'{folder}/parts'))
    return runner(
        model=model, work_dir=str(folder), experiment_name=str(folder), default_scope=model['type'].split('.')[0],
        train_dataloader=loader(data, **{'shuffle': False, **(sampler or {})}),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(type=optimizer, optimizer=dict(type='SGD', lr=0.05, momentum=0.9)),
        custom_hooks=[dict(type='mmasl.AdaptiveAsymmetryHook', target=0.3, begin=0., step=1.)],
        randomness=dict(seed=0), log_level='ERROR', **kwargs)


def train(runner, parameters=True) -> dict:
    """Train, and return the logged scalars of each update, the last metrics and the parameters."""
    runner.train()
    scalars = {name: torch.tensor([float(x) for x in history.data[0]])
               for name, history in runner.message_hub.log_scalars.items()}
    found = dict(
        logged={name.split('/')[1]: values for name, values in scalars.items() if name.startswith('train/')},
        metrics={name: values[-1].item() for name, values in scalars.items() if name.startswith('val/multi-label/')})
    if parameters:
        module = getattr(runner.model, 'module', runner.model)
        found['parameters'] = dict(module.state_dict())
    return found


DDP = dict(launcher='pytorch', cfg=dict(model_wrapper_cfg=dict(
    type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)))
UNEVEN = dict(sampler=dict(round_up=False), epochs=1)
SHUFFLED = dict(sampler=dict(shuffle=True))
# offload_to_cpu=True, which 'full' means, reads freed memory where the parameters already are on the CPU.
FULL = dict(state_dict_type='FULL_STATE_DICT', **{
    f'{part}state_dict_config': dict(type=f'Full{kind}Config', offload_to_cpu=False, rank0_only=False)
    for part, kind in (('', 'StateDict'), ('optim_', 'OptimStateDict'))})


FSDP = dict(runner=FlexibleRunner, launcher='pytorch', strategy=dict(
    type='FSDPStrategy', model_wrapper=dict(device_id='cpu'), state_dict_cfg=FULL))


def start(rank, folder):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2')
    torch.distributed.init_process_group('gloo', f'file://{folder}/gloo', rank=rank, world_size=2)


def linear_problem():
    """Features of 8 samples, weight, bias and sparse labels of 10 classes."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((8, 6), (10, 6), (10, )))
    return x, weight, bias, (torch.rand(8, 10, generator=generator) < 0.3).float().to_sparse()


def loss_of_classes(rank):
    """The joint loss and the gradients of a rank's samples and classes, if each rank has half of both, as in
    docs/scale.md."""
    x, weight, bias, target = linear_problem()
    own, classes = x[4 * rank:4 * rank + 4], slice(5 * rank, 5 * rank + 5)
    parts = [torch.empty_like(own) for _ in range(2)]
    torch.distributed.all_gather(parts, own)
    x, weight, bias = (t.requires_grad_() for t in (torch.cat(parts), weight[classes].clone(), bias[classes].clone()))
    target = target.to_dense()[:, classes].to_sparse()
    loss = linear_asymmetric_loss(x, weight, bias, target, scale=1 / 8, chunk_size=2)
    loss.backward()
    loss = loss.detach()
    torch.distributed.all_reduce(loss)
    torch.distributed.all_reduce(x.grad)  # a reduce-scatter where it has to be fast
    return loss, x.grad[4 * rank:4 * rank + 4], weight.grad, bias.grad


class Missing(BaseDataset):
    """A data set whose image file does not exist."""
    METAINFO = dict(classes=['a'])

    def load_data_list(self):
        return [dict(img_path='none.jpg', gt_label=[0])]


def refused(folder):
    """The message with which a rank refuses data; rank 0 alone looks at them."""
    runner = make_runner(folder, CLASSIFIER, Missing(), PER_RANK, **DDP)
    runner.register_hook(CheckDataHook())
    with pytest.raises(DataError) as error:
        runner.train()
    return str(error.value)


def two_ranks(rank, folder):
    start(rank, folder)
    found = dict(
        refused=refused(f'{folder}/refused'),
        classifier=train(make_runner(f'{folder}/cls', CLASSIFIER, Pictures(22), PER_RANK, Pictures(13), **DDP)),
        shuffled=train(make_runner(f'{folder}/shuffled', CLASSIFIER, Pictures(22), PER_RANK, **SHUFFLED, **DDP)),
        uneven=train(make_runner(f'{folder}/uneven', CLASSIFIER, Pictures(21), PER_RANK, **UNEVEN, **DDP)),
        detector=train(make_runner(f'{folder}/det', DETECTOR, Pictures(22, True), PER_RANK, **DDP)),
        fsdp=train(make_runner(f'{folder}/fsdp', CLASSIFIER, Pictures(22), PER_RANK, Pictures(13), **FSDP), False),
        shards=loss_of_classes(rank))
    torch.save(found, f'{folder}/{rank}.pt')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ranks')
    torch.multiprocessing.start_processes(two_ranks, (str(folder), ), nprocs=2, start_method='forkserver')
    return folder


@pytest.fixture(scope='module')
def ranks(folder):
    return [torch.load(folder / f'{rank}.pt', weights_only=False) for rank in range(2)]


@pytest.fixture(scope='module')
def joint_classifier(tmp_path_factory):
    return train(make_runner(tmp_path_factory.mktemp('joint'), CLASSIFIER, Pictures(22), 2 * PER_RANK, Pictures(13)))


def assert_same(ranks, joint, losses=('loss', )):
    """Both ranks have the values of the joint process. Each logs the loss of its own batch; their mean is compared."""
    assert len(joint['logged']['loss']) == 6
    for found in ranks:
        for name in ('gap', 'p_t_pos', 'p_t_neg', 'gamma_neg'):
            assert_close(found['logged'][name], joint['logged'][name], rtol=1e-4, atol=1e-5)
        assert found['metrics'] == pytest.approx(joint['metrics'], rel=1e-4)
        if 'parameters' in found:
            assert_close(found['parameters'], joint['parameters'], rtol=1e-4, atol=1e-5)
    for name in losses:
        first, second = (found['logged'][name] for found in ranks)
        assert_close((first + second) / 2, joint['logged'][name], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(first, second, rtol=1e-2)


def test_the_setting():
    """Process 1 has no positive in the second batch."""
    labels = Pictures(22).labels
    assert not labels[9:16:2].any() and labels[8:16:2].any() and labels[1::2].any()
    assert len(labels) % (2 * PER_RANK) == 6, 'the last batch is a smaller one'


def test_all_ranks_refuse_bad_data(ranks):
    """Rank 1 does not wait in a collective operation: the other trainings ran later in the same processes."""
    first, second = (found['refused'] for found in ranks)
    assert first == second and '1 of 1 images of train_dataloader.dataset are missing' in first


def test_classifier(ranks, joint_classifier):
    """Gradients, gap, gamma and metrics; 13 samples are evaluated, of which process 1 gets the first once more."""
    assert_same([found['classifier'] for found in ranks], joint_classifier)
    assert joint_classifier['logged']['gamma_neg'].std() > 0.1 and len(joint_classifier['metrics']) > 10


def test_shuffled(ranks, tmp_path):
    joint = train(make_runner(tmp_path, CLASSIFIER, Pictures(22), 2 * PER_RANK, **SHUFFLED))
    assert_same([found['shuffled'] for found in ranks], joint)


def test_detector(ranks, tmp_path):
    """FCOS divides by the mean over ranks of the number of positives: the mean of the ranks' losses is the joint
    loss, also where a rank has no positive."""
    joint = train(make_runner(tmp_path, DETECTOR, Pictures(22, True), 2 * PER_RANK))
    assert_same([found['detector'] for found in ranks], joint, ('loss_cls', 'loss_bbox', 'loss_centerness', 'loss'))
    assert ranks[1]['detector']['logged']['loss_bbox'][1] == 0


def test_uneven_ranks(ranks, tmp_path):
    """Without round_up the last batch has 3 samples on rank 0 and 2 on rank 1. Gap and gamma are those of the joint
    batch. The gradient weighs ranks equally, as in data parallel training, not samples."""
    joint = train(make_runner(tmp_path, CLASSIFIER, Pictures(21), 2 * PER_RANK, **UNEVEN))
    for found in (found['uneven'] for found in ranks):
        assert len(joint['logged']['gap']) == 3
        for name in ('gap', 'gamma_neg'):
            assert_close(found['logged'][name], joint['logged'][name], rtol=1e-4, atol=1e-5)
    first, second = (found['uneven']['logged']['loss'] for found in ranks)
    assert_close((3 * first + 2 * second)[2] / 5, joint['logged']['loss'][2], rtol=1e-4, atol=1e-5)
    head = 'head.fc.bias'
    assert_close(ranks[0]['uneven']['parameters'], ranks[1]['uneven']['parameters'], rtol=0, atol=0)
    assert not torch.allclose(ranks[0]['uneven']['parameters'][head], joint['parameters'][head], rtol=1e-4)


def test_classes_in_shards(ranks):
    """Loss and gradients where a process has half of the classes, not half of the loss."""
    *tensors, target = linear_problem()
    tensors = [x.requires_grad_() for x in tensors]
    loss = linear_asymmetric_loss(*tensors, target, scale=1 / 8)
    loss.backward()
    (first, *halves), (second, *others) = (found['shards'] for found in ranks)
    assert_close([first, second], [loss.detach()] * 2)
    assert_close([torch.cat(pair) for pair in zip(halves, others)], [x.grad for x in tensors])


# --- MMEngine's other strategies

def test_fsdp(ranks, folder, joint_classifier):
    """Sharded parameters give the same numbers. The checkpoint loads into a plain model and holds gamma."""
    assert_same([found['fsdp'] for found in ranks], joint_classifier)
    checkpoint = torch.load(folder / 'fsdp' / 'epoch_2.pth', weights_only=False)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = CLASSIFICATION.build(CLASSIFIER)
    model.load_state_dict(checkpoint['state_dict'], strict=True)
    assert_close(dict(model.state_dict()), joint_classifier['parameters'], rtol=1e-4, atol=1e-5)
    assert restore_asymmetry(model, checkpoint)
    gamma = find_losses(model)['head.loss_module'].gamma_neg
    assert_close(gamma, joint_classifier['logged']['gamma_neg'][-1], rtol=1e-4, atol=1e-5)


def test_parameters_of_the_loss_survive_to_empty():
    """FSDPStrategy(skip_init_weights=True) builds on the meta device and fills with to_empty, which leaves garbage."""
    with MetaTensorContext():
        model = nn.ModuleList([nn.Linear(2, 2), AsymmetricLoss(gamma_neg=2.5, clip=[0.1, 0.2])])
    assert model[0].weight.is_meta
    model.to_empty(device='cpu')
    assert not model[0].weight.is_meta and model[1].gamma_neg == 2.5
    assert_close(model[1].clip, torch.tensor([0.1, 0.2]))


def two_deepspeed_ranks(rank, folder):
    import deepspeed
    start(rank, folder)
    deepspeed.init_distributed('gloo')  # uses the existing group; the strategy's own start needs a GPU
    runner = make_runner(
        f'{folder}/w', CLASSIFIER, Pictures(22), PER_RANK, Pictures(13), FlexibleRunner,
        optimizer='DeepSpeedOptimWrapper', strategy=dict(
            type='DeepSpeedStrategy', zero_optimization=dict(stage=3), train_micro_batch_size_per_gpu=PER_RANK,
            config=dict(zero_allow_untested_optimizer=True)))
    torch.save(train(runner, parameters=False), f'{folder}/{rank}.pt')


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('deepspeed'), reason='DeepSpeed is not installed')
def test_deepspeed(joint_classifier, tmp_path, monkeypatch):
    monkeypatch.setenv('DS_ACCELERATOR', 'cpu')
    torch.multiprocessing.spawn(two_deepspeed_ranks, (str(tmp_path), ), nprocs=2)
    assert_same([torch.load(tmp_path / f'{rank}.pt', weights_only=False) for rank in range(2)], joint_classifier)
