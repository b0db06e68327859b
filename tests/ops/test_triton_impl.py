"""The kernel compiles for GPUs, which needs none; its helpers. tests/ops/test_functional.py checks its values."""
import os
import subprocess
import sys

import pytest
import torch
from test_functional import DEVICE
from torch.testing import assert_close

from mmasl.errors import UnavailableError
from mmasl.ops import asymmetric_loss, triton_impl, use_implementation
from mmasl.ops.functional import pick_implementation
from mmasl.ops.torch_impl import SOFT_LABELS

COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from mmasl.ops import triton_impl


def build(kernel, backend, arch, types, constants):
    names = [p.name for p in kernel.params]
    signature = {name: types.get(name, '*fp32' if name.endswith('_ptr') else 'i32') for name in names}
    signature |= dict.fromkeys(constants, 'constexpr')
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()})
    triton_impl.HIP.value = backend == 'hip'
    compiled = compile(source, target=GPUTarget(backend, arch, 32 if backend == 'cuda' else 64))
    print(backend, len(compiled.asm['cubin' if backend == 'cuda' else 'hsaco']) > 1000)


assert not triton_impl.INTERPRETED
for arch, dtype, target, loss, soft_label in {cases}:
    constants = dict.fromkeys(['MAY_BE_SOFT', 'PER_CLASS_POS', 'PER_CLASS_CLIP', 'DETACH', 'PER_CLASS_ALPHA',
                               'PER_CLASS_WEIGHT', 'PER_CLASS_POS_WEIGHT'], loss == 1) | dict(
        HAS_LABELS=target == 'i64', PER_CLASS_NEG=False, SOFT_LABEL=soft_label, LOSS=loss, BLOCK_R=16, BLOCK_C=16,
        stride_class=1, ignore_index=None if loss == 1 else 255, quality_ptr=None,
        **dict.fromkeys(['alpha_ptr', 'class_weight_ptr', 'pos_weight_ptr'] if arch == 80 else []))
    build(triton_impl._kernel, 'cuda' if isinstance(arch, int) else 'hip', arch,
          dict(z_ptr='*' + dtype, grad_ptr='*' + dtype, target_ptr='*' + target),
          constants)
"""


@pytest.mark.parametrize('cases', [
    [(80, 'fp32', 'i64', 2, 'mal'), (90, 'bf16', 'fp32', 1, 'mixture'), ('gfx942', 'fp32', 'fp32', 2, 'vfl')],
    pytest.param([(90, 'fp16', 'u8', 2, 'mixture'), (90, 'fp32', 'fp32', 1, 'qfl')], marks=pytest.mark.slow)],
    ids=['most', 'others'])
def test_compiles_for_gpus(cases, tmp_path):
    env = dict(os.environ, TRITON_INTERPRET='0', TRITON_CACHE_DIR=str(tmp_path))
    done = subprocess.run([sys.executable, '-c', COMPILE.replace('{cases}', str(cases))], env=env, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [f'{"cuda" if isinstance(arch, int) else "hip"} True' for arch, *_ in cases]


IMPORT = """
import sys
from types import ModuleType
sys.modules['triton'] = None
from mmasl.ops import functional
print(functional._no_triton)
for name in ('triton', 'triton.language'):
    sys.modules[name] = ModuleType(name)
sys.modules['triton'].__version__ = '3.3.1'
try:
    import mmasl.ops.triton_impl
except ImportError as error:
    print(error)
"""


@pytest.mark.slow
def test_why_triton_cannot_be_used():
    done = subprocess.run([sys.executable, '-c', IMPORT], capture_output=True, text=True)
    assert done.stdout.splitlines() == ['Triton is not installed',
                                        'the kernel needs Triton 3.4 or newer, and Triton 3.3.1 is installed']


@pytest.fixture(autouse=True)
def tensors_on_device():
    with torch.device(DEVICE):
        yield


@pytest.fixture
def unchecked(monkeypatch):
    monkeypatch.setattr(triton_impl, '_checked', {})


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_first_call_compares_the_kernel_once(unchecked, monkeypatch, dtype):
    calls = []
    check = triton_impl.check
    monkeypatch.setattr(triton_impl, 'check', lambda *place: calls.append(place) or check(*place))
    logits = torch.zeros(2, 3, dtype=dtype)
    assert [triton_impl.unavailable_reason(logits) for _ in range(2)] == ['', '']
    assert calls == [(logits.device, dtype, 'mixture')]


@pytest.mark.parametrize('result', [0, 1, 2])
def test_a_kernel_that_computes_something_else_is_refused(unchecked, monkeypatch, result):
    run = triton_impl.run

    def wrong(*args, **kwargs):
        found = list(run(*args, **kwargs))
        found[result] = found[result] * 1.01
        return found

    monkeypatch.setattr(triton_impl, 'run', wrong)
    with use_implementation('triton'), pytest.raises(UnavailableError, match='differs from the PyTorch formula'):
        pick_implementation(torch.zeros(1))


def test_a_meaning_of_soft_labels_that_is_wrong_is_refused_alone(unchecked, monkeypatch, caplog):
    run = triton_impl.run

    def wrong(problem, **kwargs):
        loss, *others = run(problem, **kwargs)
        return loss * (1.01 if problem.soft_label == 'mal' else 1), *others

    monkeypatch.setattr(triton_impl, 'run', wrong)
    logits = torch.zeros(1)
    assert [kind for kind in SOFT_LABELS if triton_impl.unavailable_reason(logits, kind)] == ['mal']
    assert "soft_label='mal'" in caplog.text
    with use_implementation('triton'), pytest.raises(UnavailableError, match='differs from the PyTorch formula'):
        asymmetric_loss(torch.zeros(1, 2), torch.zeros(1, 2), soft_label='mal')


def test_a_kernel_that_does_not_run_is_refused(unchecked, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError('PTX assembly aborted\nptxas: no kernel image for sm_00')

    monkeypatch.setattr(triton_impl, 'run', fail)
    with use_implementation('triton'), pytest.raises(UnavailableError, match='RuntimeError: .*no kernel image'):
        pick_implementation(torch.zeros(1))


@pytest.mark.parametrize('name, dtype, calls', [
    ('triton', torch.float32, 1), ('eager', torch.float32, 0), ('inductor', torch.float64, 0)], ids=str)
def test_a_gradient_is_scaled_by_the_implementation_that_is_asked_for(name, dtype, calls, monkeypatch):
    seen, scale = [], triton_impl.scale_
    monkeypatch.setattr(triton_impl, 'scale_', lambda *args: seen.append(args) or scale(*args))
    logits, target = torch.randn(7, 5, dtype=dtype), torch.rand(7, 5, dtype=dtype)
    plain, scaled = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    asymmetric_loss(plain, target, reduction='sum').backward()
    loss = asymmetric_loss(scaled, target, reduction='sum')
    with use_implementation(name):
        (3 * loss).backward()
    assert len(seen) == calls
    assert_close(scaled.grad, 3 * plain.grad)


def test_a_first_call_while_a_graph_is_captured(unchecked, monkeypatch):
    device = torch.device('cuda', 0)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert triton_impl._unavailable_reason(device, torch.float32, 'mixture') == 'PyTorch finds no GPU'
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    assert 'the capture of a CUDA graph forbids' in triton_impl._unavailable_reason(
        device, torch.float32, 'mixture')
    assert not triton_impl._checked, 'a later call checks'


def test_first_call_inside_a_compiled_graph(unchecked):
    @torch.compile(fullgraph=True, backend='eager')
    def step(logits, target):
        with use_implementation('triton'):
            return asymmetric_loss(logits, target, reduction='sum')

    logits, target = torch.randn(7, 5), torch.rand(7, 5)
    expected = asymmetric_loss(logits, target, reduction='sum')
    assert_close(step(logits, target), expected)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('factor', [1., 0.5, 0.])
@pytest.mark.parametrize('shape', [(3, ), (70, 33), (0, 4)], ids=str)
def test_scale_in_place(dtype, factor, shape):
    grad = torch.linspace(-3, 3, 5000)[:torch.Size(shape).numel()].reshape(shape).to(dtype)
    expected = grad * factor
    assert triton_impl.scale_(grad, torch.tensor(factor)) is grad
    assert_close(grad, expected)


def test_what_is_copied_and_what_is_read_in_place():
    x = torch.zeros(2, 6, 4, 5)
    assert triton_impl.layout(x) == (1, 48, 5, 1)
    assert triton_impl.layout(x.permute(0, 2, 3, 1)) == (2, 20, 1, 20)
    assert triton_impl.layout(x[0].permute(1, 2, 0)) == (1, 20, 1, 20)
    assert triton_impl.layout(x[..., ::2]) is None
    assert triton_impl.layout(torch.zeros(())) == (1, 1, 1, 1)
    strided = torch.randn(7, 12)[:, ::2]
    target = (strided > 1).float()
    with use_implementation('triton'):
        results = [asymmetric_loss(z, target) for z in (strided, strided.contiguous())]
    assert_close(*results, rtol=0, atol=0)


def test_a_tile_of_a_transposed_target_spans_more_than_int32():
    """The classes of 17 million rows, of which two are looked at: the rest of the memory is never touched."""
    rows, shape = 17_000_000, (2, 128)
    logits, y = torch.randn(shape), torch.arange(256).view(shape) % 3 == 0
    # As much in front, where a wrapped offset ends.
    target = torch.empty(2 * 128 * rows, dtype=torch.bool).as_strided(shape, (1, rows), 128 * rows).copy_(y)
    for kwargs in (dict(target=target), dict(target=target, weight=target), dict(target=y, weight=target)):
        plain = dict.fromkeys(kwargs, y)
        with use_implementation('triton'):
            assert_close(*(asymmetric_loss(logits, **x) for x in (kwargs, plain)), rtol=0, atol=0)


@pytest.mark.parametrize('classes', [1, 2, 5, 16, 20, 80, 100, 601, 9605])
def test_tiles_waste_little(classes):
    size = triton_impl._class_block(classes, 1)
    assert size & (size - 1) == 0 and size <= 128
    assert -(-classes // size) * size <= 1.6 * classes
