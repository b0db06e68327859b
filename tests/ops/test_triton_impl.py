"""The kernel compiles for GPUs, which needs none; its helpers. tests/ops/test_functional.py checks its values."""
import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from mmasl.ops import asymmetric_loss, triton_impl, use_implementation

COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from mmasl.ops import triton_impl


def build(kernel, arch, types, constants):
    names = [p.name for p in kernel.params]
    signature = {name: types.get(name, '*fp32' if name.endswith('_ptr') else 'i32') for name in names}
    signature |= dict.fromkeys(constants, 'constexpr')
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()})
    print(len(compile(source, target=GPUTarget('cuda', arch, 32), options=dict(num_warps=4)).asm['cubin']) > 1000)


assert not triton_impl.INTERPRETED
for arch, dtype, target, loss in (80, 'fp32', 'i64', 2), (90, 'bf16', 'fp32', 1), (90, 'fp16', 'u8', 2):
    constants = dict.fromkeys(['MAY_BE_SOFT', 'PER_CLASS_POS', 'PER_CLASS_CLIP', 'DETACH'], loss == 1) | dict(
        HAS_LABELS=target == 'i64', PER_CLASS_NEG=False, LOSS=loss, BLOCK_R=16, BLOCK_C=16, stride_class=1,
        ignore_index=None if loss == 1 else 255, quality_ptr=None)
    build(triton_impl._kernel, arch, dict(z_ptr='*' + dtype, grad_ptr='*' + dtype, target_ptr='*' + target,
                                          alpha_pos='fp32', alpha_neg='fp32'), constants)
"""


def test_compiles_for_gpus(tmp_path):
    env = dict(os.environ, TRITON_INTERPRET='0', TRITON_CACHE_DIR=str(tmp_path))
    done = subprocess.run([sys.executable, '-c', COMPILE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ['True'] * 3


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
