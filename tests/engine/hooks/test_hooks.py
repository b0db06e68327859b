"""The probability gap and its control, in MMEngine's runner on a small task whose gap answers to gamma_neg."""
import os

import pytest
import torch
import torch.multiprocessing
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn
from torch.testing import assert_close
from torch.utils.data import Dataset

import mmasl.engine.hooks.adaptive_asymmetry
from mmasl import AdaptiveAsymmetryHook, AsymmetricLoss, ProbabilityGapHook
from mmasl.engine.hooks.adaptive_asymmetry import restore_asymmetry

CLASSES = 4
HOLD = dict(step=1e-9, damping=0.)  # of a control that stays where it starts
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
    """A window of one update is the batch; lr 0, so that the model stays what it is."""
    data = Task(300)
    runner = make_runner(tmp_path, dict(type='mmasl.ProbabilityGapHook', window=1, min_positives=1e-3), data=data,
                         shuffle=False, lr=0.)
    runner.train()
    logits = torch.full_like(data.y, -2.)
    expected = torch.stack([gap(z, y) for z, y in zip(logits.split(100), data.y.split(100))])
    assert_close(logged(runner, 'gap'), expected, check_dtype=False, rtol=0, atol=1e-6)
    assert_close(logged(runner, 'p_t_pos') - logged(runner, 'p_t_neg'), expected, check_dtype=False, rtol=0, atol=1e-6)
    assert logged(runner, 'gamma_neg').tolist() == [2, 2, 2] and logged(runner, 'clip').tolist() == [0, 0, 0]
    scalars = next(tmp_path.glob('*/vis_data/scalars.json')).read_text()
    assert all(f'"{name}"' in scalars for name in ('p_t_pos', 'p_t_neg', 'gap', 'gamma_neg', 'clip'))
    assert runner.model.heads[0].criterion.probability_sums.enabled is False, 'nobody reads the sums any more'


def test_the_window_divides_sums_and_never_averages_averages(tmp_path):
    data = Task(100)
    data.y[:50] = 0
    data.y[0, 0] = 1  # one positive in the first batch, many in the second
    runner = make_runner(tmp_path, ProbabilityGapHook(window=1e9, min_positives=1), data=data, batch_size=50,
                         shuffle=False, lr=0.)
    with torch.no_grad():
        runner.model.scale.fill_(1.)
    runner.train()
    assert_close(logged(runner, 'gap')[-1], gap(data.x - 2, data.y), check_dtype=False, rtol=0, atol=1e-6)


def test_rare_classes_get_a_longer_window():
    hook = ProbabilityGapHook(window=5, min_positives=100)
    hook.per_class = True
    loss, sums = AsymmetricLoss(), torch.zeros(4, 3)
    for _ in range(300):
        loss.probability_sums.total = torch.tensor([[40., 1., 0.], [80., 2., 0.], [1., 1., 1.], [20., 98., 100.]])
        renewed = hook._take(loss, sums)
    assert_close(sums[1], torch.tensor([400., 101., 0.]), rtol=0.01, atol=0.)
    assert_close(renewed, torch.tensor([1., 5 * (1 - torch.tensor(-0.02).exp()), 0.]))


def test_several_losses_are_numbered(tmp_path):
    runner = make_runner(tmp_path, dict(type='mmasl.ProbabilityGapHook'), Model(losses=2), Task(200))
    runner.train()
    assert_close(logged(runner, 'gap_0'), logged(runner, 'gap_1'))


@pytest.mark.parametrize('target', [-0.2, 0., 0.2])
@pytest.mark.parametrize('start', [0., 8.])
def test_gap_reaches_its_target_from_any_start(tmp_path, start, target):
    runner = make_runner(tmp_path, AdaptiveAsymmetryHook(target), Model(gamma_neg=start), epochs=8)
    runner.train()
    assert logged(runner, 'gap')[-50:].mean().item() == pytest.approx(target, abs=0.02)
    gamma = logged(runner, 'gamma_neg')[-50:]
    assert 0.1 < gamma.min() and gamma.max() < 15.9, 'not at a bound'


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
    """Both signs, from the same start near the balance: one comes to the target, the other runs to a bound."""
    gammas = {}
    for name, hook in dict(stable=AdaptiveAsymmetryHook(0.), printed=PrintedSign(0.)).items():
        runner = make_runner(tmp_path / name, hook, Model(gamma_neg=3.), epochs=8)
        runner.train()
        gammas[name] = logged(runner, 'gamma_neg')[-50:]
        if name == 'stable':
            assert logged(runner, 'gap')[-50:].mean().item() == pytest.approx(0, abs=0.02)
    assert 0.1 < gammas['stable'].min() and gammas['stable'].max() < 15.9
    assert gammas['printed'].unique().tolist() in ([0.], [16.])


@pytest.mark.parametrize('adapt', ['clip', ['gamma_neg', 'clip']], ids=str)
def test_margin_control(tmp_path, adapt):
    runner = make_runner(tmp_path, AdaptiveAsymmetryHook(0.1, adapt=adapt), Model(gamma_neg=1., clip=0.02), epochs=8)
    runner.train()
    assert logged(runner, 'gap')[-50:].mean().item() == pytest.approx(0.1, abs=0.02)
    clip, gamma = logged(runner, 'clip')[-1], logged(runner, 'gamma_neg')[-1]
    assert 0.02 < clip < 0.5
    assert gamma == 1 if adapt == 'clip' else gamma > 1


def test_each_class_comes_to_the_target(tmp_path):
    runner = make_runner(tmp_path, dict(type='mmasl.AdaptiveAsymmetryHook', target=0.1, per_class=True), epochs=30)
    runner.train()
    gamma = runner.model.heads[0].criterion.gamma_neg
    assert gamma.shape == (CLASSES,)
    assert gamma.sort().indices.tolist() == [0, 1, 2, 3], 'the rarer the class, the more asymmetry it needs'
    data = Task(20000, seed=1)
    p = runner.model(data.x, data.y).sigmoid().detach()
    gaps = torch.stack([p[data.y[:, c] == 1, c].mean() - (1 - p[data.y[:, c] == 0, c]).mean() for c in range(CLASSES)])
    assert_close(gaps, torch.full((CLASSES,), 0.1), rtol=0, atol=0.06)
    assert logged(runner, 'gamma_neg_min')[-1] == gamma.min() and logged(runner, 'gamma_neg_max')[-1] == gamma.max()


def test_a_batch_without_positives_holds(tmp_path):
    data = Task(300, torch.zeros(CLASSES))
    data.y[100:200, 0] = 1
    runner = make_runner(tmp_path, AdaptiveAsymmetryHook(0.1), data=data, shuffle=False)
    runner.train()
    before, during, after = logged(runner, 'gamma_neg').tolist()
    assert before == 2 and during != 2 and after == during


@pytest.mark.parametrize('per_class', [False, True])
def test_nan_holds(per_class):
    hook = AdaptiveAsymmetryHook(0.1, per_class=per_class, window=1)
    loss = AsymmetricLoss(gamma_neg=[2., 2.])
    shape = (2,) if per_class else ()
    hook.losses, hook.sums = [loss], [torch.zeros(4, *shape)]
    hook.rate, hook.gaps = 1., [torch.full(shape, torch.nan)]

    def update(sums):
        loss.probability_sums.total = torch.tensor(sums)
        renewed = hook._take(loss, hook.sums[0])
        hook.control(0, mmasl.engine.hooks.probability_gap.gap_of(hook.sums[0]), renewed, 0.5)

    update([[100., 100.], [200., 200.], [100., 100.], [200., 200.]])
    first, window = loss.gamma_neg.clone(), hook.sums[0].clone()
    assert (first > 2).all()
    update([[torch.nan, 100.], [200., 200.], [100., 100.], [200., 200.]])
    assert loss.gamma_neg[0] == first[0] and hook.sums[0].isfinite().all()
    assert (loss.gamma_neg[1] > first[1]) == per_class
    assert per_class or torch.equal(hook.sums[0], window)


def test_accumulated_batches_are_one_batch(tmp_path):
    gammas = {}
    for size, counts in ((100, 1), (25, 4)):
        runner = make_runner(tmp_path / str(size), AdaptiveAsymmetryHook(0., begin=0), data=Task(1000), batch_size=size,
                             shuffle=False, accumulative_counts=counts)
        runner.train()
        gammas[size] = logged(runner, 'gamma_neg')
    assert len(gammas[100]) == 10 and len(gammas[25]) == 10
    assert_close(gammas[25], gammas[100], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('per_class', [False, True])
def test_a_resumed_run_goes_on_with_the_same_numbers(tmp_path, per_class):
    def hook():
        return dict(type='mmasl.AdaptiveAsymmetryHook', target=0., per_class=per_class)

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


def test_a_strategy_that_keeps_its_checkpoints_from_hooks_cannot_resume(tmp_path, monkeypatch):
    """As DeepSpeed's does."""
    make_runner(tmp_path, AdaptiveAsymmetryHook(0.1), epochs=1).train()
    monkeypatch.setattr(AdaptiveAsymmetryHook, 'after_load_checkpoint', Hook.after_load_checkpoint)
    with pytest.raises(RuntimeError, match='resumed at iteration 40, and AdaptiveAsymmetryHook got no checkpoint'):
        make_runner(tmp_path, AdaptiveAsymmetryHook(0.1), epochs=2, resume=True).train()


def test_loading_weights_starts_from_the_config(tmp_path):
    make_runner(tmp_path / 'first', AdaptiveAsymmetryHook(0.1)).train()
    path = str(tmp_path / 'first' / 'epoch_1.pth')
    checkpoint = torch.load(path, weights_only=False)
    adapted = checkpoint['adaptive_asymmetry'][0]['gamma_neg']
    assert adapted != 2 and not any('gamma' in key or 'clip' in key for key in checkpoint['state_dict'])
    second = make_runner(tmp_path / 'second', AdaptiveAsymmetryHook(0.1, step=1e-9), load_from=path, epochs=1)
    second.train()
    assert logged(second, 'gamma_neg')[0] == 2

    model = Model()
    assert restore_asymmetry(model, checkpoint)
    assert model.heads[0].criterion.gamma_neg == adapted
    assert not restore_asymmetry(model, dict(state_dict={}))
    with pytest.raises(ValueError, match='asymmetry of 1 losses and the model has 2: load it with the config'):
        restore_asymmetry(Model(losses=2), checkpoint)


@pytest.mark.parametrize('before, after', [
    ((False, {}), (True, {})), ((True, {}), (False, {})), ((True, {}), (True, dict(classes=6))),
    ((False, dict(losses=2)), (False, {})), ((True, {}), (True, dict(losses=2))),
    ((True, dict(gamma_neg=[5.] * CLASSES)), (True, {}))],
    ids=['to per class', 'from per class', 'other classes', 'fewer losses', 'more losses', 'other config'])
def test_weights_of_any_control_start_from_the_config(tmp_path, before, after):
    """Values and their shape are the run's own, whatever the checkpoint holds."""
    (old, old_model), (new, new_model) = before, after
    make_runner(tmp_path / 'first', AdaptiveAsymmetryHook(per_class=old), Model(**old_model), few(**old_model)).train()
    runner = make_runner(tmp_path / 'second', AdaptiveAsymmetryHook(per_class=new, **HOLD), Model(**new_model),
                         few(**new_model), load_from=str(tmp_path / 'first' / 'epoch_1.pth'))
    runner.train()
    for head in runner.model.heads:
        assert_close(head.criterion.gamma_neg, torch.full((len(runner.model.shift),) if new else (), 2.))


def test_weights_loaded_without_load_from_start_from_the_config_too(tmp_path):
    make_runner(tmp_path / 'first', AdaptiveAsymmetryHook(per_class=True), data=few()).train()
    runner = make_runner(tmp_path / 'second', AdaptiveAsymmetryHook(per_class=True, **HOLD), Model(classes=6), few(6))
    runner.load_checkpoint(str(tmp_path / 'first' / 'epoch_1.pth'))
    runner.train()
    assert_close(runner.model.heads[0].criterion.gamma_neg, torch.full((6,), 2.))


@pytest.mark.parametrize('per_class', [False, True])
def test_a_test_has_the_asymmetry_of_its_checkpoint(tmp_path, per_class):
    hook = dict(type='mmasl.AdaptiveAsymmetryHook', per_class=per_class)
    trained = make_runner(tmp_path, hook)
    trained.train()
    expected = trained.model.heads[0].criterion.gamma_neg
    assert (expected != 2).all()
    tested = make_runner(tmp_path, hook, load_from=str(tmp_path / 'epoch_1.pth'), **evaluation('test'))
    tested.test()
    assert torch.equal(tested.model.heads[0].criterion.gamma_neg, expected)


def test_a_checkpoint_loaded_after_training_brings_its_asymmetry(tmp_path):
    runner = make_runner(tmp_path, AdaptiveAsymmetryHook(), epochs=2, **evaluation('test'))
    runner.train()
    runner.load_checkpoint(str(tmp_path / 'epoch_1.pth'))
    runner.test()
    saved = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)['adaptive_asymmetry'][0]['gamma_neg']
    assert runner.model.heads[0].criterion.gamma_neg == saved != logged(runner, 'gamma_neg')[-1]


@pytest.mark.parametrize('before', [False, True])
def test_changing_per_class_on_resume_is_refused(tmp_path, before):
    make_runner(tmp_path, AdaptiveAsymmetryHook(per_class=before), data=few()).train()
    with pytest.raises(ValueError, match=f'per_class={not before} .* with per_class={before}: set that to resume, or '):
        make_runner(tmp_path, AdaptiveAsymmetryHook(per_class=not before), data=few(), epochs=2,
                    resume=True).train()


@pytest.mark.parametrize('first', [ProbabilityGapHook, AdaptiveAsymmetryHook])
@pytest.mark.parametrize('second', [ProbabilityGapHook, AdaptiveAsymmetryHook])
def test_two_readers_of_the_probabilities_are_refused(tmp_path, first, second):
    with pytest.raises(ValueError, match=f'custom_hooks holds {first.__name__} and {second.__name__}, .* keep one'):
        make_runner(tmp_path, [first(), second()], data=few()).train()


def test_resuming_a_run_without_control_is_refused(tmp_path):
    make_runner(tmp_path, ProbabilityGapHook()).train()
    with pytest.raises(ValueError, match='written without AdaptiveAsymmetryHook: start from its weights'):
        make_runner(tmp_path, AdaptiveAsymmetryHook(), epochs=2, resume=True).train()


@pytest.mark.parametrize('update_buffers', [False, True])
def test_ema_is_not_disturbed(tmp_path, update_buffers):
    ema = dict(type='EMAHook', momentum=0.01, update_buffers=update_buffers)
    hook = dict(type='mmasl.AdaptiveAsymmetryHook', target=0., per_class=True)
    plain = make_runner(tmp_path / 'plain', hook)
    plain.train()
    both = make_runner(tmp_path / 'both', [ema, hook])
    both.train()
    assert torch.equal(logged(both, 'gamma_neg'), logged(plain, 'gamma_neg'))
    averaged = next(hook for hook in both.hooks if isinstance(hook, EMAHook)).ema_model.module
    assert averaged.heads[0].criterion.gamma_neg.shape == (CLASSES,)
    checkpoint = torch.load(tmp_path / 'both' / 'epoch_1.pth', weights_only=False)
    assert_close(checkpoint['adaptive_asymmetry'][0]['gamma_neg'], plain.model.heads[0].criterion.gamma_neg)


@pytest.mark.parametrize('update_buffers', [False, True])
@pytest.mark.parametrize('per_class', [False, True])
def test_an_average_is_evaluated_by_the_controlled_asymmetry(tmp_path, update_buffers, per_class):
    hooks = [dict(type='mmasl.EMAHook', horizon=0.1, update_buffers=update_buffers),
             dict(type='mmasl.AdaptiveAsymmetryHook', target=0., per_class=per_class)]
    runner = make_runner(tmp_path, hooks, **evaluation('val'))
    runner.train()
    expected = logged(runner, 'gamma_neg')[-1].item()
    assert expected != 2 and runner.model.heads[0].criterion.gamma_neg.mean().item() == expected
    assert runner.message_hub.get_scalar('val/gamma_neg').current() == expected

    tested = make_runner(tmp_path, hooks, load_from=str(tmp_path / 'epoch_1.pth'), **evaluation('test'))
    assert tested.test() == dict(gamma_neg=expected)


def two_ranks(rank, folder, per_class):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
    torch.distributed.init_process_group('gloo', f'file://{folder}/gloo', rank=rank, world_size=2)
    runner = make_runner(
        f'{folder}/two', AdaptiveAsymmetryHook(0., per_class=per_class), data=Task(1000), batch_size=50, shuffle=False,
        launcher='pytorch', cfg=dict(model_wrapper_cfg=dict(
            type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)))
    runner.train()
    torch.save([logged(runner, 'gamma_neg'), logged(runner, 'gap')], f'{folder}/{rank}.pt')


@pytest.mark.parametrize('per_class', [False, True])
def test_two_ranks_are_one_with_the_joint_batch(tmp_path, per_class):
    torch.multiprocessing.spawn(two_ranks, (str(tmp_path), per_class), nprocs=2)
    first, second = (torch.load(tmp_path / f'{rank}.pt') for rank in range(2))
    assert_close(first, second, rtol=0, atol=0)
    hook = AdaptiveAsymmetryHook(0., per_class=per_class)
    runner = make_runner(tmp_path / 'one', hook, data=Task(1000), shuffle=False)
    runner.train()
    assert_close(first, [logged(runner, 'gamma_neg'), logged(runner, 'gap')], rtol=1e-4, atol=1e-5)


def test_registered():
    assert isinstance(HOOKS.build(dict(type='mmasl.ProbabilityGapHook')), ProbabilityGapHook)


@pytest.mark.parametrize('kwargs, message', [
    (dict(target=1.5), 'target=1.5 must lie between -1 and 1'),
    (dict(target=float('nan')), 'target=nan must lie'),
    (dict(step=-0.1), 'step=-0.1 must be above 0: a step below moves away'),
    (dict(damping=-1), 'damping=-1 must be 0 or above'),
    (dict(begin=1), r'begin=1 must be a share of the training, in \[0, 1\)'),
    (dict(adapt='gamma'), r"adapt=\['gamma'\] must name 'gamma_neg', 'clip' or both"),
    (dict(adapt=[]), r'adapt=\[\] must name'),
    (dict(gamma_bounds=(4, 2)), r'gamma_bounds=\(4, 2\) must be two numbers in \[0, inf\), the lower first'),
    (dict(clip_bounds=(0, 1)), r'clip_bounds=\(0, 1\) must be two numbers in \[0, 1\)'),
    (dict(window=0), 'window=0 must be at least 1 update'),
    (dict(min_positives=0), 'min_positives=0 must be above 0'),
], ids=lambda value: str(value)[:30])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveAsymmetryHook(**kwargs)


def test_bad_models(tmp_path):
    model = Model()
    model.heads[0].criterion = None
    with pytest.raises(ValueError, match='found no mmasl.AsymmetricLoss in the model: set the head'):
        make_runner(tmp_path / '1', ProbabilityGapHook(), model).train()
    with pytest.raises(ValueError, match=r'gamma_neg=20.0 of the loss lies outside the bounds 0.0 to 16.0'):
        make_runner(tmp_path / '2', AdaptiveAsymmetryHook(), Model(gamma_neg=20)).train()
    model = Model()
    model.heads[0].num_classes = None
    with pytest.raises(ValueError, match='per_class=True needs the number of classes'):
        make_runner(tmp_path / '3', AdaptiveAsymmetryHook(per_class=True), model).train()
