"""Multi-label heads for MMPretrain's classifiers, one a module. This package needs MMPretrain."""
from .calibrated_predictions import CalibratedPredictions
from .feature_map_head import FeatureMapHead
from .label_graph_head import LabelGraphHead
from .ml_decoder_head import MLDecoderHead
from .multi_label_cls_head import MultiLabelClsHead
from .multi_label_csra_head import CSRAClsHead
from .multi_label_linear_head import MultiLabelLinearClsHead
from .query2label_head import Query2LabelHead

__all__ = ['CSRAClsHead', 'CalibratedPredictions', 'FeatureMapHead', 'LabelGraphHead', 'MLDecoderHead',
           'MultiLabelClsHead', 'MultiLabelLinearClsHead', 'Query2LabelHead']
