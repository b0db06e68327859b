"""TODO."""
from mmpretrain.models import heads

from mmasl.models.heads.calibrated_predictions import CalibratedPredictions
from mmasl.registry import MODELS


@MODELS.register_module()
class MultiLabelClsHead(CalibratedPredictions, heads.MultiLabelClsHead):
    """MMPretrain's MultiLabelClsHead with :class:`CalibratedPredictions`."""
