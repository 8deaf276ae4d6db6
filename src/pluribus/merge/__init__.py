"""Static merge methods: many checkpoints of one base into one, without training.

A method is one file here, named after it. `pluribus.merge` is the function that runs any of them.
"""
