"""Fewer entries, fewer channels: SHiRA keeps entries of dW, LoRAPrune whole heads and channels of a model.

groups      which rows and columns stand or fall together, from a model's config
importance  what a unit is worth: loraprune, wanda, magnitude, adapter
widths      how many units stay: a ratio, a schedule, the config that says it
cuts        what stays of a parameter; deltas sliced by it and spread out again
slice       the smaller model folder        index_map, recover   the way back
loraprune   all of it together              channels             an adapter alone
shira, mask sparse deltas
"""
