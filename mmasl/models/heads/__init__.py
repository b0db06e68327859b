from .label_graph_head import LabelGraphHead
from .ml_decoder_head import MLDecoderHead
from .multi_label_cls_head import MultiLabelClsHead
from .multi_label_csra_head import CSRAClsHead
from .multi_label_linear_head import MultiLabelLinearClsHead
from .query2label_head import Query2LabelHead

__all__ = ['CSRAClsHead', 'LabelGraphHead', 'MLDecoderHead', 'MultiLabelClsHead', 'MultiLabelLinearClsHead',
           'Query2LabelHead']
