"""MMPretrain's CSRAClsHead with calibrated predictions."""
from mmpretrain.models import heads

from mmasl.registry import MODELS

from .calibrated_predictions import CalibratedPredictions


@MODELS.register_module()
class CSRAClsHead(CalibratedPredictions, heads.CSRAClsHead):
    """MMPretrain's CSRAClsHead with :class:`CalibratedPredictions`."""
