"""Settings and fixtures of all tests."""
import gc
import os
from functools import lru_cache

import pytest
from mmengine.config import config as mmengine_config
from mmengine.config import utils as mmengine_config_utils

# Run Triton kernels on the CPU, unless the tests of kernels run on a GPU (benchmarks/gpu.py). triton reads the variable
# when it is imported.
if os.environ.get('MMASL_DEVICE', 'cpu') == 'cpu':
    os.environ.setdefault('TRITON_INTERPRET', '1')


# Cache the look-up of `mmpretrain::` bases, for which MMEngine reads 85 metafiles each time.
mmengine_config._get_external_cfg_path = lru_cache(maxsize=None)(mmengine_config._get_external_cfg_path)
mmengine_config_utils.load = lru_cache(maxsize=None)(mmengine_config_utils.load)


@pytest.fixture(scope='module', autouse=True)
def imported_libraries_are_no_garbage():
    """MMEngine collects garbage for every data set it builds: a quarter of a second with all libraries imported."""
    gc.collect()
    gc.freeze()
