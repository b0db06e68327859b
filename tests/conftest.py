"""What all tests share."""
import os
from functools import lru_cache

import pytest
from mmengine.config import config as mmengine_config

# Triton's interpreter runs the kernel on the CPU; the variable counts when triton is imported.
os.environ.setdefault('TRITON_INTERPRET', '1')


@pytest.fixture(scope='session', autouse=True)
def external_bases_are_found_once():
    """To find a base in MMPretrain, MMEngine reads all its 85 metafiles: most of the time that a config takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmengine_config, '_get_external_cfg_path', lru_cache(maxsize=None)(
            mmengine_config._get_external_cfg_path))
        yield
