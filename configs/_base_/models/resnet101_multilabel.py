# ImageNet-pretrained ResNet-101 with one sigmoid per class. A config sets num_classes and the loss of the head.
_base_ = 'mmpretrain::_base_/models/resnet101.py'

model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet101')),
    head=dict(_delete_=True, type='MultiLabelLinearClsHead', in_channels=2048))
