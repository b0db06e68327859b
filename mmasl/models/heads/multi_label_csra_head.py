"""TODO."""
from mmpretrain.models import heads

from mmasl.models.heads.calibrated_predictions import CalibratedPredictions
from mmasl.registry import MODELS


@MODELS.register_module()
class CSRAClsHead(CalibratedPredictions, heads.CSRAClsHead):
    """MMPretrain's CSRAClsHead with :class:`CalibratedPredictions`."""
