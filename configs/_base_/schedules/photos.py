# Fine-tuning of a whole pre-trained network: one cycle of AdamW over 10 epochs. The cycle ends with
# train_cfg.max_epochs.
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.01))
param_scheduler = dict(type='OneCycleLR', eta_max=1e-3, by_epoch=True, convert_to_iter_based=True)

train_cfg = dict(by_epoch=True, max_epochs=10, val_interval=1)
val_cfg = dict()
test_cfg = dict()
