"""MMPretrain's MultiLabelClsHead with calibrated predictions."""
from mmpretrain.models import heads

from mmasl.registry import MODELS

from .calibrated_predictions import CalibratedPredictions


@MODELS.register_module()
class MultiLabelClsHead(CalibratedPredictions, heads.MultiLabelClsHead):
    """MMPretrain's MultiLabelClsHead with :class:`CalibratedPredictions`."""
