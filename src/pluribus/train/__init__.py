"""Training that a merge stands on or replaces; each idea is a package of its own.

`continual`: tasks that arrive one after another, and models for any preference between them.
`prune`: the smallest weights of all layers together go, and stay away in what is trained after it.
"""
