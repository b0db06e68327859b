# tresnet-l_paper_focal_voc.py from the weights of the focal loss on COCO (Table 9, "Extra Pretrain Data").
_base_ = './tresnet-l_paper_focal_voc.py'

load_from = 'work_dirs/tresnet-l_paper_focal_coco/epoch_60.pth'
# The rows of the head start from COCO's of the same class; six classes have another name there.
custom_hooks = [
    dict(type='mmasl.ProbabilityGapHook'),
    dict(
        type='mmasl.AdaptCheckpointHook',
        aliases=dict(
            aeroplane='airplane',
            diningtable='dining table',
            motorbike='motorcycle',
            pottedplant='potted plant',
            sofa='couch',
            tvmonitor='tv')),
]
