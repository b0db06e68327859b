"""What the Triton kernel is compiled to for an H100 or H200 (sm_90), which needs no GPU: instructions and registers.

Where the instructions of all elements take longer than their bytes, memory bandwidth is not what limits the kernel.
"""
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmasl.ops import triton_impl
from mmasl.ops.triton_tiles import DEFAULT

ELEMENTS, WARPS = DEFAULT
BINARIES = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin'
# An H200: instructions a second of 132 multiprocessors at 1.755 GHz, special functions an eighth of that; what a copy
# moves of its 4.8 TB/s is not known here.
LANES = 132 * 128 * 1.755e9
CASES = {  # name: dtype, labels, soft targets, sums of the probability gap, bytes an element read and written
    'labels': ('fp32', True, False, False, 8),
    'labels, bfloat16': ('bf16', True, False, False, 4),
    'labels, with sums': ('fp32', True, False, True, 8),
    'dense float32 targets': ('fp32', False, True, False, 12),
    'dense uint8 targets': ('fp32', False, False, False, 9),
}


def compile_kernel(dtype: str, labels: bool, soft: bool, sums: bool) -> tuple[str, int]:
    """SASS, and elements of a thread, of the kernel as 80 classes get it: total loss and gradient."""
    block_c = triton_impl._class_block(80, 1)
    constants = dict(
        HAS_LABELS=labels, MAY_BE_SOFT=soft, PER_CLASS_POS=False, PER_CLASS_NEG=False, PER_CLASS_CLIP=False,
        PER_CLASS_ALPHA=False, PER_CLASS_WEIGHT=False, PER_CLASS_POS_WEIGHT=False, DETACH=False, SOFT_LABEL='mixture',
        LOSS=triton_impl.MODES['sum'], BLOCK_R=ELEMENTS // block_c, BLOCK_C=block_c,
        quality_ptr=None, weight_ptr=None, alpha_ptr=None, class_weight_ptr=None, pos_weight_ptr=None,
        upstream_ptr=None, ignore_index=None, stride_class=1, target_outer=0, target_class=0 if labels else 1,
        **{f'{name}_{axis}': 0 for name in ('weight', 'upstream') for axis in ('outer', 'row', 'class')})
    constants |= {} if sums else dict(sums_ptr=None)
    types = dict(z_ptr='*' + dtype, grad_ptr='*' + dtype,
                 target_ptr='*i64' if labels else '*fp32' if soft else '*u8')
    names = [parameter.name for parameter in triton_impl._kernel.params]
    signature = {name: types.get(name, '*fp32' if name.endswith('_ptr') else 'i32') for name in names}
    signature |= dict.fromkeys(constants, 'constexpr')
    aligned = [i for i, name in enumerate(names) if name not in constants and (
        name.endswith('_ptr') or name in ('classes', 'stride_row', 'target_row'))]
    values = {(names.index(key), ): value for key, value in constants.items()}
    source = ASTSource(triton_impl._kernel, signature, values,
                       {(i, ): [['tt.divisibility', 16]] for i in aligned})
    compiled = triton.compile(source, target=GPUTarget('cuda', 90, 32), options=dict(num_warps=WARPS))
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / 'kernel.cubin'
        cubin.write_bytes(compiled.asm['cubin'])
        sass = subprocess.run([BINARIES / 'cuobjdump', '-sass', '-res-usage', cubin], capture_output=True, text=True)
    return sass.stdout + sass.stderr, ELEMENTS // (32 * WARPS)


def measure(device: str) -> Iterator[dict]:
    for name, (dtype, labels, soft, sums, moved) in CASES.items():
        sass, elements = compile_kernel(dtype, labels, soft, sums)
        operations = re.findall(r'^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9]+)', sass, re.MULTILINE)
        instructions, special = len(operations) / elements, operations.count('MUFU') / elements
        registers, = re.findall(r'REG:(\d+)', sass)[:1]
        # ps an element; soft targets have a second path, which hard ones do not take.
        yield dict(case=name, instructions_an_element=round(instructions, 1), special_functions=round(special, 1),
                   registers=int(registers), bytes_an_element=moved,
                   arithmetic_ps=round(1e12 * instructions / LANES, 2),
                   bytes_ps_at_4_tb_s=round(moved / 4, 2))


def targets(rows: list[dict]) -> list[tuple[str, str, bool]]:
    row = next(row for row in rows if row['case'] == 'labels')
    arithmetic, memory = float(row['arithmetic_ps']), float(row['bytes_ps_at_4_tb_s'])
    return [('labels, float32: arithmetic takes no longer than 85 % of 4 TB/s would',
             f'{arithmetic} ps an element, against {memory / 0.85:.2f}', arithmetic <= memory / 0.85)]
