# App. B of arXiv 2009.14119: 60 epochs of Adam under one cycle with a maximal learning rate of 2e-4. It mentions no
# weight decay. The cited policy also takes the momentum, here beta1, down while the learning rate rises, and back. The
# cycle ends with train_cfg.max_epochs.
optim_wrapper = dict(optimizer=dict(type='Adam', lr=2e-4))
param_scheduler = [
    dict(type='OneCycleLR', eta_max=2e-4, by_epoch=True, convert_to_iter_based=True),
    dict(type='mmasl.OneCycleMomentum', by_epoch=True, convert_to_iter_based=True),
]

train_cfg = dict(by_epoch=True, max_epochs=60, val_interval=1)
val_cfg = dict()
test_cfg = dict()
