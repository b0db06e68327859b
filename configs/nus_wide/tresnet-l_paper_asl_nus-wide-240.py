# tresnet-l_paper_asl_nus-wide.py at 240 px: App. E says the settings are COCO's, hence 448 px, but 65.2 mAP was
# confirmed at 240, and 448 gave 64.0 (issue 44 of the official repository).
_base_ = './tresnet-l_paper_asl_nus-wide.py'

_base_.train_pipeline[1].scale = _base_.test_pipeline[1].scale = 240
train_dataloader = dict(dataset=dict(pipeline=_base_.train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=_base_.test_pipeline))
test_dataloader = val_dataloader

# The name says 448, and 65.2 mAP is what the file has at 240.
released = dict(
    checkpoint='https://miil-public-eu.oss-eu-central-1.aliyuncs.com/model-zoo/ASL/'
    'NUS_WIDE_TRresNet_L_448_65.2.pth',
    mAP=65.2)
