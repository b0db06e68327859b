"""tools/train.py and tools/test.py: flags, errors before anything is built, and small runs of both families."""
import errno
import json
import os
import pickle
import re
import socket
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmasl.errors import ConfigError, DataError, DiskFullError, MMASLError, UnavailableError
from mmasl.reproduce.experiments import digits_of
from mmasl.utils import tools as cli
from mmasl.utils.checkpoint import read_checkpoint
from tools import make_digits
from tools import test as TEST
from tools import train as TRAIN

ROOT = Path(__file__).parents[2]
TOOLS = dict(train=TRAIN, test=TEST)

CONFIG = """
default_scope = 'mmdet'
model = dict(type='Model', backbone=dict(type='Backbone'))
train_dataloader = dict(num_workers=2, dataset=dict(type='Data', data_root='data/', ann_file='train.json',
                                                    data_prefix=dict(img='images')))
val_dataloader = dict(num_workers=0, dataset=dict(type='Data', data_root='data/', ann_file='val.json', pipeline=[
    dict(type='LoadImageFromFile'), dict(type='PackDetInputs', meta_keys=('img_id', 'flip'))]))
val_evaluator = dict(type='Metric', ann_file='data/val.json')
test_dataloader, test_evaluator = val_dataloader, val_evaluator
train_cfg = dict(by_epoch=True, max_epochs=1)
val_cfg = test_cfg = dict()
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
param_scheduler = [dict(type='MultiStepLR')]
default_hooks = dict(visualization=dict(type='VisualizationHook'))
auto_scale_lr = dict(enable=False, base_batch_size=16)
load_from = None
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """A current folder with the config above, its data and a checkpoint, on a machine without GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.delenv('RANK', raising=False)
    monkeypatch.setattr(cli, 'get_device', lambda: 'cpu')
    monkeypatch.setattr(Config, 'pretty_text', '')  # formatting configs and looking for compilers is slow
    monkeypatch.setattr(Runner, '_log_env', lambda self, env: None)
    Path('c.py').write_text(CONFIG)
    Path('data/images').mkdir(parents=True)
    for name in ('data/train.json', 'data/val.json', 'weights.pth'):
        Path(name).touch()
    return tmp_path


def configure(tool: str, *argv: str):
    parser = TOOLS[tool].build_parser()
    positional = ['c.py', 'weights.pth'] if tool == 'test' else ['c.py']
    return TOOLS[tool].configure(cli.parse_args(parser, [*positional, *argv]))


def refusal(tool: str, *argv: str) -> str:
    """The message of an error, or the exit code of argparse."""
    with pytest.raises((MMASLError, SystemExit)) as stop:
        configure(tool, *argv)
    return stop.value.args[0]


# --- flags

@pytest.mark.parametrize('tool', TOOLS)
def test_shared_flags(tool):
    args = TOOLS[tool].build_parser().parse_args(
        ['c.py'] + ['w.pth'] * (tool == 'test') +
        '--work-dir w --amp --launcher slurm --local-rank 3 --cfg-options a.b=1 c=[x,y]'.split())
    assert (args.config, args.work_dir, args.amp, args.launcher, args.local_rank) == ('c.py', 'w', True, 'slurm', 3)
    assert args.cfg_options == {'a.b': 1, 'c': ['x', 'y']}


@pytest.mark.parametrize('argv, resume', (([], None), (['--resume'], 'auto'), (['--resume', 'a.pth'], 'a.pth')))
def test_train_flags(argv, resume):
    args = TRAIN.build_parser().parse_args(['c.py', '--no-validate', '--auto-scale-lr', *argv])
    assert args.no_validate and args.auto_scale_lr and args.resume == resume


def test_test_flags():
    args = TEST.build_parser().parse_args(
        'c.py w.pth --out o.json --out-item metrics --show --show-dir s --wait-time 1.5 --interval 7 --tta'.split())
    assert (args.checkpoint, args.out, args.out_item, args.show_dir) == ('w.pth', 'o.json', 'metrics', 's')
    assert args.show and args.tta and (args.wait_time, args.interval) == (1.5, 7)


def test_work_dir_of_flag_then_config_then_name():
    assert configure('train').work_dir == os.path.join('work_dirs', 'c')
    assert configure('train', '--cfg-options', 'work_dir=mine').work_dir == 'mine'
    assert configure('train', '--cfg-options', 'work_dir=mine', '--work-dir', 'flag').work_dir == 'flag'


def test_options_reach_the_config():
    cfg = configure('train', '--cfg-options', 'optim_wrapper.optimizer.lr=0.5', 'train_dataloader.dataset.type=Other')
    assert cfg.optim_wrapper.optimizer == dict(type='SGD', lr=0.5)
    assert cfg.train_dataloader.dataset.type == 'Other'


def test_options_that_do_not_fit(capsys):
    assert '--cfg-options does not fit c.py' in refusal('train', '--cfg-options', 'param_scheduler.4.type=X')
    assert 'Give the whole list' in refusal('train', '--cfg-options', 'param_scheduler.0=x')
    with pytest.raises(ConfigError, match='a.0: entries of a list in c.py can be changed by their numbers only if'):
        cli.merge_options(Config(dict(a=[1., 2.])), {'a.0': 3}, 'c.py')
    assert 'as in custom_hooks.0.type=' in refusal('train', '--cfg-options', "custom_hooks=[dict(type='EMAHook')]")
    cli.merge_options(Config(dict(a='')), {'a': 'predict(x)'}, 'c.py')
    assert refusal('train', '--cfg-options', 'novalue') == 2
    assert 'must be KEY=VALUE' in capsys.readouterr().err


@pytest.mark.parametrize('key', ['metainfo.classes', 'classes'])
def test_empty_lines_at_the_end_of_a_list_of_classes(key):
    Path('three.txt').write_text('cat\ndog\nelk\n\n \n')
    Path('two.txt').write_text('cat\n\nelk\n')
    for name, names in (('three.txt', ['cat', 'dog', 'elk']), ('two.txt', 'two.txt'), ('none.txt', 'none.txt')):
        dataset = configure('train', '--cfg-options', f'train_dataloader.dataset.{key}={name}').train_dataloader.dataset
        assert (dataset.metainfo.classes if 'metainfo' in dataset else dataset.classes) == names


@pytest.mark.parametrize('option, meant', [
    ('train_cfgs.max_epochs=1', 'train_cfg'), ('optim_wraper.optimizer.lr=1', 'optim_wrapper'),
    ('train_cfg.max_epoch=1', 'train_cfg.max_epochs'), ('custom_hook.0.type=EMAHook', 'custom_hooks'),
    ('train_dataloader.dataset.data_rot=x', 'train_dataloader.dataset.data_root')])
def test_options_that_would_change_nothing(option, meant):
    assert refusal('train', '--cfg-options', option).endswith(f'would change nothing. Did you mean {meant}?')


def test_options_that_add_settings():
    cfg = configure('train', '--cfg-options', 'custom_hooks.0.type=EMAHook', 'custom_hooks.1.type=Other',
                    'randomness.seed=1', 'model.test_cfg.score_thr=0', 'optim_wrapper.clip_grad.max_norm=1')
    assert [hook.type for hook in cfg.custom_hooks] == ['EMAHook', 'Other']
    assert (cfg.randomness.seed, cfg.model.test_cfg.score_thr, cfg.optim_wrapper.clip_grad.max_norm) == (1, 0, 1)
    assert 'Check its spelling' in refusal('train', '--cfg-options', 'unheard.of=1')


def test_options_of_another_class():
    """Its arguments may nearly equal those of the class that it replaces."""
    roots, place = 'train_dataloader.dataset.data_roots=[a,b]', 'train_dataloader.dataset'
    assert refusal('train', '--cfg-options', roots).endswith(f'Did you mean {place}.data_root?')
    for replaced, left in (('type=Others', True), ('_delete_=True', False)):
        dataset = configure('train', '--cfg-options', roots, f'{place}.{replaced}').train_dataloader.dataset
        assert dataset.data_roots == ['a', 'b'] and ('data_root' in dataset) is left
    assert configure('train', '--cfg-options', 'strategy.type=DDPStrategy').strategy.type == 'DDPStrategy'


def test_imports_by_options(folder, monkeypatch):
    """As docs/stock_configs.md shows them, for a config without custom_imports."""
    Path('mine_by_option.py').touch()
    assert 'Failed to import mine_by_option. Correct the name' in refusal(
        'train', '--cfg-options', 'custom_imports.imports=[mine_by_option]')
    monkeypatch.syspath_prepend(folder)
    cfg = configure('train', '--cfg-options', 'custom_imports.imports=[mmasl,mine_by_option]')
    assert cfg.custom_imports.imports == ['mmasl', 'mine_by_option'] and sys.modules.pop('mine_by_option')


def test_no_workers_and_a_home_folder(monkeypatch, folder):
    monkeypatch.setenv('HOME', str(folder))
    cfg = configure('train', '--cfg-options', 'train_dataloader.persistent_workers=True',
                    'train_dataloader.prefetch_factor=2', 'train_dataloader.num_workers=0',
                    'val_dataloader.num_workers=1', 'val_dataloader.persistent_workers=True',
                    'train_dataloader.dataset.data_root=~/data', 'val_evaluator.ann_file=~/data/val.json')
    assert not {'persistent_workers', 'prefetch_factor'} & set(cfg.train_dataloader)
    assert cfg.val_dataloader.persistent_workers
    assert cfg.train_dataloader.dataset.data_root == f'{folder}/data'
    assert cfg.val_evaluator.ann_file == f'{folder}/data/val.json'


def test_mistakes_in_types_and_arguments_end_in_a_message():
    for config, words in ((dict(type='TimerHook'), '^TimerHook is not in the .*Correct its type'),
                          (dict(type='IterTimerHook', intervall=1), "'intervall'. Correct the arguments")):
        with pytest.raises(SystemExit, match=words), cli.exit_on_user_error():
            HOOKS.build(config)


def test_no_validate_drops_validation():
    Path('data/val.json').unlink()
    cfg = configure('train', '--no-validate')
    assert cfg.val_cfg is None and cfg.val_dataloader is None and cfg.val_evaluator is None


# --- mixed precision and learning rate

def test_amp_needs_a_gpu(monkeypatch):
    for tool in TOOLS:
        assert '--amp needs a GPU' in refusal(tool, '--amp')
    assert "'AmpOptimWrapper' needs a GPU" in refusal('train', '--cfg-options', 'optim_wrapper.type=AmpOptimWrapper')
    monkeypatch.setattr(cli, 'get_device', lambda: 'cuda')
    wrapper = configure('train', '--amp').optim_wrapper
    assert (wrapper.type, wrapper.loss_scale, wrapper.optimizer.type) == ('AmpOptimWrapper', 'dynamic', 'SGD')
    assert configure('train', '--amp', '--cfg-options', 'optim_wrapper.loss_scale=512.').optim_wrapper.loss_scale == 512
    assert configure('test', '--amp').test_cfg.fp16
    assert "is 'Other'" in refusal('train', '--amp', '--cfg-options', 'optim_wrapper.type=Other')


def test_auto_scale_lr():
    assert configure('train', '--auto-scale-lr').auto_scale_lr.enable
    assert 'base_batch_size' in refusal('train', '--auto-scale-lr', '--cfg-options', 'auto_scale_lr=None')
    assert 'eta_max' in refusal('train', '--auto-scale-lr', '--cfg-options', 'param_scheduler.0.type=OneCycleLR')


# --- missing files

@pytest.mark.parametrize('config, path, place, source', (
    ('fcos_asl_coco', 'data/coco/annotations/instances_train2017.json', 'data/coco/', 'train2017.zip'),
    ('atss_focal_coco', 'data/coco/val2017/', 'data/coco/', 'annotations_trainval2017.zip'),
    ('resnet101_asl_coco', 'data/coco/annotations/instances_val2014.json', 'data/coco/', 'val2014.zip'),
    ('resnet101_bce_voc', 'data/VOCdevkit/VOC2007/ImageSets/Main/test.txt', 'data/', 'VOCtest_06-Nov-2007.tar')))
def test_missing_data_of_the_shipped_configs(config, path, place, source, folder):
    with pytest.raises(MMASLError) as stop:
        TRAIN.configure(TRAIN.build_parser().parse_args([
            str(next(ROOT.glob(f'configs/**/{config}.py'))), '--cfg-options', 'model.backbone.init_cfg=None']))
    for expected in (f'  {path} ', f'in {place}', source, 'tools/make_digits.py data/digits', str(folder),
                     'configs/digits/fcos_asl_digits.py', 'configs/digits/resnet_asl_digits.py'):
        assert expected in str(stop.value)


@pytest.mark.parametrize('config, root', (
    ('resnet_asl_digits', 'data/digits'), ('fcos_asl_digits', 'data/digits'), ('resnet_ce_glyphs', 'data/glyphs'),
    ('resnet_adaptive_digits_hard', 'data/digits_hard')))
def test_missing_digits_are_made_by_the_command_that_is_shown(config, root, monkeypatch):
    """The "Made by" comment of the config: it makes what tools/reproduce.py trains on."""
    with pytest.raises(DataError) as stop:
        cli.check_data(Config.fromfile(ROOT / f'configs/digits/{config}.py'), 'train')
    command, = re.findall('^Made by: (.+)$', str(stop.value), re.MULTILINE)
    written = []
    monkeypatch.setattr(make_digits.DigitScenes, 'write', lambda self, root, overwrite: written.append((root, self)))
    monkeypatch.setattr(sys, 'argv', command.split()[1:])
    make_digits.main()
    assert written == [(root, digits_of(root))]


@pytest.mark.parametrize('config', ['resnet_bce_digits_paper', 'tresnet_asl_digits_paper', 'resnet_asl_digits'])
def test_missing_start_has_its_own_config(config):
    """Each start of the digits is made by another config."""
    with pytest.raises(MMASLError) as stop:
        TRAIN.configure(TRAIN.build_parser().parse_args([str(next(ROOT.glob(f'configs/**/{config}.py')))]))
    start, = re.findall(r'train it first \(python tools/train.py (\S+)\)', str(stop.value))
    assert Path(start).is_file() and f'work_dirs/{Path(start).stem}/' in str(stop.value)


def test_missing_data_is_reported_whole_and_alone():
    for name in ('data/train.json', 'data/val.json'):
        Path(name).unlink()
    lines = [line.split() for line in refusal('train').splitlines() if '<-' in line]
    assert lines == [['data/train.json', '<-', 'train_dataloader.dataset.ann_file'],
                     ['data/val.json', '<-', 'val_dataloader.dataset.ann_file'],
                     ['data/val.json', '<-', 'val_evaluator.ann_file']]
    assert [line.split()[-1] for line in refusal('test').splitlines() if '<-' in line] == [
        'test_dataloader.dataset.ann_file', 'test_evaluator.ann_file']


def test_missing_data_inside_wrappers_and_lists():
    Path('c.py').write_text(CONFIG + """
train_dataloader['dataset'] = dict(type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=[
    dict(type='Data', ann_file='data/train.json'), dict(type='Data', data_root='absent', data_prefix='x'),
    dict(type='Data', data_root='nowhere'), dict(type='mmpretrain.CIFAR10', data_root='fetched')]))
val_evaluator = [dict(type='Metric'), dict(type='Metric', ann_file='gone.json')]
""")
    lines = [line.split() for line in refusal('train').splitlines() if '<-' in line]
    assert [(path.rstrip('/'), key) for path, _, key in lines] == [
        ('absent/x', 'train_dataloader.dataset.dataset.datasets.1.data_prefix'),
        ('nowhere', 'train_dataloader.dataset.dataset.datasets.2.data_root'),
        ('gone.json', 'val_evaluator.1.ann_file')]


def test_remote_data_is_left_to_its_backend():
    options = ['train_dataloader.dataset.data_root=s3://bucket', 'val_dataloader.dataset.ann_file=https://host/a.json',
               'val_evaluator.ann_file=absent.json', 'val_evaluator.backend_args.backend=petrel']
    assert configure('train', '--cfg-options', *options).train_dataloader.dataset.data_root == 's3://bucket'


@pytest.mark.parametrize('tool, argv, message', (
    ('train', ['--resume', 'gone.pth'], 'No such checkpoint: gone.pth'),
    ('train', ['--cfg-options', 'load_from=gone.pth'], 'No such checkpoint: gone.pth'),
    ('test', ['--cfg-options', 'test_dataloader=None'], 'c.py has no test_dataloader')))
def test_missing_files(tool, argv, message):
    assert message in refusal(tool, *argv)


@pytest.mark.parametrize('broken', ['building', 'training'])
def test_a_download_out_of_reach(broken, monkeypatch):
    """timm downloads while the model is built, torch.hub while its weights are initialised."""
    import timm  # noqa: F401  # brings the hub's errors

    unreachable = sys.modules['huggingface_hub.errors'].LocalEntryNotFoundError

    class Runner:
        train_loop = val_loop = None

        def train(self):
            raise URLError('no route')

    def build(cfg, hooks):
        if broken == 'building':
            raise unreachable('no route')
        return Runner()

    monkeypatch.setattr(TRAIN, 'build_runner', build)
    monkeypatch.setattr(TRAIN, 'check_annotation_files', lambda *_: None)
    with pytest.raises(SystemExit, match=r'could not be downloaded \(.*no route.*model.backbone.pretrained=False'):
        TRAIN.main(['c.py'])


def test_another_failure_keeps_its_traceback(monkeypatch):
    def build(cfg, hooks):
        raise FileNotFoundError('something else')

    monkeypatch.setattr(TRAIN, 'build_runner', build)
    with pytest.raises(FileNotFoundError, match='something else'):
        TRAIN.main(['c.py'])


def test_what_a_checkpoint_replaces_is_not_downloaded():
    for tool, flags in (('test', ()), ('train', ('--resume', 'weights.pth'))):
        cfg = configure(tool, '--cfg-options', 'model.backbone.pretrained=True', *flags)
        assert cfg.model.backbone.pretrained is False
    assert configure('train', '--cfg-options', 'model.backbone.pretrained=True').model.backbone.pretrained is True


def test_missing_pretrained_weights():
    Path('c.py').write_text(CONFIG + "model['neck'] = [dict(init_cfg=dict(type='Pretrained', checkpoint='gone.pth'))]")
    message = refusal('train')
    assert 'No such file of pretrained weights: gone.pth' in message and 'init_cfg=None' in message
    configure('test')


def test_missing_config_and_checkpoint(folder):
    for tool, argv in (('train', ['gone.py']), ('test', ['gone.py', 'weights.pth']), ('test', ['c.py', 'gone.pth'])):
        with pytest.raises(ConfigError, match=f'(config|checkpoint): gone.*{folder}'):
            TOOLS[tool].configure(TOOLS[tool].build_parser().parse_args(argv))
    for name in ('torchvision://resnet101', 'https://host/a.pth'):
        cli.require_file(name, 'checkpoint')


# --- resume

def test_resume_without_checkpoint_starts_anew_and_says_so(capsys):
    cfg = configure('train', '--resume', '--work-dir', 'w', '--cfg-options', 'load_from=weights.pth')
    assert cfg.resume is False and cfg.load_from == 'weights.pth'
    assert 'w holds no checkpoint' in capsys.readouterr().err


def save(name: str) -> str:
    Path('w').mkdir(exist_ok=True)
    torch.save(dict(meta={}, message_hub={}, optimizer={}, state_dict={}), f'w/{name}')
    return f'w/{name}'


@pytest.mark.parametrize('named', ('w/epoch_3.pth', '/elsewhere/epoch_3.pth'), ids=('in place', 'moved'))
@pytest.mark.parametrize('argv', (['--resume'], ['--cfg-options', 'resume=True']), ids=('flag', 'config'))
def test_resume_from_the_last_checkpoint(named, argv, capsys):
    save('epoch_3.pth')
    Path('w/last_checkpoint').write_text(named + '\n')
    cfg = configure('train', *argv, '--work-dir', 'w')
    assert cfg.resume is True and cfg.load_from == os.path.join('w', 'epoch_3.pth')
    assert capsys.readouterr().err == ''


def test_resume_from_the_newest_that_can_be_read(capsys):
    path = save('epoch_2.pth')
    Path('w/last_checkpoint').write_text('w/epoch_3.pth')
    Path('w/epoch_3.pth').write_bytes(Path(path).read_bytes()[:500])
    assert configure('train', '--resume', '--work-dir', 'w').load_from == path
    said = capsys.readouterr().err
    assert 'Resuming from w/epoch_2.pth, the newest' in said and 'epoch_3.pth is not a checkpoint or is damaged' in said


def test_resume_never_starts_anew_beside_checkpoints():
    Path('w').mkdir()
    Path('w/last_checkpoint').write_text('w/epoch_3.pth')
    message = refusal('train', '--resume', '--work-dir', 'w')
    assert 'w holds no checkpoint to resume from' in message and 'no such checkpoint: w/epoch_3.pth' in message
    assert '--resume CHECKPOINT' in message


def test_testing_never_resumes():
    cfg = configure('test', '--cfg-options', 'resume=True')
    assert cfg.resume is False and cfg.load_from == 'weights.pth'


# --- what depends on the family

def test_classification_gets_mmpretrains_dataloader_defaults(monkeypatch):
    argv = ['--cfg-options', 'default_scope=mmpretrain', 'val_dataloader.pin_memory=False']
    cfg = configure('train', *argv)
    assert cfg.train_dataloader.collate_fn == dict(type='default_collate')
    assert cfg.train_dataloader.persistent_workers is True and cfg.val_dataloader.persistent_workers is False
    assert cfg.train_dataloader.pin_memory is False
    monkeypatch.setattr(cli, 'get_device', lambda: 'cuda')
    cfg = configure('train', *argv)
    assert cfg.train_dataloader.pin_memory is True and cfg.val_dataloader.pin_memory is False
    assert configure('test', *argv).test_dataloader.collate_fn == dict(type='default_collate')


def test_detection_dataloaders_are_left_alone():
    cfg = configure('train')
    for loader in (cfg.train_dataloader, cfg.val_dataloader, configure('test').test_dataloader):
        assert set(loader) == {'num_workers', 'dataset'}


def test_pictures(folder):
    argv = ['--show', '--show-dir', 'pictures', '--wait-time', '1', '--interval', '5']
    drawn = dict(type='VisualizationHook', show=True, wait_time=1.)
    assert configure('test', *argv).default_hooks.visualization == dict(
        drawn, draw=True, test_out_dir=str(folder / 'pictures'))
    assert configure('test', *argv, '--cfg-options', 'default_scope=mmpretrain').default_hooks.visualization == dict(
        drawn, enable=True, out_dir=str(folder / 'pictures'), interval=5)
    assert 'default_hooks.visualization' in refusal('test', '--show', '--cfg-options',
                                                    'default_hooks.visualization=None')
    assert 'without --tta' in refusal('test', '--tta', *argv, '--cfg-options', 'default_scope=mmpretrain')
    assert '--interval 0: give 1 or more' in refusal('test', '--show-dir', 'pictures', '--interval', '0')


def test_tta_wraps_model_and_pipeline():
    cfg = configure('test', '--tta')
    assert cfg.model.type == 'DetTTAModel' and cfg.model.module.type == 'Model'
    load, tta = cfg.test_dataloader.dataset.pipeline
    assert load.type == 'LoadImageFromFile' and tta.type == 'TestTimeAug'
    flips, (pack, ) = tta.transforms
    assert [flip.prob for flip in flips] == [1, 0]
    assert pack.meta_keys == ('img_id', 'flip', 'flip_direction')
    assert configure('test', '--tta', '--cfg-options', 'default_scope=mmpretrain').model.type == 'AverageClsScoreTTA'
    Path('c.py').write_text(CONFIG + "tta_model = dict(type='Mine')\ntta_pipeline = [dict(type='Other')]\n")
    cfg = configure('test', '--tta')
    assert cfg.model.type == 'Mine' and cfg.test_dataloader.dataset.pipeline == [dict(type='Other')]


@pytest.mark.parametrize('argv, message', (
    (['--out', 'o.json'], 'pred are written to .pkl'), (['--out', 'o.txt', '--out-item', 'metrics'], 'metrics are')))
def test_out_needs_a_known_suffix(argv, message):
    assert message in refusal('test', *argv)


# --- exits

@pytest.mark.parametrize('error, message', (
    (OSError(errno.ENOSPC, 'x'), r'A file of the run could not be written \(No space left on device\)\. Earlier'),
    (OSError(errno.EDQUOT, 'x', 'a.log'), r'a.log could not be written \(Disk quota exceeded\): \S+ has \S+ MB'),
    (DiskFullError('full'), '^full$')), ids=('disk', 'quota', 'ours'))
def test_a_full_disk_ends_in_a_message(error, message):
    with pytest.raises(SystemExit, match=message), cli.exit_on_user_error():
        raise error


def test_a_refused_checkpoint_ends_in_a_message():
    with pytest.raises(SystemExit, match='^weights.pth is not a checkpoint or is damaged'), cli.exit_on_user_error():
        read_checkpoint('weights.pth')


def test_other_errors_pass():
    for error in (FileNotFoundError('a'), ValueError('b')):
        with pytest.raises(type(error)), cli.exit_on_user_error():
            raise error


@pytest.mark.parametrize('flags, missing', (
    ([], set()), (['--no-check-data'], {'mmasl.CheckDataHook'}), (['--no-check-finite'], {'mmasl.CheckFiniteHook'}),
    (['--no-exact-resume'], {'mmasl.ResumeHook'})))
def test_flags_turn_hooks_off(flags, missing):
    args = TRAIN.build_parser().parse_args(['c.py', *flags])
    hooks = TRAIN.automatic_hooks(ConfigDict(resume=False), args)
    everything = TRAIN.automatic_hooks(ConfigDict(resume=False), TRAIN.build_parser().parse_args(['c.py']))
    names = [hook if isinstance(hook, str) else hook['type'] for hook in everything if hook not in hooks]
    assert names == sorted(missing)
    assert hooks[-1] == dict(type='mmasl.CheckStateDictHook', strict=False)
    assert TRAIN.automatic_hooks(ConfigDict(resume=True), args)[-1] == dict(
        type='mmasl.CheckStateDictHook', strict=True)


# --- launchers

@pytest.mark.parametrize('launcher, kind, message', (
    ('pytorch', ConfigError, 'tools/dist_train.sh'), ('slurm', UnavailableError, '--launcher slurm needs a GPU')))
def test_launcher_that_cannot_start(launcher, kind, message):
    with pytest.raises(kind, match=message):
        cli.build_runner(ConfigDict(launcher=launcher))


@pytest.mark.parametrize('script, arguments', (
    ('dist_train', 'CONFIG GPUS'), ('dist_test', 'CONFIG CHECKPOINT GPUS'),
    ('slurm_train', 'PARTITION JOB_NAME CONFIG WORK_DIR'), ('slurm_test', 'PARTITION JOB_NAME CONFIG CHECKPOINT')))
def test_scripts_say_their_arguments(script, arguments):
    done = subprocess.run([ROOT / 'tools' / f'{script}.sh', 'one'], capture_output=True, text=True)
    assert done.returncode == 2 and f'{script}.sh {arguments}' in done.stderr


def test_slurm_script_passes_everything_on(folder):
    srun = folder / 'srun'
    srun.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    srun.chmod(0o755)
    done = subprocess.run([ROOT / 'tools' / 'slurm_train.sh', 'part', 'name', 'c.py', 'w', '--cfg-options', 'a=[1, 2]'],
                          capture_output=True, text=True, env=os.environ | dict(
                              PATH=f'{folder}:{os.environ["PATH"]}', GPUS='4', GPUS_PER_NODE='2', SRUN_ARGS='--x --y'))
    words = done.stdout.splitlines()
    assert {'--partition=part', '--job-name=name', '--ntasks=4', '--gres=gpu:2', '--x', '--y'} <= set(words)
    assert words[-7:] == ['c.py', '--work-dir', 'w', '--launcher', 'slurm', '--cfg-options', 'a=[1, 2]']


# --- real runs

def run(*command: object) -> str:
    """Run a tool in the current folder, not the repository's; returns stdout and stderr."""
    done = subprocess.run([*map(str, command)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=os.environ | dict(
                              OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', PYTHON=sys.executable))
    assert done.returncode == 0, done.stdout[-3000:]
    assert 'Could not safely load' not in done.stdout
    return done.stdout


def main(tool: str, *argv: object) -> None:
    """Run a tool in this process; its arguments end with ``--cfg-options``."""
    main.runs += 1  # names of their own: MMEngine would share logs and visualizers between runs
    TOOLS[tool].main([*map(str, argv), f'experiment_name=run{main.runs}', f'visualizer.name=run{main.runs}'])


main.runs = 0


def scalars(work_dir: str, key: str) -> list:
    """All values of a logged key, over the runs in a work dir in their order."""
    files = sorted(Path(work_dir).glob('*/vis_data/scalars.json'))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [row[key] for row in rows if key in row]


@pytest.fixture(scope='module')
def digits(tmp_path_factory) -> Path:
    from mmasl.datasets.digits import DigitScenes
    return DigitScenes(train=8, val=4, colors=1).write(tmp_path_factory.mktemp('data') / 'digits')


def write_tiny(base: str, digits: Path, prefix: str, dataset: dict, text: str) -> None:
    """Write tiny.py: a shipped config for the digits; ``prefix`` is the dataset's name for its image folder."""
    loaders = {split: dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(
        dataset, data_root=str(digits), ann_file=f'annotations/instances_{split}.json',
        data_prefix={prefix: f'{split}/'})) for split in ('train', 'val')}
    Path('tiny.py').write_text(f"""
_base_ = {str(ROOT / 'configs' / base)!r}
train_dataloader = {loaders['train']}
val_dataloader = {loaders['val']}
test_dataloader = val_dataloader
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(max_keep_ckpts=-1))
train_cfg = dict(max_epochs=2)
{text}
""")


@pytest.fixture
def classifier(digits) -> list[str]:
    """Writes tiny.py for a ResNet-18; returns flags for images of 64 px."""
    write_tiny('resnet101_asl_coco.py', digits, 'img_path', {}, """
model = dict(backbone=dict(depth=18, base_channels=8, init_cfg=None), head=dict(num_classes=10, in_channels=64))
""")
    return ['--cfg-options', *(f'{split}_dataloader.dataset.pipeline.1.scale=64' for split in ('train', 'val', 'test'))]


@pytest.fixture
def detector(digits) -> list[str]:
    """Writes tiny.py for a small FCOS; returns flags for images of 64 px."""
    annotations = digits / 'annotations/instances_val.json'
    classes = [category['name'] for category in json.loads(annotations.read_text())['categories']]
    write_tiny('fcos_asl_coco.py', digits, 'img', dict(metainfo=dict(classes=classes)), f"""
model = dict(backbone=dict(depth=18, base_channels=8, init_cfg=None), neck=dict(
    in_channels=[8, 16, 32, 64], out_channels=32), bbox_head=dict(
        num_classes=10, in_channels=32, feat_channels=32, stacked_convs=1), test_cfg=dict(score_thr=0.))
val_evaluator = dict(ann_file={str(annotations)!r})
test_evaluator = val_evaluator
""")
    return ['--cfg-options', 'train_dataloader.dataset.pipeline.2.scale=(64,64)',
            *(f'{split}_dataloader.dataset.pipeline.1.scale=(64,64)' for split in ('val', 'test'))]


def test_classifier_trains_resumes_and_tests(classifier):
    main('train', 'tiny.py', '--work-dir', 'w', *classifier)
    main('train', 'tiny.py', '--work-dir', 'again', '--resume', 'w/epoch_1.pth', *classifier)
    # The resumed second epoch continues the one-cycle schedule.
    whole, resumed = scalars('w', 'lr'), scalars('again', 'lr')
    assert len(whole) == 8 and resumed == pytest.approx(whole[4:], rel=1e-6)

    main('test', 'tiny.py', 'w/epoch_2.pth', '--out', 'out.json', '--out-item', 'metrics', '--show-dir', 'pictures',
           *classifier)
    assert json.loads(Path('out.json').read_text())['multi-label/mAP'] == pytest.approx(
        scalars('w', 'multi-label/mAP')[-1])
    assert len(list(Path('pictures').iterdir())) == 4
    main('test', 'tiny.py', 'w/epoch_2.pth', '--tta', '--out', 'out.pkl', *classifier)
    predictions = pickle.loads(Path('out.pkl').read_bytes())
    assert [len(prediction['pred_score']) for prediction in predictions] == [10] * 4


def test_detector_trains_resumes_and_tests(detector):
    main('train', 'tiny.py', '--work-dir', 'w', '--auto-scale-lr', *detector, 'train_cfg.max_epochs=1')
    assert scalars('w', 'lr')[0] == pytest.approx(0.01 / 3 * 2 / 16)
    main('train', 'tiny.py', '--work-dir', 'w', '--resume', '--auto-scale-lr', '--no-validate', *detector)
    assert any('resumed epoch: 1, iter: 4' in log.read_text() for log in Path('w').glob('*/*.log'))
    assert scalars('w', 'epoch')[-1] == 2 and len(scalars('w', 'coco/bbox_mAP')) == 1

    main('test', 'tiny.py', 'w/epoch_2.pth', '--tta', '--out', 'out.pkl', '--show-dir', 'pictures', *detector)
    predictions = pickle.loads(Path('out.pkl').read_bytes())
    assert all(set(prediction['pred_instances']) == {'bboxes', 'labels', 'scores'} for prediction in predictions)
    assert len(predictions) == len(list(Path('pictures').iterdir())) == 4
    main('test', 'tiny.py', 'w/epoch_2.pth', '--out', 'out.json', '--out-item', 'metrics', *detector)
    assert 'coco/bbox_mAP' in json.loads(Path('out.json').read_text())


@pytest.mark.slow
def test_two_processes_without_gpu_train_and_test_as_one(classifier, monkeypatch):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        monkeypatch.setenv('PORT', str(free.getsockname()[1]))
    run(ROOT / 'tools/dist_train.sh', 'tiny.py', 2, '--work-dir', 'w', *classifier)
    assert len(scalars('w', 'loss')) == 4  # 2 epochs of 8 images, 2 in each of 2 processes
    metrics = ['--out-item', 'metrics', *classifier]
    run(ROOT / 'tools/dist_test.sh', 'tiny.py', 'w/epoch_2.pth', 2, '--out', 'two.json', *metrics)
    main('test', 'tiny.py', 'w/epoch_2.pth', '--out', 'one.json', *metrics)
    two, one = (json.loads(Path(name).read_text()) for name in ('two.json', 'one.json'))
    assert two == pytest.approx(one)


def test_a_mistake_ends_in_a_message_without_traceback():
    done = subprocess.run([sys.executable, ROOT / 'tools/train.py', ROOT / 'configs/fcos_asl_coco.py'],
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ''
    assert done.stderr.startswith('Missing data') and 'Traceback' not in done.stderr
