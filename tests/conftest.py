"""Triton's interpreter runs the kernel on the CPU; the variable counts when triton is imported."""
import os

os.environ.setdefault('TRITON_INTERPRET', '1')
