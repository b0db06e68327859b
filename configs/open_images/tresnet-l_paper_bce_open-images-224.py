# TResNet-L on Open Images with binary cross-entropy, the 30 epochs at 224 px of App. F of arXiv 2009.14119.
_base_ = [
    '../_base_/models/tresnet_multilabel.py', '../_base_/datasets/open_images.py',
    '../_base_/schedules/onecycle_60e.py', '../_base_/tresnet_runtime.py'
]

# App. F: what is not annotated is negative, "with reduced weights" that are not given; 0.1 is our choice, not tuned.
model = dict(
    head=dict(
        num_classes=9605,
        loss=dict(
            type='mmasl.AsymmetricLoss',
            use_sigmoid=True,
            gamma_pos=0.0,
            gamma_neg=0.0,
            clip=0.0,
            detach_focusing=False,
            ignore_index=-1,
            weight_unannotated=0.1,
            reduction='mean')))

train_cfg = dict(max_epochs=30)
_base_.train_pipeline[1].scale = _base_.test_pipeline[1].scale = 224
train_dataloader = dict(dataset=dict(pipeline=_base_.train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=_base_.test_pipeline))
test_dataloader = val_dataloader
