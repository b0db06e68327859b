# FCOS on TResNet-M with MMDetection's focal loss, trained as App. H of arXiv 2009.14119 says (Table 13).
# "With the enhancements discussed in ATSS": center sampling, GIoU loss, distances divided by the stride, and centerness
# beside the regression.
_base_ = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py'
custom_imports = dict(imports=['mmasl'], allow_failed_imports=False)

# Input size and head are not stated: those of MMDetection. Batch norm learns, in batches of 6 images.
model = dict(
    data_preprocessor=dict(mean=[0., 0., 0.], std=[255., 255., 255.], bgr_to_rgb=True),
    backbone=dict(
        _delete_=True,
        type='mmpretrain.TIMMBackbone',
        model_name='tresnet_m.miil_in1k',
        pretrained=True,
        features_only=True,
        out_indices=(1, 2, 3, 4)),
    neck=dict(in_channels=[64, 128, 1024, 2048]),
    bbox_head=dict(
        loss_cls=dict(_delete_=True, type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0)))

# 8 GPUs of 6 images.
train_dataloader = dict(batch_size=6)
auto_scale_lr = dict(base_batch_size=48)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=1e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=1 / 3, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=70, milestones=[40, 60], gamma=0.1),
]
train_cfg = dict(max_epochs=70)
