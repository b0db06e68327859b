def obstacle(logits):
    return 'not written'
