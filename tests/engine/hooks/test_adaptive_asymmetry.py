"""The probability gap and its control, in MMEngine's runner, on a small task whose gap depends on gamma_neg."""
import math
import sys
from types import MethodType
from unittest.mock import MagicMock

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn
from torch.testing import assert_close
from torch.utils.data import Dataset

from mmasl import AdaptiveAsymmetryHook, AsymmetricLoss, ProbabilityGapHook
from mmasl.engine.hooks.adaptive_asymmetry import restore_asymmetry, unreachable_threshold
from mmasl.engine.hooks.probability_gap import gap_of
from mmasl.errors import CheckpointError, ConfigError
from mmasl.models.heads.calibrated_predictions import CalibratedPredictions

CLASSES = 4
RATES = torch.tensor([0.3, 0.1, 0.05, 0.02])


class Task(Dataset):
    """Labels of given rates, and a noisy view of each."""

    def __init__(self, size=4000, rates=RATES, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.y = (torch.rand(size, len(rates), generator=generator) < rates).float()
        self.x = self.y + torch.randn(size, len(rates), generator=generator)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return dict(x=self.x[index], y=self.y[index])


def few(classes=CLASSES, **_):
    """Three updates."""
    return Task(300, torch.full((classes,), 0.3))


class Model(BaseModel):

    def __init__(self, losses=1, classes=CLASSES, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.shift = nn.Parameter(torch.zeros(classes)), nn.Parameter(torch.full((classes,), -2.))
        self.heads = nn.ModuleList(Head(classes, **kwargs) for _ in range(losses))

    def forward(self, x, y, mode='tensor'):
        logits = x * self.scale + self.shift
        if mode == 'predict':
            return [self.heads[0].criterion.gamma_neg.mean().item()]
        if mode != 'loss':
            return logits
        return {f'loss_{i}': head.criterion(logits, y) for i, head in enumerate(self.heads)}


class Head(nn.Module):

    def __init__(self, num_classes, **kwargs):
        super().__init__()
        self.num_classes = num_classes
        self.criterion = AsymmetricLoss(**{'gamma_neg': 2., 'clip': 0., **kwargs})


def make_runner(work_dir, hook, model=None, data=None, epochs=1, batch_size=100, shuffle=True, accumulative_counts=1,
                lr=0.1, **kwargs):
    hooks = hook if isinstance(hook, list) else [hook]
    return Runner(
        model or Model(), str(work_dir), experiment_name=f'{work_dir}-{kwargs.get("resume")}',
        train_dataloader=dict(batch_size=batch_size, num_workers=0, dataset=data or Task(),
                              collate_fn=dict(type='default_collate'),
                              sampler=dict(type='DefaultSampler', shuffle=shuffle)),
        optim_wrapper=dict(optimizer=dict(type='Adam', lr=lr), accumulative_counts=accumulative_counts),
        train_cfg=dict(by_epoch=True, max_epochs=epochs), custom_hooks=hooks, log_level='WARNING',
        randomness=dict(seed=0), default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)), **kwargs)


class Seen(BaseMetric):
    """The gamma_neg by which a head with calibrated predictions would predict."""

    def process(self, data_batch, data_samples):
        self.results.append(data_samples[0])

    def compute_metrics(self, results):
        assert len(set(results)) == 1
        return dict(gamma_neg=results[0])


def evaluation(part):
    """Arguments of a runner that evaluates: of ``part``, 'val' or 'test'."""
    loader = dict(batch_size=100, num_workers=0, dataset=Task(100), collate_fn=dict(type='default_collate'),
                  sampler=dict(type='DefaultSampler', shuffle=False))
    return {f'{part}_dataloader': loader, f'{part}_evaluator': [Seen()], f'{part}_cfg': dict()}


def logged(runner, name):
    return torch.tensor(runner.message_hub.get_scalar(f'train/{name}').data[0]).float()


def gap(logits, y):
    p = logits.double().sigmoid()
    return p[y == 1].mean() - (1 - p[y == 0]).mean()


def test_logs_the_gap_of_equations_9_and_10(tmp_path):
    """A window of one update is the batch; with lr=0 the model does not change."""
    data, hook = Task(300), ProbabilityGapHook(window=1)
    hook.min_positives = 1e-3
    runner = make_runner(tmp_path, hook, data=data, shuffle=False, lr=0.)
    runner.train()
    logits = torch.full_like(data.y, -2.)
    expected = torch.stack([gap(z, y) for z, y in zip(logits.split(100), data.y.split(100))])
    assert_close(logged(runner, 'gap'), expected, check_dtype=False, rtol=0, atol=1e-6)
    assert_close(logged(runner, 'p_t_pos') - logged(runner, 'p_t_neg'), expected, check_dtype=False, rtol=0, atol=1e-6)
    assert logged(runner, 'gamma_neg').tolist() == [2, 2, 2] and logged(runner, 'clip').tolist() == [0, 0, 0]
    scalars = next(tmp_path.glob('*/vis_data/scalars.json')).read_text()
    assert all(f'"{name}"' in scalars for name in ('p_t_pos', 'p_t_neg', 'gap', 'gamma_neg', 'clip'))
    assert runner.model.heads[0].criterion.probability_sums.enabled is False, 'the hook no longer reads the sums'


@pytest.mark.parametrize('kwargs, batch_size', [
    ({}, 100), (dict(reduction='sum', loss_weight=0.25), 50), (dict(weight_unannotated=0.5, ignore_index=-1), 150)])
def test_logs_the_loss_of_an_entry(tmp_path, kwargs, batch_size):
    """The mean over the labels, for any batch size, reduction and weight of the loss; ignored labels count as they do
    in the loss."""
    data = Task(300)
    if 'ignore_index' in kwargs:
        data.y[::3] = -1
    runner = make_runner(tmp_path, ProbabilityGapHook(), Model(**kwargs), data, batch_size=batch_size, lr=0.,
                         shuffle=False)
    runner.train()
    loss = AsymmetricLoss(gamma_neg=2., clip=0., **kwargs | dict(reduction='mean', loss_weight=1.))
    logits = torch.full_like(data.y, -2.)
    expected = torch.stack([loss(z, y) for z, y in zip(logits.split(batch_size), data.y.split(batch_size))])
    assert_close(logged(runner, 'loss_per_entry'), expected, rtol=1e-5, atol=0)


def test_every_backend_gets_the_gap(tmp_path, monkeypatch):
    """The packages are stand-ins that record their calls: TensorBoard, MLflow and Weights & Biases, as MMEngine calls
    them."""
    packages = {name: MagicMock() for name in ('torch.utils.tensorboard', 'mlflow', 'wandb')}
    for name, package in packages.items():
        monkeypatch.setitem(sys.modules, name, package)
    backends = [dict(type='TensorboardVisBackend'), dict(type='MLflowVisBackend', tracking_uri=str(tmp_path / 'ml')),
                dict(type='WandbVisBackend', init_kwargs=dict(mode='offline'))]
    runner = make_runner(tmp_path, ProbabilityGapHook(), data=Task(1000),
                         visualizer=dict(type='Visualizer', vis_backends=backends))
    runner.visualizer.add_config(Config(dict(work_dir=str(tmp_path))))  # as Runner.from_cfg does
    runner.train()
    tensorboard, mlflow, wandb = packages.values()
    names = {call.args[0] for call in tensorboard.SummaryWriter.return_value.add_scalar.call_args_list}
    assert {'loss', 'gap', 'loss_per_entry'} <= names
    assert any('gap' in str(call) for call in mlflow.log_metric.call_args_list + mlflow.log_metrics.call_args_list)
    assert any('gap' in str(call) for call in wandb.log.call_args_list)
    assert wandb.init.call_args.kwargs['mode'] == 'offline'


def test_the_window_divides_sums_and_never_averages_averages(tmp_path):
    data = Task(100)
    data.y[:50] = 0
    data.y[0, 0] = 1  # one positive in the first batch, many in the second
    hook = ProbabilityGapHook(window=1e9)
    hook.min_positives = 1
    runner = make_runner(tmp_path, hook, data=data, batch_size=50, shuffle=False, lr=0.)
    with torch.no_grad():
        runner.model.scale.fill_(1.)
    runner.train()
    assert_close(logged(runner, 'gap')[-1], gap(data.x - 2, data.y), check_dtype=False, rtol=0, atol=1e-6)


@pytest.mark.parametrize('positives, held, renewed', [(80., 400., 1.), (2., 101., 5 * (1 - math.exp(-0.02)))])
def test_few_positives_lengthen_the_window(positives, held, renewed):
    hook, loss, sums = ProbabilityGapHook(window=5), AsymmetricLoss(), torch.zeros(4)
    for _ in range(300):
        loss.probability_sums.add(torch.tensor([[positives / 2], [positives], [1.], [20.]]))
        found = hook._take(loss, sums)
    assert sums[1].item() == pytest.approx(held, rel=0.01) and found.item() == pytest.approx(renewed)


def test_several_losses_are_numbered(tmp_path):
    runner = make_runner(tmp_path, dict(type='mmasl.ProbabilityGapHook'), Model(losses=2), Task(200))
    runner.train()
    assert_close(logged(runner, 'gap_0'), logged(runner, 'gap_1'))


@pytest.mark.parametrize('start, target', [(0., 0.2), (8., -0.2), (3., 0.)])
def test_gap_reaches_its_target_from_any_start(tmp_path, start, target):
    runner = make_runner(tmp_path, AdaptiveAsymmetryHook(target), Model(gamma_neg=start), epochs=8)
    runner.train()
    assert logged(runner, 'gap')[-50:].mean().item() == pytest.approx(target, abs=0.02)
    gamma = logged(runner, 'gamma_neg')[-50:]
    assert 0.1 < gamma.min() and gamma.max() < 15.9, 'gamma_neg must not be at a bound'


@pytest.mark.parametrize('prior', [0.05, 0.5])
@pytest.mark.parametrize('gamma', [0., 4.])
def test_the_gap_starts_by_the_prior_of_the_head(tmp_path, prior, gamma):
    """Whatever gamma_neg is; from the rate of the labels it rises, from 1/2 it falls first."""
    model = Model(gamma_neg=gamma)
    nn.init.constant_(model.shift, torch.tensor(prior).logit().item())
    runner = make_runner(tmp_path, ProbabilityGapHook(), model, data=Task(1000))
    runner.train()
    gaps = logged(runner, 'gap')
    assert gaps[0].item() == pytest.approx(2 * prior - 1, abs=1e-3)
    assert gaps[5] > gaps[0] + 0.01 if prior == 0.05 else gaps[5] < gaps[0] - 0.01


class PrintedSign(AdaptiveAsymmetryHook):
    """Eq. 11 as printed."""

    def control(self, number, gap, renewed, done):
        if done >= self.begin:
            self.losses[number].gamma_neg.add_(self.rate * (gap - self.target)).clamp_(0, 16)


def test_the_printed_sign_of_equation_11_is_positive_feedback(tmp_path):
    """It runs to a bound, from a start near the balance. The opposite sign reaches its target above."""
    runner = make_runner(tmp_path, PrintedSign(0.), Model(gamma_neg=3.), epochs=8)
    runner.train()
    assert logged(runner, 'gamma_neg')[-50:].unique().tolist() in ([0.], [16.])


def test_margin_control(tmp_path):
    runner = make_runner(tmp_path, AdaptiveAsymmetryHook(0.1, adapt='clip'), Model(gamma_neg=1., clip=0.02), epochs=8)
    runner.train()
    assert logged(runner, 'gap')[-50:].mean().item() == pytest.approx(0.1, abs=0.02)
    assert 0.02 < logged(runner, 'clip')[-1] < 0.5 and logged(runner, 'gamma_neg')[-1] == 1


class Calibrated(Model):
    """A model whose head has a threshold on calibrated scores."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.heads[0].thr = 0.5
        self.heads[0].loss_module = self.heads[0].criterion
        self.heads[0].unreachable_threshold = MethodType(
            CalibratedPredictions.unreachable_threshold, self.heads[0])


def test_a_margin_above_which_nothing_is_predicted(tmp_path, monkeypatch):
    """A warning, once, in the training; an error in a test."""
    told = []
    hook = dict(type='mmasl.AdaptiveAsymmetryHook', adapt='clip', target=0.9, step=0.6, begin=0.)
    runner = make_runner(tmp_path, hook, Calibrated(gamma_neg=4., clip=0.02), Task(2000), epochs=2, **evaluation('val'))
    assert not unreachable_threshold(runner.model)
    monkeypatch.setattr(runner.logger, 'warning', lambda text, *_: told.append(text))
    runner.train()
    words = 'thr=0.5 is never exceeded: with clip=0.'
    assert runner.model.heads[0].criterion.clip > 0.4 and sum(words in text for text in told) == 1
    tested = make_runner(tmp_path, hook, Calibrated(gamma_neg=4., clip=0.02), load_from=str(tmp_path / 'epoch_2.pth'),
                         **evaluation('test'))
    with pytest.raises(ConfigError, match=words):
        tested.test()


def test_parameters_per_class_move_together(tmp_path):
    runner = make_runner(tmp_path, AdaptiveAsymmetryHook(0.1), Model(gamma_neg=[1., 2., 3., 4.]), Task(1000))
    runner.train()
    gamma = runner.model.heads[0].criterion.gamma_neg
    assert_close(gamma - gamma[0], torch.arange(4.))
    assert gamma[0] != 1
    assert logged(runner, 'gamma_neg_min')[-1] == gamma.min() and logged(runner, 'gamma_neg_max')[-1] == gamma.max()


def test_a_batch_without_positives_holds(tmp_path):
    data = Task(300, torch.zeros(CLASSES))
    data.y[100:200, 0] = 1
    runner = make_runner(tmp_path, AdaptiveAsymmetryHook(0.1), data=data, shuffle=False)
    runner.train()
    before, during, after = logged(runner, 'gamma_neg').tolist()
    assert before == 2 and during != 2 and after == during


def test_nan_holds():
    hook, loss = AdaptiveAsymmetryHook(0.1), AsymmetricLoss(gamma_neg=2.)
    hook.losses, hook.sums, hook.rate, hook.gaps = [loss], [torch.zeros(4)], 1., [torch.tensor(torch.nan)]

    def update(sums):
        loss.probability_sums.add(torch.tensor(sums)[:, None])
        renewed = hook._take(loss, hook.sums[0])
        hook.control(0, gap_of(hook.sums[0]), renewed, 0.5)

    update([100., 200., 100., 200.])
    first, window = loss.gamma_neg.clone(), hook.sums[0].clone()
    assert first > 2
    update([torch.nan, 200., 100., 200.])
    assert loss.gamma_neg == first and torch.equal(hook.sums[0], window)


def test_accumulated_batches_are_one_batch(tmp_path):
    gammas = {}
    for size, counts in ((100, 1), (25, 4)):
        runner = make_runner(tmp_path / str(size), AdaptiveAsymmetryHook(0., begin=0), data=Task(1000), batch_size=size,
                             shuffle=False, accumulative_counts=counts)
        runner.train()
        gammas[size] = logged(runner, 'gamma_neg')
    assert len(gammas[100]) == 10 and len(gammas[25]) == 10
    assert_close(gammas[25], gammas[100], rtol=1e-4, atol=1e-4)


def test_a_resumed_run_continues_with_the_same_numbers(tmp_path):
    def hook():
        return dict(type='mmasl.AdaptiveAsymmetryHook', target=0.)

    class Killed(Exception):
        pass

    class Kill(Hook):

        def before_train_epoch(self, runner):
            if runner.epoch == 1:
                raise Killed

    whole = make_runner(tmp_path / 'whole', hook(), epochs=3)
    whole.train()
    with pytest.raises(Killed):
        make_runner(tmp_path / 'part', [hook(), Kill()], epochs=3).train()
    resumed = make_runner(tmp_path / 'part', hook(), epochs=3, resume=True)
    resumed.train()
    assert resumed.iter == 120 and len(logged(whole, 'gamma_neg')) == 120
    for name in ('gamma_neg', 'gap'):
        assert torch.equal(logged(resumed, name)[-80:], logged(whole, name)[-80:])
    assert torch.equal(resumed.model.heads[0].criterion.gamma_neg, whole.model.heads[0].criterion.gamma_neg)
    assert torch.equal(resumed.model.scale, whole.model.scale)


def test_a_strategy_that_hides_its_checkpoints_from_hooks_cannot_resume(tmp_path, monkeypatch):
    """As DeepSpeed's does."""
    make_runner(tmp_path, AdaptiveAsymmetryHook(0.1), data=few()).train()
    monkeypatch.setattr(AdaptiveAsymmetryHook, 'after_load_checkpoint', Hook.after_load_checkpoint)
    with pytest.raises(CheckpointError, match='resumes at iteration 3, but Runner gives AdaptiveAsymmetryHook no chec'):
        make_runner(tmp_path, AdaptiveAsymmetryHook(0.1), data=few(), epochs=2, resume=True).train()


def test_loading_weights_starts_from_the_config(tmp_path):
    make_runner(tmp_path / 'first', AdaptiveAsymmetryHook(0.1), data=few()).train()
    path = str(tmp_path / 'first' / 'epoch_1.pth')
    checkpoint = torch.load(path, weights_only=False)
    adapted = checkpoint['adaptive_asymmetry'][0]['gamma_neg']
    assert adapted != 2 and not any('gamma' in key or 'clip' in key for key in checkpoint['state_dict'])
    second = make_runner(tmp_path / 'second', AdaptiveAsymmetryHook(0.1), data=few(), load_from=path)
    second.train()
    assert logged(second, 'gamma_neg')[0] == 2

    model = Model()
    assert restore_asymmetry(model, checkpoint)
    assert model.heads[0].criterion.gamma_neg == adapted
    assert not restore_asymmetry(model, dict(state_dict={}))
    with pytest.raises(CheckpointError, match='asymmetry of 1 losses and the model has 2. Load it with the config'):
        restore_asymmetry(Model(losses=2), checkpoint)


@pytest.mark.parametrize('before, after', [
    (dict(losses=2), {}), ({}, dict(losses=2)), ({}, dict(classes=6)), (dict(gamma_neg=[5.] * CLASSES), {})],
    ids=['fewer losses', 'more losses', 'other classes', 'other config'])
def test_weights_of_any_model_start_from_the_config(tmp_path, before, after):
    """Values and shapes are those of the config, whatever the checkpoint holds."""
    make_runner(tmp_path / 'first', AdaptiveAsymmetryHook(), Model(**before), few(**before)).train()
    runner = make_runner(tmp_path / 'second', AdaptiveAsymmetryHook(), Model(**after), few(**after),
                         load_from=str(tmp_path / 'first' / 'epoch_1.pth'))
    runner.train()
    for name in ('gamma_neg_0', 'gamma_neg_1') if after.get('losses') else ('gamma_neg', ):
        assert logged(runner, name)[0] == 2
    assert all(head.criterion.gamma_neg.dim() == 0 for head in runner.model.heads)


def test_weights_loaded_without_load_from_start_from_the_config_too(tmp_path):
    make_runner(tmp_path / 'first', AdaptiveAsymmetryHook(), data=few()).train()
    runner = make_runner(tmp_path / 'second', AdaptiveAsymmetryHook(), data=few())
    runner.load_checkpoint(str(tmp_path / 'first' / 'epoch_1.pth'))
    runner.train()
    assert logged(runner, 'gamma_neg')[0] == 2


def test_a_test_has_the_asymmetry_of_its_checkpoint(tmp_path):
    hook = dict(type='mmasl.AdaptiveAsymmetryHook')
    trained = make_runner(tmp_path, hook, data=Task(1000))
    trained.train()
    expected = trained.model.heads[0].criterion.gamma_neg
    assert (expected != 2).all()
    tested = make_runner(tmp_path, hook, load_from=str(tmp_path / 'epoch_1.pth'), **evaluation('test'))
    tested.test()
    assert torch.equal(tested.model.heads[0].criterion.gamma_neg, expected)


def test_a_checkpoint_loaded_after_training_brings_its_asymmetry(tmp_path):
    runner = make_runner(tmp_path, AdaptiveAsymmetryHook(), data=few(), epochs=2, **evaluation('test'))
    runner.train()
    runner.load_checkpoint(str(tmp_path / 'epoch_1.pth'))
    runner.test()
    saved = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)['adaptive_asymmetry'][0]['gamma_neg']
    assert runner.model.heads[0].criterion.gamma_neg == saved != logged(runner, 'gamma_neg')[-1]


def test_two_readers_of_the_probabilities_are_refused(tmp_path):
    with pytest.raises(ConfigError, match='custom_hooks has ProbabilityGapHook and AdaptiveAsymmetryHook, .* Keep one'):
        make_runner(tmp_path, [ProbabilityGapHook(), AdaptiveAsymmetryHook()], data=few()).train()


def test_resuming_a_run_without_control_is_refused(tmp_path):
    make_runner(tmp_path, ProbabilityGapHook(), data=few()).train()
    with pytest.raises(CheckpointError, match='written without AdaptiveAsymmetryHook. Start from its weights'):
        make_runner(tmp_path, AdaptiveAsymmetryHook(), data=few(), epochs=2, resume=True).train()


@pytest.mark.parametrize('update_buffers', [False, True])
def test_ema_does_not_change_the_control(tmp_path, update_buffers):
    ema = dict(type='EMAHook', momentum=0.01, update_buffers=update_buffers)
    hook = dict(type='mmasl.AdaptiveAsymmetryHook', target=0.)
    plain = make_runner(tmp_path / 'plain', hook, data=Task(1000))
    plain.train()
    both = make_runner(tmp_path / 'both', [ema, hook], data=Task(1000))
    both.train()
    assert torch.equal(logged(both, 'gamma_neg'), logged(plain, 'gamma_neg'))
    checkpoint = torch.load(tmp_path / 'both' / 'epoch_1.pth', weights_only=False)
    assert_close(checkpoint['adaptive_asymmetry'][0]['gamma_neg'], plain.model.heads[0].criterion.gamma_neg)


@pytest.mark.parametrize('update_buffers', [False, True])
def test_an_average_is_evaluated_by_the_controlled_asymmetry(tmp_path, update_buffers):
    hooks = [dict(type='mmasl.RelativeEMAHook', horizon=0.1, update_buffers=update_buffers),
             dict(type='mmasl.AdaptiveAsymmetryHook', target=0.)]
    runner = make_runner(tmp_path, hooks, data=Task(1000), **evaluation('val'))
    runner.train()
    expected = logged(runner, 'gamma_neg')[-1].item()
    assert expected != 2 and runner.model.heads[0].criterion.gamma_neg.item() == expected
    assert runner.message_hub.get_scalar('val/gamma_neg').current() == expected

    tested = make_runner(tmp_path, hooks, load_from=str(tmp_path / 'epoch_1.pth'), **evaluation('test'))
    assert tested.test() == dict(gamma_neg=expected)


def test_registered():
    assert isinstance(HOOKS.build(dict(type='mmasl.ProbabilityGapHook')), ProbabilityGapHook)


@pytest.mark.parametrize('hook, kwargs, message', [
    (AdaptiveAsymmetryHook, dict(target=1.5), 'target=1.5 must be a gap'),
    (AdaptiveAsymmetryHook, dict(target=float('nan')), 'target=nan must be'),
    (AdaptiveAsymmetryHook, dict(step=-0.1), 'step=-0.1 must be above 0'),
    (AdaptiveAsymmetryHook, dict(begin=1), r'begin=1 must be a share of the training, in \[0, 1\)'),
    (AdaptiveAsymmetryHook, dict(adapt='gamma'), "adapt='gamma' must be 'gamma_neg' or 'clip'"),
    (ProbabilityGapHook, dict(window=0), 'window=0 must be at least 1 update')], ids=str)
def test_bad_arguments(hook, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        hook(**kwargs)


def test_bad_models(tmp_path):
    model = Model()
    model.heads[0].criterion = None
    with pytest.raises(ConfigError, match='found no mmasl.AsymmetricLoss in the model: set the head'):
        make_runner(tmp_path / '1', ProbabilityGapHook(), model).train()
    with pytest.raises(ConfigError, match=r'gamma_neg=20.0 of the loss must lie in \[0.0, 16.0\]'):
        make_runner(tmp_path / '2', AdaptiveAsymmetryHook(), Model(gamma_neg=20)).train()
