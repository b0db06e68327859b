_base_ = './classification_runtime.py'

# The second reads the released official checkpoints, and matches the classes of a checkpoint with those of the data.
custom_hooks = [dict(type='mmasl.ProbabilityGapHook'), dict(type='mmasl.AdaptCheckpointHook')]
