# A small FCOS on the digits, with the focal loss that FCOS has: the baseline of fcos_asl_digits.py.
_base_ = [
    'mmdet::_base_/default_runtime.py', '../_base_/datasets/digits_detection.py', '../_base_/schedules/digits.py'
]
custom_imports = dict(imports=['mmasl'], allow_failed_imports=False)

model = dict(
    type='FCOS',
    data_preprocessor=dict(
        type='DetDataPreprocessor', mean=[0., 0., 0.], std=[255., 255., 255.], bgr_to_rgb=True, pad_size_divisor=32),
    backbone=dict(
        type='ResNet',
        depth=18,
        stem_channels=16,
        base_channels=16,
        out_indices=(1, 2),
        norm_eval=False,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        style='pytorch',
        init_cfg=dict(type='Pretrained', checkpoint='work_dirs/resnet_ce_glyphs/epoch_6.pth', prefix='backbone.')),
    neck=dict(type='FPN', in_channels=[32, 64], out_channels=32, num_outs=2),
    bbox_head=dict(
        type='FCOSHead',
        num_classes=40,
        in_channels=32,
        feat_channels=32,
        stacked_convs=2,
        strides=[8, 16],
        regress_ranges=((-1, 20), (20, 1e8)),
        norm_cfg=dict(type='GN', num_groups=8),
        center_sampling=True,
        norm_on_bbox=True,
        centerness_on_reg=True,
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type='GIoULoss', loss_weight=1.0),
        loss_centerness=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0)),
    test_cfg=dict(nms_pre=200, min_bbox_size=0, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5),
                  max_per_img=20))

optim_wrapper = dict(clip_grad=dict(max_norm=10.))
# Best of the search in benchmarks/learning_rates/digits.csv, for focal loss and ASL alike.
param_scheduler = dict(eta_max=1.6e-2)
train_cfg = dict(max_epochs=4, val_interval=2)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1))
randomness = dict(seed=0)
