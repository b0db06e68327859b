"""The parts of ResumeHook. Whole trainings that are killed are in test_faults.py."""
import os
import pickle
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.fileio import get_file_backend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from mmasl.engine.hooks import resume
from mmasl.engine.hooks.resume import (
    CheckpointBackend,
    ResumeHook,
    SeededBatch,
    SeededBatches,
    seed_draws,
)
from mmasl.engine.resume_settings import optimizer_differences
from mmasl.errors import CheckpointError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    CheckpointBackend.outdated.clear()
    CheckpointBackend.replaced.clear()
    return tmp_path


# --- files


def test_the_checkpoint_before_goes_last(monkeypatch):
    """MMEngine's hook removes it before it writes the next; with max_keep_ckpts=1 none would be left for a while.

    At no time is there more than one file beside the last checkpoint and the best.
    """
    register_backend(resume.BACKEND, CheckpointBackend, force=True)
    hook = CheckpointHook(1, max_keep_ckpts=1, save_best='mAP', rule='greater',
                          backend_args=dict(backend=resume.BACKEND))
    seen, write = [], resume.atomic_write
    monkeypatch.setattr(resume, 'atomic_write', lambda path, content: (
        seen.append((os.path.basename(path), sorted(Path().glob('*.pth')))), write(path, content)))

    def save(out_dir, filename, *_, backend_args, **__):
        get_file_backend(filename, backend_args=backend_args).put(b'x', filename)

    info: dict = {}
    runner = SimpleNamespace(
        work_dir='.', logger=SimpleNamespace(info=print), save_checkpoint=save, epoch=0, iter=0,
        message_hub=SimpleNamespace(runtime_info=info, update_info=info.__setitem__, get_info=info.get))
    hook.before_train(runner)
    for epoch in range(3):
        runner.epoch = epoch
        hook._save_checkpoint(runner)
        runner.epoch = epoch + 1
        hook._save_best_checkpoint(runner, dict(mAP=runner.epoch))
        CheckpointBackend.clear()
    assert [(name, list(map(str, files))) for name, files in seen[:6]] == [
        ('epoch_1.pth', []), ('best_mAP_epoch_1.pth', ['epoch_1.pth']),
        ('epoch_1.pth', ['best_mAP_epoch_1.pth', 'epoch_1.pth']),
        ('epoch_2.pth', ['best_mAP_epoch_1.pth', 'epoch_1.pth']),
        ('best_mAP_epoch_2.pth', ['best_mAP_epoch_1.pth', 'epoch_2.pth']),
        ('epoch_2.pth', ['best_mAP_epoch_2.pth', 'epoch_2.pth'])]
    assert sorted(os.listdir()) == ['best_mAP_epoch_3.pth', 'epoch_3.pth', 'last_checkpoint']


def test_what_is_written_again_is_not_outdated():
    backend = CheckpointBackend()
    for name in ('a', 'b'):
        backend.put(b'1', name)
        backend.remove(name)
    backend.put(b'2', 'a')
    CheckpointBackend.clear()
    assert os.listdir() == ['a'] and CheckpointBackend.outdated == set()


# --- draws


def draw() -> tuple:
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_draws_follow_from_their_key():
    found = []
    for key in ((3, 0, 1, 5), (3, 1, 1, 5), (3, 0, 2, 5), (3, 0, 1, 6), (4, 0, 1, 5)):
        seed_draws(*key)
        found.append(draw())
        seed_draws(*key)
        assert draw() == found[-1]
    assert len({value for each in found for value in each}) == 15, 'no generator repeats another, nor itself'


def test_a_batch_seeds_whoever_loads_it_and_not_who_sends_it():
    batch = SeededBatch([5, 7], (3, 1))
    before = random.getstate()
    sent = pickle.loads(pickle.dumps(batch))
    assert random.getstate() == before
    assert list(sent) == [5, 7] and len(sent) == 2
    seen = [draw() for each in (batch, sent) for _ in each]
    assert seen[:2] == seen[2:]


class Draws(Dataset):
    """Each sample is the random numbers of its loading."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> tuple:
        return index, *draw()


def make_batches(sampler_type, drop_last: bool) -> SeededBatches:
    batches = SeededBatches(BatchSampler(sampler_type(Draws(), shuffle=True, seed=3), 2, drop_last))
    batches.key = (3, 0)
    return batches


def stream(batches: SeededBatches, epoch: int, workers: int = 0):
    """Batches of all epochs, starting with one."""
    loader = DataLoader(Draws(), num_workers=workers, persistent_workers=workers > 0, collate_fn=list)
    object.__setattr__(loader, 'batch_sampler', batches)
    while True:
        if not batches._ahead:
            batches.sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


@pytest.mark.parametrize('sampler, drop_last, workers', [
    (DefaultSampler, False, 2), (DefaultSampler, True, 0), (InfiniteSampler, False, 0), (InfiniteSampler, True, 2)])
def test_a_stream_goes_on_where_it_was(sampler, drop_last, workers):
    whole = [batch for batch, _ in zip(stream(make_batches(sampler, drop_last), 0), range(12))]
    assert len({value for batch in whole for item in batch for value in item[1:]}) == 3 * sum(map(len, whole))
    for count in (0, 1, 3, 4, 7):
        batches = make_batches(sampler, drop_last)
        batches.number = count
        epoch = batches.skip_batches(count, 0)
        for batch, expected in zip(stream(batches, epoch, workers), whole[count:]):
            assert batch == expected


def test_the_rest_of_the_sampler_shows_through():
    batches = make_batches(DefaultSampler, False)
    assert len(batches) == 4 and batches.batch_size == 2 and batches.sampler.seed == 3
    assert not hasattr(batches, 'skip') and not hasattr(batches, '__wrapped__')


# --- the hook


class Model(torch.nn.Module):

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, width)

    def train_step(self, data, optim_wrapper):
        loss = self.layer(torch.rand(2, 1)).sum()
        optim_wrapper.update_params(loss)
        return dict(loss=loss)


def make_runner(work_dir: str, model: torch.nn.Module | None = None, **kwargs) -> Runner:
    return Runner(**dict(
        dict(model=model or Model(), work_dir=work_dir, optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
             train_dataloader=dict(batch_size=2, num_workers=0, dataset=Draws(), sampler=dict(type='DefaultSampler')),
             train_cfg=dict(by_epoch=True, max_epochs=2), custom_hooks=[dict(type='mmasl.ResumeHook')],
             log_level='ERROR', experiment_name=os.path.abspath(work_dir).replace('/', '_'), cfg={}), **kwargs))


@pytest.fixture
def trained() -> str:
    make_runner('w').train()
    return 'w/epoch_1.pth'


def test_a_config_can_name_the_hook(trained):
    runner = make_runner('again', load_from=trained, resume=True)
    runner.train()
    first, again = (torch.load(f'{name}/epoch_2.pth', weights_only=False) for name in ('w', 'again'))
    assert first['state_dict']['layer.weight'].equal(again['state_dict']['layer.weight'])
    assert first['mmasl_resume'] == again['mmasl_resume'] == dict(batches=4, processes=1, done=0, evaluated=False)
    assert first['meta']['seed'] == again['meta']['seed'] == runner.train_dataloader.sampler.seed


def test_an_evaluation_is_made_again_with_the_same_numbers():
    """A kill has prevented the evaluation of the checkpoint, or it was written before: without save_best."""
    class Noisy(Model):
        def val_step(self, data):
            return [dict(pred=np.random.rand() + torch.rand(()).item())]

    class Mean(BaseMetric):
        def process(self, data_batch, data_samples):
            self.results += [sample['pred'] for sample in data_samples]

        def compute_metrics(self, results):
            found.append((loop.epoch, np.mean(results)))
            return dict(mean=found[-1][1])

    found: list = []
    data = dict(batch_size=2, num_workers=0, dataset=Draws(), sampler=dict(type='DefaultSampler', shuffle=False))
    settings = dict(val_dataloader=data, val_evaluator=Evaluator(Mean()), val_cfg={})
    for work_dir, start in (('w', {}), ('again', dict(load_from='w/epoch_1.pth', resume=True))):
        runner = make_runner(work_dir, Noisy(), **settings, **start)
        loop = runner.train_loop
        runner.train()
    assert found[:2] == found[2:] and [epoch for epoch, _ in found] == [1, 2, 1, 2]
    assert found[0][1] != found[1][1]


def test_checkpoints_elsewhere_are_left_to_their_backend():
    hooks = [CheckpointHook(**kwargs) for kwargs in (
        {}, dict(backend_args=dict(backend='local')), dict(out_dir='s3://bucket'))]
    runner = SimpleNamespace(hooks=hooks, work_dir='w', _train_loop=None)
    ResumeHook().before_run(runner)
    assert [hook.backend_args for hook in hooks] == [dict(backend=resume.BACKEND), dict(backend='local'), None]


def change(path: str, **content) -> str:
    torch.save(torch.load(path, weights_only=False) | content, 'changed.pth')
    return 'changed.pth'


@pytest.mark.parametrize('content, words', [
    (dict(mmasl_resume=dict(batches=2, processes=1, done=1, evaluated=False)), 'batches.: 2.*epoch starts again'),
    (dict(mmasl_resume=dict(batches=4, processes=2, done=0, evaluated=False)), 'processes.: 2.*differs from'),
    (dict(mmasl_resume=None), 'written without mmasl.ResumeHook')], ids=['batch size', 'processes', "MMEngine's"])
def test_what_cannot_go_on_alike_goes_on_and_says_so(trained, monkeypatch, content, words):
    runner = make_runner('again', load_from=change(trained, **content), resume=True)
    said = []
    monkeypatch.setattr(runner.logger, 'warning', said.append)
    runner.train()
    assert runner.iter == 8
    assert any(re.search(words, text) for text in said)


def test_another_model_is_not_resumed(trained):
    with pytest.raises(CheckpointError, match=r'layer.weight is \(1, 1\) in the checkpoint and \(3, 1\) in the model'):
        make_runner('again', Model(3), load_from=trained, resume=True).train()


class Stream(Draws, IterableDataset):
    """Data without an index, as shards are read."""
    __getitem__ = None

    def __iter__(self):
        return map(float, range(7))


def test_data_without_batches_is_told():
    """Training, checkpoints and resuming work as in MMEngine, from the start and within the data."""
    said = []
    for start in ({}, dict(load_from='w/iter_3.pth', resume=True)):
        runner = make_runner('w', train_dataloader=dict(batch_size=2, num_workers=0, dataset=Stream(), sampler=None),
                             train_cfg=dict(by_epoch=False, max_iters=4),
                             default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=3)),
                             **start)
        runner.logger.warning = lambda text, *_: said.append(text)
        runner.train()
        assert runner.iter == 4
    assert sum('has no batches of indices' in text for text in said) == 2


# --- settings that a checkpoint restores

SGD = dict(type='SGD', lr=0.1, momentum=0.9)
ADAM = dict(type='Adam', lr=0.1)
STEPS = dict(type='MultiStepLR', milestones=[9])
COSINE = dict(type='CosineAnnealingLR', eta_min=0.01)
ONE_CYCLE = dict(type='OneCycleLR', eta_max=0.1, by_epoch=True, convert_to_iter_based=True)


def resumed(then: dict, now: dict) -> tuple[str, Runner]:
    """Train two epochs with some settings, and resume the first with others, or the second if there are more.

    Returns the warnings and the runner.
    """
    make_runner('then', **then).train()
    runner = make_runner('now', load_from=f'then/epoch_{2 if "train_cfg" in now else 1}.pth', resume=True, **now)
    told: list[str] = []
    runner.logger.warning = lambda text, *_: told.append(str(text))
    runner.train()
    return '\n'.join(told), runner


def test_other_lengths_of_a_schedule_follow_the_training():
    """Resuming for more epochs, as MMEngine does, with schedules whose end follows the number of epochs."""
    told, runner = resumed(dict(param_scheduler=COSINE), dict(
        param_scheduler=COSINE, train_cfg=dict(by_epoch=True, max_epochs=4)))
    assert runner.iter == 16
    assert 'of a training of another length' in told and 'T_max: 2 in the checkpoint, 4 by the config' in told
    # The last rate of the checkpoint's schedule remains.
    last = torch.load('then/epoch_2.pth', weights_only=False)['optimizer']['param_groups'][0]['lr']
    assert runner.optim_wrapper.param_groups[0]['lr'] == last


@pytest.mark.parametrize('then, now, words', [
    (dict(optimizer=SGD), dict(optimizer=dict(SGD, lr=0.01)), 'optimizer.lr: 0.1 in the checkpoint, 0.01 by the conf'),
    (dict(optimizer=SGD), dict(optimizer=dict(SGD, weight_decay=0.5)), 'optimizer.weight_decay: 0 in .*, 0.5 by'),
    (dict(optimizer=SGD), dict(optimizer=dict(SGD, nesterov=True)), 'nesterov: False in the checkpoint, True by'),
    (dict(optimizer=ADAM), dict(optimizer=dict(ADAM, betas=(0.8, 0.999))), r'betas: \(0.9, 0.999\) in .* \(0.8'),
    (dict(optimizer=ADAM), dict(optimizer=dict(ADAM, type='AdamW', weight_decay=0.)), 'decoupled_weight_decay: False'),
    (dict(optimizer=SGD), dict(optimizer=SGD, paramwise_cfg=dict(bias_lr_mult=2.)), 'another optimizer than SGD'),
    (dict(optimizer=SGD, paramwise_cfg=dict(bias_lr_mult=2.)), dict(optimizer=SGD, paramwise_cfg=dict(
        bias_lr_mult=3.)), 'optimizer.lr of 1 of 2 parameter groups: 0.2 in the checkpoint, 0.3'),
    (dict(optimizer=SGD), dict(optimizer=ADAM), 'another optimizer than Adam over 2 parameters')],
    ids=['lr', 'decay', 'nesterov', 'betas', 'AdamW', 'groups', 'one group', 'other'])
def test_other_settings_of_an_optimizer_are_refused(then, now, words):
    with pytest.raises(CheckpointError, match=words):
        resumed(dict(optim_wrapper=then), dict(optim_wrapper=now))


@pytest.mark.parametrize('then, now, words', [
    (STEPS, dict(STEPS, milestones=[1]), r'\(MultiStepLR\) milestones: \[9\] in the checkpoint, \[1\] by the config'),
    (STEPS, dict(STEPS, gamma=0.5), 'gamma: 0.1 in the checkpoint, 0.5'),
    (STEPS, dict(STEPS, by_epoch=False), 'by_epoch: True in the checkpoint, False'),
    (STEPS, dict(type='ExponentialLR', gamma=0.1), 'param_scheduler.0 is ExponentialLR by the config and another'),
    (STEPS, [STEPS, STEPS], '2 schedules by the config and 1 in'), (STEPS, None, '0 schedules by the config and 1 in'),
    (ONE_CYCLE, dict(ONE_CYCLE, pct_start=0.5), 'schedule_phases: '),
    (ONE_CYCLE, dict(ONE_CYCLE, eta_max=1.), 'eta_max: 0.1 in the checkpoint, 1.0'),
    (dict(COSINE, T_max=8), dict(COSINE, T_max=9), 'T_max: 8 in the checkpoint, 9')],
    ids=['milestones', 'gamma', 'unit', 'kind', 'more', 'none', 'phases', 'maximum', 'period'])
def test_other_schedules_are_refused(then, now, words):
    with pytest.raises(CheckpointError, match=words):
        resumed(dict(param_scheduler=then), dict(param_scheduler=now))


@pytest.mark.parametrize('schedule, refused', [('one cycle', True), ('steps', False)])
def test_another_batch_size(schedule, refused):
    """Schedules in iterations would end early or late; those in epochs do not depend on the number of batches."""
    settings = dict(param_scheduler=ONE_CYCLE if refused else STEPS)
    loader = dict(batch_size=4, num_workers=0, dataset=Draws(), sampler=dict(type='DefaultSampler'))
    if refused:
        with pytest.raises(CheckpointError, match='total_steps: 8 in the checkpoint, 4 by the config'):
            resumed(settings, dict(settings, train_dataloader=loader))
    else:
        told, _ = resumed(settings, dict(settings, train_dataloader=loader))
        assert 'differs from an uninterrupted run' in told


def test_the_settings_of_the_checkpoint_are_used_where_asked():
    told, runner = resumed(dict(optim_wrapper=dict(optimizer=SGD)), dict(
        optim_wrapper=dict(optimizer=dict(SGD, lr=5.)), custom_hooks=[dict(type='mmasl.ResumeHook', strict=False)]))
    assert 'lr: 0.1 in the checkpoint, 5.0 by the config' in told
    assert runner.optim_wrapper.param_groups[0]['lr'] == 0.1


def test_the_same_settings_pass():
    for settings in (dict(param_scheduler=ONE_CYCLE), dict(param_scheduler=[COSINE, dict(
            type='mmasl.OneCycleMomentum', by_epoch=True, convert_to_iter_based=True)]),
            dict(optim_wrapper=dict(optimizer=ADAM), param_scheduler=dict(type='CosineAnnealingMomentum'))):
        assert 'other settings' not in resumed(settings, settings)[0]


def test_several_optimizers():
    def wrapper(**lr) -> OptimWrapperDict:
        return OptimWrapperDict(**{name: OptimWrapper(torch.optim.SGD([torch.zeros(1)], value))
                                   for name, value in lr.items()})

    state = wrapper(a=0.1, b=0.1).state_dict()
    assert list(map(str, optimizer_differences(wrapper(a=0.1, b=0.2), state, 'a.pth'))) == [
        'optim_wrapper.b.optimizer.lr: 0.1 in the checkpoint, 0.2 by the config']
    with pytest.raises(CheckpointError, match=r"the optimizers \['a', 'b'\], and optim_wrapper has \['a'\]"):
        list(optimizer_differences(wrapper(a=0.1), state, 'a.pth'))
    scaled = OptimWrapper(torch.optim.SGD([torch.zeros(1)], 0.1))
    scaled.loss_scaler = torch.amp.GradScaler('cpu', growth_interval=7)
    state = scaled.state_dict() | dict(loss_scaler=torch.amp.GradScaler('cpu', growth_interval=9).state_dict())
    assert list(map(str, optimizer_differences(scaled, state, 'a.pth'))) == [
        'optim_wrapper.loss_scale.growth_interval: 9 in the checkpoint, 7 by the config']


def test_other_classes_are_refused():
    class Named(Draws):
        metainfo = dict(classes=('cat', 'dog'))

    class Turned(Draws):
        metainfo = dict(classes=('dog', 'cat'))

    loaders = [dict(train_dataloader=dict(batch_size=2, num_workers=0, dataset=kind(), sampler=dict(
        type='DefaultSampler'))) for kind in (Named, Turned)]
    with pytest.raises(CheckpointError, match="class 0 of train_dataloader.dataset: 'cat' in the checkpoint, 'dog' by"):
        resumed(*loaders)
