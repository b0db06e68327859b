"""OneCycleMomentum against PyTorch's schedule, and RelativeEMAHook against its definition, in real runs."""
import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OneCycleParamScheduler, OptimWrapper
from mmengine.runner import Runner
from torch.optim.lr_scheduler import OneCycleLR

from mmasl.engine.hooks.ema import RelativeEMAHook
from mmasl.engine.schedulers import OneCycleMomentum

ROOT = Path(__file__).parents[2]
STEPS = 5  # an epoch


class Net(BaseModel):

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)
        self.fc = torch.nn.Linear(3, 2)

    def forward(self, inputs, mode):
        loss = self.fc(self.norm(torch.stack(inputs))).square().sum()
        return dict(loss=loss) if mode == 'loss' else [dict(weight=self.fc.weight.detach().clone())]


class Samples(torch.utils.data.Dataset):

    def __len__(self):
        return 4 * STEPS

    def __getitem__(self, index):
        return dict(inputs=torch.randn(3, generator=torch.Generator().manual_seed(index)))


class SeenWeights(BaseMetric):

    def process(self, data_batch, data_samples):
        self.results.append(data_samples[0]['weight'])

    def compute_metrics(self, results):
        SeenWeights.last = results[-1]
        return dict(x=1.)


class Recorder(Hook):
    """The weights after each update, and the optimizer's settings that made it."""
    priority = 'VERY_HIGH'

    def before_train(self, runner):
        self.weights, self.settings = [copy.deepcopy(runner.model.state_dict())], []

    def before_train_iter(self, runner, *args, **kwargs):
        self.settings.append([(group['lr'], *group['betas'], group['weight_decay'])
                              for group in runner.optim_wrapper.optimizer.param_groups])

    def after_train_iter(self, runner, *args, **kwargs):
        self.weights.append(copy.deepcopy(runner.model.state_dict()))


def make_runner(work_dir: Path, schedule: str, epochs: int | None = None, hooks=(), save=True,
                **kwargs) -> Runner:
    cfg = Config.fromfile(ROOT / 'configs/_base_/schedules' / schedule)
    loader = dict(batch_size=4, num_workers=0, dataset=Samples(), sampler=dict(type='DefaultSampler', shuffle=False))
    train_cfg = cfg.train_cfg if epochs is None else dict(cfg.train_cfg, max_epochs=epochs)
    checkpoint = dict(type='CheckpointHook', interval=1) if save else None
    torch.manual_seed(0)
    torch.serialization.add_safe_globals([OneCycleParamScheduler])
    return Runner(
        Net(), str(work_dir), train_dataloader=loader, val_dataloader=loader, val_evaluator=[SeenWeights()],
        optim_wrapper=cfg.optim_wrapper, param_scheduler=cfg.param_scheduler, train_cfg=train_cfg, val_cfg=dict(),
        custom_hooks=list(hooks), default_hooks=dict(logger=None, checkpoint=checkpoint),
        experiment_name=work_dir.name, log_level='ERROR', **kwargs)


def reference_settings(cycle: int, steps: int, lr: float, pct_start: float) -> list[tuple[float, float]]:
    """Learning rate and beta1 of PyTorch's schedule."""
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.)
    scheduler = OneCycleLR(optimizer, max_lr=lr, total_steps=cycle, pct_start=pct_start)
    values = []
    for _ in range(steps):
        values.append((optimizer.param_groups[0]['lr'], optimizer.param_groups[0]['betas'][0]))
        optimizer.step()
        scheduler.step()
    return values


# ----------------------------------------------------------------------------------------------- one-cycle

@pytest.mark.parametrize('schedule, cycle, epochs, lr, pct_start', [
    ('onecycle_60e.py', 60, 60, 2e-4, 0.3), ('official_41e.py', 80, 41, 1e-4, 0.2)], ids=['paper', 'official'])
def test_schedule_is_pytorchs(tmp_path, schedule, cycle, epochs, lr, pct_start):
    recorder = Recorder()
    runner = make_runner(tmp_path, schedule, hooks=[recorder], save=False)
    runner.train()
    assert len(recorder.settings) == epochs * STEPS
    expected = reference_settings(cycle * STEPS, epochs * STEPS, lr, pct_start)
    for groups, pair in zip(recorder.settings, expected):
        assert all(group[:2] == pytest.approx(pair, rel=1e-9) for group in groups)
    assert {group[2] for groups in recorder.settings for group in groups} == {0.999}
    if schedule == 'official_41e.py':
        assert recorder.settings[-1][0][0] == pytest.approx(0.67e-4, abs=0.02e-4)


def test_the_cycle_follows_the_number_of_epochs(tmp_path):
    recorder = Recorder()
    make_runner(tmp_path, 'onecycle_60e.py', epochs=4, hooks=[recorder]).train()
    found = [groups[0][:2] for groups in recorder.settings]
    expected = reference_settings(4 * STEPS, 4 * STEPS, 2e-4, 0.3)
    for pair, wanted in zip(found, expected, strict=True):
        assert pair == pytest.approx(wanted, rel=1e-9)


def test_no_decay_for_parameters_of_one_dimension(tmp_path):
    recorder = Recorder()
    runner = make_runner(tmp_path, 'official_41e.py', epochs=1, hooks=[recorder])
    runner.train()
    names = {id(parameter): name for name, parameter in runner.model.named_parameters()}
    decay = {names[id(group['params'][0])]: group['weight_decay']
             for group in runner.optim_wrapper.optimizer.param_groups}
    assert decay == {'norm.weight': 0, 'norm.bias': 0, 'fc.weight': 1e-4, 'fc.bias': 0}


@pytest.mark.parametrize('make, momentum', [
    (lambda p: torch.optim.SGD(p, lr=1, momentum=0.5), lambda group: group['momentum']),
    (lambda p: torch.optim.AdamW(p, lr=1), lambda group: group['betas'][0])], ids=['SGD', 'AdamW'])
def test_momentum_of_other_optimizers_and_phases(make, momentum):
    optimizer = OptimWrapper(make([torch.zeros(1, requires_grad=True)]))
    untouched = momentum(optimizer.param_groups[0])
    schedule = OneCycleMomentum(optimizer, eta_min=0.2, eta_max=0.8, pct_start=0.25, begin=3, end=15, by_epoch=False)
    values = []
    for _ in range(20):
        values.append(momentum(optimizer.param_groups[0]))
        optimizer.optimizer.step()
        schedule.step()
    assert values[:3] == [untouched] * 3
    assert values[3] == pytest.approx(0.8) and values[5] == pytest.approx(0.2) and values[4] == pytest.approx(0.5)
    assert values[14:] == pytest.approx([0.8] * 6)


@pytest.mark.parametrize('kwargs, message', [
    (dict(eta_min=0.9, eta_max=0.8), 'eta_min=0.9 and eta_max=0.8'), (dict(eta_max=1.), 'eta_max=1.0'),
    (dict(eta_min=-0.1), 'eta_min=-0.1'), (dict(pct_start=0.), 'pct_start=0.0'), (dict(pct_start=1.), 'pct_start=1.0'),
    (dict(end=3), '3 steps are too few to turn after pct_start=0.3')], ids=str)
def test_wrong_cycles(kwargs, message):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1, momentum=0.5)
    with pytest.raises(ValueError, match=message):
        OneCycleMomentum(optimizer, **dict(end=100) | kwargs)


def test_only_epochs_are_converted():
    with pytest.raises(ValueError, match='by_epoch=False and epoch_length=5: only a schedule in epochs'):
        OneCycleMomentum.build_iter_from_epoch(None, by_epoch=False, epoch_length=5)


# ----------------------------------------------------------------------------------------------------- EMA

@pytest.mark.parametrize('horizon, epochs', [(0.1266, 8), (0.5, 2)])
def test_ema_is_what_is_evaluated_and_saved(tmp_path, horizon, epochs):
    recorder = Recorder()
    ema = RelativeEMAHook(horizon=horizon, update_buffers=True)
    make_runner(tmp_path, 'official_41e.py', epochs, hooks=[recorder, ema]).train()
    decay = horizon * epochs * STEPS / (1 + horizon * epochs * STEPS)
    assert decay / (1 - decay) == pytest.approx(horizon * epochs * STEPS)

    # The average starts from the weights after the first update.
    expected = copy.deepcopy(recorder.weights[1])
    for weights in recorder.weights[2:]:
        for key, value in weights.items():
            if value.is_floating_point():
                expected[key] = decay * expected[key] + (1 - decay) * value
    saved = torch.load(tmp_path / f'epoch_{epochs}.pth', weights_only=False)
    raw = recorder.weights[-1]
    for key in ('fc.weight', 'fc.bias', 'norm.weight', 'norm.running_mean', 'norm.running_var'):
        torch.testing.assert_close(saved['state_dict'][key], expected[key])
        assert not torch.equal(expected[key], raw[key])
        torch.testing.assert_close(saved['ema_state_dict'][f'module.{key}'], raw[key])
    torch.testing.assert_close(SeenWeights.last, expected['fc.weight'])


def test_official_horizon_on_coco_is_the_official_decay():
    hook = next(hook for hook in Config.fromfile(ROOT / 'configs/tresnet/tresnet-l_official_asl_coco.py').custom_hooks
                if hook.type == 'mmasl.RelativeEMAHook')
    steps = 41 * -(-82081 // 128)
    assert 1 - 1 / (1 + hook.horizon * steps) == pytest.approx(0.9997, abs=1e-6)
    assert hook.update_buffers


def test_stopped_and_resumed_is_as_if_it_had_not_been(tmp_path):
    """Schedule, momentum, averaged and raw weights of a training that stops before its schedule ends."""
    def train(name: str, **kwargs) -> Recorder:
        recorder = Recorder()
        hooks = [recorder, RelativeEMAHook(horizon=0.2, update_buffers=True)]
        make_runner(tmp_path / name, 'official_41e.py', 6, hooks, **kwargs).train()
        return recorder

    whole = train('whole')
    resumed = train('resumed', load_from=str(tmp_path / 'whole/epoch_2.pth'), resume=True)
    assert len(resumed.settings) == 4 * STEPS
    assert resumed.settings == whole.settings[2 * STEPS:]
    ends = [torch.load(tmp_path / name / 'epoch_6.pth', weights_only=False) for name in ('whole', 'resumed')]
    for part in ('state_dict', 'ema_state_dict'):
        for key, value in ends[0][part].items():
            assert torch.equal(ends[1][part][key], value), key
    train('again', load_from=str(tmp_path / 'whole/epoch_6.pth'), resume=True)
    assert not (tmp_path / 'again/epoch_6.pth').exists(), 'there is nothing left to train'


def test_a_test_builds_no_training_data():
    hook = RelativeEMAHook(horizon=0.1)
    hook.before_run(SimpleNamespace(model=Net(), _train_loop=dict()))  # without max_iters, which would build the loop
    assert hook.ema_model.momentum == pytest.approx(2e-4)


@pytest.mark.parametrize('horizon', [0, 1, -0.1, float('nan')])
def test_wrong_horizon(horizon):
    with pytest.raises(ValueError, match=f'horizon={horizon} must be a share of the training'):
        RelativeEMAHook(horizon=horizon)


def test_momentum_beside_the_horizon():
    with pytest.raises(ValueError, match="momentum=0.1: RelativeEMAHook derives it.*type='EMAHook'"):
        RelativeEMAHook(horizon=0.1, momentum=0.1)
