# TResNet-L (v1) of timm, pretrained on ImageNet-1K at 224 px, with one sigmoid per class. A config sets num_classes and
# the loss of the head; another backbone needs its model_name and the head's in_channels. The authors started from the
# 224 px weights (issue 29 of the official repository), not from those fine-tuned at 448 px.
model = dict(
    type='ImageClassifier',
    backbone=dict(type='TIMMBackbone', model_name='tresnet_l.miil_in1k', pretrained=True),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='MultiLabelLinearClsHead', in_channels=2432))
